"""What the catalog lacks, out of the store and into its tables; what the store lost, out of the tables.

Every function compares names first and reads only what is new, so that a reconcile costs what has changed.  Rows go in as numpy
arrays and lists: DuckDB takes millions of those in a second, and a few thousand by one `INSERT ... VALUES` each.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from hvbackup.errors import HvbackupError
from hvbackup.store.catalog.schema import COLUMNS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hvbackup.model import RecoveryPoint
    from hvbackup.store.store import Store

PIECE_CHUNKS = 1 << 20  # chunks inserted together: 200 MB of arrays at most
PIECE_FILES = 10_000  # points or run records read and inserted together
MEASURES = ("read_bytes", "changed_bytes", "new_bytes", "stored_bytes")

Row = Sequence[Any]


class Connection(Protocol):
    """What we use of DuckDB's connection."""

    def execute(self, query: str, parameters: object = None) -> Any:
        """Run a statement."""

    def register(self, view_name: str, python_object: object) -> Any:
        """Make an object visible as a table."""

    def unregister(self, view_name: str) -> Any:
        """The opposite."""


def load_packs(con: Connection, store: Store, wanted: frozenset[str]) -> None:
    """`raw.packs` and `raw.chunks` hold these packs, as the index of the store knows them, and no others."""
    have = con.execute(
        "WITH found AS (SELECT pack, count(*) AS n FROM raw.chunks GROUP BY pack) "
        "SELECT name, number FROM raw.packs LEFT JOIN found ON pack = number WHERE chunks = coalesce(n, 0)"
    ).fetchall()
    forget(con, "packs", "name", {name for name, _ in have} & wanted)
    con.execute("DELETE FROM raw.chunks WHERE pack NOT IN (SELECT number FROM raw.packs)")
    missing = sorted(wanted.difference(name for name, _ in have))
    first = max((number for _, number in have), default=0) + 1
    _load_chunks(con, store, {name: first + i for i, name in enumerate(missing)})


def _load_chunks(con: Connection, store: Store, numbers: dict[str, int]) -> None:
    import numpy as np

    from hvbackup.store.format import layout as f

    first = min(numbers.values(), default=0)
    counts, blocks = (np.zeros(len(numbers), np.int64) for _ in range(2))
    for names, rows in store.index.rows():
        number = np.array([numbers.get(name, -1) for name in names], np.int32)
        for start in range(0, len(rows), PIECE_CHUNKS) if (number >= 0).any() else ():
            piece = rows[start : start + PIECE_CHUNKS]
            piece = piece[piece["pack"] < len(number)]  # the index may be a damaged cache itself
            of = number[piece["pack"]]
            piece, of = piece[of >= 0], of[of >= 0]
            _insert_chunks(con, piece, of)
            counts += np.bincount(of - first, minlength=len(numbers))
            blocks += np.bincount(of[piece["kind"] == f.CHUNK_BLOCK] - first, minlength=len(numbers))
    insert(con, "packs", _pack_rows(store, numbers, counts.tolist(), blocks.tolist()))


def _insert_chunks(con: Connection, rows: NDArray[np.void], pack: NDArray[np.int32]) -> None:
    import numpy as np

    words = np.ascontiguousarray(rows["id"]).view(">u8").reshape(-1, 4).astype(np.uint64)
    fields = {"record_at": "offset", "stored": "stored", "chunk_at": "at", "plain": "plain", "kind": "kind"}
    arrays = {column: np.ascontiguousarray(rows[field]) for column, field in fields.items()}
    con.register("incoming", {**arrays, "pack": pack, **{f"w{i}": np.ascontiguousarray(words[:, i]) for i in range(4)}})
    # DuckDB knows no numpy type for 32 bytes; it makes them of four big-endian words.
    con.execute(
        "INSERT INTO raw.chunks SELECT w0::BIT::BLOB || w1::BIT::BLOB || w2::BIT::BLOB || w3::BIT::BLOB, "
        "pack, record_at, stored, chunk_at, plain, kind FROM incoming"
    )
    con.unregister("incoming")


def _pack_rows(store: Store, numbers: dict[str, int], counts: list[int], blocks: list[int]) -> Iterator[Row]:
    from hvbackup.store.format import pack

    for (name, number), count, data in zip(numbers.items(), counts, blocks, strict=True):
        try:
            size = store.files.size(pack.path_of(name))
        except FileNotFoundError:
            size = None  # removed since the index was read
        yield number, name, "data" if data else "meta", size, count


def load_points(con: Connection, store: Store, wanted: frozenset[str]) -> list[str]:
    """`raw.points` and `raw.disks` hold these points and no others.  Returns the paths of those that can't be read."""
    have = con.execute(
        "WITH found AS (SELECT point, count(*) AS n FROM raw.disks GROUP BY point) "
        "SELECT path FROM raw.points LEFT JOIN found ON point = path "
        "WHERE status <> 'damaged' AND disks = coalesce(n, 0)"
    ).fetchall()
    keep = {path for (path,) in have} & wanted
    forget(con, "points", "path", keep)
    forget(con, "disks", "point", keep)
    damaged: list[str] = []
    for paths in _pieces(wanted - keep):
        points: list[Row] = []
        disks: list[Row] = []
        for path in paths:
            try:
                point = store.load_point(path)
            except HvbackupError:
                if store.files.exists(path):  # else it was pruned since it was listed
                    damaged.append(path)
                    points.append(_damaged_row(path))
                continue
            points.append(_point_row(path, point))
            disks += _disk_rows(path, point)
        insert(con, "points", points)
        insert(con, "disks", disks)
    return damaged


def _point_row(path: str, p: RecoveryPoint) -> Row:
    status = "degraded" if p.notes else "ok"
    head = (path, p.id, p.t, p.machine.id, p.machine.name, p.machine.platform, str(p.consistency), p.config.kind)
    tail = (p.seq, p.origin.store if p.origin else None, "; ".join(p.tags))
    return (*head, status, "; ".join(p.notes), len(p.disks), *(p.figures.get(name) for name in MEASURES[:3]), *tail)


def _damaged_row(path: str) -> Row:
    """All that the name of a point tells."""
    t, _, point = path.rsplit("/", 1)[1].partition("-")
    known = {"path": path, "id": point, "t": int(t) if t.isdecimal() else None, "status": "damaged", "disks": 0}
    return tuple(known.get(column.split()[0]) for column in COLUMNS["points"])


def _disk_rows(path: str, point: RecoveryPoint) -> Iterator[Row]:
    for position, root in enumerate(point.disks):
        disk = root.disk
        yield path, position, disk.id, disk.size, disk.sector, root.root.hex(), root.how, disk.path


def load_runs(con: Connection, store: Store, wanted: frozenset[str]) -> list[str]:
    """`raw.runs` holds these run records and no others.  Returns the paths of those that can't be read."""
    from hvbackup.store.format import layout as f
    from hvbackup.store.format.sealed import unseal

    keep = {path for (path,) in con.execute("SELECT path FROM raw.runs").fetchall()} & wanted
    forget(con, "runs", "path", keep)
    damaged: list[str] = []
    for paths in _pieces(wanted - keep):
        rows = []
        for path in paths:
            try:
                rows.append(_run_row(path, unseal(store.ring, f.KIND_RUN, path, store.files.read(path))))
            except FileNotFoundError:
                continue
            except HvbackupError:
                damaged.append(path)
        insert(con, "runs", rows)
    return damaged


def _run_row(path: str, value: dict[str, Any]) -> Row:
    figures = value.get("figures", {})
    named = {"kind", "t", "machine", "point", "status", "notes", "figures", "previous"}
    rest = {k: v for k, v in value.items() if k not in named}
    rest |= {k: v for k, v in figures.items() if k not in (*MEASURES, "seconds", "cpu_seconds")}
    head = (path, value["kind"], value["t"], value.get("machine"), value.get("point"), value.get("status"))
    costs = (figures.get(name) for name in (*MEASURES, "seconds", "cpu_seconds"))
    return (*head, "; ".join(value.get("notes", [])), *costs, json.dumps(rest, sort_keys=True) if rest else None)


def _pieces(paths: Collection[str]) -> Iterator[list[str]]:
    rest = iter(sorted(paths))
    while piece := list(islice(rest, PIECE_FILES)):
        yield piece


def forget(con: Connection, table: str, column: str, keep: Collection[str]) -> None:
    """Rows of a table that are about none of `keep` are gone."""
    con.execute(f"DELETE FROM raw.{table} WHERE {column} NOT IN (SELECT unnest($1::VARCHAR[]))", [sorted(keep)])


def insert(con: Connection, table: str, rows: Iterable[Row]) -> None:
    """The rows, with values in the order of COLUMNS, are in the table."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    if columns:
        types = [column.split()[1] for column in COLUMNS[table]]
        values = ", ".join(f"unnest(${i}::{kind}[])" for i, kind in enumerate(types, 1))
        con.execute(f"INSERT INTO raw.{table} SELECT {values}", columns)
