"""The spelling of QEMU's command line, against QEMU's own."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvbackup.recover.qemu_options import _ALONE, Fields, Option, parse, render

keys = st.from_regex(r"[a-z][a-z-]{0,5}(\.[a-z][a-z-]{0,5}){0,2}", fullmatch=True)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(st.lists(st.tuples(keys, texts), min_size=1, max_size=6))
def test_fields_survive_being_written_and_read(pairs: list[tuple[str, str]]) -> None:
    fields = Fields(tuple(pairs))
    if not fields.render().lstrip().startswith("{"):
        assert Fields.parse(fields.render()) == fields


leaves = st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=10)
names = st.from_regex(r"[a-z][a-z-]{0,6}", fullmatch=True)
trees = st.dictionaries(
    names,
    st.recursive(
        leaves,
        lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(names, inner, min_size=1, max_size=3),
        max_leaves=8,
    ),
    min_size=1,
    max_size=4,
)


@given(trees)
def test_json_keeps_its_shape_and_types(tree: dict[str, object]) -> None:
    assert json.loads(Fields.parse(json.dumps(tree)).render()) == tree


def test_a_first_word_and_switches_have_their_meaning() -> None:
    fields = Fields.parse("virtio-blk-pci,drive=d0,share-rw", "driver")
    assert fields.get("driver") == "virtio-blk-pci"
    assert fields.is_on("share-rw")
    assert Fields.parse("file=a,,b.img,if=virtio").get("file") == "a,b.img"
    assert fields.put("drive", "x,y").render() == "driver=virtio-blk-pci,drive=x,,y,share-rw=on"


def test_words_become_options_and_words_again() -> None:
    words = ["-S", "--daemonize", "-m", "512", "disk.img", "-device", "e1000", "-nodefaults"]
    assert parse(words) == [
        Option("S"),
        Option("daemonize"),
        Option("m", "512"),
        Option("", "disk.img"),
        Option("device", "e1000"),
        Option("nodefaults"),
    ]
    assert render(parse(words)) == [word.replace("--", "-") for word in words]


@pytest.mark.real
def test_we_know_which_options_stand_alone() -> None:
    """QEMU looks for missing values in all options before it does anything, and then prints its version and ends."""
    qemu = "qemu-system-x86_64"
    listed = subprocess.run([qemu, "-help"], capture_output=True, text=True, timeout=120, check=True).stdout
    names = set(re.findall(r"^--?([\w-]+)", listed, re.MULTILINE))
    assert {"drive", "nodefaults", "S"} <= names
    for name in names:
        done = subprocess.run([qemu, "-version", f"-{name}"], capture_output=True, text=True, timeout=120, check=False)
        assert ("requires an argument" in done.stderr) == (name not in _ALONE), name
