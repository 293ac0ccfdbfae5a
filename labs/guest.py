#!/usr/bin/env python3
"""The lab guest: a Debian kernel, busybox and a witness program, built into `.lab/guest/` and run by QEMU without KVM.

    python labs/guest.py build        make it (seconds; only what changed)
    python labs/guest.py run DISK     a shell in it, with DISK as /dev/vda

The witness (`labs/guest/writer.c`) writes numbered, checksummed records and acknowledges each one; its `verify` says
whether a disk holds exactly the first n of them.  Needs nothing but the standard library, so any Python runs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid as uuids
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

if not __package__:  # run as a file: `labs` is in the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from labs.guest_image import GuestError, build, run

__all__ = ["Console", "Guest", "GuestError", "LabDisk", "Qmp", "acked_numbers", "build", "make_disk", "verify_on_host"]

SOCKET_PATH_MAX_BYTES = 107  # sun_path, less its closing zero


# --- disks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LabDisk:
    """An image file and how the guest sees it: node `node`, device `qdev`."""

    path: Path
    format: str = "qcow2"
    node: str = ""  # default disk0, disk1, ...
    qdev: str = ""  # default vda, vdb, ...
    options: dict[str, Any] = field(default_factory=dict)  # more of the virtio-blk-pci device


def make_disk(
    path: Path,
    size_bytes: int,
    format: str = "qcow2",  # noqa: A002
    *,
    ext4: bool = True,
    content: Path | None = None,
) -> LabDisk:
    """A new image, with an ext4 (empty, or with this folder's files) that does not go on writing by itself."""
    raw = path.with_name(path.name + ".raw") if format != "raw" else path
    with raw.open("wb") as file:
        file.truncate(size_bytes)
    if ext4:
        filled = ("-d", content) if content else ()
        options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
        run(_program("mkfs.ext4"), "-q", "-F", "-E", options, *filled, raw)
    if format != "raw":
        run("qemu-img", "convert", "-f", "raw", "-O", format, raw, path)
        raw.unlink()
    return LabDisk(path, format)


def _program(name: str) -> str:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin") or name


# --- running ---------------------------------------------------------------------------------------------------------


class Console:
    """A shell on a guest's serial line, by the socket QEMU listens on.  Thread safety: used by one thread at a time."""

    def __init__(self, path: Path | str, timeout_seconds: float = 60) -> None:
        self._line = _connect(str(path), timeout_seconds)
        self._seen = b""
        self._count = 0

    def wait_ready(self, timeout_seconds: float = 240, *, booting: bool = False) -> None:
        """The shell answers when this returns; `booting`: we are connected since before the guest printed anything."""
        end = time.monotonic() + timeout_seconds
        if booting:
            self.wait_for(rb"@@ready@@\r?\n", timeout_seconds)
        while True:
            with contextlib.suppress(TimeoutError):
                self.start("")
                self.wait_for(self._mark(), max(0.1, min(2.0, end - time.monotonic())))
                return
            if time.monotonic() > end:
                raise GuestError(f"The guest's shell does not answer; last it said: {self._seen[-500:]!r}")

    def sh(self, command: str, timeout_seconds: float = 240, *, check: bool = True) -> str:
        """What the command printed (both streams).  Raises GuestError when it fails."""
        self.start(command)
        return self.finish(timeout_seconds, check=check)

    def start(self, command: str) -> None:
        """Begin a command; `finish` gives its output."""
        self._count += 1
        body = f"{{ {command}\n}} 2>&1; " if command else "true; "
        self._line.sendall(f"{body}echo @@end {self._count} $?@@\n".encode())

    def finish(self, timeout_seconds: float = 240, *, check: bool = True) -> str:
        """Wait for the command begun last."""
        text, match = self.wait_for(self._mark(), timeout_seconds)
        said = text.decode(errors="replace").replace("\r", "").strip()
        if check and match[1] != b"0":
            raise GuestError(f"In the guest a command ended with status {match[1].decode()}: {said[-2000:]}")
        return said

    def wait_for(self, pattern: bytes, timeout_seconds: float) -> tuple[bytes, re.Match[bytes]]:
        """What came before the pattern, and its match.  Raises TimeoutError, GuestError when the guest is gone."""
        end = time.monotonic() + timeout_seconds
        while not (match := re.search(pattern, self._seen)):
            if not select.select([self._line], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"The guest did not print {pattern!r}; last it said: {self._seen[-500:]!r}")
            try:
                data = self._line.recv(1 << 16)
            except ConnectionError:
                data = b""
            if not data:
                raise GuestError(f"The guest is gone; last it said: {self._seen[-500:]!r}")
            self._seen += data
        before, self._seen = self._seen[: match.start()], self._seen[match.end() :]
        return before, match

    def close(self) -> None:
        self._line.close()

    def _mark(self) -> bytes:
        return rb"@@end %d (\d+)@@\r?\n" % self._count


class Qmp:
    """A small QMP client for the lab's own monitor.  Thread safety: used by one thread at a time."""

    def __init__(self, path: Path | str, timeout_seconds: float = 60) -> None:
        self._socket = _connect(str(path), timeout_seconds)
        self._socket.settimeout(120)
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        """The command's answer; `_` in argument names stands for `-`.  Raises GuestError."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        for line in self._lines:
            answer = json.loads(line)
            if "error" in answer:
                raise GuestError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise GuestError(f"{command}: QEMU is gone")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@dataclass
class Guest:
    """One lab guest: `with Guest(folder, [disk]) as guest:` boots it, and ends it whatever happens.

    `qmp_path` is for the product (a QMP socket serves one client at a time); the lab uses a monitor of its own.
    Acknowledged writes go to a second serial line and so to a file, which outlives the guest: `acked()`.
    """

    folder: Path
    disks: Sequence[LabDisk] = ()
    name: str = "lab"
    uuid: str = ""
    memory_mib: int = 192
    agent: bool = False  # a port for the guest agent, at `agent_path`
    extra: Sequence[str] = ()
    incoming: str = ""  # where it waits for a machine to come by live migration, instead of booting
    argv: list[str] = field(default_factory=list, init=False)
    console: Console = field(init=False)
    qmp: Qmp = field(init=False)
    boot_seconds: float = field(default=0.0, init=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.uuid = self.uuid or str(uuids.uuid4())
        fits = len(bytes(self.folder.absolute() / "monitor.sock")) <= SOCKET_PATH_MAX_BYTES
        self._sockets = self.folder.absolute() if fits else Path(tempfile.mkdtemp(prefix="hvbackup-lab-"))
        self.qmp_path = self._sockets / "qmp.sock"
        self.serial_path = self._sockets / "serial.sock"
        self.agent_path = self._sockets / "agent.sock"
        self.acks_path = self.folder / "acks.log"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        if self._process is None:
            raise GuestError(f"Guest {self.name} is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, timeout_seconds: float = 240) -> Self:
        """The guest's shell answers when this returns."""
        home = build()
        self.argv = self._command_line(home)
        for path in (self.qmp_path, self.serial_path, self.agent_path, self._sockets / "monitor.sock"):
            path.unlink(missing_ok=True)
        begun = time.monotonic()
        with (self.folder / "qemu.log").open("ab") as log:
            self._process = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent()
            )
        try:
            self.qmp = Qmp(self._sockets / "monitor.sock")
            self.console = Console(self.serial_path)
            if not self.incoming:
                self.console.wait_ready(timeout_seconds, booting=True)
        except (GuestError, OSError) as error:
            self.kill()
            raise GuestError(f"Guest {self.name} did not start: {error}\n{self._log_tail()}") from error
        self.boot_seconds = time.monotonic() - begun
        return self

    def sh(self, command: str, timeout_seconds: float = 240, *, check: bool = True) -> str:
        """What a shell command in the guest printed.  Raises GuestError when it fails."""
        return self.console.sh(command, timeout_seconds, check=check)

    # the witness

    def start_writer(self, *files: str, mode: str = "sequence", rate: float = 0, options: str = "") -> None:
        """Let the witness write in the background (RATE records a second, 0: as fast as it can)."""
        self.acks_path.write_bytes(b"")  # the serial line appends to it
        self.sh(f"writer {mode} -r {rate} {options} {' '.join(files)} >/dev/ttyS1 2>&1 & echo $! >/tmp/writer.pid")

    def stop_writer(self) -> int:
        """End the witness; returns the last number it acknowledged."""
        self.sh("pid=$(cat /tmp/writer.pid); kill $pid; while [ -d /proc/$pid ]; do sleep 0.05; done")
        return self.acked()

    def acked(self) -> int:
        """The last write acknowledged so far.  Raises GuestError when the witness stopped with an error."""
        numbers = acked_numbers(self.acks_path)
        return numbers[-1] if numbers else 0

    def wait_acked(self, number: int, timeout_seconds: float = 180) -> int:
        """At least this many writes are acknowledged when this returns."""
        end = time.monotonic() + timeout_seconds
        while (last := self.acked()) < number:
            if time.monotonic() > end or not self.running:
                raise GuestError(f"Guest {self.name} acknowledged {last} writes, not {number}")
            time.sleep(0.02)
        return last

    def verify(self, *files: str) -> int:
        """How many writes the files hold, exactly and completely.  Raises GuestError when they are no such state."""
        return verified(self.sh(f"writer verify {' '.join(files)}"))

    # its end

    def pause(self) -> None:
        """No instruction of the guest runs, and nothing is in flight to its disks, when this returns."""
        self.qmp("stop")

    def resume(self) -> None:
        self.qmp("cont")

    def power_off(self, timeout_seconds: float = 120) -> None:
        """Synchronised, unmounted and gone, as an administrator would do it."""
        self.console.start("sync; umount -a -r; poweroff -f")
        self._wait(timeout_seconds)

    def quit(self, timeout_seconds: float = 120) -> None:
        """QEMU closes its images in good order; to the guest it is a power failure."""
        with contextlib.suppress(GuestError, OSError):
            self.qmp("quit")
        self._wait(timeout_seconds)

    def kill(self) -> None:
        """SIGKILL; nothing is closed in good order.  Idempotent."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._wait(20)

    def _wait(self, timeout_seconds: float) -> None:
        if self._process is not None:
            try:
                self._process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(20)
                raise GuestError(f"Guest {self.name} did not end within {timeout_seconds} s and was killed") from None
        for name in ("qmp", "console"):
            if hasattr(self, name):
                getattr(self, name).close()
        if self._sockets != self.folder.absolute():
            shutil.rmtree(self._sockets, ignore_errors=True)

    def _command_line(self, home: Path) -> list[str]:
        argv = ["qemu-system-x86_64", "-name", self.name, "-uuid", self.uuid, "-machine", "q35", "-accel", "tcg"]
        argv += ["-cpu", "max", "-m", str(self.memory_mib), "-nodefaults", "-display", "none", "-no-reboot"]
        argv += ["-kernel", str(home / "vmlinuz"), "-initrd", str(home / "initramfs")]
        argv += ["-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check nokaslr"]
        argv += ["-qmp", f"unix:{self.qmp_path},server=on,wait=off"]
        argv += ["-qmp", f"unix:{self._sockets / 'monitor.sock'},server=on,wait=off"]
        argv += ["-chardev", f"socket,id=serial,path={self.serial_path},server=on,wait=off"]
        argv += ["-chardev", f"file,id=acks,path={self.acks_path},append=on"]
        argv += ["-serial", "chardev:serial", "-serial", "chardev:acks"]
        if self.agent:
            argv += ["-chardev", f"socket,id=agent,path={self.agent_path},server=on,wait=off"]
            argv += ["-device", "virtio-serial-pci,id=virtio-serial"]
            argv += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
        for index, disk in enumerate(self.disks):
            argv += _disk_options(index, disk)
        return [*argv, *(["-incoming", self.incoming] if self.incoming else []), *self.extra]

    def _log_tail(self) -> str:
        return (self.folder / "qemu.log").read_text(errors="replace")[-2000:]


def _disk_options(index: int, disk: LabDisk) -> list[str]:
    node = disk.node or f"disk{index}"
    file = {"driver": "file", "node-name": f"{node}-file", "filename": str(disk.path), "discard": "unmap"}
    backend = {"driver": disk.format, "node-name": node, "discard": "unmap", "file": file}
    device = {"driver": "virtio-blk-pci", "drive": node, "id": disk.qdev or f"vd{chr(97 + index)}", **disk.options}
    return ["-blockdev", json.dumps(backend), "-device", json.dumps(device)]


def acked_numbers(path: Path) -> list[int]:
    """The numbers in an acknowledgement file.  Raises GuestError when the witness reported anything else."""
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1].decode(errors="replace").replace("\r", "")
    lines = [line for line in whole.split("\n") if line]
    for line in lines:
        if not re.fullmatch(r"ack \d+", line):
            raise GuestError(f"The writer says: {line}")
    return [int(line[4:]) for line in lines]


def verified(said: str) -> int:
    """The number in what `writer verify` printed."""
    match = re.search(r"^verified (\d+)$", said, re.MULTILINE)
    if not match:
        raise GuestError(f"The writer says: {said}")
    return int(match[1])


def verify_on_host(*files: Path) -> int:
    """`writer verify` on files of this machine."""
    command = [str(path) for path in (build() / "writer", "verify", *files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return verified(done.stdout + done.stderr)


def _connect(path: str, timeout_seconds: float) -> socket.socket:
    end = time.monotonic() + timeout_seconds
    while True:
        line = socket.socket(socket.AF_UNIX)
        try:
            line.connect(path)
        except OSError:
            line.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return line


def _die_with_parent() -> Any:
    """For Popen: the child is killed when we are, however we end.

    The kernel ties this to the thread that starts the child, so only the main thread may ask for it.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


# --- command line ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    try:
        if list(argv) == ["build"]:
            print(f"Lab guest: {build()}")
        elif len(argv) == 2 and argv[0] == "run":
            _run_shell(Path(argv[1]))
        else:
            print(__doc__, file=sys.stderr)
            return 2
    except GuestError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _run_shell(disk: Path) -> None:
    image = json.loads(run("qemu-img", "info", "--output=json", disk))
    with (
        tempfile.TemporaryDirectory(prefix="hvbackup-lab-") as folder,
        Guest(Path(folder), [LabDisk(disk.absolute(), image["format"])]) as guest,
    ):
        print(f"Up after {guest.boot_seconds:.1f} s; a line is a command, end with ctrl-D")
        for line in sys.stdin:
            print(guest.sh(line.rstrip("\n"), check=False))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
