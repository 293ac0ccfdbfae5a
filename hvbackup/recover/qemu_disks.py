"""What becomes of the block backends of a captured QEMU command line.  Pure.

The one rule everything here serves: nothing that the original machine writes to is ever opened for writing.

    a captured disk                     its overlay, in the same place: same node, same device, same id
    firmware variables, not captured    a copy in the machine's folder
    a CD, or anything read-only         kept when its file is still there
    a CD whose file is gone             an empty drive
    anything else                       left out, with its device, and said so
    a captured disk that is not there   was added while the machine ran: attached as virtio-blk, and said so
"""

from __future__ import annotations

import enum
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hvbackup.errors import UsageError
from hvbackup.recover.qemu_options import Fields, Option, json_option

_LEGACY = {
    "hda": (("index", "0"), ("media", "disk")),
    "hdb": (("index", "1"), ("media", "disk")),
    "hdc": (("index", "2"), ("media", "disk")),
    "hdd": (("index", "3"), ("media", "disk")),
    "": (("index", "0"), ("media", "disk")),
    "cdrom": (("index", "2"), ("media", "cdrom")),
    "fda": (("if", "floppy"), ("index", "0")),
    "fdb": (("if", "floppy"), ("index", "1")),
    "pflash": (("if", "pflash"), ("format", "raw")),
    "sd": (("if", "sd"),),
    "mtdblock": (("if", "mtd"),),
}
_DRIVE_KEEPS = (  # of a -drive that gets another file: how the guest sees it, never how the host stored it
    *("id", "node-name", "if", "index", "bus", "unit", "media", "serial", "werror", "rerror", "discard"),
    *("detect-zeroes", "addr", "group", "cyls", "heads", "secs", "trans"),
)
_CD = re.compile(r"(ide|scsi)-cd|usb-cd")


class Fate(enum.Enum):
    """What becomes of a backend, and so of the device on it."""

    OVERLAY = "overlay"
    KEPT = "kept"
    EMPTY = "empty"  # a CD drive without a medium
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Overlay:
    """A captured disk and the file that takes its place."""

    disk: str  # the disk's id in the recovery point
    file: str  # a qcow2 image with its backing file
    node: str = ""  # the block node it lived in
    path: str = ""  # the file it lived in


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a command line needs from its host, as values, so that rewriting it touches nothing."""

    machine: str  # for messages
    cwd: str  # where relative paths begin
    folder: str  # the restored machine's own
    exists: Callable[[str], bool]

    def resolve(self, path: str) -> str:
        """An absolute path; what is no path (a protocol's address) stays."""
        path = path.removeprefix("file:") if path.startswith("file:") else path
        if not path or self.is_address(path):
            return path
        return posixpath.normpath(posixpath.join(self.cwd, path))

    def is_address(self, path: str) -> bool:
        """Whether this is a protocol's address and no file."""
        return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", path)) or path.startswith("json:")

    def has(self, path: str) -> bool:
        """Whether this is a file, and there."""
        return bool(path) and not self.is_address(path) and self.exists(self.resolve(path))

    def require(self, path: str, what: str) -> str:
        """The absolute path of a file the machine can't start without.  Raises UsageError."""
        if not self.has(path):
            raise UsageError(
                f"Machine {self.machine} needs its {what} {self.resolve(path)}, which is not here; put it back, "
                "or boot the disks on a plain machine with --generic"
            )
        return self.resolve(path)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The outcome: new options by position (None: dropped), and what devices stand on."""

    options: Mapping[int, Option | None]
    fates: Mapping[str, Fate]  # by the name a device uses: a node or a drive
    added: Sequence[Option]
    copies: Sequence[tuple[str, str]]  # files to copy before QEMU starts
    notes: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Backend:
    """Something a device stands on: the root of a tree of nodes, or a -drive."""

    key: str
    names: frozenset[str]
    members: Mapping[int, Fields]  # position in the command line -> fields; the root comes first
    is_drive: bool

    @property
    def at(self) -> int:
        return next(iter(self.members))

    @property
    def root(self) -> Fields:
        return self.members[self.at]

    def files(self) -> Iterator[tuple[int, str, str]]:
        """Position, key and value of every file named anywhere below."""
        for at, fields in self.members.items():
            for key, value in fields.strings():
                if key.rpartition(".")[2] == "filename" or (self.is_drive and key == "file"):
                    yield at, key, value

    def is_read_only(self) -> bool:
        return any(self.root.is_on(key) for key in ("read-only", "readonly", "file.read-only"))


@dataclass
class _Planner:
    """Collects the outcome while the backends are visited."""

    around: Surroundings
    options: dict[int, Option | None] = field(default_factory=dict)
    fates: dict[str, Fate] = field(default_factory=dict)
    added: list[Option] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def overlay(self, backend: _Backend, overlay: Overlay) -> None:
        """The disk's overlay takes the root's place; what was below is no longer needed."""
        if backend.is_drive:
            fields = backend.root.only(*_DRIVE_KEEPS).put("file", overlay.file).put("format", "qcow2")
            self.options[backend.at] = Option("drive", fields.render())
        else:
            self.options[backend.at] = _overlay_node(backend.root.get("node-name"), overlay)
        self._settle(backend, Fate.OVERLAY)

    def keep(self, backend: _Backend, new_files: Mapping[str, str]) -> None:
        """The backend stays, with absolute paths."""
        members = dict(backend.members)
        for at, key, value in backend.files():
            members[at] = members[at].put(key, new_files.get(value, self.around.resolve(value)))
        name = "drive" if backend.is_drive else "blockdev"
        self.options.update({at: Option(name, fields.render()) for at, fields in members.items()})
        self._settle(backend, Fate.KEPT)

    def copy(self, backend: _Backend) -> None:
        """Firmware variables: the machine may write to them, so it gets its own."""
        new_files = {}
        for _, _, file in backend.files():
            new_files[file] = f"{self.around.folder}/firmware{len(self.copies)}"
            self.copies.append((self.around.require(file, "firmware variables"), new_files[file]))
        self.keep(backend, new_files)

    def leave_out(self, backend: _Backend, *, is_cd: bool) -> None:
        """The backend is not opened."""
        files = ", ".join(file for _, _, file in backend.files()) or backend.key
        if not is_cd:
            self.notes.append(f"Disk {files} was not captured and is left out")
        elif backend.is_drive:
            empty = backend.root.only("id", "if", "index", "bus", "unit", "media", "serial")
            self.options[backend.at] = Option("drive", empty.render())
        if is_cd:
            self.notes.append(f"The CD {files} is not here; its drive is empty")
        self._settle(backend, Fate.EMPTY if is_cd else Fate.GONE)

    def add(self, overlay: Overlay, index: int) -> None:
        """A disk that came while the machine ran."""
        node = f"hvbackup-added{index}"
        self.added += [_overlay_node(node, overlay), json_option("device", {"driver": "virtio-blk-pci", "drive": node})]
        self.notes.append(f"Disk {overlay.disk} is not on the captured command line; attached as virtio-blk")

    def _settle(self, backend: _Backend, fate: Fate) -> None:
        for at in backend.members:
            self.options.setdefault(at, None)
        self.fates.update(dict.fromkeys(backend.names, fate))


def plan(options: Sequence[Option], overlays: Sequence[Overlay], around: Surroundings) -> Blocks:
    """What becomes of every block option.  Raises UsageError when two disks claim one backend, or firmware is missing."""
    nodes, users = _nodes(options), _users(options)
    backends = [*_trees(nodes, users), *_drives(options)]
    taken = _match(backends, overlays, users, around)
    planner = _Planner(around)
    for backend in backends:
        if backend.key in taken:
            planner.overlay(backend, taken[backend.key])
    for backend in backends:
        if backend.key not in taken:
            _settle_other(planner, backend, users)
    placed = [overlay.disk for overlay in taken.values()]
    for index, overlay in enumerate(overlays):
        if overlay.disk not in placed:
            planner.add(overlay, index)
    for at, option in enumerate(options):
        if option.name in ("blockdev", "drive", *_LEGACY):  # below an overlay, or used by nothing
            planner.options.setdefault(at, None)
    return Blocks(planner.options, planner.fates, planner.added, planner.copies, planner.notes)


def _settle_other(planner: _Planner, backend: _Backend, users: Mapping[str, _User]) -> None:
    drivers = {users[name].driver for name in backend.names if name in users}
    is_firmware = backend.root.get("if") == "pflash" or any(driver.startswith("pflash") for driver in drivers)
    is_cd = backend.root.get("media") == "cdrom" or any(_CD.fullmatch(driver) for driver in drivers)
    files = [file for _, _, file in backend.files()]
    if is_firmware and not backend.is_read_only():
        planner.copy(backend)
    elif is_firmware:
        planner.keep(backend, {file: planner.around.require(file, "firmware") for file in files})
    elif not files and backend.is_drive:
        planner.keep(backend, {})  # an empty tray
    elif (is_cd or backend.is_read_only()) and files and all(planner.around.has(file) for file in files):
        planner.keep(_read_only(backend), {})
    else:
        planner.leave_out(backend, is_cd=is_cd)


def _read_only(backend: _Backend) -> _Backend:
    if backend.is_read_only() or backend.root.get("media") == "cdrom":
        return backend
    root = backend.root.put("read-only", True if backend.root.is_json else "on")
    return _Backend(backend.key, backend.names, {**backend.members, backend.at: root}, backend.is_drive)


def _overlay_node(node: str, overlay: Overlay) -> Option:
    file = {"driver": "file", "filename": overlay.file, "discard": "unmap"}
    return json_option("blockdev", {"driver": "qcow2", "node-name": node, "discard": "unmap", "file": file})


# --- who stands on what ----------------------------------------------------------------------------------------------


def _nodes(options: Sequence[Option]) -> dict[str, tuple[int, Fields]]:
    parsed = ((at, Fields.parse(o.value or "", "driver")) for at, o in enumerate(options) if o.name == "blockdev")
    return {fields.get("node-name") or f"blockdev {at}": (at, fields) for at, fields in parsed}


@dataclass(frozen=True, slots=True)
class _User:
    """What stands on a node or a drive."""

    driver: str  # pflash0 and pflash1 for the machine's own firmware
    id: str = ""


def _users(options: Sequence[Option]) -> dict[str, _User]:
    """By the name of the node or drive."""
    users: dict[str, _User] = {}
    for option in options:
        if option.name == "device":
            fields = Fields.parse(option.value or "", "driver")
            users.setdefault(fields.get("drive"), _User(fields.get("driver"), fields.get("id")))
        elif option.name in ("machine", "M"):
            fields = Fields.parse(option.value or "", "type")
            users.update({fields.get(key): _User(key) for key in ("pflash0", "pflash1")})
    return {name: user for name, user in users.items() if name}


def _trees(nodes: Mapping[str, tuple[int, Fields]], users: Mapping[str, _User]) -> list[_Backend]:
    below = {
        name: [value for key, value in fields.strings() if value in nodes and key != "node-name"]
        for name, (_, fields) in nodes.items()
    }
    trees = []
    for root in (name for name in nodes if name in users):
        names, todo = [root], list(below[root])
        while todo:
            names.append(todo.pop(0))
            todo += [name for name in below[names[-1]] if name not in names]
        members = dict(nodes[name] for name in names)
        trees.append(_Backend(f"node {root}", frozenset({root, *_inline_nodes(members)}), members, is_drive=False))
    return trees


def _inline_nodes(members: Mapping[int, Fields]) -> Iterator[str]:
    for fields in members.values():
        yield from (value for key, value in fields.strings() if key.rpartition(".")[2] == "node-name")


def _drives(options: Sequence[Option]) -> list[_Backend]:
    naming = _Naming(options)
    drives = []
    for at, option in enumerate(options):
        if option.name == "drive":
            fields = Fields.parse(option.value or "", "file")
        elif option.name in _LEGACY:
            fields = Fields.of(("file", option.value or ""), *_LEGACY[option.name])
        else:
            continue
        names = {naming.name(fields), fields.get("node-name")} - {""}
        drives.append(_Backend(f"drive {at}", frozenset(names), {at: fields}, is_drive=True))
    return drives


class _Naming:
    """How QEMU names a -drive that has no id: ide0-hd0, virtio1, pflash0."""

    def __init__(self, options: Sequence[Option]) -> None:
        kinds = [Fields.parse(o.value or "", "type").get("type") for o in options if o.name in ("machine", "M")]
        machine = next((kind for kind in kinds if kind), "")
        self._default = "virtio" if machine.startswith("virt") else "ide"
        self._per_bus = {"ide": 1 if "q35" in machine else 2, "scsi": 7}
        self._used: set[tuple[str, int, int]] = set()

    def name(self, fields: Fields) -> str:
        kind = fields.get("if") or self._default
        bus, unit = self._place(kind, fields)
        self._used.add((kind, bus, unit))
        media = ("-cd" if fields.get("media") == "cdrom" else "-hd") if kind in ("ide", "scsi") else ""
        place = f"{bus}{media}{unit}" if kind in self._per_bus else f"{media}{unit}"
        return fields.get("id") or f"{kind}{place}"

    def _place(self, kind: str, fields: Fields) -> tuple[int, int]:
        per_bus = self._per_bus.get(kind, 0)
        if fields.get("index"):
            index = int(fields.get("index"))
            return divmod(index, per_bus) if per_bus else (0, index)
        bus, unit = int(fields.get("bus") or 0), int(fields.get("unit") or 0)
        while not fields.get("unit") and (kind, bus, unit) in self._used:
            unit += 1
            if per_bus and unit >= per_bus:
                bus, unit = bus + 1, 0
        return bus, unit


def _match(
    backends: Sequence[_Backend], overlays: Sequence[Overlay], users: Mapping[str, _User], around: Surroundings
) -> dict[str, Overlay]:
    """Which overlay goes where: by the device's id, else by a name of the backend, and by its path where no name says."""
    taken: dict[str, Overlay] = {}
    for overlay in overlays:
        backend = _by_device(backends, overlay, users) or _by_name(backends, overlay)
        backend = backend or _by_path(backends, overlay, around)
        if backend is not None and backend.key in taken:
            raise UsageError(
                f"Disks {taken[backend.key].disk} and {overlay.disk} of machine {around.machine} are one on its "
                "command line; boot them on a plain machine with --generic"
            )
        if backend is not None:
            taken[backend.key] = overlay
    return taken


def _by_device(backends: Sequence[_Backend], overlay: Overlay, users: Mapping[str, _User]) -> _Backend | None:
    stands_on = {name for name, user in users.items() if user.id == overlay.disk}
    return next((backend for backend in backends if stands_on & backend.names), None)


def _by_name(backends: Sequence[_Backend], overlay: Overlay) -> _Backend | None:
    names = {overlay.disk, overlay.node} - {""}
    return next((backend for backend in backends if names & backend.names), None)


def _by_path(backends: Sequence[_Backend], overlay: Overlay, around: Surroundings) -> _Backend | None:
    path = around.resolve(overlay.path)
    found = [b for b in backends if path and path in (around.resolve(file) for _, _, file in b.files())]
    return found[0] if len(found) == 1 else None
