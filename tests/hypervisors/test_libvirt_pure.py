"""libvirt's URIs and XML, without a libvirt."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from hvbackup.errors import UsageError
from hvbackup.hypervisors import libvirt_define, libvirt_xml
from hvbackup.hypervisors.libvirt_define import NewDomain
from hvbackup.hypervisors.libvirt_uri import LibvirtUri

DOMAIN = """
<domain type='kvm'><name>web</name><uuid>0f0e0d0c-0b0a-4908-8706-050403020100</uuid>
<genid>1b1e2c3d-0000-4000-8000-000000000000</genid>
<memory unit='GiB'>2</memory><vcpu>4</vcpu><os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
<loader type='pflash'>/code.fd</loader><nvram template='/vars.fd'>/var/lib/nvram/web.fd</nvram></os>
<devices>
<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg/web'/>
<target dev='vda' bus='virtio'/></disk>
<disk type='network' device='disk'><driver name='qemu' type='raw'/><auth username='a'/><source protocol='rbd' name='pool/data'/>
<target dev='vdb' bus='virtio'/><blockio logical_block_size='4096'/></disk>
<disk type='file' device='cdrom'><source file='/iso'/><target dev='sda' bus='sata'/></disk>
<disk type='block' device='lun'><source dev='/dev/sdz'/><target dev='sdb' bus='scsi'/></disk>
<interface type='network'><mac address='52:54:00:00:00:01'/><source network='dmz'/></interface>
<interface type='bridge'><mac address='52:54:00:00:00:02'/><source bridge='br0'/></interface>
<channel type='unix'><source mode='bind' path='/var/lib/libvirt/qemu/channel/target/x'/>
<target name='org.qemu.guest_agent.0'/></channel>
<hostdev mode='subsystem' type='pci'/>
<tpm model='tpm-crb'><backend type='emulator'/></tpm>
</devices></domain>
"""


@pytest.mark.parametrize(
    ("text", "uri", "domains", "local"),
    [
        ("qemu:///system", "qemu:///system", (), True),
        ("qemu:///system?domain=a,b&domain=c", "qemu:///system", ("a", "b", "c"), True),
        ("qemu:///system?socket=/run/x&domain=a", "qemu:///system?socket=/run/x", ("a",), True),
        ("qemu+unix:///session", "qemu+unix:///session", (), True),
        ("qemu+ssh://me@far:2222/system?keyfile=/k", "qemu+ssh://me@far:2222/system?keyfile=/k&no_tty=1", (), False),
        ("qemu+tls://far/system?pkipath=/p&nbd-port=2000", "qemu+tls://far/system?pkipath=/p", (), False),
    ],
)
def test_what_is_libvirts_goes_to_libvirt(text: str, uri: str, domains: tuple[str, ...], local: bool) -> None:
    found = LibvirtUri.parse(text)
    assert (found.uri, tuple(found.domains), found.local) == (uri, domains, local)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("xen:///system", "Not a connection to QEMU"),
        ("qemu+tcp://far/system", "Not a connection to QEMU"),
        ("/etc", "Not a connection to QEMU"),
        ("qemu:///system?domian=a", "did you mean domain"),
        ("qemu:///system?nbd-port=none", "nbd-port is a number"),
    ],
)
def test_what_is_no_connection_is_said(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        LibvirtUri.parse(text)


def test_ssh_knows_where_to_go() -> None:
    found = LibvirtUri.parse("qemu+ssh://me@far:2222/system?keyfile=/k&no_verify=1&command=/bin/s")
    assert (found.login, found.ssh_port, found.keyfile, found.verify, found.ssh) == (
        "me@far",
        2222,
        "/k",
        False,
        "/bin/s",
    )


def test_a_domain_is_read() -> None:
    spec = libvirt_xml.spec(DOMAIN)
    assert [(d.target, d.kind, d.path, d.sector, d.at_rest) for d in spec.disks] == [
        ("vda", "block", "/dev/vg/web", 512, True),
        ("vdb", "network", "rbd:pool/data", 4096, False),
    ]
    assert spec.skipped == {"sda": "a CD-ROM", "sdb": "a LUN that is handed through to the guest"}
    assert (spec.memory_bytes, spec.cpus, spec.nvram, spec.tpm, spec.agent, spec.agent_runs) == (
        2 << 30, 4, "/var/lib/nvram/web.fd", True, True, False,
    )  # fmt: skip
    assert [n["network"] for n in spec.networks] == ["dmz", "br0"]


def test_names_are_quoted_in_what_we_write() -> None:
    text = libvirt_xml.backup({"transport": "unix", "socket": "/a'<b>\"&"}, [], ["vd<a"])
    root = ElementTree.fromstring(text)
    assert root.find("server").get("socket") == "/a'<b>\"&"  # type: ignore[union-attr]
    assert root.find("disks/disk").get("name") == "vd<a"  # type: ignore[union-attr]


def test_a_definition_is_rewritten_and_the_rest_stays() -> None:
    new = NewDomain("again", {"vda": ("/r/vda.qcow2", "qcow2")}, "/r/nvram.raw", {"br0": "lan"}, new_identity=True)
    text, notes = libvirt_define.rewritten(DOMAIN, new)
    root = ElementTree.fromstring(text)
    uuid, name = libvirt_define.identity(text)
    assert name == "again"
    assert uuid not in ("", "0f0e0d0c-0b0a-4908-8706-050403020100")
    assert root.findtext("genid") is None or not root.findtext("genid")
    assert root.findtext("os/nvram") == "/r/nvram.raw"
    disks = {d.find("target").get("dev"): d for d in root.findall("devices/disk")}  # type: ignore[union-attr]
    assert set(disks) == {"vda", "sda"}  # the others were not captured
    assert disks["vda"].get("type") == "file"
    assert disks["vda"].find("source").attrib == {"file": "/r/vda.qcow2"}  # type: ignore[union-attr]
    assert disks["vda"].find("driver").get("type") == "qcow2"  # type: ignore[union-attr]
    assert disks["sda"].find("source") is None
    assert libvirt_define.networks(text) == [("network", "dmz"), ("network", "lan")]
    assert not root.findall("devices/interface/mac")
    assert root.find("devices/channel/source") is None
    assert root.find("devices/tpm") is not None
    assert any("vdb was not captured" in n for n in notes)
    assert any("pci" in n for n in notes)
    with pytest.raises(UsageError, match="no network attic"):
        libvirt_define.rewritten(DOMAIN, NewDomain("again", {}, networks={"attic": "lan"}))


def test_its_own_identity_is_kept_unless_asked_otherwise() -> None:
    text, _ = libvirt_define.rewritten(DOMAIN, NewDomain("web", {}))
    assert libvirt_define.identity(text) == ("0f0e0d0c-0b0a-4908-8706-050403020100", "web")
    assert "52:54:00:00:00:01" in text
    assert ElementTree.fromstring(text).findtext("os/nvram") is None or "/vars.fd" in text
