"""Backups, destruction, and the machine booted back from a point; then every point is proved."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labs.demo.stage import Failed, Hvbackup, Show, size
from labs.guest import Console, Guest, LabDisk, verified, verify_on_host
from labs.guest_image import run

RATE = 150  # records a second
PAUSE_SECONDS = 4.0  # of writing between backups
DISKS = ("vda", "vdb")
RECORDS = ("/mnt/a/records", "/mnt/b/records")
MOUNT = "mkdir -p /mnt/a /mnt/b && mount /dev/vda /mnt/a && mount /dev/vdb /mnt/b"


@dataclass(frozen=True, slots=True)
class Backup:
    """One backup of the demonstration."""

    label: str
    point: str
    acked_before: int
    acked_after: int
    figures: dict[str, Any]
    seconds: float


def protect(guest: Guest, hvbackup: Hvbackup, folder: Path, show: Show) -> tuple[list[Backup], list[Path]]:
    """A full backup and three incrementals; the last one while the guest stands still for a reference copy."""
    show.command(f"backup qemu:{guest.qmp_path}", "4 times, while the guest writes")
    show.say()
    show.cost("", "records", "read", "changed", "stored", "seconds")
    backups = []
    for number in range(3):
        backups.append(back_up("full backup" if number == 0 else f"incremental {number}", guest, hvbackup))
        show_backup(backups[-1], show)
        time.sleep(PAUSE_SECONDS)
    guest.pause()
    reference = [copy_disk(disk, folder / f"reference-{disk.path.stem}.raw") for disk in guest.disks]
    backups.append(back_up("incremental 3 *", guest, hvbackup))
    guest.resume()
    show_backup(backups[-1], show)
    last = backups[-1].acked_after
    guest.wait_acked(last + RATE)
    used = hvbackup("status")["store"]["used_bytes"]
    show.say()
    show.say(
        f"Four complete points of {size(sum(path.stat().st_size for path in reference))} are {size(used)} in the store."
    )
    show.say("* No backup stops a guest.  Here it was paused all the same, so that qemu-img could copy its disks")
    show.say("  as they were at this very moment: the reference below.  Then it went on writing.")
    return backups, reference


def back_up(label: str, guest: Guest, hvbackup: Hvbackup) -> Backup:
    before, begun = guest.acked(), time.monotonic()
    answer = hvbackup("backup", f"qemu:{guest.qmp_path}")
    seconds = time.monotonic() - begun
    (done,) = answer["runs"]
    if done["status"] != "ok":
        raise Failed(f"The backup is {done['status']}: {done['notes']}")
    return Backup(label, done["point"]["id"], before, guest.acked(), done["figures"], seconds)


def show_backup(backup: Backup, show: Show) -> None:
    sizes = (size(backup.figures[key]) for key in ("read_bytes", "changed_bytes", "stored_bytes"))
    show.cost(backup.label, f"{backup.acked_before:,}", *sizes, f"{backup.seconds:.2f}")


def copy_disk(disk: LabDisk, to: Path) -> Path:
    """The disk as it is now, read without hvbackup; the guest stands still."""
    run("qemu-img", "convert", "-U", "-f", disk.format, "-O", "raw", disk.path, to)
    return to


def destroy(guest: Guest, show: Show) -> None:
    """Both disks are overwritten from inside, as malware would, and the machine is killed."""
    begun = time.monotonic()
    for name in DISKS:
        guest.sh(f"dd if=/dev/urandom of=/dev/{name} bs=1M count=48 oflag=direct", check=False)
    guest.kill()
    show.step("The first 48 MiB of both disks are overwritten, and QEMU is killed", begun)
    for disk in guest.disks:
        raw = copy_disk(disk, disk.path.with_name("destroyed.raw"))
        if subprocess.run(["e2fsck", "-n", str(raw)], capture_output=True, timeout=60, check=False).returncode < 4:
            raise Failed(f"{disk.path.name} still has a file system")
        raw.unlink()
    show.say("e2fsck finds no file system on either of them any more")


def boot_back(hvbackup: Hvbackup, machine: str, backup: Backup, show: Show) -> None:
    """The machine runs from its recovery point, and says itself what it has."""
    show.command(f"boot {machine} --at {backup.point} --name {machine}-restored")
    begun = time.monotonic()
    booted = hvbackup("boot", machine, "--at", backup.point, "--name", f"{machine}-restored")
    try:
        show.step("QEMU runs; its disks are overlays over the point, nothing was copied", begun)
        console = Console(booted["sockets"]["serial"])
        console.wait_ready()
        show.step("The guest has started and its shell answers", begun)
        console.sh(MOUNT)
        count = verified(console.sh(f"writer verify {' '.join(RECORDS)}"))
        show.step(f"It finds its records 1 to {count:,} complete, on both disks", begun)
        if not backup.acked_before <= count <= backup.acked_after + 1:
            raise Failed(f"The guest had acknowledged {backup.acked_before}, and has {count}")
        console.sh("dd if=/dev/zero of=/mnt/a/new bs=1M count=8 && sync && rm /mnt/b/records && sync")
        show.step("It goes on working: it writes, and deletes what is proved untouched below", begun)
        console.close()
    finally:
        hvbackup("discard", f"{machine}-restored")
    show.command(f"discard {machine}-restored")


def check_point(
    hvbackup: Hvbackup, machine: str, backup: Backup, folder: Path, show: Show, reference: Sequence[Path] | None
) -> None:
    """A point is restored to files; they are compared with the reference, then their records are checked."""
    to = folder / "restored"
    begun = time.monotonic()
    hvbackup("restore", machine, "--at", backup.point, "--to", str(to))
    seconds = time.monotonic() - begun
    images = [to / f"{disk}.raw" for disk in DISKS]
    if reference:
        for image, original in zip(images, reference, strict=True):
            compare(image, original)
        total = sum(image.stat().st_size for image in images)
        show.proved(f"{backup.label:<16} both disks, {size(total)}, equal the reference bit for bit")
    count = verify_on_host(*(extract_records(image) for image in images))
    if not backup.acked_before <= count <= backup.acked_after + 1:
        raise Failed(f"{backup.label} has {count} records; {backup.acked_before} were acknowledged before it began")
    shutil.rmtree(to)
    show.proved(
        f"{backup.label:<16} records 1 to {count:,} complete over both disks; {backup.acked_before:,} were acknowledged "
        f"before it began; restored in {seconds:.1f} s"
    )


def compare(image: Path, original: Path) -> None:
    """Raises Failed unless the files are equal, bit for bit, and of the same length."""
    done = subprocess.run(["cmp", str(image), str(original)], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise Failed(f"Restored disk and reference differ: {done.stdout}{done.stderr}")


def extract_records(image: Path) -> Path:
    """The record file in an ext4 image: its journal is replayed, as a mount would, and then e2fsck must find no fault."""
    to = image.with_suffix(".records")
    for options in (["-E", "journal_only", "-y"], ["-fn"]):
        command = ["e2fsck", *options, str(image)]
        checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if checked.returncode:
        raise Failed(f"{image.name} has a damaged file system: {checked.stdout}")
    run("debugfs", "-R", f"dump /records {to}", image)
    return to
