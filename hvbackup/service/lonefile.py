"""A file that belongs to no store: a key where somebody wants it, the description beside restored disks.

`Files` keeps its unfinished files in a folder of its own, which has no place among other people's files.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from hvbackup.errors import HvbackupError
from hvbackup.files import Kernel


def write(path: Path, data: bytes, kernel: Kernel | None = None) -> None:
    """The file has this content, durably, and is readable by its owner only, when this returns.  Raises HvbackupError."""
    kernel = kernel or Kernel()
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        fd = kernel.create(str(unfinished), 0o600)
        try:
            kernel.write(fd, data)
            kernel.fsync(fd)
        finally:
            kernel.close(fd)
        kernel.rename(str(unfinished), str(path))
        kernel.sync_dir(str(path.parent))
    except OSError as e:
        unfinished.unlink(missing_ok=True)
        raise HvbackupError(f"Cannot write {path}: {e.strerror}") from e
