"""One libvirtd for all the tests of a process that want one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from labs.libvirtd import Libvirtd, daemon


@pytest.fixture(scope="session")
def libvirtd() -> Iterator[Libvirtd]:
    with daemon() as made:
        yield made
