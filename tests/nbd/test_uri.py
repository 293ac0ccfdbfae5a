"""NBD URIs: parsed, refused, and printed so that they can be parsed again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvbackup.errors import UsageError
from hvbackup.nbd.uri import NbdUri

_NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd://host", NbdUri(host="host")),
        ("nbd://", NbdUri(host="localhost")),
        ("nbd://host:1234/a%20b", NbdUri("a b", "host", 1234)),
        ("nbd://[::1]:0/x", NbdUri("x", "::1", 0)),
        ("nbds://host/x?tls-certificates=/etc/pki", NbdUri("x", "host", tls=True, certificates="/etc/pki")),
        ("nbd+unix:///?socket=/run/a.nbd", NbdUri(socket="/run/a.nbd")),
        ("nbd+unix:////slash/first?socket=a%26b", NbdUri("/slash/first", socket="a&b")),
        ("nbds+unix:///x?socket=/s", NbdUri("x", socket="/s", tls=True)),
    ],
)
def test_parts(text: str, expected: NbdUri) -> None:
    assert NbdUri.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/dev/vda",
        "http://host/x",
        "nbd+unix:///x",
        "nbd+unix://host/x?socket=/s",
        "nbd://host/x?socket=/s",
        "nbd://host:port/x",
        "nbd://host:70000/x",
        "nbd://[::1/x",
        "nbd://host/" + "x" * 5000,
    ],
)
def test_what_is_no_uri_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        NbdUri.parse(text)
    assert str(caught.value).startswith(text[:80])


@given(_NAMES, st.sampled_from(["", "/run/x y/ä?&=.nbd"]), st.booleans(), st.integers(0, 65535))
def test_printed_and_parsed_again_it_is_the_same(export: str, socket: str, tls: bool, port: int) -> None:
    uri = NbdUri(export, socket=socket, tls=tls) if socket else NbdUri(export, "fe80::1", port, tls=tls)
    assert NbdUri.parse(str(uri)) == uri
