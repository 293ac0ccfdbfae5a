"""Five domains of a real libvirtd under the service, and everything that can die dies: are its promises kept?

    python labs/unattended.py [--minutes 30] [--seed 1]

Each domain is a real guest (TCG) whose writer numbers its writes and says when one is done.  Three are protected
continuously, two by an RPO.  Domains, libvirtd, the service, its workers and jobs are killed, and the store's file system is
filled up, one after the other until three minutes before the end.  Then:

* reports of the service ("this can be recovered now") are held against the truth: what it said can be, and holds every write that
  was acknowledged before that moment;
* every point of every machine is restored and holds exactly the first n writes of each life of its guest;
* the store passes a deep check, and nothing is left: no lease, no process, no scratch, no foreign checkpoint.

Figures are printed, and kept in `.lab/figures/unattended.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import libvirt

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hvbackup import config
from hvbackup.cli import local
from hvbackup.hypervisors.libvirt_xml import NAMESPACE
from hvbackup.model import MiB
from labs.guest import Console, GuestError, acked_numbers, build, verify_on_host
from labs.libvirtd import Libvirtd, daemon, disk_xml, run

FIGURES = Path(__file__).resolve().parent.parent / ".lab" / "figures"
SIZE = 24 * MiB
LIVES = ("vda", "vdb", "vdc", "vdd")  # each life of a guest writes to a disk of its own
RATE = 4  # writes a second
STORE_BYTES = 600 * MiB
CALM_SECONDS = 180
SLOW_SECONDS = 10.0  # between a question and its answer, on a busy machine
CONFIGURATION = """
[service]
discover = "1m"
prune = ""
[source.host]
uri = "libvirt:{uri}"
jobs = 2
[policy.gold]
machines = ["tag:gold"]
protect = true
every = "5s"
fold = "2m"
rpo = "90s"
[policy.silver]
machines = ["tag:silver"]
rpo = "4m"
[store.main]
check = ""
reclaim = ""
regroup = ""
"""


# A moment is labelled when its switch is over, so that nothing written after its label is in it; what was done while the switch
# lasted may be missing.
SWITCH_SECONDS = 1.0


@dataclass
class Guest:
    """One domain, and what its writer said."""

    libvirtd: Libvirtd
    folder: Path
    name: str
    tag: str
    life: int = 0
    acks: list[tuple[float, int, int]] = field(default_factory=list)  # host time, life, number: seen done by then
    console: Console | None = None
    looking: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        for disk in LIVES:
            run("qemu-img", "create", "-q", "-f", "qcow2", self.folder / f"{disk}.qcow2", str(SIZE))
        self.libvirtd.connection().defineXML(self._xml())

    def _xml(self) -> str:
        home = build()
        append = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check nokaslr"
        disks = "".join(disk_xml(d, self.folder / f"{d}.qcow2") for d in LIVES)
        return (
            f"<domain type='qemu'><name>{self.name}</name>"
            f"<metadata><h:tags xmlns:h='{NAMESPACE}'>{self.tag}</h:tags></metadata>"
            "<memory unit='MiB'>128</memory><vcpu>1</vcpu><cpu mode='maximum'/>"
            "<os><type arch='x86_64' machine='q35'>hvm</type>"
            f"<kernel>{home}/vmlinuz</kernel><initrd>{home}/initramfs</initrd><cmdline>{append}</cmdline></os>"
            f"<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{disks}"
            f"<serial type='unix'><source mode='bind' path='{self.folder}/console.sock'/><target port='0'/></serial>"
            f"<serial type='file'><source path='{self.folder}/acks'/><target port='1'/></serial></devices></domain>"
        )

    def domain(self) -> libvirt.virDomain:
        return self.libvirtd.connection().lookupByName(self.name)

    def start(self) -> None:
        """A new life, which writes to a disk of its own."""
        self.domain().create()
        self.console = Console(self.folder / "console.sock", 60)
        self.console.wait_ready(300, booting=True)
        self.console.sh(f"writer overwrite -r {RATE} -s {SIZE // 2} /dev/{LIVES[self.life]} >/dev/ttyS1 2>&1 &")

    def kill(self) -> None:
        """As if the power had failed."""
        self.look()
        os.kill(int((self.libvirtd.folder / f"run/qemu/{self.name}.pid").read_text()), signal.SIGKILL)
        with self.looking:
            (self.folder / "acks").unlink()  # what this life has said is not the next one's word
            self.life += 1

    def look(self) -> None:
        """Note what is done by now."""
        with self.looking, contextlib.suppress(OSError, GuestError):
            numbers = acked_numbers(self.folder / "acks")
            if numbers:
                self.acks.append((time.time(), self.life, numbers[-1]))

    def done_by(self, t: float, life: int) -> int:
        """So many writes of a life were acknowledged before t, for sure."""
        return max((n for at, of, n in self.acks if of == life and at <= t), default=0)


@dataclass
class Report:
    """What the service said of a machine."""

    machine: str
    asked: float
    until: str  # the newest moment that can be recovered
    age: float
    late: bool
    rpo: float

    @property
    def moment(self) -> float:
        """Up to when everything could be recovered, it said."""
        return datetime.fromisoformat(self.until).timestamp()

    @property
    def is_odd(self) -> bool:
        """Its age is not that of its moment, or its state is not what age and target make of it."""
        wrong_age = not -SLOW_SECONDS < self.asked - self.moment - self.age < SLOW_SECONDS
        wrong_state = self.late != (self.age > self.rpo) and abs(self.age - self.rpo) > SLOW_SECONDS
        return wrong_age or wrong_state


class Lab:
    """Everything, and what was seen of it."""

    def __init__(self, folder: Path, libvirtd: Libvirtd, seed: int) -> None:
        self.folder, self.libvirtd, self.rng = folder, libvirtd, random.Random(seed)
        names = {"STORE": "disk/store", "STATE": "state", "CONFIG": "config", "RUN": "run"}
        self.environment = {**os.environ, **{f"HVBACKUP_{k}": str(folder / v) for k, v in names.items()}}
        self.places = config.places(environment=self.environment, root=False)
        self.guests = [
            Guest(libvirtd, folder / f"vm{n}", f"vm{n}", "gold" if n < 3 else "silver") for n in range(5)
        ]  # fmt: skip
        self.reports: list[Report] = []
        self.faults: list[tuple[float, str]] = []
        self.service: subprocess.Popen[bytes] | None = None
        self.log = (folder / "serve.log").open("ab")
        self.ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    # -- the service ---------------------------------------------------------------------------------------------------

    def command(self, *words: str | Path) -> list[str]:
        return [sys.executable, "-m", "hvbackup", *map(str, words)]

    def ask(self, *words: str | Path) -> Any:
        done = subprocess.run(
            self.command(*words, "--json"), env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"hvbackup {' '.join(map(str, words))}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    def serve(self) -> None:
        self.service = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *self.command("serve")],
            env=self.environment,
            stdout=self.log,
            stderr=self.log,
            stdin=subprocess.DEVNULL,
        )

    def rows(self) -> list[dict[str, Any]]:
        """How machines stand, or nothing where nobody answers."""
        try:
            answer = local.ask(self.places, "GET", "/api/v1/machines")
        except Exception:  # noqa: BLE001 - it was killed while it answered
            return []
        return list(answer["machines"]) if answer else []

    def until(self, what: str, done: Callable[[], Any], seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                raise SystemExit(f"not in time: {what}; {self.rows()}")
            time.sleep(0.5)

    def _watch(self) -> None:
        """Acknowledgements often, reports every few seconds."""
        n = 0
        while not self.ended.wait(0.25):
            for guest in self.guests:
                guest.look()
            if n % 20 == 0:
                before = time.time()
                for row in self.rows():
                    if row["recoverable"]:
                        told = (row["recoverable"], row["age_seconds"], row["state"] == "late", row["rpo_seconds"])
                        self.reports.append(Report(row["name"], before, *told))
            n += 1

    def begin(self) -> None:
        """Everything runs and is protected when this returns."""
        (self.folder / "config").mkdir(exist_ok=True)
        self.ask("init")
        (self.folder / "config/config.toml").write_text(CONFIGURATION.format(uri=self.libvirtd.uri))
        for guest in self.guests:
            guest.start()
        self._watcher.start()
        self.serve()
        self.until("all protected", lambda: self.standing() == {"protected": 5} and self.points() >= 5)

    def standing(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for row in self.rows():
            found[row["state"]] = found.get(row["state"], 0) + 1
        return found

    def points(self) -> int:
        return sum(bool(row["points"]) for row in self.rows())

    # -- faults --------------------------------------------------------------------------------------------------------

    def kill_domain(self) -> str:
        guest = min(self.guests, key=lambda g: (g.life, self.rng.random()))
        if guest.life + 1 >= len(LIVES):
            return "no domain has a life left"
        guest.kill()
        time.sleep(self.rng.uniform(2, 20))
        guest.start()
        return f"domain {guest.name} killed and started again"

    def kill_libvirtd(self) -> str:
        self.libvirtd.kill()
        time.sleep(self.rng.uniform(2, 30))
        self.libvirtd.start()
        return "libvirtd killed and started again"

    def kill_service(self) -> str:
        assert self.service is not None
        self.service.kill()
        self.service.wait()
        time.sleep(self.rng.uniform(0, 20))
        self.serve()
        return "hvbackup serve killed and started again"

    def kill_ours(self) -> str:
        """A worker or a job, whichever runs."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes() if entry.name.isdecimal() else b""
                if str(self.folder / "state/").encode() in line:
                    found.append((int(entry.name), line))
        if not found:
            return "nothing of ours ran"
        pid, line = self.rng.choice(sorted(found))
        os.kill(pid, signal.SIGKILL)
        return f"{'a worker' if b'cli.worker' in line else 'a job'} killed"

    def fill_disk(self) -> str:
        ballast = self.folder / "disk/ballast"
        with ballast.open("wb") as file:
            found = os.statvfs(ballast.parent)
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, max(1, found.f_bavail * found.f_frsize - 64 * 1024))
        time.sleep(45)
        ballast.unlink()
        return "the store's disk was full for 45 s"

    def trouble(self, seconds: float) -> None:
        """Faults, one after the other, for so long."""
        every = [self.kill_domain, self.kill_libvirtd, self.kill_service, self.kill_ours, self.fill_disk]
        end, turn = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            if turn % len(every) == 0:
                self.rng.shuffle(every)
            said = every[turn % len(every)]()
            self.faults.append((time.time(), said))
            print(f"{time.strftime('%H:%M:%S')} {said}; {self.standing()}", flush=True)
            turn += 1
            time.sleep(self.rng.uniform(10, 30))

    # -- the truth -----------------------------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """The service ends, and everything is held against the truth."""
        self.until("all protected again", lambda: self.standing() == {"protected": 5}, 300)
        calm = self.standing()
        self.ended.set()
        self._watcher.join()
        assert self.service is not None
        self.service.send_signal(signal.SIGTERM)
        code = self.service.wait(60)
        ended = self.ask("serve", "--end-workers")["ended"]
        wrong, restored = self._verify_points()
        told, checked = self._verify_reports()
        deep = subprocess.run(self.command("check", "--deep"), env=self.environment, check=False).returncode
        return {
            "minutes": round((time.time() - self.faults[0][0]) / 60, 1) if self.faults else 0,
            "faults": [said for _, said in self.faults],
            "states_at_the_end": calm,
            "service_exit": code,
            "workers_ended": len(ended),
            "reports": len(self.reports),
            "reports_late": sum(r.late for r in self.reports),
            "reports_held_against_the_truth": checked,
            "untrue_reports": told,
            "points_restored": restored,
            "wrong_points": wrong,
            "deep_check": deep,
            "left": self._left(),
        }

    def _verify_points(self) -> tuple[list[str], int]:
        wrong, count = [], 0
        for point in self.ask("points", "--last", "all")["points"]:
            name, t = point["machine"]["name"], point["time"]
            guest = next(g for g in self.guests if g.name == name)
            count += 1
            wrong += [f"point {point['id']} of {name} at {t}: {w}" for w in self._restored(guest, point["id"], None)]
        return wrong, count

    def _restored(self, guest: Guest, at: str, t: float | None) -> list[str]:
        """What is wrong with a machine at a moment."""
        to = self.folder / "restored"
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir()
        done = subprocess.run(
            self.command("restore", guest.name, "--at", at, "--to", to, "--quiet"),
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            return [done.stderr.strip()]
        wrong = []
        for life, disk in enumerate(LIVES):
            try:
                n = verify_on_host(to / f"{disk}.raw")
            except Exception as e:  # noqa: BLE001 - whatever it says is what is wrong
                wrong.append(f"{disk}: {e}")
                continue
            if t is not None and n < guest.done_by(t - SWITCH_SECONDS, life):
                wrong.append(f"{disk}: holds {n} writes, {guest.done_by(t - SWITCH_SECONDS, life)} were done before")
        return wrong

    def _verify_reports(self) -> tuple[list[str], int]:
        """Each moment that was promised exists; of some of them every write is looked at."""
        untrue, checked = [], 0
        for guest in self.guests:
            mine = [r for r in self.reports if r.machine == guest.name]
            untrue += [f"{r}" for r in mine if r.is_odd]
            moments = sorted({r.until for r in mine})
            for at in self.rng.sample(moments, min(12, len(moments))):
                checked += 1
                t = datetime.fromisoformat(at).timestamp()
                untrue += [f"{guest.name} at {at}: {w}" for w in self._restored(guest, at, t)]
        return untrue, checked

    def _left(self) -> list[str]:
        found = [f"lease {each}" for each in self.ask("status")["leases"]]
        found += [str(p) for p in (self.folder / "state/scratch").rglob("*") if p.is_file()]
        found += [str(p) for p in (self.folder / "run").glob("worker-*.sock")]
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes() if entry.name.isdecimal() else b""
                words = (str(self.folder), f"libvirt:{self.libvirtd.uri}")
                machinery = (b"qemu-system", b"libvirtd", str(os.getpid()).encode())
                ours = any(w.encode() in line for w in words) and not any(m in line for m in machinery)
                if ours and int(entry.name) != os.getpid():
                    found.append(f"process {entry.name}: {line[:200]!r}")
        for guest in self.guests:
            domain = guest.domain()
            with contextlib.suppress(libvirt.libvirtError):
                found.append(f"{guest.name}: {domain.backupGetXMLDesc()[:80]}")
            # what the newest barrier and the newest point name may stay: two of each disk
            found += [f"{guest.name}: {node} has {n} bitmaps" for node, n in _bitmaps(domain).items() if n > 2]
        return found


def _bitmaps(domain: libvirt.virDomain) -> dict[str, int]:
    """How many each node has."""
    import libvirt_qemu

    asked = json.dumps({"execute": "query-named-block-nodes", "arguments": {"flat": True}})
    nodes = json.loads(libvirt_qemu.qemuMonitorCommand(domain, asked, 0))["return"]
    return {n["node-name"]: len(n.get("dirty-bitmaps", [])) for n in nodes}


@contextlib.contextmanager
def _mounted(folder: Path) -> Iterator[None]:
    image = folder / "disk.ext4"
    with image.open("wb") as file:
        file.truncate(STORE_BYTES)
    (folder / "disk").mkdir()
    path = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    for command in (["mkfs.ext4", "-q", "-F", "-m", "0", image], ["mount", "-o", "loop", image, folder / "disk"]):
        subprocess.run([str(c) for c in command], check=True, env=path)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder / "disk")], check=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Half an hour, and the verdict."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="hvl-") as name, _mounted(folder := Path(name)), daemon() as libvirtd:
        lab = Lab(folder, libvirtd, args.seed)
        try:
            lab.begin()
            print(f"{time.strftime('%H:%M:%S')} five machines are protected", flush=True)
            lab.trouble(args.minutes * 60 - CALM_SECONDS)
            time.sleep(min(CALM_SECONDS, args.minutes * 20))
            figures = lab.finish()
        finally:
            if lab.service and lab.service.poll() is None:
                lab.service.kill()
            subprocess.run(lab.command("serve", "--end-workers"), env=lab.environment, check=False)
            FIGURES.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "serve.log", FIGURES / "unattended.log")
    (FIGURES / "unattended.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return 1 if figures["untrue_reports"] or figures["wrong_points"] or figures["deep_check"] or figures["left"] else 0


if __name__ == "__main__":
    sys.exit(main())
