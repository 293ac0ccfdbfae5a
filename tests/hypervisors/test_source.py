"""What users may call a source, and what they are told when they mistype it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hvbackup.errors import UsageError
from hvbackup.hypervisors.image import ImageSource
from hvbackup.hypervisors.imagedisk import ImageSpec
from hvbackup.hypervisors.nbdsource import NbdSource, NbdSpec
from hvbackup.hypervisors.qemu import QemuHypervisor
from hvbackup.hypervisors.source import SourceOptions, open_source
from hvbackup.nbd.uri import NbdUri

OPTIONS = SourceOptions("00c0ffee", Path("/scratch"))
LISTED = SourceOptions("00c0ffee", Path("/scratch"), changed=Path("/list"))


def images(source: str, options: SourceOptions = OPTIONS) -> tuple[ImageSpec, ...]:
    found = open_source(source, options)
    assert isinstance(found, ImageSource)
    return found._specs


def export(source: str, options: SourceOptions = OPTIONS) -> NbdSpec:
    found = open_source(source, options)
    assert isinstance(found, NbdSource)
    return found._spec


def test_qemu_is_a_socket() -> None:
    found = open_source("qemu:/run/vm%20one/qmp.sock", OPTIONS)
    assert isinstance(found, QemuHypervisor)
    assert found.path == Path("/run/vm one/qmp.sock")


@pytest.mark.parametrize(
    ("source", "specs"),
    [
        ("image:/srv/vm.raw", [ImageSpec(Path("/srv/vm.raw"))]),
        ("image:vm.raw", [ImageSpec(Path("vm.raw"))]),
        ("image:/srv/a b:c.raw", [ImageSpec(Path("/srv/a b:c.raw"))]),
        ("image:/srv/100%25%2C%3F.raw", [ImageSpec(Path("/srv/100%,?.raw"))]),
        ("image:/a.img?format=qcow2&track=no", [ImageSpec(Path("/a.img"), "qcow2", None, track=False)]),
        (
            "image:/a.qcow2,/b?format=raw&changed=/l%2Cist",
            [ImageSpec(Path("/a.qcow2")), ImageSpec(Path("/b"), "raw", Path("/l,ist"))],
        ),
    ],
)
def test_images_are_paths_with_options(source: str, specs: list[ImageSpec]) -> None:
    assert list(images(source)) == specs


@pytest.mark.parametrize(
    ("source", "spec"),
    [
        ("nbd://host:1234/vm", NbdSpec(NbdUri("vm", "host", 1234))),
        ("nbds://host/vm?tls-certificates=/c", NbdSpec(NbdUri("vm", "host", tls=True, certificates="/c"))),
        ("nbd+unix:///vm?socket=/run/a%20b", NbdSpec(NbdUri("vm", socket="/run/a b"))),
        (
            "nbd+unix:///?bitmap=a%26b&socket=/s&changed=/list",
            NbdSpec(NbdUri(socket="/s"), "a&b", Path("/list")),
        ),
    ],
)
def test_nbd_addresses_lose_only_our_options(source: str, spec: NbdSpec) -> None:
    assert export(source) == spec


def test_a_list_belongs_to_the_only_disk() -> None:
    assert images("image:/a.raw?format=raw", LISTED) == (ImageSpec(Path("/a.raw"), "raw", Path("/list")),)
    assert export("nbd://host/vm", LISTED).changed == Path("/list")
    for refused in ("image:/a.raw,/b.raw", "qemu:/qmp.sock"):
        with pytest.raises(UsageError, match="list of changed extents"):
            open_source(refused, LISTED)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("imgae:/a.raw", "Unknown kind of source imgae (did you mean image?)"),
        ("qmp:/run/qmp.sock", "Unknown kind of source qmp"),
        ("ndb://host/vm", "did you mean nbd?"),
        ("zfs:pool", "image:/path/disk.raw"),
        ("/srv/vm.raw", "did you mean image:/srv/vm.raw?"),
        ("./a:b.raw", "did you mean image:./a:b.raw?"),
        ("vm", "Not a source"),
        ("", "Not a source"),
        ("image:", "Nothing follows the colon"),
        ("qemu:", "Nothing follows the colon"),
        ("image:/a.raw,", "empty path"),
        ("image:?format=raw", "empty path"),
        ("image:/a.raw?fromat=raw", "unknown option fromat (did you mean format?); there are format, changed, track"),
        ("image:/a.raw?track=maybe", "track is yes or no"),
        ("qemu:/qmp.sock?name=x", "unknown option name; there are agent"),
        ("nbd://host/vm?bitmpa=x", "did you mean bitmap?"),
        ("nbd+unix:///vm", "No socket named"),
        ("nbd://host:port/vm", "Not an NBD URI"),
    ],
)
def test_what_is_mistyped_is_explained(source: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_source(source, OPTIONS)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_whose_name_means_something_is_spelled_out(tmp_path: Path) -> None:
    path = tmp_path / "a,b?c%20.raw"
    path.write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        open_source(f"image:{path}", OPTIONS)
    plain = f"image:{tmp_path}/a%2Cb%3Fc%2520.raw"
    assert str(caught.value).endswith(f"write {plain}")
    assert images(plain) == (ImageSpec(path),)


@pytest.mark.parametrize(("module", "words"), [("qemu.qmp", "pip install qemu.qmp"), ("libvirt", "python3-libvirt")])
def test_a_missing_sdk_names_its_package(monkeypatch: pytest.MonkeyPatch, module: str, words: str) -> None:
    def missing(_: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UsageError, match=f"need {module}: .*{words}"):
        open_source("qemu:/qmp.sock", OPTIONS)


def test_a_hole_in_our_own_program_is_not_called_a_missing_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'hvbackup.x'", name="hvbackup.x")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError):
        open_source("qemu:/qmp.sock", OPTIONS)


def test_an_image_needs_no_sdk() -> None:
    script = (
        "import sys; from pathlib import Path; from hvbackup.hypervisors.source import *;"
        "open_source('image:/a.raw', SourceOptions('00c0ffee', Path('/s')));"
        "sys.exit(any(name.split('.')[0] in ('qemu', 'asyncio', 'libvirt') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120, check=False).returncode == 0
