"""A directory in memory, for tests that make thousands of small files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY = "/dev/shm"


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """An empty directory, in memory where there is such a place."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="hvbackup-", dir=MEMORY) as path:
        yield Path(path)
