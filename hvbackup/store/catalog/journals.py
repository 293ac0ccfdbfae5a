"""What the catalog tells of journals: their sealed segments, and the gaps and marks that those tell of.

Only sealed segments, which never change: so the catalog need not be touched again while a log grows, and is usually a minute
behind (`hvbackup timeline` looks at logs as well).  Gaps and marks of a machine are told anew whenever its segments change,
because a later segment may take back a mark of an earlier one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hvbackup.errors import HvbackupError
from hvbackup.store.catalog.loading import Connection, Row, forget, insert

if TYPE_CHECKING:
    from hvbackup.store.journal.runs import SealedRun
    from hvbackup.store.store import Store


def segment_paths(store: Store) -> Iterator[str]:
    """The paths of all sealed segments that count."""
    folders = store.files.names("journals")
    if folders:
        from hvbackup.store.journal import journal, segment

        for folder in folders:
            names = journal.list_files(store.files, folder)
            yield from (segment.path_of(folder, n) for n in names if n.suffix == journal.SEGMENT)


def load_journals(con: Connection, store: Store, wanted: frozenset[str]) -> list[str]:
    """`raw.segments`, `raw.gaps` and `raw.marks` tell of these segments and of no others.  Returns those that can't be read."""
    have = {path for (path,) in con.execute("SELECT path FROM raw.segments").fetchall()}
    changed = sorted({path.split("/")[1] for path in have ^ wanted})
    if not changed:
        return []
    damaged: list[str] = []
    for table in ("segments", "gaps", "marks"):
        forget(con, table, "folder", {path.split("/")[1] for path in wanted} - set(changed))
    for folder in changed:
        paths = sorted(path for path in wanted if path.split("/")[1] == folder)
        damaged += _load_machine(con, store, folder, paths)
    return damaged


def _load_machine(con: Connection, store: Store, folder: str, paths: list[str]) -> list[str]:
    from hvbackup.store.journal.journal import parse_name
    from hvbackup.store.journal.runs import SealedRun
    from hvbackup.store.journal.segment import PieceCache
    from hvbackup.store.journal.told import Told

    told, rows, damaged, cache = Told(), [], [], PieceCache()
    for path in paths:
        name = parse_name(path.rsplit("/", 1)[1])
        assert name is not None  # `list_files` made the path of it
        try:
            run = SealedRun(store, folder, name, cache)
            rows.append(_segment_row(path, folder, run))
            for seq, t, value in run.summary.metas:
                told.tell(seq, t, value)
        except FileNotFoundError:
            continue  # its window has just passed
        except HvbackupError:
            damaged.append(path)
    insert(con, "segments", rows)
    insert(con, "gaps", [(folder, g.start, g.end, g.why) for g in told.gaps])
    insert(con, "marks", [(folder, m.seq, m.t, m.label, m.consistency) for m in told.marks])
    return damaged


def _segment_row(path: str, folder: str, run: SealedRun) -> Row:
    s = run.summary
    tables = [s.table(disk) for disk in s.disks.values()]
    left = sum(int((t.end[:] - t.start[:]).sum()) for t in tables)
    head = (path, folder, run.name.epoch, s.first, s.last_seq, s.first_t, s.last_t)
    return (*head, s.moments, s.count, left, run.bytes)
