"""The command line of a machine that is booted from a recovery point.  Pure.

`rewrite` takes the line the machine was captured with and changes as little as it can, so that the guest finds its
hardware again: the same devices in the same places, the same addresses and identity.  What tied it to its old host
changes: disks become overlays (`qemu_disks`), sockets, monitors and consoles move into the machine's folder, and its
network cards lead nowhere, because the original may still be running.  `generic` makes a plain machine for disks whose
machine nobody knows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hvbackup.errors import UsageError
from hvbackup.recover import qemu_disks, qemu_options
from hvbackup.recover.qemu_disks import Fate, Overlay, Surroundings
from hvbackup.recover.qemu_options import Fields, Option, quote

MiB = 1024**2

_DROPPED = frozenset(  # they belong to the old process, its host or its user
    (
        *("name", "incoming", "loadvm", "S", "preconfig", "daemonize", "pidfile", "snapshot", "nographic", "display"),
        *("vnc", "spice", "sdl", "gtk", "curses", "full-screen", "gdb", "s", "D", "d", "trace", "dfilter", "qmp"),
        *("qmp-pretty", "monitor", "mon", "chroot", "runas", "run-with", "add-fd", "mem-path", "mem-prealloc"),
        *("overcommit", "parallel", "debugcon", "plugin", "accel", "enable-kvm", "iscsi", "no-quit", "alt-grab"),
        *("ctrl-grab", "portrait", "no-frame"),
    )
)
_HOST_BOUND = re.compile(r"vfio-|usb-host|vhost-|tpm-|virtio-9p|ivshmem|u2f-|ccid-card-(emul|passthru)|pci-assign")
_HOST_BOUND_OPTIONS = {"tpmdev": "the TPM", "fsdev": "a host folder", "virtfs": "a host folder"}
_DROPPED_OBJECTS = re.compile(r"secret|tls-|authz-|filter-|colo-|input-linux|cryptodev-|rng-egd|can-host|pr-manager")
_SERIAL_DEVICES = ("isa-serial", "pci-serial", "usb-serial", "sclpconsole", "spapr-vty", "virtconsole")
_FILES = {"kernel": "kernel", "initrd": "initial RAM disk", "dtb": "device tree", "shim": "boot shim"}
_AGENT_PORT = "org.qemu.guest_agent.0"
_SERIAL = "hvbackup-serial"


@dataclass(frozen=True, slots=True)
class Place:
    """Where and as what the machine runs now."""

    name: str
    sockets: str  # the folder of its sockets, with a short name
    files: str  # the folder of its logs and of its copies of firmware variables
    exists: Callable[[str], bool]
    kvm: bool = False  # whether KVM works here, tried and not guessed
    identity: str = ""  # a new UUID, which also gives new network addresses; empty: the machine stays who it is


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A QEMU command line that can be started, and what must be told about it."""

    argv: tuple[str, ...]
    sockets: Mapping[str, str]  # qmp, and where the machine has them serial, agent, vnc
    copies: tuple[tuple[str, str], ...] = ()  # files to copy first: (from, to)
    notes: tuple[str, ...] = ()  # what differs from the captured machine


@dataclass(frozen=True, slots=True)
class Plain:
    """The machine for disks whose own machine nobody knows."""

    memory_bytes: int = 1024 * MiB
    cpus: int = 1


def generic(overlays: Sequence[Overlay], place: Place, plain: Plain) -> CommandLine:
    """A q35 machine with the disks as virtio-blk, in order."""
    sockets = _sockets(place)
    options = [Option("nodefaults"), Option("machine", "q35"), Option("accel", "kvm" if place.kvm else "tcg")]
    options += [Option("cpu", "host" if place.kvm else "max"), Option("smp", str(plain.cpus))]
    options += [Option("m", str(plain.memory_bytes // MiB)), Option("vga", "std")]
    options += [Option("nic", "user,restrict=on,model=virtio-net-pci"), Option("uuid", place.identity)]
    for index, overlay in enumerate(overlays):
        file = {"driver": "file", "filename": overlay.file, "discard": "unmap"}
        node = {"driver": "qcow2", "node-name": f"disk{index}", "discard": "unmap", "file": file}
        device = {"driver": "virtio-blk-pci", "drive": f"disk{index}", "id": f"vd{index}", "bootindex": index + 1}
        options += [qemu_options.json_option("blockdev", node), qemu_options.json_option("device", device)]
    options += [_socket_chardev(_SERIAL, place, "serial"), Option("serial", f"chardev:{_SERIAL}")]
    options = [option for option in options if option != Option("uuid", "")]
    words = qemu_options.render([*options, *_ends(place, sockets, {"serial", "vnc"})])
    return CommandLine(("qemu-system-x86_64", *words), _only(sockets, {"serial", "vnc"}))


def rewrite(argv: Sequence[str], cwd: str, overlays: Sequence[Overlay], place: Place) -> CommandLine:
    """The captured machine on its overlays.  Raises UsageError when something it can't start without is missing."""
    around = Surroundings(place.name, cwd, place.files, place.exists)
    options = qemu_options.parse(argv[1:])
    if any(option.name == "readconfig" for option in options):
        raise UsageError(
            f"Machine {place.name} was started with -readconfig, whose content was not captured; "
            "boot its disks on a plain machine with --generic"
        )
    blocks = qemu_disks.plan(options, overlays, around)
    rewriting = _Rewriting(options, place, around, blocks)
    new = [*rewriting.options(), *blocks.added, *rewriting.missing()]
    sockets = _sockets(place)
    words = qemu_options.render([*new, *_ends(place, sockets, rewriting.ends)])
    program = argv[0] if "/" not in argv[0] else around.resolve(argv[0])
    notes = (*blocks.notes, *dict.fromkeys(rewriting.notes))
    return CommandLine((program, *words), _only(sockets, rewriting.ends), tuple(blocks.copies), notes)


def monitor(path: str) -> str:
    """A monitor on a socket, as QEMU is told; this word is on no other machine's command line."""
    return f"unix:{quote(path)},server=on,wait=off"


def _sockets(place: Place) -> dict[str, str]:
    return {end: f"{place.sockets}/{end}.sock" for end in ("qmp", "serial", "agent", "vnc")}


def _only(sockets: Mapping[str, str], ends: set[str]) -> dict[str, str]:
    return {end: path for end, path in sockets.items() if end == "qmp" or end in ends}


def _ends(place: Place, sockets: Mapping[str, str], ends: set[str]) -> Iterator[Option]:
    """What every machine of ours has: a name, a monitor, and a screen nobody has to see."""
    yield Option("name", f"guest={quote(place.name)}")
    yield Option("qmp", monitor(sockets["qmp"]))
    yield Option("display", "none")
    if "vnc" in ends:
        yield Option("vnc", f"unix:{quote(sockets['vnc'])}")


def _socket_chardev(name: str, place: Place, end: str, *, mux: bool = False) -> Option:
    path, log = quote(_sockets(place)[end]), quote(f"{place.files}/{end}.log")
    return Option("chardev", f"socket,id={name},path={path},server=on,wait=off,logfile={log}{',mux=on' if mux else ''}")


@dataclass
class _Rewriting:
    """One pass over the options of a captured machine."""

    captured: Sequence[Option]
    place: Place
    around: Surroundings
    blocks: qemu_disks.Blocks
    ends: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names = {option.name for option in self.captured}
        self._devices = [Fields.parse(o.value or "", "driver") for o in self.captured if o.name == "device"]
        self._serial = self._primary_serial()
        self._agent = next((d.get("chardev") for d in self._devices if d.get("name") == _AGENT_PORT), "")
        self._cards = 0
        self._serials = 0
        self._kvm = self.place.kvm and self._asked_for_kvm()
        if self._names & {"vnc", "spice"}:
            self.ends.add("vnc")

    def options(self) -> Iterator[Option]:
        """Every option that stays, as it is now."""
        for at, option in enumerate(self.captured):
            if at in self.blocks.options:
                block = self.blocks.options[at]
                yield from [block] if block else []
            elif option.name not in _DROPPED:
                yield from self._rewritten(option)

    def missing(self) -> Iterator[Option]:
        """What QEMU would otherwise add by itself, made harmless."""
        yield Option("accel", self._accelerator())
        if "nodefaults" in self._names:
            return
        yield from (Option("monitor", "none"), Option("parallel", "none"))
        if not self._names & {"netdev", "net", "nic"}:
            yield Option("nic", "user,restrict=on")
        if "serial" not in self._names and not self._serial:
            yield from self._new_serial()

    def _rewritten(self, option: Option) -> Sequence[Option]:
        by_name = {
            "device": self._device,
            "chardev": self._chardev,
            "serial": self._serial_option,
            "netdev": self._netdev,
            "nic": self._nic,
            "net": self._net,
            "machine": self._machine,
            "M": self._machine,
            "cpu": self._cpu,
            "uuid": lambda value: [Option("uuid", self.place.identity or value)],
            "smbios": self._smbios,
            "object": self._object,
            "fw_cfg": lambda value: self._with_file("fw_cfg", value, "name", "file"),
            "acpitable": lambda value: self._with_file("acpitable", value, "", "file", "data"),
            "audiodev": lambda value: [Option("audiodev", f"none,id={Fields.parse(value, 'driver').get('id')}")],
            "audio": lambda value: [Option("audio", Fields.parse(value, "driver").put("driver", "none").render())],
            "L": lambda value: [Option("L", self.around.resolve(value))],
            "bios": lambda value: [Option("bios", self.around.resolve(value) if self.around.has(value) else value)],
            "usbdevice": self._usbdevice,
        }
        if option.name in _FILES:
            return [Option(option.name, self.around.require(option.value or "", _FILES[option.name]))]
        if option.name in _HOST_BOUND_OPTIONS:
            self.notes.append(f"Without {_HOST_BOUND_OPTIONS[option.name]}, which belongs to the old host")
            return []
        rewrite_option = by_name.get(option.name)
        return rewrite_option(option.value or "") if rewrite_option else [option]

    # devices

    def _device(self, value: str) -> Sequence[Option]:
        fields = Fields.parse(value, "driver")
        driver, fate = fields.get("driver"), self.blocks.fates.get(fields.get("drive"))
        if _HOST_BOUND.match(driver):
            self.notes.append(f"Without {driver}, which belongs to the old host")
            return []
        if fate is Fate.GONE:
            return []
        if fate is Fate.EMPTY:
            fields = fields.without("drive")
        if driver in ("scsi-block", "scsi-generic"):  # passed a real disk through
            fields = fields.put("driver", "scsi-hd")
        if driver.endswith(("-gl", "-gl-pci")):  # needs a display with OpenGL
            fields = fields.put("driver", driver.replace("-gl", ""))
        if driver == "vmgenid":  # tells the guest that it was restored
            fields = fields.put("guid", "auto")
        if fields.get("romfile"):
            fields = fields.put("romfile", self._rom(fields.get("romfile")))
        return [Option("device", self._with_new_address(fields, "netdev").render())]

    def _rom(self, path: str) -> str:
        return self.around.resolve(path) if self.around.has(path) else path

    def _with_new_address(self, fields: Fields, card: str) -> Fields:
        """A network card of a new machine is not taken for the old one's."""
        if not (self.place.identity and (fields.get(card) or fields.get("mac") or fields.get("macaddr"))):
            return fields
        self._cards += 1
        digest = hashlib.sha256(f"{self.place.identity} {self._cards}".encode()).hexdigest()
        address = ":".join(("52:54:00", digest[0:2], digest[2:4], digest[4:6]))
        return fields.put("macaddr" if fields.get("macaddr") else "mac", address)

    def _usbdevice(self, value: str) -> Sequence[Option]:
        if value in ("tablet", "mouse", "keyboard"):
            return [Option("usbdevice", value)]
        self.notes.append(f"Without the USB device {value}, which belongs to the old host")
        return []

    # character devices

    def _chardev(self, value: str) -> Sequence[Option]:
        fields = Fields.parse(value, "backend")
        name, mux = fields.get("id"), fields.is_on("mux")
        if name == self._serial:
            self.ends.add("serial")
            return [_socket_chardev(name, self.place, "serial", mux=mux)]
        if name and name == self._agent:
            self.ends.add("agent")
            return [_socket_chardev(name, self.place, "agent")]
        return [Option("chardev", f"null,id={name}{',mux=on' if mux else ''}")]

    def _serial_option(self, value: str) -> Sequence[Option]:
        self._serials += 1
        if value == "none" or value.startswith("chardev:"):
            return [Option("serial", value)]
        if self._serials == 1 and not self._serial:
            return list(self._new_serial())
        return [Option("serial", "null")]

    def _new_serial(self) -> Iterator[Option]:
        self.ends.add("serial")
        yield _socket_chardev(_SERIAL, self.place, "serial")
        yield Option("serial", f"chardev:{_SERIAL}")

    def _primary_serial(self) -> str:
        """The character device of the first serial line; empty when there is none or it has no character device."""
        lines = [o.value or "" for o in self.captured if o.name == "serial"]
        if lines and lines[0] != "none":
            return lines[0].removeprefix("chardev:") if lines[0].startswith("chardev:") else ""
        found = [d.get("chardev") for kind in _SERIAL_DEVICES for d in self._devices if d.get("driver") == kind]
        return next((name for name in found if name), "")

    # network

    def _netdev(self, value: str) -> Sequence[Option]:
        return [Option("netdev", f"user,id={Fields.parse(value, 'type').get('id')},restrict=on")]

    def _nic(self, value: str) -> Sequence[Option]:
        fields = Fields.parse(value, "type")
        if fields.get("type") == "none":
            return [Option("nic", value)]
        kept = self._with_new_address(fields.only("model", "mac", "macaddr", "id", "name"), "type")
        return [Option("nic", ",".join(filter(None, ("user,restrict=on", kept.render()))))]

    def _net(self, value: str) -> Sequence[Option]:
        fields = Fields.parse(value, "type")
        if fields.get("type") == "nic":
            return [Option("net", self._with_new_address(fields, "type").render())]
        return [Option("net", "none" if fields.get("type") == "none" else "user,restrict=on")]

    # the machine itself

    def _machine(self, value: str) -> Sequence[Option]:
        fields = Fields.parse(value, "type").without("accel")
        if not self._kvm:  # these are properties of KVM
            fields = fields.without("kernel_irqchip", "kernel-irqchip", "kvm_shadow_mem", "kvm-shadow-mem")
        return [Option("machine", fields.render())] if fields.pairs else []

    def _cpu(self, value: str) -> Sequence[Option]:
        model = value.partition(",")[0]
        if not self._kvm and model == "host":
            return [Option("cpu", "max")]
        return [Option("cpu", value if self._kvm else value.replace(",enforce=on", "").replace(",enforce", ""))]

    def _asked_for_kvm(self) -> bool:
        machines = [
            Fields.parse(o.value or "", "type").get("accel") for o in self.captured if o.name in ("machine", "M")
        ]
        accels = [Fields.parse(o.value or "", "accel").get("accel") for o in self.captured if o.name == "accel"]
        return "enable-kvm" in self._names or any(accel.split(":")[0] == "kvm" for accel in machines + accels)

    def _accelerator(self) -> str:
        wanted = [o.value or "" for o in self.captured if o.name == "accel"]
        name = "kvm" if self._kvm else "tcg"
        return next((value for value in wanted if value.split(",")[0] == name), name)

    def _smbios(self, value: str) -> Sequence[Option]:
        fields = Fields.parse(value)
        if self.place.identity and fields.get("uuid"):
            fields = fields.put("uuid", self.place.identity)
        return self._with_file("smbios", fields.render(), "", "file")

    def _object(self, value: str) -> Sequence[Option]:
        fields = Fields.parse(value, "qom-type")
        kind = fields.get("qom-type")
        if _DROPPED_OBJECTS.match(kind):
            return []
        if kind.startswith("memory-backend-"):  # memory shared with the old machine would be its memory
            fields = fields.put("qom-type", "memory-backend-ram").only("qom-type", "id", "size")
        return [Option("object", fields.render())]

    def _with_file(self, name: str, value: str, implied: str, *keys: str) -> Sequence[Option]:
        fields = Fields.parse(value, implied)
        for key in keys:
            if fields.get(key):
                fields = fields.put(key, self.around.require(fields.get(key), f"{name} file"))
        return [Option(name, fields.render())]
