"""Reading QEMU's answers, without a QEMU: filters, identities, what is left out, where a server listens."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from hvbackup.errors import StreamBypassed, UsageError
from hvbackup.hypervisors import qemu_config, qemu_fleeced, qemu_server, qemu_stop
from hvbackup.hypervisors.qemu_config import CommandLine
from hvbackup.hypervisors.qemu_graph import BlockGraph, Device, daemon_devices, device_id, qom_path, why_skipped
from hvbackup.hypervisors.qemu_names import StoreNames
from hvbackup.hypervisors.qemu_stream import offsets
from hvbackup.hypervisors.qmp import Peer
from hvbackup.model import Disk, DiskId, LeaseId, Token
from hvbackup.nbd.uri import NbdUri


def raw_node(name: str, driver: str = "qcow2", **more: Any) -> dict[str, Any]:
    image = {"virtual-size": 1 << 20, "format-specific": {"data": {"compat": "1.1"}}}
    return {"node-name": name, "drv": driver, "ro": False, "file": f"/images/{name}", "image": image, **more}


def raw_graph(**below: list[tuple[str, str]]) -> dict[str, Any]:
    """Parent node -> (role, child)."""
    names = sorted({*below, *(child for children in below.values() for _, child in children)})
    ids = {name: number for number, name in enumerate(names)}
    edges = [{"parent": ids[p], "child": ids[c], "name": role} for p, children in below.items() for role, c in children]
    return {"nodes": [{"id": i, "name": n, "type": "block-driver"} for n, i in ids.items()], "edges": edges}


def test_filters_are_looked_through_to_the_format() -> None:
    nodes = [raw_node("mirror", "mirror_top"), raw_node("cor", "copy-on-read"), raw_node("disk"), raw_node("f", "file")]
    graph = BlockGraph.parse(
        nodes, raw_graph(mirror=[("backing", "cor"), ("target", "f")], cor=[("file", "disk")], disk=[("file", "f")])
    )
    drive = graph.drive(Device("mirror", "vda", 4096))
    assert (drive.node, drive.driver, drive.disk.id, drive.disk.sector) == ("disk", "qcow2", "vda", 4096)
    assert drive.keeps_bitmaps


def test_a_filter_nobody_can_look_through_is_named() -> None:
    graph = BlockGraph.parse([raw_node("limit", "throttle")], None)
    with pytest.raises(UsageError, match=r"limit is a filter \(throttle\)"):
        graph.drive(Device("limit", "vda"))


@pytest.mark.parametrize(
    ("change", "keeps"),
    [
        ({}, True),
        ({"drv": "raw"}, False),
        ({"ro": True}, False),
        ({"image": {"virtual-size": 1, "format-specific": {"data": {"compat": "0.10"}}}}, False),
        ({"image": {"virtual-size": 1}}, True),
    ],
)
def test_which_disks_store_bitmaps(change: dict[str, Any], keeps: bool) -> None:
    graph = BlockGraph.parse([{**raw_node("d"), **change}], raw_graph())
    assert graph.drive(Device("d", "vda")).keeps_bitmaps is keeps


def test_a_daemons_disks_are_what_is_exported_and_what_nobody_uses() -> None:
    nodes = [raw_node(name) for name in ("a", "b", "base", "hvb-00c0ffee-x-f0", "hvb-00c0ffee-x-p0", "exported-base")]
    below = {
        "b": [("backing", "base")],
        "hvb-00c0ffee-x-f0": [("backing", "a"), ("file", "hvb-00c0ffee-x-p0")],
        "base": [("backing", "exported-base")],
    }
    graph = BlockGraph.parse(nodes, raw_graph(a=[], **below))
    exports = [{"id": "theirs", "node-name": "exported-base"}, {"id": "hvb-00c0ffee-x-e0", "node-name": "a"}]
    assert [d.id for d in daemon_devices(graph, exports, "hvb-00c0ffee-")] == ["a", "b", "exported-base"]


def test_without_a_graph_a_daemons_disks_are_what_it_exports() -> None:
    graph = BlockGraph.parse([raw_node("a"), raw_node("b")], None)
    assert [d.id for d in daemon_devices(graph, [{"id": "x", "node-name": "b"}], "hvb-")] == ["b"]


@pytest.mark.parametrize(
    ("block", "name", "path"),
    [
        ({"qdev": "/machine/peripheral/vda/virtio-backend"}, "vda", "/machine/peripheral/vda/virtio-backend"),
        ({"qdev": "/machine/peripheral/sd0"}, "sd0", "/machine/peripheral/sd0"),
        ({"qdev": "ide0"}, "ide0", "/machine/peripheral/ide0"),
        (
            {"qdev": "/machine/unattached/device[3]/virtio-backend", "device": "virtio0"},
            "virtio0",
            "/machine/unattached/device[3]/virtio-backend",
        ),
        (
            {"qdev": "/machine/peripheral-anon/device[0]", "device": "", "inserted": {"node-name": "root"}},
            "root",
            "/machine/peripheral-anon/device[0]",
        ),
        (
            {"qdev": "/machine/peripheral-anon/device[0]", "device": "", "inserted": {"node-name": "#block1"}},
            "machine/peripheral-anon/device[0]",
            "/machine/peripheral-anon/device[0]",
        ),
        ({"device": "spare"}, "spare", ""),
    ],
)
def test_identities_that_do_not_change_with_a_restart(block: dict[str, Any], name: str, path: str) -> None:
    assert (device_id(block), qom_path(block)) == (name, path)


@pytest.mark.parametrize(
    ("block", "qom_type", "why"),
    [
        ({"qdev": "x", "inserted": {"ro": False}}, "virtio-blk-device", ""),
        ({"qdev": "x", "inserted": {"ro": True}}, "scsi-hd", ""),
        ({"qdev": "x", "inserted": {"ro": False}}, "cfi.pflash01", ""),
        ({"qdev": "x", "inserted": {"ro": True}}, "cfi.pflash01", "read-only firmware"),
        ({"qdev": "x"}, "scsi-hd", "empty"),
        ({"qdev": "x", "inserted": {"ro": True}}, "scsi-cd", "a CD-ROM"),
        ({"qdev": "x", "inserted": {"ro": True}, "tray_open": False}, "", "a CD-ROM"),
        ({"qdev": "x"}, "floppy", "a floppy"),
        ({"inserted": {"ro": False}}, "", "attached to no device"),
    ],
)
def test_what_is_left_out_and_why(block: dict[str, Any], qom_type: str, why: str) -> None:
    assert why_skipped(block, qom_type) == why


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("addr.type=unix,addr.path=/run/x.sock", NbdUri(socket="/run/x.sock")),
        ("addr.type=unix,addr.path=x,,y.sock,max-connections=3", NbdUri(socket="/home/x,y.sock")),
        ('{"addr": {"type": "unix", "path": "/run/x.sock"}}', NbdUri(socket="/run/x.sock")),
        ("addr.type=inet,addr.host=::1,addr.port=10810", NbdUri(host="::1", port=10810)),
        ("addr.type=inet,addr.port=nbd", None),
        ("addr.type=fd,addr.str=3", None),
        ("addr.type=unix,addr.path=/run/x.sock,tls-creds=tls0", None),
    ],
)
def test_where_a_daemon_was_told_to_listen(option: str, expected: NbdUri | None) -> None:
    assert qemu_server.address(option, "/home") == expected


def test_options_of_a_command_line() -> None:
    line = CommandLine(["qsd", "--nbd-server", "a", "--nbd-server=b", "-nbd-server", "c", "nbd-server", "--nbd-server"])
    assert line.option("nbd-server") == ["a", "b", "c", ""]


def test_a_peer_that_can_not_be_seen_is_said_and_harms_nothing() -> None:
    for peer, words in (
        (Peer(0, 0, 0), "namespace"),
        (Peer(2**22 + 1, 0, 0), "can't be read"),
        (Peer(1, 0, 0), "not by"),
    ):
        line = qemu_config.of_peer(peer)
        assert words in line.note
        assert qemu_config.config(line, [], qemu_config.Facts()).kind == ""


def test_names_fit_into_qemu_and_tell_leases_apart() -> None:
    store = StoreNames("00c0ffee")
    one, two = store.of(LeaseId("x" * 100)), store.of(LeaseId("y"))
    assert one.prefix != two.prefix
    assert len(one.fleece(999)) <= 31
    assert all(n.startswith(store.prefix) for n in (one.fleece(0), one.job(1), one.export(2), one.merged))
    assert store.is_checkpoint(store.new_checkpoint())
    assert store.new_checkpoint() != store.new_checkpoint()
    assert not store.is_checkpoint(one.merged)
    assert not StoreNames("ffffffff").is_checkpoint(store.new_checkpoint())
    assert Path(one.folder("m1")).name.startswith(store.folder_prefix("m1"))
    assert store.folder_prefix("m1") != store.folder_prefix("m2")


@pytest.mark.parametrize(
    ("status", "migration", "elsewhere"),
    [
        ("running", {"status": "completed"}, False),  # it has come here
        ("prelaunch", {"status": "completed"}, False),  # and was reset
        ("prelaunch", {}, False),
        ("prelaunch", {"status": "failed", "total-time": 3}, False),
        ("postmigrate", {"status": "completed", "total-time": 3}, True),
        ("prelaunch", {"status": "completed", "total-time": 3}, True),  # it has gone, and what is left of it was reset
        ("finish-migrate", {"status": "active", "total-time": 3}, True),
        ("inmigrate", {}, True),
    ],
)
def test_a_machine_that_has_gone_to_another_qemu_is_known_by_its_state(
    status: str, migration: dict[str, object], elsewhere: bool
) -> None:
    with pytest.raises(StreamBypassed, match="live migration") if elsewhere else contextlib.nullcontext():
        qemu_stop.refuse_elsewhere(Path("qmp.sock"), {"status": status}, lambda: migration, StreamBypassed)


INNER = '{"driver": "file", "filename": "/a.qcow2"}'


@pytest.mark.parametrize(
    ("path", "elsewhere"),
    [
        ("/a.qcow2", False),
        (f'json:{{"driver": "qcow2", "file": {INNER}}}', False),
        (f'json:{{"backing": {{"driver": "null-co"}}, "driver": "qcow2", "file": {INNER}}}', False),
        ("/b.qcow2", True),
        (f'json:{{"driver": "raw", "offset": 512, "file": {INNER}}}', True),
        ('json:{"driver": "nbd", "server": {"type": "unix", "path": "/a.qcow2"}}', True),
    ],
)
def test_in_which_file_a_disk_was_is_known_however_it_is_described(path: str, elsewhere: bool) -> None:
    then, now = (Disk(DiskId("vda"), 4096, 512, where) for where in ("/a.qcow2", path))
    token = Token("qemu-bitmap", "safe", qemu_fleeced.life(then))
    assert qemu_fleeced.is_elsewhere(now, token) is elsewhere
    assert not qemu_fleeced.is_elsewhere(now, Token("qemu-bitmap", "safe", "size=4096")), "an old one does not know"
    assert not qemu_fleeced.is_elsewhere(now, Token("qemu-bitmap", "safe", "size=4096;file=1;below=")), "nor libvirt's"


@pytest.mark.parametrize(("bursts", "slack"), [([0], 0), ([64, 0], 0), ([64, 512, 8, 64, 64], 8)])
def test_what_arrives_while_a_stream_begins_hides_no_write_later(bursts: list[int], slack: int) -> None:
    """100 bytes were written before; each burst arrives while QEMU drains, and is counted then."""
    there, left = [0], list(bursts)

    def drained() -> dict[DiskId, int]:
        there[0] += left.pop(0)
        return {DiskId("vda"): 100 + there[0]}

    assert offsets([DiskId("vda")], lambda _: there[0], drained) == {"vda": 100 + slack}
    assert not left
