"""What the write stream costs a machine: unprotected, mirrored to a target that does nothing, and protected, in one run.

    python labs/bench/stream.py                       throughput at queue depths 1, 4 and 16, then 5,000 writes a second offered
    python labs/bench/stream.py --rounds 5 --count 20000 --only none,null,protect

The machine is a qemu-storage-daemon with one 1 GiB raw disk, and the guest an NBD client (`qemu-img bench`): no emulated
processor is measured.  Every round measures every kind, in another order each time; the figures are medians of the rounds.

    none      nobody looks
    null      blockdev-mirror into `nbdkit null`: what the mirror itself costs
    python    blockdev-mirror into our own NBD server in Python, which appends each write to a file and does nothing else
    target    blockdev-mirror into the target's ring, and nobody takes anything out
    protect   hvbackup protect --stream: group fsync, encryption, sealing and all
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from hvbackup.config import places
from hvbackup.hypervisors.qmp import Qmp
from hvbackup.nbd import protocol
from hvbackup.nbd.export import Export
from labs.bench.cycles import DISK_BYTES, WRITE, daemon

DEPTHS = (1, 4, 16)
STEP = 17 * WRITE  # from one write to the next: neither sequential nor all over the disk
RATE = 5000
OFFERED_DEPTH = 64


# --- kinds of protection ----------------------------------------------------------------------------------------------


@contextmanager
def nothing(folder: Path, monitor: Path) -> Iterator[None]:
    yield


@contextmanager
def mirrored(monitor: Path, target: Path) -> Iterator[None]:
    """Each write of the disk goes to an NBD target too."""
    server = {"type": "unix", "path": str(target)}
    with Qmp(monitor) as qmp:
        qmp.command("blockdev-add", driver="nbd", node_name="target", server=server, export="vda")
        with qmp.events("BLOCK_JOB_READY") as events:
            qmp.command(
                "blockdev-mirror", job_id="mirror", device="vda", target="target", sync="none", copy_mode="write-blocking",
                granularity=4096, on_target_error="stop", filter_node_name="filter",
            )  # fmt: skip
            events.next(10)
    try:
        yield
    finally:
        with Qmp(monitor) as qmp, qmp.events("BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED") as events:
            qmp.command("block-job-cancel", device="mirror", force=True)
            events.next(10)
            qmp.command("blockdev-del", node_name="target")


@contextmanager
def null(folder: Path, monitor: Path) -> Iterator[None]:
    path = folder / "null.sock"
    path.unlink(missing_ok=True)
    process = subprocess.Popen(["nbdkit", "-f", "-U", str(path), "-e", "vda", "null", f"size={DISK_BYTES}"])
    try:
        _until_listening(path)
        with mirrored(monitor, path):
            yield
    finally:
        process.terminate()
        process.wait(20)


class Appending(Export):
    """A write is a write(2) at the end of a file."""

    size = DISK_BYTES
    read_only = False
    parallel = False

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)

    def read_into(self, offset: int, target: memoryview) -> None:
        target[:] = bytes(len(target))

    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        os.writev(self._file.fileno(), [struct.pack("<QQQ", time.time_ns(), offset, len(data)), data])


@contextmanager
def python(folder: Path, monitor: Path) -> Iterator[None]:
    path = folder / "python.sock"
    code = (
        "import sys, time; from pathlib import Path; from labs.bench.stream import Appending, NbdServer\n"
        f"server = NbdServer({{'vda': Appending(Path({str(folder / 'appended')!r}))}}); server.listen_unix({str(path)!r})\n"
        "sys.stdin.read()"
    )
    root = Path(__file__).resolve().parent.parent.parent
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=root)
    try:
        _until_listening(path)
        with mirrored(monitor, path):
            yield
    finally:
        process.kill()
        process.wait(20)


def _until_listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        while sock.connect_ex(str(path)):
            time.sleep(0.02)


@contextmanager
def target(folder: Path, monitor: Path) -> Iterator[None]:
    from hvbackup.target.process import Export as Disk
    from hvbackup.target.process import Target

    made = Target([Disk("vda", DISK_BYTES)], places().rings.with_name(folder.name), folder / "target.sock", 1 << 30)
    try:
        with mirrored(monitor, made.path):
            yield
        assert not made.ring.heads.lost, "the ring was too small for this measurement"
    finally:
        made.close()


@contextmanager
def protect(folder: Path, monitor: Path) -> Iterator[None]:
    with protecting(folder, monitor):
        yield


@contextmanager
def protecting(folder: Path, monitor: Path) -> Iterator[list[dict[str, Any]]]:
    """`protect --stream` has begun; what it said so far."""
    places = {"STORE": "store", "STATE": "state", "CONFIG": "config", "RUN": "run"}
    environment = {**os.environ, **{f"HVBACKUP_{n}": str(folder / p) for n, p in places.items()}}
    program = [sys.executable, "-m", "hvbackup"]
    if not (folder / "store").exists():
        subprocess.run([*program, "init", "--quiet"], env=environment, check=True, timeout=60)
    words = [*program, "protect", f"qemu:{monitor}", "--stream", "--json"]
    worker = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    events: list[dict[str, Any]] = []

    def read() -> None:
        for line in worker.stdout or ():
            events.append(json.loads(line))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        while not any(e["event"] == "begun" for e in events):
            assert worker.poll() is None, "protect ended"
            time.sleep(0.05)
        yield events
    finally:
        worker.send_signal(signal.SIGINT)
        worker.wait(60)
        reader.join()
    assert not (trouble := [e for e in events if e["event"] == "trouble"]), (trouble, events[-3:])


Kind = Callable[[Path, Path], AbstractContextManager[None]]
KINDS: dict[str, Kind] = {"none": nothing, "null": null, "python": python, "target": target, "protect": protect}


# --- loads ------------------------------------------------------------------------------------------------------------


def throughput(guest: Path, depth: int, count: int) -> float:
    """Writes a second, as many as go."""
    image = f"driver=nbd,server.type=unix,server.path={guest},export=vda"
    words = ["qemu-img", "bench", "-w", "-d", str(depth), "-c", str(count), "-s", str(WRITE), "-S", str(STEP)]
    done = subprocess.run(
        [*words, "-t", "none", "--image-opts", image], capture_output=True, text=True, check=True, timeout=300
    )
    found = re.search(r"completed in ([0-9.]+) seconds", done.stdout)
    assert found, done.stdout
    return count / float(found[1])


def offered(guest: Path, rate: int, seconds: float) -> dict[str, float]:
    """What becomes of so many writes a second, sent when they are due whether or not the ones before were answered."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(guest))
        _open(sock)
        sent: dict[int, float] = {}
        taken: list[float] = []
        room = threading.Semaphore(OFFERED_DEPTH)

        def receive() -> None:
            size = protocol.SIMPLE_REPLY.size
            rest = b""
            while data := sock.recv(65536):
                rest += data
                now = time.monotonic()
                for at in range(0, len(rest) - size + 1, size):
                    _, error, cookie = protocol.SIMPLE_REPLY.unpack_from(rest, at)
                    assert not error
                    taken.append(now - sent.pop(cookie))
                    room.release()
                rest = rest[len(rest) // size * size :]

        receiver = threading.Thread(target=receive)
        receiver.start()
        count = _send_paced(sock, rate, seconds, sent, room)
        time.sleep(0.3)
        sock.shutdown(socket.SHUT_RDWR)
        receiver.join()
    ordered = sorted(taken)
    share = {f"p{p}_ms": round(1000 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 3) for p in (50, 95, 99)}
    return {"writes_per_second": round(count / seconds), **share}


def _open(sock: socket.socket) -> None:
    """The shortest way into an export."""
    sock.recv(18)
    sock.sendall(struct.pack(">I", 3) + protocol.option(protocol.OPT_EXPORT_NAME, b"vda"))
    assert len(sock.recv(64)) == 10


def _send_paced(
    sock: socket.socket, rate: int, seconds: float, sent: dict[int, float], room: threading.Semaphore
) -> int:
    rng, began, count = random.Random(1), time.monotonic(), 0
    data = rng.randbytes(WRITE)
    while (elapsed := time.monotonic() - began) < seconds:
        while count < elapsed * rate:
            room.acquire()
            sent[count] = began + count / rate  # when it was due: waiting in front of the machine counts
            head = protocol.REQUEST.pack(
                protocol.REQUEST_MAGIC, 0, protocol.WRITE, count, rng.randrange(DISK_BYTES // WRITE) * WRITE, WRITE
            )
            sock.sendall(head + data)
            count += 1
        time.sleep(0.0005)
    return count


# --- the measurement --------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=150000, help="writes of each measurement; a quarter at depth 1")
    parser.add_argument("--seconds", type=float, default=6, help="of each stretch at the offered rate; 0: leave it out")
    parser.add_argument("--only", default=",".join(KINDS))
    args = parser.parse_args()
    kinds = args.only.split(",")
    rates: dict[tuple[str, int], list[float]] = {}
    offers: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="hvbackup-stream-") as name, daemon(Path(name)) as monitor:
        folder = Path(name)
        guest = folder / "guest.sock"
        throughput(guest, 16, args.count)  # every block of the disk's file is there, and in the cache
        for round_ in range(args.rounds):
            for kind in kinds if round_ % 2 == 0 else kinds[::-1]:
                with KINDS[kind](folder, monitor):
                    for depth in DEPTHS:
                        count = args.count // 4 if depth == 1 else args.count
                        rates.setdefault((kind, depth), []).append(throughput(guest, depth, count))
                    if args.seconds and kind in ("none", "null", "protect"):
                        offers.setdefault(kind, []).append(offered(guest, RATE, args.seconds))
    print(json.dumps(summary(kinds, rates, offers), indent=2))
    return 0


def summary(
    kinds: Sequence[str],
    rates: dict[tuple[str, int], list[float]],
    offers: dict[str, list[dict[str, float]]],
) -> dict[str, Any]:
    """Medians, and ratios to the same mirror into nothing."""
    found: dict[str, Any] = {}
    for kind in kinds:
        for depth in DEPTHS:
            row = found.setdefault(f"depth {depth}", {})
            row[kind] = {"writes_per_second": round(statistics.median(rates[kind, depth]))}
            if "null" in kinds:
                pairs = zip(rates[kind, depth], rates["null", depth], strict=True)
                row[kind]["of_null"] = round(statistics.median(a / b for a, b in pairs), 2)
    for kind, rows in offers.items():
        found.setdefault(f"{RATE} offered", {})[kind] = {k: statistics.median(r[k] for r in rows) for k in rows[0]}
    found["load_average"] = os.getloadavg()[0]
    return found


if __name__ == "__main__":
    sys.exit(main())
