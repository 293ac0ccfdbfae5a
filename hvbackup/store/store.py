"""Opens a store, commits points, and hands out views.

STORE/                      the truth; everything here is written once, except keys/ and leases/
  HVBACKUP                  what this is: format, id, block size, cipher
  keys/  packs/  points/  runs/  leases/  tmp/
STATE/<store id>/           a cache of one machine: index, catalog, lock; may be removed at any time

commit: killed after        left behind                     cleaned by
1 writer's lease            the lease                       the next writer (writers.py)
2 packs sealed              chunks no point refers to       the next run refers to them; reclaim
3 point file in place       the point: it is committed
4 run record                the point, told of              adopt() on the next open
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvbackup.errors import Busy, HvbackupError, NotFound, PointDamaged, StoreDamage, StoreMissing, UsageError
from hvbackup.files import Files, Kernel
from hvbackup.model import DiskId, DiskRoot, Instant, MachineId, RecoveryPoint
from hvbackup.store.chunks.reader import CACHE_BYTES, ChunkReader
from hvbackup.store.chunks.view import DiskView
from hvbackup.store.chunks.writer import ChunkWriter
from hvbackup.store.chunks.writers import WriterLease
from hvbackup.store.format import keys
from hvbackup.store.format import layout as f
from hvbackup.store.format import point as points
from hvbackup.store.format.runs import Head, Runs
from hvbackup.store.index.index import Index

DESCRIPTOR = "HVBACKUP"
OWNER_LOCK = "owner.lock"  # under STATE: shared by those who add, held alone by who removes
WRITING_SECONDS = 30.0  # how long who adds waits for who removes
DAMAGED_DISKS = "damaged-disks.json"  # under STATE
ADOPT_RECORDS = 256  # how far back the chain is read for a point that a crash left untold
CIPHERS = ("none", "aes-256-gcm")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What the file HVBACKUP says; readable without a key."""

    id: bytes
    block: int
    cipher: str
    verify_key: str  # Ed25519 public key, hex: checks signatures of points without any secret

    def dump(self) -> bytes:
        """The bytes of the file."""
        value = {
            "hvbackup": "a backup store; see docs/format.md",
            "format": f.FORMAT,
            "id": self.id.hex(),
            "block": self.block,
            "page": f.PAGE_IDS,
            "cipher": self.cipher,
            "verify_key": self.verify_key,
        }
        return json.dumps(value, indent=1).encode() + b"\n"


def describe(files: Files) -> Descriptor:
    """Read HVBACKUP.  Raises StoreMissing when it is absent, foreign, or of a version we can't read."""
    try:
        value = f.parse_json(files.read(DESCRIPTOR))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreMissing(f"No hvbackup store at {files.root}; `hvbackup init {files.root}` makes one") from None
    except ValueError as e:
        raise StoreMissing(f"{files.path(DESCRIPTOR)} is not readable: put a copy of this one file back") from e
    try:
        if value["format"] != f.FORMAT:
            raise StoreMissing(
                f"The store at {files.root} has format {value['format']}, and this version reads format {f.FORMAT}: "
                "use a newer hvbackup"
            )
        found = Descriptor(bytes.fromhex(value["id"]), int(value["block"]), value["cipher"], value["verify_key"])
        if len(found.id) != 16 or found.block not in f.BLOCK_SIZES or value["page"] != f.PAGE_IDS:
            raise ValueError("a size is unknown")
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise StoreMissing(f"{files.path(DESCRIPTOR)} is not the description of a store: {e}") from e
    if found.cipher not in CIPHERS:
        raise StoreMissing(f"The store at {files.root} uses cipher {found.cipher}, unknown to this version")
    return found


def init(
    path: Path | str,
    secret: keys.Secret | None,
    block: int = f.BLOCK_SIZES[0],
    kernel: Kernel | None = None,
    family: keys.Keyring | None = None,
) -> str:
    """A new, empty store exists at `path` when this returns its id; encrypted unless `secret` is None.

    It gets the id key of `family`, if there is one, so that equal chunks have equal ids in both stores.

    HVBACKUP is written last.  Raises UsageError when the directory holds anything else.
    """
    files = Files(path, kernel)
    if files.exists(DESCRIPTOR):
        raise UsageError(f"There is a store at {path} already ({describe(files).id.hex()})")
    left = [n for n in files.names("") if n not in ("keys", "tmp")]  # these two: an `init` that was killed
    if left:
        raise UsageError(f"{path} is not empty (it has {left[0]}); a store wants a directory of its own")
    if block not in f.BLOCK_SIZES:
        raise UsageError(f"A block has {' or '.join(str(b // 1024) + ' KiB' for b in f.BLOCK_SIZES)}")
    if family and family.encrypted != (secret is not None):
        raise UsageError(
            "Stores of one family are all encrypted or all not: an open store would give the key of ids away"
        )
    files.make_dir("")
    files.settle()
    store = secrets.token_bytes(16)
    ring = keys.Keyring.generate(store, encrypted=secret is not None, family=family)
    for name in files.names("keys"):
        files.remove(f"keys/{name}")
    keys.add_wrapping(files, ring, secret, "made with the store")
    cipher = CIPHERS[1] if secret else CIPHERS[0]
    files.write_new(DESCRIPTOR, Descriptor(store, block, cipher, ring.verifier.public_bytes_raw().hex()).dump())
    return store.hex()


class Writing:
    """While this context lasts, chunks and points may be written; other processes may write others, and none owns the store.

    Entering waits for an owner (reclaim, repair) to end, and makes the index anew: an owner may have removed packs.
    Thread safety: any thread; one at a time is inside.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._lock, self._depth, self._exit = store, threading.RLock(), 0, ExitStack()
        self.wait_seconds = WRITING_SECONDS

    @property
    def held(self) -> bool:
        """Whether somebody is inside."""
        return self._depth > 0

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            if self._depth == 0 and not self._store.owner:
                with ExitStack() as stack:
                    self._store.begin_writing(stack, self.wait_seconds)
                    self._exit = stack.pop_all()
            self._depth += 1
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._depth -= 1
            if self._depth == 0:
                self._exit.close()
        finally:
            self._lock.release()


class Store:
    """An open store.

    Any number of processes read.  Those that add chunks and points do it inside `writing`, side by side; whoever removes or
    repairs opens it with `owner=True` and is alone among writers.  What belongs to one machine (its journal, its leases, what
    is made on its hypervisor) belongs to who is inside `holding`.
    Thread safety: views and readers from any thread; everything that writes from one.
    """

    def __init__(self, files: Files, state: Files, ring: keys.Keyring, descriptor: Descriptor, *, owner: bool) -> None:
        self.files, self.state, self.ring, self.descriptor, self.owner = files, state, ring, descriptor, owner
        self.id, self.block = descriptor.id, descriptor.block
        self.index = Index(files, state, keep=owner)
        self.cache_bytes = CACHE_BYTES  # of decoded blocks, from the next writing on
        self.chunks = ChunkReader(files, ring, self.index)
        self.runs = Runs(files, ring, state)
        self.heads: list[Head] = []  # newest records that were kept elsewhere: they must be there
        self.heads_trouble = ""  # why those could not be read
        self.writing = Writing(self)
        self._exit = ExitStack()

    @classmethod
    def open(
        cls,
        path: Path | str,
        state: Path | str,
        secrets_: Sequence[keys.Secret] = (),
        *,
        owner: bool = False,
        kernel: Kernel | None = None,
    ) -> Store:
        """An open store.  Raises StoreMissing, KeyRefused, Busy (another owner on this machine)."""
        files = Files(path, kernel)
        descriptor = describe(files)
        ring = keys.unlock(files, descriptor.id, list(secrets_), encrypted=descriptor.cipher != CIPHERS[0])
        if ring.verifier.public_bytes_raw().hex() != descriptor.verify_key:
            raise StoreMissing(
                f"{files.path(DESCRIPTOR)} names another signer than the keys: put a copy of this one file back"
            )
        store = cls(files, Files(Path(state) / descriptor.id.hex(), kernel), ring, descriptor, owner=owner)
        if owner:
            store._exit.enter_context(store.state.owner(OWNER_LOCK, f"The store at {path}"))
            store._clear()
        store.index.sync()
        if owner:
            store.runs.settle()
            store._adopt()
        return store

    def begin_writing(self, stack: ExitStack, wait_seconds: float) -> None:
        """Chunks and points may be written until the stack is closed; for `writing`.  Raises Busy."""
        what = f"The store at {self.files.root}"
        with ExitStack() as alone, contextlib.suppress(Busy):
            alone.enter_context(self.state.owner(OWNER_LOCK, what))
            self.runs.settle()
            self._adopt()  # nobody else is between a point and its record now
        stack.enter_context(self.state.owner(OWNER_LOCK, what, shared=True, wait_seconds=wait_seconds))
        self._clear()
        self.runs.settle()
        self.index = Index(self.files, self.state, keep=True)
        self.index.sync()
        self.chunks = ChunkReader(self.files, self.ring, self.index, self.cache_bytes)
        stack.callback(self.index.stop_keeping)

    @contextmanager
    def holding(self, machine: MachineId) -> Iterator[None]:
        """Nobody else on this host captures or protects the machine while the context lasts.  Raises Busy, naming who does."""
        name = f"machines/{self.ring.machine_name(machine)}.lock"
        with self.state.owner(name, f"Machine {machine}"):
            yield

    def _clear(self) -> None:
        from hvbackup.store.shelves import immutable  # needs us

        immutable.arm(self)
        self.files.sweep()
        self.state.sweep()
        self._settle()

    def _settle(self) -> None:
        """What a dead run left is certain before a point is built upon it: its lease tells, or that there is no point yet."""
        if self.files.names("leases") or not self.files.names(points.FOLDER):
            self.files.settle()

    def close(self) -> None:
        """Give the lock and all handles back; idempotent."""
        self.files.close()
        self._exit.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- machines and points -------------------------------------------------------------------------------------------

    def machine_folders(self) -> list[str]:
        """The keyed names of all machines that have points."""
        return self.files.names(points.FOLDER)

    def point_paths(self, folder: str) -> list[str]:
        """The paths of all points of one machine, oldest first."""
        names = self.files.names(f"{points.FOLDER}/{folder}")
        return [f"{points.FOLDER}/{folder}/{n}" for n in names if points.is_name(n)]

    def load_point(self, path: str) -> RecoveryPoint:
        """The point in one file.  Raises StoreDamage."""
        try:
            data = self.files.read(path)
        except FileNotFoundError:
            raise PointDamaged(f"{path} is missing") from None
        except HvbackupError as e:
            raise PointDamaged(str(e)) from e
        return points.load(self.ring, path, data)

    def points(self, machine: MachineId | None = None) -> Iterator[RecoveryPoint]:
        """Every readable point (of one machine), oldest first within a machine; damaged ones are named by `check`."""
        folders = self.machine_folders() if machine is None else [self.ring.machine_name(machine)]
        for folder in folders:
            for path in self.point_paths(folder):
                try:
                    yield self.load_point(path)
                except StoreDamage:
                    continue

    def newest(self, machine: MachineId) -> RecoveryPoint | None:
        """The newest readable point of a machine, or None."""
        for path in reversed(self.point_paths(self.ring.machine_name(machine))):
            try:
                return self.load_point(path)
            except StoreDamage:
                continue
        return None

    def find_machine(self, text: str) -> MachineId:
        """The machine people call `text`: its id or its newest name.  Raises NotFound, UsageError when two have it."""
        newest = [p for f_ in self.machine_folders() if (p := self._newest_in(f_))]
        found = {p.machine.id for p in newest if text in (p.machine.id, p.machine.name)}
        if not found:
            known = ", ".join(sorted(p.machine.name for p in newest)) or "none yet"
            raise NotFound(f"No machine {text} in this store; it has: {known}")
        if len(found) > 1:
            raise UsageError(
                f"{len(found)} machines are called {text}; say which by its id: {', '.join(sorted(found))}"
            )
        return found.pop()

    def _newest_in(self, folder: str) -> RecoveryPoint | None:
        for path in reversed(self.point_paths(folder)):
            try:
                return self.load_point(path)
            except StoreDamage:
                continue
        return None

    def path_of(self, point: RecoveryPoint) -> str:
        """Where a point lives in the store: what run records call it."""
        return points.path_of(self.ring, point)

    # -- damage --------------------------------------------------------------------------------------------------------

    def is_damaged(self, point: RecoveryPoint, disk: DiskId) -> bool:
        """Whether the last `check` found chunks lost that this disk of this point needs."""
        return (self.path_of(point), disk) in self.damaged_disks()

    def damaged_disks(self) -> list[tuple[str, DiskId]]:
        """(path of a point, disk) of everything that the last `check` found to need something lost."""
        try:
            return [(str(path), DiskId(str(disk))) for path, disk in f.parse_json(self.state.read(DAMAGED_DISKS))]
        except (FileNotFoundError, ValueError, TypeError):
            return []

    def set_damaged_disks(self, disks: Sequence[tuple[str, DiskId]]) -> None:
        """Remember what `check` found, for the next capture to heal."""
        self.state.replace(DAMAGED_DISKS, json.dumps(sorted(disks)).encode())

    # -- reading and writing -------------------------------------------------------------------------------------------

    def view(self, root: DiskRoot) -> DiskView:
        """A disk of a recovery point, read-only."""
        return DiskView(self.chunks, root, self.block)

    def writer(self) -> ChunkWriter:
        """A writer for one capture, inside `writing`; what its point builds upon is looked up after this returns."""
        lease = WriterLease(self.files, self.state, self.ring, self.runs.writer)
        return ChunkWriter(self.files, self.ring, self.index, lease.begin(self.index))

    def parent(self, machine: MachineId, writer: ChunkWriter) -> RecoveryPoint | None:
        """The newest readable point of a machine, to build upon: what it needs stays until the writer ends."""
        while (found := self.newest(machine)) is not None:
            writer.builds_upon(found)
            if self.files.exists(self.path_of(found)):
                break  # else it was forgotten before we had said that we need it
        return found

    def commit(self, point: RecoveryPoint, writer: ChunkWriter) -> None:
        """The point exists when this returns, and did not exist before it was called.  Raises Busy: see `writers.py`."""
        path, data = self.path_of(point), points.dump(self.ring, point)
        writer.put_point_copy(path, data)
        writer.seal()
        writer.lease.confirm()
        self.files.write_new(path, data)
        try:
            writer.lease.confirm()
        except Busy:
            self.files.remove(path)
            raise
        writer.lease.end()

    def tell(self, kind: str, t: Instant, **value: Any) -> None:
        """Append a run record."""
        self.runs.append({"kind": kind, "t": t, **value})

    def _adopt(self) -> None:
        """Tell of points whose run record was lost by a crash, so that their absence would be noticed from now on."""
        recent = self.runs.recent(ADOPT_RECORDS)
        told = {r.value.get("point") for r in recent}
        since = min((r.value["t"] for r in recent), default=0) if len(recent) == ADOPT_RECORDS else 0
        for folder in self.machine_folders():
            for path in self.point_paths(folder)[-1:]:  # a crash leaves at most the newest one untold
                if path not in told and int(path.rsplit("/", 1)[1].split("-")[0]) >= since:
                    told.add(path)
                    self._adopt_one(path)
        for path in [p for r in recent for p in r.value.get("begun", ())]:  # copies come in any order
            if path not in told and self.files.exists(path):
                told.add(path)
                self._adopt_one(path)

    def _adopt_one(self, path: str) -> None:
        try:
            point = self.load_point(path)
        except StoreDamage:
            return
        self.tell("adopted", point.t, point=path, machine=point.machine.id)
