"""The demonstration: a running machine is protected while it writes, destroyed, and comes back as it was at many moments.

    make demo        or, when everything is set up: .venv/bin/python -m labs.demo [--keep]

It uses nothing but the `hvbackup` command and a guest of its own.  The guest has two disks and a witness that writes
numbered, checksummed records to both in turn; a record counts once it is on disk.  What is claimed at the end is proved:

1. In every recovery point, and in every moment of continuous protection, the records are complete, 1 to n without a gap over
   both disks, and n includes every record the guest had acknowledged before.  (Both disks are of one moment, or the numbers
   would not fit.)
2. The point that is booted was made while the guest stood still for a copy of its disks, made without hvbackup: what
   comes back is compared with this reference bit for bit.
3. The machine that is booted checks the records itself, from inside.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from labs.demo import moments
from labs.demo.points import MOUNT, RATE, RECORDS, boot_back, check_point, destroy, protect
from labs.demo.stage import MIB, Failed, Hvbackup, Show
from labs.guest import Guest, GuestError, make_disk
from labs.guest_image import HOME, build


def demonstrate(folder: Path, show: Show) -> None:
    """Everything, in order.  Raises Failed, GuestError."""
    hvbackup = Hvbackup(folder)
    show.title("A machine that works")
    with running_guest(folder, show) as guest:
        show.title("Protected while it writes")
        show.command("init")
        hvbackup("init")
        backups, reference = protect(guest, hvbackup, folder, show)
        show.title("Protected at every moment")
        recording = moments.record(guest, hvbackup, show)
        show.title("Destroyed")
        destroy(guest, show)
    show.title("Booted back")
    chosen = backups[-1]
    boot_back(hvbackup, guest.name, chosen, show)
    show.title("Proved")
    show.command(f"restore {guest.name} --at POINT --to FOLDER", "each of the four, and four of the moments")
    for backup in [*backups, *moments.drawn(recording)]:
        check_point(hvbackup, guest.name, backup, folder, show, reference if backup is chosen else None)
    checked = hvbackup("check", "--deep")
    show.proved(f"the store: all {checked['chunks']:,} chunks read back as they were written (check --deep)")


@contextlib.contextmanager
def running_guest(folder: Path, show: Show) -> Iterator[Guest]:
    begun = time.monotonic()
    content = HOME.parent / "kernel" if (HOME.parent / "kernel").is_dir() else HOME  # anything real will do
    disks = [
        make_disk(folder / "system.qcow2", 512 * MIB, content=content),
        make_disk(folder / "data.raw", 256 * MIB, "raw"),
    ]
    show.step("Two ext4 disks: system.qcow2, 512 MiB, with files on it; data.raw, 256 MiB", begun)
    with Guest(folder / "guest", disks, name="shop") as guest:
        show.step(
            "QEMU without KVM, a Debian kernel, busybox, ext4 on both disks", time.monotonic() - guest.boot_seconds
        )
        guest.sh(MOUNT)
        guest.start_writer(*RECORDS, rate=RATE)
        guest.wait_acked(RATE)
        show.say(f"It now writes {RATE} numbered, checksummed records of 4 KiB a second, to both disks in turn")
        yield guest


def main(argv: Sequence[str]) -> int:
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    build()
    folder = Path(tempfile.mkdtemp(prefix="hvbackup-demo-"))
    show = Show()
    try:
        demonstrate(folder, show)
    except (Failed, GuestError) as error:
        show.say()
        show.say(f"FAILED: {error}")
        return 1
    finally:
        if "--keep" in argv:
            show.say(f"Everything is kept in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    show.say()
    show.say(f"{show.proofs} proofs, {time.monotonic() - show.begun:.0f} seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
