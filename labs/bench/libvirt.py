"""hvbackup beside virtnbdbackup on a machine of libvirt: full, then incremental backups, in turns, of the same disk.

    python -m labs.bench.libvirt [--rounds 3] [--mib 512] [--changes 64]

The machine is paused and QEMU's own block layer writes, so that no emulated processor is measured.  Both use libvirt's
checkpoints and pull-mode backups of the same libvirtd.  virtnbdbackup is the distribution's, once as it comes and once with its
lz4 (`-z`); hvbackup encrypts, hashes and compresses as always.  Each tool has a machine of its own with the same content, for
virtnbdbackup refuses one that has checkpoints of others.  Each round writes the same CHANGES scattered blocks of 64 KiB to each
of them, and the order turns from round to round.  What counts is wall time, CPU time and bytes kept.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import libvirt
import libvirt_qemu

from labs.bench.measure import file_bytes
from labs.libvirtd import Libvirtd, daemon, disk_xml, run

Cost = tuple[float, float, int]
Costs = dict[tuple[str, str], list[Cost]]

MIB = 1 << 20
BLOCK = 64 << 10


@dataclass(frozen=True, slots=True)
class Tool:
    """One way to back a machine up."""

    name: str
    program: Sequence[str]
    store: Path

    @property
    def machine(self) -> str:
        """The one it backs up."""
        return self.store.name

    def command(self, uri: str, *, full: bool) -> list[str]:
        """The words of one backup of the machine."""
        if self.name == "hvbackup":
            return [*self.program, "backup", f"libvirt:{uri}&domain={self.machine}", "--quiet"]
        level = "full" if full else "inc"
        return [*self.program, "-U", uri, "-d", self.machine, "-l", level, "-o", str(self.store), "-n"]


class Machine:
    """One qcow2 disk of half compressible data."""

    def __init__(self, host: Libvirtd, folder: Path, name: str, mib: int) -> None:
        self._rng, self._blocks, self._folder = random.Random(1), mib * MIB // BLOCK, folder
        image, raw = folder / f"{name}.qcow2", folder / "disk.raw"
        with raw.open("wb") as file:
            for _ in range(mib):
                file.write(self._rng.randbytes(MIB // 2).ljust(MIB, b"x"))
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
        raw.unlink()
        xml = (
            f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>"
            "<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>"
            f"<emulator>/usr/bin/qemu-system-x86_64</emulator>{disk_xml('vda', image)}</devices></domain>"
        )
        self._domain = host.connection().defineXML(xml)
        self._domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)

    def change(self, count: int) -> None:
        """The guest overwrites so many blocks, here and there."""
        pattern = self._folder / "pattern"
        for _ in range(count):
            pattern.write_bytes(self._rng.randbytes(BLOCK))
            line = f"write -s {pattern} {self._rng.randrange(self._blocks) * BLOCK} {BLOCK}"
            command = f'qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend "{line}"'
            libvirt_qemu.qemuMonitorCommand(self._domain, command, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)


def measure(tool: Tool, uri: str, folder: Path, *, full: bool) -> Cost:
    """What one backup cost: wall seconds, CPU seconds with those of its children, bytes the store grew by."""
    before, log = file_bytes(tool.store), folder / f"{tool.name}.log"
    began = time.monotonic()
    with log.open("wb") as said:
        process = subprocess.Popen(tool.command(uri, full=full), stdout=said, stderr=said)
        _, status, used = os.wait4(
            process.pid, 0
        )  # not `measured`: that ends our other children too, libvirtd among them
    wall = time.monotonic() - began
    if status:
        sys.exit(f"{tool.name} failed: {log.read_text()[-2000:]}")
    return wall, used.ru_utime + used.ru_stime, file_bytes(tool.store) - before


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--changes", type=int, default=64)
    args = parser.parse_args()
    if not shutil.which("virtnbdbackup"):
        sys.exit("virtnbdbackup is missing: labs/setup.sh bench")
    with tempfile.TemporaryDirectory(prefix="hvt-") as name, daemon() as host:
        folder = Path(name)
        os.environ |= {f"HVBACKUP_{k}": f"{folder}/{k.lower()}" for k in ("STORE", "STATE", "CONFIG", "RUN")}
        ours = str(Path(sys.executable).with_name("hvbackup"))
        tools = [
            Tool("hvbackup", [ours], folder / "store"),
            Tool("virtnbdbackup", ["virtnbdbackup"], folder / "v"),
            Tool("virtnbdbackup -z", ["virtnbdbackup", "-z"], folder / "vz"),
        ]
        run(ours, "init")
        for tool in tools:
            tool.store.mkdir(exist_ok=True)
        report(tools, rounds(tools, host, folder, args))


def rounds(tools: Sequence[Tool], host: Libvirtd, folder: Path, args: argparse.Namespace) -> Costs:
    """Every tool's turns: one full backup, then incremental ones, in an order that turns."""
    machines, found = {t.name: Machine(host, folder, t.machine, args.mib) for t in tools}, Costs()
    for number in range(args.rounds + 1):
        turned = [*tools[number % len(tools) :], *tools[: number % len(tools)]]
        for tool in turned:
            if number:
                machines[tool.name].change(args.changes)
            phase = "incremental" if number else "full"
            found.setdefault((tool.name, phase), []).append(measure(tool, host.uri, folder, full=not number))
    return found


def report(tools: Sequence[Tool], costs: Costs) -> None:
    """Medians, and their ratio to virtnbdbackup as it comes."""
    for phase in ("full", "incremental"):
        base = statistics.median(c[0] for c in costs["virtnbdbackup", phase])
        for tool in tools:
            wall, cpu, kept = (statistics.median(c[i] for c in costs[tool.name, phase]) for i in range(3))
            print(
                f"{phase:12} {tool.name:18} {wall:6.2f} s  {wall / base:5.2f} of virtnbdbackup  "
                f"CPU {cpu:5.2f} s  kept {kept / MIB:7.1f} MiB"
            )


if __name__ == "__main__":
    main()
