"""Command lines of captured machines, as people and libvirt write them, become lines that run beside the original."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvbackup.errors import UsageError
from hvbackup.recover.qemu_argv import CommandLine, Place, Plain, generic, rewrite
from hvbackup.recover.qemu_disks import Overlay

VDA = Overlay("vda", "/run/x/new.qcow2", node="disk0", path="/vm/a.qcow2")
PLACE = Place("copy", "/run/x", "/run/x", exists=lambda path: "absent" not in path)
UUID = "8a1d4f6e-0000-4000-8000-000000000002"


def changed(line: str, *overlays: Overlay, place: Place = PLACE, cwd: str = "/vm") -> CommandLine:
    return rewrite(["qemu-system-x86_64", *shlex.split(line)], cwd, overlays or (VDA,), place)


def values(line: CommandLine, option: str) -> list[str]:
    return [value for name, value in zip(line.argv, line.argv[1:], strict=False) if name == f"-{option}"]


def nodes(line: CommandLine) -> dict[str, object]:
    parsed = [json.loads(value) for value in values(line, "blockdev") if value.startswith("{")]
    return {node["node-name"]: node for node in parsed}


OVERLAY_NODE = {
    "driver": "qcow2",
    "node-name": "disk0",
    "discard": "unmap",
    "file": {"driver": "file", "filename": "/run/x/new.qcow2", "discard": "unmap"},
}


@pytest.mark.parametrize(
    "line",
    [
        "-blockdev driver=qcow2,node-name=disk0,file.driver=file,file.filename=a.qcow2 -device virtio-blk-pci,drive=disk0,id=vda",
        """-blockdev '{"driver":"qcow2","node-name":"disk0","file":{"driver":"file","filename":"/vm/a.qcow2"}}'
           -device '{"driver":"virtio-blk-pci","drive":"disk0","id":"vda"}'""",
        "-blockdev file,node-name=f,filename=a.qcow2 -blockdev qcow2,node-name=disk0,file=f -device virtio-blk,drive=disk0",
    ],
)
def test_a_node_is_replaced_by_the_overlay_and_its_device_stays(line: str) -> None:
    new = changed(line)
    assert nodes(new) == {"disk0": OVERLAY_NODE}
    assert "/a.qcow2" not in " ".join(new.argv)
    assert new.notes == ()


@pytest.mark.parametrize(
    ("line", "disk", "expected"),
    [
        ("-drive file=a.qcow2,if=virtio,cache=none,aio=native", "virtio0", "if=virtio"),
        ("-drive file=x.iso,media=cdrom,if=ide -drive file=a.qcow2", "ide0-hd1", ""),
        ("-M q35 -drive file=x.iso,media=cdrom,if=ide -drive file=a.qcow2", "ide1-hd0", ""),
        ("-hda a.qcow2", "ide0-hd0", "index=0,media=disk"),
        ("-M q35 -hdb a.qcow2", "ide1-hd0", "index=1,media=disk"),
        ("a.qcow2", "ide0-hd0", "index=0,media=disk"),
        ("-drive file=a.qcow2,if=scsi,bus=0,unit=3,serial=S1", "scsi0-hd3", "if=scsi,bus=0,unit=3,serial=S1"),
        (
            "-drive file.driver=file,file.filename=a.qcow2,driver=qcow2,if=none,id=d -device e,drive=d",
            "d",
            "if=none,id=d",
        ),
        ("-drive file=a.qcow2,if=none,id=hd0 -device ide-hd,drive=hd0,id=sda", "sda", "if=none,id=hd0"),
        ("-drive file=/vm/a.qcow2,if=virtio", "somebody-else's-name", "if=virtio"),
    ],
)
def test_a_drive_keeps_its_place_and_gets_the_overlay(line: str, disk: str, expected: str) -> None:
    new = changed(line, Overlay(disk, "/run/x/o.qcow2", path="/vm/a.qcow2"))
    (drive,) = (value for value in values(new, "drive") if "media=cdrom" not in value)
    assert drive == ",".join(filter(None, (expected, "file=/run/x/o.qcow2,format=qcow2")))
    assert "/a.qcow2" not in " ".join(new.argv)


def test_a_backing_chain_and_a_filter_give_way_to_the_overlay() -> None:
    line = """-object throttle-group,id=tg -blockdev file,node-name=base-file,filename=base.qcow2
        -blockdev qcow2,node-name=base,file=base-file -blockdev file,node-name=top-file,filename=a.qcow2
        -blockdev qcow2,node-name=disk0,file=top-file,backing=base
        -blockdev throttle,node-name=slow,throttle-group=tg,file=disk0 -device virtio-blk-pci,drive=slow"""
    new = changed(line)
    assert list(nodes(new)) == ["slow"]  # what the device stands on
    assert values(new, "blockdev") == [json.dumps({**OVERLAY_NODE, "node-name": "slow"})]


LIBVIRT = (Path(__file__).parent / "libvirt-9.txt").read_text()
LIBVIRT_DISK = Overlay("virtio-disk0", "/run/x/o.qcow2", "libvirt-9-format", "/var/lib/libvirt/images/snap.qcow2")


def test_a_libvirt_machine() -> None:
    new = changed(LIBVIRT, LIBVIRT_DISK, cwd="/")
    text = " ".join(new.argv)
    for foreign in (
        "master-key",
        "web.qcow2",
        "base.qcow2",
        "fd=",
        "tap",
        "spice",
        "vfio",
        "kvm,",
        "irqchip",
        "-S ",
        "memfd",
    ):
        assert foreign not in text.replace("com.redhat.spice.0", ""), foreign
    assert values(new, "accel") == ["tcg"]
    assert values(new, "cpu") == ["max"]
    assert values(new, "uuid") == ["1f9dc0a4-0e7d-4c0a-9a7e-3f1f2d3c4b5a"]
    assert values(new, "netdev") == ["user,id=hostnet0,restrict=on"]
    assert '"mac": "52:54:00:aa:bb:cc"' in text
    assert nodes(new)["libvirt-2-format"]["file"]["filename"] == "/run/x/o.qcow2"  # type: ignore[index]
    assert new.copies == (("/var/lib/libvirt/qemu/nvram/web_VARS.fd", "/run/x/firmware0"),)
    assert nodes(new)["libvirt-pflash1-storage"]["filename"] == "/run/x/firmware0"  # type: ignore[index]
    assert nodes(new)["libvirt-pflash0-storage"]["filename"] == "/usr/share/OVMF/OVMF_CODE_4M.fd"  # type: ignore[index]
    (cd,) = (json.loads(value) for value in values(new, "device") if "ide-cd" in value)
    assert "drive" not in cd
    assert '"guid": "auto"' in text
    assert new.sockets == {end: f"/run/x/{end}.sock" for end in ("qmp", "serial", "agent", "vnc")}
    assert len(new.notes) == 2


def test_kvm_stays_where_it_works_and_was_used() -> None:
    kvm = Place("copy", "/run/x", "/run/x", exists=lambda path: True, kvm=True)
    new = changed(LIBVIRT, LIBVIRT_DISK, cwd="/", place=kvm)
    assert values(new, "accel") == ["kvm"]
    assert values(new, "cpu") == ["host,migratable=on"]
    assert values(changed("-accel tcg,thread=single -hda a", place=kvm), "accel") == ["tcg,thread=single"]
    assert values(changed("-hda a", place=kvm), "accel") == ["tcg"]
    assert values(changed("-enable-kvm -hda a", place=kvm), "accel") == ["kvm"]
    assert values(changed("-enable-kvm -hda a"), "accel") == ["tcg"]


def test_a_new_identity_changes_everything_that_names_the_machine() -> None:
    line = (
        f"{LIBVIRT} -nic tap,model=e1000,mac=52:54:00:00:00:01 -smbios type=1,uuid=1f9dc0a4-0e7d-4c0a-9a7e-3f1f2d3c4b5a"
    )
    new = changed(
        line, LIBVIRT_DISK, place=Place("copy", "/run/x", "/run/x", exists=PLACE.exists, identity=UUID), cwd="/"
    )
    text = " ".join(new.argv)
    assert values(new, "uuid") == [UUID]
    assert values(new, "smbios") == [f"type=1,uuid={UUID}"]
    assert "52:54:00:aa:bb:cc" not in text
    assert "52:54:00:00:00:01" not in text
    macs = re.findall("52:54:00:[0-9a-f:]{8}", text)
    assert len(set(macs)) == len(macs) == 2


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("-cdrom x.iso", "-drive file=/vm/x.iso,index=2,media=cdrom"),
        ("-cdrom absent.iso", "-drive index=2,media=cdrom"),
        ("-drive file=seed.img,if=virtio,readonly=on", "-drive file=/vm/seed.img,if=virtio,readonly=on"),
        ("-drive if=ide,media=cdrom", "-drive if=ide,media=cdrom"),
        ("-kernel k -initrd i -append 'root=/dev/vda ro'", "-kernel /vm/k -initrd /vm/i -append root=/dev/vda ro"),
        ("-fw_cfg name=opt/x,file=x.cfg", "-fw_cfg name=opt/x,file=/vm/x.cfg"),
        (
            "-object memory-backend-file,id=m,size=1G,mem-path=/dev/shm/m,share=on",
            "-object qom-type=memory-backend-ram,id=m,size=1G",
        ),
        ("-drive if=pflash,file=vars.fd,format=raw", "-drive if=pflash,file=/run/x/firmware0,format=raw"),
        ("-device vhost-vsock-pci,guest-cid=3", ""),
        ("-drive file=other.qcow2,if=virtio", ""),
        ("-drive file=other.qcow2,if=none,id=o -device virtio-blk-pci,drive=o", ""),
        ("-blockdev file,node-name=other,filename=other.raw -device virtio-blk-pci,drive=other", ""),
        ("-device virtio-vga-gl", "-device driver=virtio-vga"),
        ("-usbdevice tablet", "-usbdevice tablet"),
        (
            "-net nic,macaddr=52:54:00:00:00:09 -net bridge,br=br0",
            "-net type=nic,macaddr=52:54:00:00:00:09 -net user,restrict=on",
        ),
        (
            "-nic bridge,br=br0,model=virtio,mac=52:54:00:00:00:09",
            "-nic user,restrict=on,model=virtio,mac=52:54:00:00:00:09",
        ),
        ("-nic none", "-nic none"),
        ("-readonly-is-no-option x", "-readonly-is-no-option x"),
    ],
)
def test_what_else_is_on_the_line(line: str, kept: str) -> None:
    drives = "-nodefaults -drive file=a.qcow2,if=none,id=vda "
    new, bare = changed(drives + line), changed(drives)
    added = " ".join(new.argv)
    for word in bare.argv:
        added = added.replace(word, "", 1)
    assert added.split() == kept.split()


@pytest.mark.parametrize(
    "line",
    [
        "-kernel absent",
        "-initrd absent",
        "-drive if=pflash,file=absent.fd,readonly=on",
        "-drive if=pflash,file=absent.fd",
    ],
)
def test_what_the_machine_cannot_start_without_is_named(line: str) -> None:
    with pytest.raises(UsageError, match=r"copy needs its .* /vm/absent.*--generic"):
        changed(f"-hda a.qcow2 {line}")


def test_a_line_we_cannot_see_is_refused() -> None:
    with pytest.raises(UsageError, match="-readconfig"):
        changed("-readconfig vm.cfg")


def test_one_backend_is_never_given_two_disks() -> None:
    with pytest.raises(UsageError, match="Disks vda and disk0 of machine copy are one"):
        changed(
            "-blockdev file,filename=a,node-name=disk0 -device x,drive=disk0,id=vda", VDA, Overlay("disk0", "/run/x/b")
        )


def test_a_disk_added_while_the_machine_ran_is_attached() -> None:
    new = changed(
        "-hda a.qcow2", Overlay("ide0-hd0", "/run/x/a"), Overlay("hot", "/run/x/hot", node="hot", path="/vm/hot")
    )
    assert nodes(new)["hvbackup-added1"]["file"]["filename"] == "/run/x/hot"  # type: ignore[index]
    assert new.notes == ("Disk hot is not on the captured command line; attached as virtio-blk",)


@pytest.mark.parametrize(
    "line", ["-serial mon:stdio", "-nographic", "-serial file:x -serial none", "-chardev pty,id=s -serial chardev:s"]
)
def test_the_first_serial_line_is_in_the_folder(line: str) -> None:
    new = changed(f"-hda a.qcow2 {line}")
    assert new.sockets["serial"] == "/run/x/serial.sock"
    (chardev,) = values(new, "chardev")
    assert "path=/run/x/serial.sock,server=on,wait=off,logfile=/run/x/serial.log" in chardev
    assert values(new, "serial")[0] == f"chardev:{re.search('id=([^,]+)', chardev)[1]}"  # type: ignore[index]


def test_without_a_serial_line_there_is_no_socket_for_one() -> None:
    assert "serial" not in changed("-nodefaults -hda a.qcow2").sockets


files = st.sampled_from(["/live/a.qcow2", "/live/b.raw", "/live/c.img", "live/d", "/iso/x.iso"])
pieces = st.one_of(
    files.map(lambda f: ["-drive", f"file={f},if=virtio"]),
    files.map(lambda f: ["-hda", f]),
    files.map(lambda f: [f]),
    st.tuples(files, st.integers(0, 3)).map(lambda t: ["-drive", f"file={t[0]},if=none,id=d{t[1]}"]),
    st.integers(0, 3).map(lambda n: ["-device", f"virtio-blk-pci,drive=d{n},id=vd{n}"]),
    st.tuples(files, st.integers(0, 3)).map(
        lambda t: ["-blockdev", f"driver=raw,node-name=n{t[1]},file.driver=file,file.filename={t[0]}"]
    ),
    st.tuples(files, st.integers(0, 3)).map(
        lambda t: [
            "-blockdev",
            json.dumps({"driver": "qcow2", "node-name": f"n{t[1]}", "file": {"driver": "file", "filename": t[0]}}),
        ]
    ),
    st.integers(0, 3).map(lambda n: ["-device", json.dumps({"driver": "scsi-hd", "drive": f"n{n}", "id": f"vd{n}"})]),
    st.sampled_from(
        [["-S"], ["-daemonize"], ["-pidfile", "/run/live.pid"], ["-qmp", "unix:/live/qmp,server=on"], ["-snapshot"]]
    ),
)


@given(
    st.lists(pieces, max_size=8),
    st.lists(st.sampled_from(["vd0", "vd1", "virtio0", "ide0-hd0", "d2", "n3"]), max_size=3, unique=True),
)
def test_nothing_the_original_writes_to_is_ever_opened(parts: Sequence[Sequence[str]], disks: Sequence[str]) -> None:
    words = [word for part in parts for word in part]
    overlays = [Overlay(disk, f"/run/x/{disk}.qcow2", node=disk) for disk in disks]
    try:
        new = rewrite(["qemu", *words], "/", overlays, PLACE)
    except UsageError as error:
        assert "are one on its command line" in str(error)  # noqa: PT017
        return
    assert "live" not in " ".join(new.argv)
    for overlay in overlays:  # and every captured disk is there, once
        assert " ".join(new.argv).count(overlay.file) == 1


QEMU_IMAGE = ["qemu-img", "create", "-q", "-f", "qcow2"]


@pytest.mark.real
@pytest.mark.parametrize(
    ("line", "disk"),
    [
        ("-hda a.qcow2 -nographic -m 64", "ide0-hd0"),
        (
            "-M q35 -m 64 -drive file=a.qcow2,if=virtio -drive file=x.iso,media=cdrom -vga std -net nic -net user",
            "virtio0",
        ),
        (
            "-nodefaults -m 64 -M pc -device virtio-scsi-pci -drive file=a.qcow2,if=none,id=d -device scsi-hd,drive=d,id=sda",
            "sda",
        ),
        (
            re.sub(r"-blockdev [^\n]*pflash[^\n]*\n|-device[^\n]*vmgenid[^\n]*\n|,pflash\d=[\w-]+", "", LIBVIRT),
            "virtio-disk0",
        ),
        ("", ""),
    ],
)
def test_qemu_takes_the_line(tmp_path: Path, line: str, disk: str) -> None:
    for name in ("a.qcow2", "o.qcow2", "x.iso"):
        subprocess.run([*QEMU_IMAGE, str(tmp_path / name), "64M"], check=True, timeout=120)
    overlay = Overlay(disk or "vda", str(tmp_path / "o.qcow2"))
    place = Place("copy", str(tmp_path), str(tmp_path), exists=lambda path: Path(path).exists())
    argv = ["qemu-system-x86_64", *shlex.split(line)]
    new = rewrite(argv, str(tmp_path), [overlay], place) if line else generic([overlay], place, Plain(64 << 20))
    asked = '{"execute":"qmp_capabilities"}{"execute":"query-block"}{"execute":"quit"}'
    words = [word.replace("unix:" + new.sockets["qmp"] + ",server=on,wait=off", "stdio") for word in new.argv]
    done = subprocess.run([*words, "-S"], input=asked, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "o.qcow2") in done.stdout
    assert "a.qcow2" not in done.stdout
