"""A domain's definition, rewritten so that it becomes a machine again: on restored disks, with other networks, as itself or anew.

What is not changed here stays as it was captured, so that the guest finds every device in its place.  Pure.
"""

from __future__ import annotations

import uuid
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree.ElementTree import Element, SubElement

from hvbackup.errors import UsageError

_SOURCE_KINDS = {"network": "network", "bridge": "bridge"}


@dataclass(frozen=True, slots=True)
class NewDomain:
    """What is different this time."""

    name: str
    disks: Mapping[str, tuple[str, str]]  # target -> file and format
    nvram: str = ""
    networks: Mapping[str, str] = field(default_factory=dict)  # as captured -> as wanted
    new_identity: bool = False  # another UUID and other network addresses


def rewritten(native: str, new: NewDomain) -> tuple[str, list[str]]:
    """The definition, and what could not come along.  Raises UsageError."""
    root = ElementTree.fromstring(native)
    notes: list[str] = []
    _text(root, "name", new.name)
    if new.new_identity:
        _text(root, "uuid", str(uuid.uuid4()))
    for genid in root.findall("genid"):
        genid.text = None  # libvirt makes a new one: the guest must know that it was set back
    _place_nvram(root, new.nvram)
    devices = root.find("devices")
    if devices is not None:
        for disk in devices.findall("disk"):
            _place(devices, disk, new, notes)
        _wire(devices, new)
        _free_sockets(devices)
        notes += [
            f"It uses a device of its host ({d.get('type')}), which this one must have"
            for d in devices.findall("hostdev")
        ]
    return ElementTree.tostring(root, encoding="unicode"), notes


def plain(portable: Mapping[str, Any], new: NewDomain) -> str:
    """A definition for a machine that was captured elsewhere: the same memory, processors and disks on a plain machine."""
    root = Element("domain", type="kvm")
    _text(root, "name", new.name)
    memory = SubElement(root, "memory", unit="b")
    memory.text = str(int(portable.get("memory_bytes") or 1 << 30))
    _text(root, "vcpu", str(int(portable.get("cpus") or 1)))
    SubElement(SubElement(root, "os"), "type", arch="x86_64", machine="q35").text = "hvm"
    SubElement(SubElement(root, "features"), "acpi")
    devices = SubElement(root, "devices")
    for index, (path, form) in enumerate(new.disks.values()):
        disk = SubElement(devices, "disk", type="file", device="disk")
        SubElement(disk, "driver", name="qemu", type=form)
        SubElement(disk, "source", file=path)
        SubElement(disk, "target", dev=f"vd{chr(97 + index)}", bus="virtio")
    SubElement(devices, "console", type="pty")
    SubElement(devices, "graphics", type="vnc", listen="127.0.0.1")
    return ElementTree.tostring(root, encoding="unicode")


def networks(native: str) -> Sequence[tuple[str, str]]:
    """(kind, name) of every network the definition is on."""
    found = []
    for interface in ElementTree.fromstring(native).findall("devices/interface"):
        kind, source = interface.get("type", ""), interface.find("source")
        if source is not None and kind in _SOURCE_KINDS:
            found.append((kind, source.get(_SOURCE_KINDS[kind], "")))
    return found


def identity(xml: str) -> tuple[str, str]:
    """UUID and name of a definition."""
    root = ElementTree.fromstring(xml)
    return root.findtext("uuid", ""), root.findtext("name", "")


def _text(root: Element, tag: str, value: str) -> None:
    found = root.find(tag)
    (SubElement(root, tag) if found is None else found).text = value


def _place(devices: Element, disk: Element, new: NewDomain, notes: list[str]) -> None:
    """A disk on its restored file; one that was not captured loses its medium, or goes."""
    target = disk.find("target")
    name = target.get("dev", "") if target is not None else ""
    for tag in ("backingStore", "auth", "mirror"):
        for child in disk.findall(tag):
            disk.remove(child)
    source = disk.find("source")
    if name in new.disks:
        path, form = new.disks[name]
        disk.set("type", "file")
        driver = disk.find("driver")
        (SubElement(disk, "driver", name="qemu") if driver is None else driver).set("type", form)
        if source is not None:
            disk.remove(source)
        SubElement(disk, "source", file=path)
    elif disk.get("device") in ("cdrom", "floppy"):
        if source is not None:
            disk.remove(source)
    else:
        devices.remove(disk)
        notes.append(f"Disk {name} was not captured and is left out")


def _place_nvram(root: Element, path: str) -> None:
    nvram = root.find("os/nvram")
    if nvram is None:
        return
    for child in list(nvram):
        nvram.remove(child)
    nvram.attrib.pop("type", None)
    if path:
        nvram.text = path
    else:
        system = root.find("os")
        assert system is not None  # it has a child
        if nvram.get("template"):
            nvram.text = None
        else:
            system.remove(nvram)


def _wire(devices: Element, new: NewDomain) -> None:
    """Networks under their names on this host.  Raises UsageError for a mapping that maps nothing."""
    seen = set()
    for interface in devices.findall("interface"):
        mac, source = interface.find("mac"), interface.find("source")
        if new.new_identity and mac is not None:
            interface.remove(mac)  # libvirt makes one
        key = _SOURCE_KINDS.get(interface.get("type", ""), "")
        name = source.get(key, "") if source is not None and key else ""
        if source is None or name not in new.networks:
            continue
        seen.add(name)
        if interface.get("type") == "bridge":
            interface.set("type", "network")
        source.attrib.clear()
        source.set("network", new.networks[name])
    if unknown := set(new.networks) - seen:
        raise UsageError(f"The machine was on no network {', '.join(sorted(unknown))}; see its networks with --json")


def _free_sockets(devices: Element) -> None:
    """Channels get their sockets from libvirt, not from the machine that had them before."""
    for channel in devices.findall("channel"):
        source = channel.find("source")
        if channel.get("type") == "unix" and source is not None and "/channel/" in source.get("path", ""):
            channel.remove(source)
