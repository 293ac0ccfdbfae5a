"""A disk restored to a qcow2 image, written through a qemu-nbd of our own.

    killed after               left behind                        cleaned by
    0 an older image renamed   PATH.partial with the older state  `--resume`, `--differential`: compared with what it should be
    1 image made               PATH.partial, empty                `--resume` goes on with it, `--replace` begins again
    2 qemu-nbd started         a folder with a socket             nobody: it is empty once qemu-nbd ended, which it does with us
    3 blocks written           PATH.partial with those            `--resume`: each is compared with what it should be
    4 renamed                  PATH, whole

A qcow2 image has whole sectors: one whose disk has not is up to 511 zero bytes longer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from hvbackup.errors import HostUnreachable, HvbackupError, SpaceExhausted, UsageError
from hvbackup.files import PARTIAL, Kernel
from hvbackup.model import MiB
from hvbackup.nbd.client import NbdClient, RequestFailed
from hvbackup.nbd.uri import NbdUri
from hvbackup.pipeline import Take, at_once
from hvbackup.recover.rawtarget import take_aside
from hvbackup.recover.restore import Mode, Restored, restore
from hvbackup.store.chunks.view import DiskView

START_SECONDS = 20.0
STOP_SECONDS = 120.0  # the end of qemu-nbd writes what it has in memory
CREATE_SECONDS = 60.0
CONNECTIONS_MAX = 32  # one for each thread, and one
FLUSH_BYTES = 512 * MiB


def to_qcow2(
    view: DiskView, path: Path, key: bytes, progress: Callable[[int, int], None], mode: Mode, take: Take = at_once
) -> Restored:
    """A qcow2 image holds the disk when this returns.  Raises ChunkDamaged, SpaceExhausted, UsageError, HvbackupError."""
    with closing(Qcow2Target(path, view.size, mode)) as target:
        return restore(view, target, key, progress, compare=mode.compares, take=take)


class Qcow2Target:
    """An image under `PATH.partial`, which gets its name in `finish`.  Thread safety: `read_into`, `write`, `zero` from any."""

    def __init__(self, path: Path, size: int, mode: Mode, kernel: Kernel | None = None) -> None:
        self._path, self._kernel = path, kernel or Kernel()
        self._written = path.with_name(path.name + PARTIAL)
        if mode is Mode.DIFFERENTIAL and path.exists():
            take_aside(path, self._kernel)
        if mode is Mode.REPLACE:
            self._written.unlink(missing_ok=True)
        self.blank = not self._written.exists()
        if self.blank:
            _create(self._written, size)
        self._folder = Path(tempfile.mkdtemp(prefix="hvbackup-"))
        self._uri = NbdUri(socket=str(self._folder / "nbd.sock"))
        self._local, self._lock = threading.local(), threading.Lock()
        self._clients: list[NbdClient] = []
        self._unflushed = 0
        self._process = _serve(self._written, self._folder)
        try:
            self._first = self._connected(size)
        except BaseException:
            self.close()
            raise

    def _connected(self, size: int) -> NbdClient:
        """The connection that keeps qemu-nbd alive."""
        end = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(HostUnreachable):
                client = self._open()
                break
            if self._process.poll() is not None and time.monotonic() < end and "lock" in self._said():
                self._process = _serve(self._written, self._folder)  # the one of a killed restore is still ending
            elif self._process.poll() is not None or time.monotonic() > end:
                raise HvbackupError(f"qemu-nbd can't open {self._written}: {self._said()}; begin again with --replace")
            time.sleep(0.02)
        if client.size < size:
            raise UsageError(
                f"{self._written} is an image of another disk ({client.size} bytes); begin again with --replace"
            )
        return client

    def _open(self) -> NbdClient:
        client = NbdClient.open(self._uri)
        with self._lock:
            self._clients.append(client)
        return client

    def _client(self) -> NbdClient:
        """This thread's own connection: qemu-nbd serves what one wrote to all others."""
        client: NbdClient | None = getattr(self._local, "client", None)
        if client is None:
            client = self._local.client = self._open()
        return client

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with what the image holds now."""
        self._client().read_into(offset, buffer)

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data`.  Raises SpaceExhausted."""
        try:
            self._client().write(offset, data)
            self._flush_now_and_then(len(data))
        except RequestFailed as e:
            if e.errno != errno.ENOSPC:
                raise
            raise SpaceExhausted(
                f"No room left on {self._path.parent} while writing {self._path.name}; free some and say --resume"
            ) from e

    def _flush_now_and_then(self, count: int) -> None:
        """A power cut costs a resumed restore no more than this."""
        with self._lock:
            self._unflushed += count
            due = self._unflushed >= FLUSH_BYTES
            self._unflushed = 0 if due else self._unflushed
        if due:
            self._client().flush()

    def zero(self, offset: int, length: int) -> None:
        """The range reads as zeroes."""
        self._client().write_zeroes(offset, length)

    def finish(self) -> None:
        """The image is whole, durable and has its name when this returns."""
        self._first.flush()
        self._end()
        if self._process.returncode != 0:
            raise HvbackupError(
                f"qemu-nbd did not end well with {self._written}: {self._said()}; say --resume to try again"
            )
        self._kernel.rename(str(self._written), str(self._path))
        self._kernel.sync_dir(str(self._path.parent))

    def _end(self) -> None:
        """qemu-nbd ends with its last connection."""
        while self._clients:
            self._clients.pop().close()
        self._process.wait(STOP_SECONDS)

    def close(self) -> None:
        """Let go; what was written stays."""
        try:
            with contextlib.suppress(subprocess.TimeoutExpired, HvbackupError):
                if self._clients:
                    self._end()
        finally:
            self._process.kill()
            self._process.wait(STOP_SECONDS)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _said(self) -> str:
        text = (self._folder / "words").read_text(errors="replace").strip()
        return text.splitlines()[-1] if text else "it says nothing"


def _create(path: Path, size: int) -> None:
    _require("qemu-img")
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "--", str(path), str(-(-size // 512) * 512)]
    old = os.umask(0o077)
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=CREATE_SECONDS, check=True)
    except subprocess.CalledProcessError as e:
        raise HvbackupError(f"qemu-img can't make {path}: {e.stderr.strip()}") from e
    except subprocess.TimeoutExpired as e:
        raise HvbackupError(f"qemu-img did not make {path} within {CREATE_SECONDS:g} s") from e
    finally:
        os.umask(old)


def _serve(path: Path, folder: Path) -> subprocess.Popen[bytes]:
    """A qemu-nbd that ends with its last connection, and with us; our signals from a terminal are not for it.

    It is asked to end, not killed: where each block is stays in its memory for a while.
    """
    _require("qemu-nbd")
    _require("setpriv")
    # The shell: we may have died before the kernel was told to end it with us.
    words = ["setpriv", "--pdeathsig", "TERM", "--", "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"', str(os.getpid())]
    words += ["qemu-nbd", "-f", "qcow2", "--discard=unmap"]
    words += ["-e", str(CONNECTIONS_MAX), "-k", str(folder / "nbd.sock"), "--", str(path)]
    with (folder / "words").open("wb") as log:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def _require(program: str) -> None:
    if shutil.which(program) is None:
        package = "util-linux" if program == "setpriv" else "qemu-utils"
        raise UsageError(
            f"The program {program} is missing; install Debian package {package}: apt-get install {package}"
        )
