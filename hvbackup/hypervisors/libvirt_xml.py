"""libvirt's XML, as far as we read and write it.  Pure."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element
from xml.sax.saxutils import quoteattr

NAMESPACE = "https://hvbackup.org/xmlns/libvirt/1"  # a name, not an address
RAW, QCOW2 = "raw", "qcow2"

_SIZES = {
    "b": 1,
    "bytes": 1,
    "KB": 1000,
    "k": 1024,
    "KiB": 1024,
    "MB": 10**6,
    "M": 1 << 20,
    "MiB": 1 << 20,
    "G": 1 << 30,
}
_SIZES |= {"GB": 10**9, "GiB": 1 << 30, "T": 1 << 40, "TB": 10**12, "TiB": 1 << 40}
_NO_DISK = {"cdrom": "a CD-ROM", "floppy": "a floppy", "lun": "a LUN that is handed through to the guest"}
_NO_BLOCKS = ("vhostuser", "nvme", "vhostvdpa")


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """One disk as the domain's XML has it."""

    target: str  # vda: what libvirt calls it in every life of the machine
    kind: str  # file, block, network, volume, ...
    path: str  # of its file or device; a name for people where it is neither
    format: str
    sector: int
    alias: str  # QEMU's id of the device
    read_only: bool
    below: Sequence[str]  # the files it is based on
    skip: str = ""  # why it is not captured

    @property
    def at_rest(self) -> bool:
        """Whether it could be read without a QEMU."""
        return self.kind in ("file", "block")


@dataclass(frozen=True, slots=True)
class DomainSpec:
    """What we want to know of a domain."""

    uuid: str
    name: str
    disks: Sequence[DomainDisk]  # those that are captured
    skipped: Mapping[str, str]
    memory_bytes: int
    cpus: int
    machine_type: str
    arch: str
    nvram: str = ""  # the file that holds the firmware's variables
    tpm: bool = False  # an emulated one, with state of its own
    agent: bool = False  # a port for a guest agent
    agent_runs: bool = False  # and somebody in the guest opened it
    networks: Sequence[Mapping[str, str]] = ()
    tags: Sequence[str] = ()  # of its metadata, in our namespace


def spec(text: str) -> DomainSpec:
    """What a domain's XML says."""
    root = ElementTree.fromstring(text)
    disks = [_disk(e) for e in root.findall("devices/disk")]
    kind = root.find("os/type")
    nvram = root.findtext("os/nvram", "").strip()
    source = root.find("os/nvram/source")
    port = root.find("devices/channel/target[@name='org.qemu.guest_agent.0']")
    return DomainSpec(
        uuid=root.findtext("uuid", ""),
        name=root.findtext("name", ""),
        disks=[d for d in disks if not d.skip],
        skipped={d.target: d.skip for d in disks if d.skip},
        memory_bytes=_bytes(root.find("memory")),
        cpus=int(root.findtext("vcpu", "1")),
        machine_type=kind.get("machine", "") if kind is not None else "",
        arch=kind.get("arch", "") if kind is not None else "",
        nvram=nvram or (source.get("file", "") if source is not None else ""),
        tpm=root.find("devices/tpm/backend[@type='emulator']") is not None,
        agent=port is not None,
        agent_runs=port is not None and port.get("state") == "connected",
        networks=[_interface(e) for e in root.findall("devices/interface")],
        tags=_tags(root),
    )


def _tags(root: Element) -> list[str]:
    """`<metadata><h:tags xmlns:h="…">prod, db</h:tags></metadata>`, also with an element for each."""
    found = root.find(f"metadata/{{{NAMESPACE}}}tags")
    words = " ".join(found.itertext()).replace(",", " ").split() if found is not None else []
    return list(dict.fromkeys(words))


def _disk(element: Element) -> DomainDisk:
    kind, driver, block = element.get("type", ""), element.find("driver"), element.find("blockio")
    target, alias = element.find("target"), element.find("alias")
    path = _path(element.find("source"), kind)
    device = element.get("device", "disk")
    skip = _NO_DISK.get(device, "" if device == "disk" else f"a {device}")
    if not skip and kind in _NO_BLOCKS:
        skip = f"a device of kind {kind}, which QEMU can't show us"
    return DomainDisk(
        target=target.get("dev", "") if target is not None else "",
        kind=kind,
        path=path,
        format=driver.get("type", RAW) if driver is not None else RAW,
        sector=int(block.get("logical_block_size", "512")) if block is not None else 512,
        alias=alias.get("name", "") if alias is not None else "",
        read_only=element.find("readonly") is not None,
        below=list(_below(element.find("backingStore"))),
        skip=skip or ("" if path else "empty"),
    )


def _path(source: Element | None, kind: str) -> str:
    if source is None:
        return ""
    if kind == "volume":
        return f"{source.get('pool', '')}/{source.get('volume', '')}"
    if kind == "network":
        return f"{source.get('protocol', '')}:{source.get('name', '')}"
    return source.get("file") or source.get("dev") or source.get("dir") or ""


def _below(store: Element | None) -> Iterable[str]:
    while store is not None and store.get("type"):
        yield _path(store.find("source"), store.get("type", ""))
        store = store.find("backingStore")


def _interface(element: Element) -> Mapping[str, str]:
    source, mac = element.find("source"), element.find("mac")
    where = next(iter(source.attrib.values()), "") if source is not None else ""
    network = source.get("network") or source.get("bridge") or where if source is not None else ""
    return {
        "type": element.get("type", ""),
        "network": network,
        "mac": mac.get("address", "") if mac is not None else "",
    }


def _bytes(element: Element | None) -> int:
    if element is None or not (element.text or "").strip().isdigit():
        return 0
    return int(element.text or 0) * _SIZES.get(element.get("unit", "KiB"), 1024)


# --- what we write ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wanted:
    """One disk of a backup."""

    target: str
    export: str
    scratch: str
    since: str = ""  # a checkpoint; "": everything
    bitmap: str = ""  # under which name its changes are shown


def backup(server: Mapping[str, str], wanted: Sequence[Wanted], left_out: Iterable[str]) -> str:
    """A backup in pull mode."""
    disks = "".join(_wanted(w) for w in wanted) + "".join(f"<disk name={_q(t)} backup='no'/>" for t in left_out)
    return f"<domainbackup mode='pull'><server{_attributes(server)}/><disks>{disks}</disks></domainbackup>"


def _wanted(w: Wanted) -> str:
    how = {"backupmode": "incremental", "incremental": w.since, "exportbitmap": w.bitmap} if w.since else {}
    attributes = {"name": w.target, "backup": "yes", "type": "file", "exportname": w.export}
    scratch = f"<scratch file={_q(w.scratch)}/>" if w.scratch else ""
    return (
        f"<disk{_attributes({**attributes, **(how or {'backupmode': 'full'})})}><driver type='qcow2'/>{scratch}</disk>"
    )


def checkpoint(name: str, targets: Iterable[str], left_out: Iterable[str] = (), made: int = 0) -> str:
    """A checkpoint of these disks; with a time, one that was made then."""
    disks = "".join(f"<disk name={_q(t)} checkpoint='bitmap' bitmap={_q(name)}/>" for t in targets)
    disks += "".join(f"<disk name={_q(t)} checkpoint='no'/>" for t in left_out)
    when = f"<creationTime>{made}</creationTime>" if made else ""
    return f"<domaincheckpoint><name>{name}</name>{when}<disks>{disks}</disks></domaincheckpoint>"


def exports(text: str) -> Sequence[str]:
    """The names under which a running backup shows its disks."""
    return [d.get("exportname", "") for d in ElementTree.fromstring(text).findall("disks/disk")] if text else []


def bitmaps(text: str) -> Sequence[str]:
    """The disks a checkpoint records changes of."""
    found = ElementTree.fromstring(text).findall("disks/disk[@checkpoint='bitmap']")
    return [d.get("name", "") for d in found]


def owner(capabilities: str) -> tuple[int, int]:
    """Which user and group QEMU runs as; root where the daemon does not say."""
    for model in ElementTree.fromstring(capabilities).findall("host/secmodel"):
        if model.findtext("model") == "dac":
            label = next((b.text or "" for b in model.findall("baselabel")), "").replace("+", "").partition(":")
            if label[0].isdigit() and label[2].isdigit():
                return int(label[0]), int(label[2])
    return 0, 0


def _attributes(values: Mapping[str, str]) -> str:
    return "".join(f" {key}={_q(value)}" for key, value in values.items())


def _q(text: str) -> str:
    return quoteattr(text)
