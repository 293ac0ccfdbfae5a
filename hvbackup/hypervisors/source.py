"""What the user calls a source: `qemu:/run/vm/qmp.sock`, `image:/srv/vm.raw`, `nbd://host/export`.

    qemu:/path/qmp.sock                       the machine of a running QEMU; ?agent=PATH where its guest agent listens
    image:/path/disk.raw,/path/other.qcow2    the disks of a machine that is switched off
    libvirt:qemu:///system                    every machine of a host; ?domain=NAME,NAME only these; qemu+ssh://, qemu+tls://
    nbd://host:port/export                    any NBD export; also nbds://, nbd+unix:///export?socket=/path

An image takes options: `?format=raw` (or qcow2, vmdk, ...), `?changed=FILE` (a list of changed extents), `?track=no` (add
no bitmap to a qcow2 image).  An NBD address takes `?bitmap=NAME` and `?changed=FILE`.  In paths, `%`, `?` and `,` are
written %25, %3F and %2C.

An adapter's modules are imported when a source asks for it: a missing SDK disables that adapter alone.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

from hvbackup.errors import UsageError
from hvbackup.hypervisors import Hypervisor
from hvbackup.hypervisors.libvirt_uri import LibvirtUri
from hvbackup.nbd.uri import NbdUri

NBD_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")
SCHEMES = ("qemu", "libvirt", "image", *NBD_SCHEMES)

_EXAMPLES = "qemu:/path/qmp.sock, libvirt:qemu:///system, image:/path/disk.raw, nbd://host/export, nbd+unix:///export?socket=/path"
_PLAIN = "".join(chr(n) for n in range(33, 127) if chr(n) not in "%?,") + " "  # what a path may hold as it is
_PACKAGES = {  # module -> how to get it
    "qemu": "pip install qemu.qmp (Debian 13: apt install python3-qemu-qmp)",
    "libvirt": "apt install python3-libvirt, or pip install libvirt-python",
    "pyVmomi": "pip install pyvmomi",
    "proxmoxer": "pip install proxmoxer",
}


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What an adapter needs to know beside where to look."""

    store_id: str  # 8 hexadecimal digits: names everything we make on the host
    scratch: Path  # where a running QEMU may put old blocks
    runtime: Path | None = None  # where sockets of our own servers go; None: the system's place
    name: str = ""  # what people call the machine; "": what the platform says
    changed: Path | None = None  # a list of changed extents for a source with one disk
    machine_file: Path | None = None  # the machine's configuration, where it can't be asked
    agent: Path | None = None  # where the guest agent of a source with one machine listens; None: QEMU knows
    exclude_mountpoints: Sequence[str] = ()  # these go on when the guest is frozen
    freeze_limit_seconds: float | None = None  # the guest is let go then, whatever happens; None: the adapter's own

    @property
    def freezing(self) -> bool:
        """Whether something was said about freezing a guest."""
        return bool(self.agent or self.exclude_mountpoints or self.freeze_limit_seconds)


def tells_events(source: str) -> bool:
    """Whether the platform of a source says what happens to its machines, as it happens."""
    return source.partition(":")[0] == "libvirt"


def open_source(source: str, options: SourceOptions) -> Hypervisor:
    """The adapter for a source; nothing is connected yet.  Raises UsageError."""
    scheme, _, rest = source.partition(":")
    if scheme in SCHEMES and scheme not in ("qemu", "libvirt") and options.freezing:
        raise UsageError(
            f"{source}: There is no guest to freeze; --agent, --exclude-mountpoint and --freeze-limit go with "
            "qemu: and libvirt:"
        )
    if scheme in NBD_SCHEMES:
        return _nbd(source, options)
    if scheme == "image" and rest:
        return _image(rest, options)
    if scheme == "qemu" and rest:
        return _qemu(rest, options)
    if scheme == "libvirt" and rest:
        return _libvirt(rest, options)
    raise _unknown(source)


def _qemu(rest: str, options: SourceOptions) -> Hypervisor:
    if options.changed:
        raise UsageError("A list of changed extents is for images and NBD exports; QEMU knows by itself what changed")
    path, given = _path_and_options(rest)
    _only(f"qemu:{rest}", given, ("agent",))
    adapter = adapter_of("hvbackup.hypervisors.qemu", "qemu:")
    agent = Path(given["agent"]) if given.get("agent") else options.agent
    limit = {"limit_seconds": options.freeze_limit_seconds} if options.freeze_limit_seconds else {}
    found: Hypervisor = adapter.QemuHypervisor(
        path,
        options.store_id,
        scratch_dir=options.scratch,
        machine_file=options.machine_file,
        freezing=adapter.Freezing(agent, options.exclude_mountpoints, **limit),
    )
    return found


def _libvirt(rest: str, options: SourceOptions) -> Hypervisor:
    if options.changed or options.machine_file:
        raise UsageError("--changed and --machine are for sources that know less; libvirt knows both by itself")
    adapter = adapter_of("hvbackup.hypervisors.libvirt", "libvirt:")
    limit = {"limit_seconds": options.freeze_limit_seconds} if options.freeze_limit_seconds else {}
    found: Hypervisor = adapter.LibvirtHypervisor(
        LibvirtUri.parse(rest),
        options.store_id,
        scratch_dir=options.scratch,
        runtime=options.runtime,
        freezing=adapter.Freezing(options.agent, options.exclude_mountpoints, **limit),
    )
    return found


def _image(rest: str, options: SourceOptions) -> Hypervisor:
    adapter = adapter_of("hvbackup.hypervisors.image", "image:")
    if rest != (plain := quote(rest, safe=_PLAIN)) and Path(rest).exists():
        raise UsageError(f"image:{rest}: In a file's name '%', '?' and ',' mean something; write image:{plain}")
    specs = [_image_spec(adapter, part) for part in rest.split(",")]
    if options.changed and len(specs) > 1:
        raise UsageError(
            "With several disks, say to which one a list of changed extents belongs: /disk.raw?changed=FILE"
        )
    if options.changed:
        specs = [adapter.ImageSpec(specs[0].path, specs[0].format, options.changed, specs[0].track)]
    found: Hypervisor = adapter.ImageSource(specs, options.store_id, name=options.name, runtime=options.runtime)
    return found


def _image_spec(adapter: ModuleType, part: str) -> Any:
    path, given = _path_and_options(part)
    _only(f"image:{part}", given, ("format", "changed", "track"))
    if given.get("track", "yes") not in ("yes", "no"):
        raise UsageError(f"image:{part}: track is yes or no")
    changed = Path(given["changed"]) if given.get("changed") else None
    return adapter.ImageSpec(path, given.get("format", ""), changed, given.get("track") != "no")


def _nbd(source: str, options: SourceOptions) -> Hypervisor:
    adapter = adapter_of("hvbackup.hypervisors.nbdsource", "nbd:")
    head, _, query = source.partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    _only(source, given, ("bitmap", "changed", "socket", "tls-certificates"))
    bitmap, listed = given.pop("bitmap", ""), given.pop("changed", "")
    plain = head + ("?" + "&".join(f"{key}={quote(value)}" for key, value in given.items()) if given else "")
    changed = options.changed or (Path(listed) if listed else None)
    spec = adapter.NbdSpec(NbdUri.parse(plain), bitmap, changed)
    found: Hypervisor = adapter.NbdSource(spec, name=options.name)
    return found


def _path_and_options(text: str) -> tuple[Path, Mapping[str, str]]:
    """A path with an optional query, in the way of a URI."""
    path, _, query = text.partition("?")
    if not path:
        raise UsageError("There is an empty path in this source; a comma in a file's name is written %2C")
    return Path(unquote(path)), dict(parse_qsl(query, keep_blank_values=True))


def _only(source: str, given: Mapping[str, str], known: tuple[str, ...]) -> None:
    for option in given:
        if option not in known:
            raise UsageError(f"{source}: unknown option {option}{_nearest(option, known)}; {_listing(known)}")


def _listing(known: tuple[str, ...]) -> str:
    return f"there are {', '.join(known)}" if known else "this kind of source has none"


def _nearest(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, 1, 0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def _unknown(source: str) -> UsageError:
    scheme, colon, _ = source.partition(":")
    if colon and scheme in SCHEMES:
        return UsageError(f"{source}: Nothing follows the colon; sources look like {_EXAMPLES}")
    if not colon or "/" in scheme:
        hint = f" (did you mean image:{source}?)" if "/" in source else ""
        return UsageError(f"{source}: Not a source, it names no kind{hint}; sources look like {_EXAMPLES}")
    near = _nearest(scheme, SCHEMES)
    return UsageError(f"{source}: Unknown kind of source {scheme}{near}; sources look like {_EXAMPLES}")


def adapter_of(module: str, scheme: str) -> ModuleType:
    """A module that needs an SDK.  Raises UsageError when that is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _PACKAGES:
            raise
        raise UsageError(f"Sources that begin with {scheme} need {error.name}: {_PACKAGES[missing]}") from error
