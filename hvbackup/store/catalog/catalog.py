"""DuckDB over everything in a store: a cache that people ask in SQL, and nothing else relies on.

`reconcile` is the one way in which anything gets into it: it compares the names of packs, points, run records and segments of
journals in the store with those in the tables, and inserts or deletes the difference.  So a rebuild is a reconcile from empty,
and rows that DuckDB lost are found like rows that never were.  A file that can't be opened, or is of another version, is removed
and made again.

`query` answers a stranger's SQL.  It runs in a process of its own that can open this one file, can write none, and ends when its
time or memory is used up.

    killed after            left behind                     mended by
    any statement           the tables as they were         the next reconcile: it is one transaction
    the transaction         no stamp                        the next reconcile finds no difference and writes it
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hvbackup.errors import Busy, HvbackupError, SpaceExhausted, UsageError
from hvbackup.files import Files
from hvbackup.store.catalog.journals import load_journals, segment_paths
from hvbackup.store.catalog.loading import load_packs, load_points, load_runs
from hvbackup.store.catalog.schema import COLUMNS, SCHEMA, VIEWS

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

    from hvbackup.store.store import Store

FILE = "catalog.duckdb"
STAMP = "catalog.json"  # what the catalog held when it was last closed: equal to the store's names, nothing is to do
RECONCILE_MEMORY_BYTES = 256 << 20  # what DuckDB may use to insert 10 million chunks: more does not make it faster
QUERY_MEMORY_BYTES = 1 << 30  # and for a query
LOCK_SECONDS = 10.0  # how long another process may hold the file before we say so
GRACE_SECONDS = 10.0  # from the polite end of a query to the forced one
ANSWER_BYTES_MAX = 256 << 20  # nothing longer is taken from a query
ADDRESS_SPACE_BYTES = 4 << 30  # of the process of a query: DuckDB does not count every string and list it makes
THREADS_MAX = 4  # of a query: each has address space of its own

# Never fetch or load code, never look at our own variables.
OFFLINE = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",
}
# And, for strangers: no file but the catalog, no network, and nothing of this can be changed.
SEALED = {
    **OFFLINE,
    "enable_external_access": "false",
    "allow_persistent_secrets": "false",
    "temp_directory": "",
    "memory_limit": f"{QUERY_MEMORY_BYTES}B",
}

Answer = tuple[list[str], list[list[Any]]]


@dataclass(frozen=True, slots=True)
class _Contents:
    """The names of everything the catalog tells of."""

    packs: frozenset[str]
    points: frozenset[str]
    runs: frozenset[str]
    segments: frozenset[str]

    @classmethod
    def of(cls, store: Store) -> _Contents:
        """What the store has."""
        names = store.files.names
        points = (path for folder in store.machine_folders() for path in store.point_paths(folder))
        runs = (f"runs/{writer}/{name}" for writer in names("runs") for name in names(f"runs/{writer}"))
        packs = store.index.known()
        return cls(frozenset(packs), frozenset(points), frozenset(runs), frozenset(segment_paths(store)))

    def digest(self) -> str:
        """Equal for equal contents."""
        import blake3

        names = self.packs | self.points | self.runs | self.segments
        return blake3.blake3("\n".join(sorted(names)).encode()).hexdigest()


class Catalog:
    """The catalog of one store on this machine.  Thread safety: one thread; other processes may ask at the same time."""

    def __init__(self, state: Files) -> None:
        self._state = state
        self.path = state.path(FILE)

    # -- the way in ----------------------------------------------------------------------------------------------------

    def reconcile(self, store: Store) -> list[str]:
        """The catalog says what the store (as its index knows it) has when this returns.

        Returns notes for people: a catalog that had to be made again, files that can't be read.
        Raises Busy, SpaceExhausted, HvbackupError.
        """
        contents = _Contents.of(store)
        if self._stamp(contents) == self._read_stamp():
            return []
        import duckdb

        notes: list[str] = []
        self._state.make_dir("")
        try:
            damaged = self._reconciled(store, contents)
        except duckdb.Error as e:
            notes.append(f"The catalog {self.path} was made again: {_first_line(e)}")
            self.remove()
            try:
                damaged = self._reconciled(store, contents)
            except duckdb.Error as again:
                raise HvbackupError(f"Cannot write the catalog {self.path}: {_first_line(again)}") from again
        if damaged:
            return [
                *notes,
                f"{len(damaged)} points, run records or segments can't be read; run `hvbackup check` to see which",
            ]
        self._state.replace(STAMP, json.dumps(self._stamp(contents)).encode())
        return notes

    def _reconciled(self, store: Store, contents: _Contents) -> list[str]:
        with self._open() as con:
            _prepare(con, store.id.hex())
            con.execute("BEGIN")
            load_packs(con, store, contents.packs)
            damaged = [*load_points(con, store, contents.points), *load_runs(con, store, contents.runs)]
            damaged += load_journals(con, store, contents.segments)
            con.execute("COMMIT")
            con.execute("CHECKPOINT")
        return damaged

    @contextmanager
    def _open(self) -> Iterator[DuckDBPyConnection]:
        import duckdb

        config = {**OFFLINE, "temp_directory": f"{self.path}.tmp", "memory_limit": f"{RECONCILE_MEMORY_BYTES}B"}
        with closing(_connect(str(self.path), config, read_only=False)) as con:
            try:
                yield con
            except duckdb.Error as e:
                if "No space left" in str(e):
                    raise SpaceExhausted(f"No room left on {self.path.parent} for the catalog; free some space") from e
                raise

    def remove(self) -> None:
        """There is no catalog when this returns; the next reconcile makes it from the store."""
        for name in (STAMP, FILE, f"{FILE}.wal"):
            self._state.remove(name)

    def _stamp(self, contents: _Contents) -> dict[str, Any]:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return {"missing": True}
        # The size and time of the file make it the one we closed: one that a crash cut short has others.
        return {"schema": SCHEMA, "names": contents.digest(), "size": found.st_size, "mtime_ns": found.st_mtime_ns}

    def _read_stamp(self) -> Any:
        try:
            return json.loads(self._state.read(STAMP))
        except (FileNotFoundError, ValueError):
            return None

    # -- the way out ---------------------------------------------------------------------------------------------------

    def query(self, sql: str, *, timeout_seconds: float = 60.0, max_rows: int = 100_000) -> Answer:
        """The answer to one statement that only reads: (names of the columns, at most `max_rows` rows).

        Values are what JSON has: moments are RFC 3339 in UTC, BLOBs hexadecimal, exact decimals are numbers.
        Safe with SQL from anybody.  Raises UsageError with the reason, Busy, HvbackupError.
        """
        if not self.path.is_file():
            raise HvbackupError(f"There is no catalog at {self.path} yet; reconcile makes it")
        asked = {"path": str(self.path), "sql": sql, "seconds": timeout_seconds, "rows": max_rows}
        command = [sys.executable, "-P", "-c", "from hvbackup.store.catalog.catalog import main; main()"]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(asked).encode(),
                capture_output=True,
                timeout=timeout_seconds + LOCK_SECONDS + GRACE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UsageError(f"The query took longer than {timeout_seconds:g} s and was stopped") from None
        if done.returncode < 0:  # by a limit: DuckDB can't always say so itself
            raise UsageError("The query needs more memory or time than a query may have; ask for less at once")
        if done.returncode > 0:
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise HvbackupError(f"The process of the query failed: {last or done.returncode}")
        said = json.loads(done.stdout)
        if "error" in said:
            raise {"busy": Busy, "usage": UsageError}.get(said["class"], HvbackupError)(said["error"])
        return said["columns"], said["rows"]


def _prepare(con: DuckDBPyConnection, store: str) -> None:
    """The tables exist and are ours.  Raises duckdb.Error when they are somebody else's."""
    import duckdb

    if not con.execute("SELECT 1 FROM duckdb_tables() LIMIT 1").fetchall():
        tables = [f"CREATE TABLE raw.{name} ({', '.join(columns)});" for name, columns in COLUMNS.items()]
        con.execute("BEGIN; CREATE SCHEMA raw;" + "".join(tables) + VIEWS)
        con.execute("INSERT INTO raw.meta VALUES ($1, $2)", [SCHEMA, store])
        con.execute("COMMIT")
    elif con.execute("SELECT * FROM raw.meta").fetchall() != [(SCHEMA, store)]:
        raise duckdb.Error("it was of another version or store")


def _connect(path: str, config: dict[str, str], *, read_only: bool) -> DuckDBPyConnection:
    """An open catalog, in UTC.  Raises Busy naming the process that holds it, duckdb.Error."""
    import duckdb

    threads = {"threads": str(min(THREADS_MAX, os.cpu_count() or 1))}
    give_up = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            con = duckdb.connect(path, read_only=read_only, config={**threads, **config})
        except duckdb.IOException as e:
            if "lock" not in str(e):
                raise
            if time.monotonic() > give_up:
                holder = re.search(r"PID (\d+)", str(e))
                who = f"process {holder[1]}" if holder else "another process"
                raise Busy(f"The catalog {path} is in use by {who}; wait for it to end, or stop it") from None
            time.sleep(0.1)
            continue
        con.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
        return con


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


# -- the process of a query ------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer the query on standard input, on standard output: the whole life of a query's process."""
    asked = json.load(sys.stdin)
    _confine(asked["seconds"])
    sys.stdout.write(_answer(asked))


def _confine(seconds: float) -> None:
    """From here on this process writes no file and can't outgrow its limits, whatever the query finds to do."""
    cpu = int(seconds + LOCK_SECONDS) * THREADS_MAX + 1
    for what, limit in (
        (resource.RLIMIT_AS, ADDRESS_SPACE_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu),
    ):
        hard = resource.getrlimit(what)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (limit, limit))


def _answer(asked: dict[str, Any]) -> str:
    import duckdb

    try:
        with closing(_connect(asked["path"], SEALED, read_only=True)) as con:
            con.execute("SET lock_configuration = true")
            return _asked(con, asked["sql"], asked["seconds"], asked["rows"])
    except HvbackupError as e:
        return _refusal(e)
    except duckdb.InterruptException:
        return _refusal(UsageError(f"The query took longer than {asked['seconds']:g} s and was stopped"))
    except (duckdb.OutOfMemoryException, MemoryError):
        return _refusal(UsageError("The query needs more memory than a query may have; ask for less at once"))
    except (duckdb.IOException, duckdb.FatalException, duckdb.InternalException) as e:
        return _refusal(
            HvbackupError(f"{_first_line(e)}; if {asked['path']} is damaged, remove it: it is only a cache")
        )
    except duckdb.Error as e:
        return _refusal(UsageError(str(e).strip()))


def _refusal(error: HvbackupError) -> str:
    kind = "busy" if isinstance(error, Busy) else "usage" if isinstance(error, UsageError) else "failed"
    return json.dumps({"error": str(error), "class": kind})


def _asked(con: DuckDBPyConnection, sql: str, seconds: float, rows_max: int) -> str:
    statement = _only_reading(sql)
    stop = threading.Timer(seconds, con.interrupt)
    stop.daemon = True
    stop.start()
    try:
        con.execute(_without_zones(con, statement))
        columns = [column[0] for column in con.description or ()]
        rows: list[str] = []
        size = 0
        while len(rows) < rows_max and (some := con.fetchmany(min(1000, rows_max - len(rows)))):
            rows += [json.dumps([_plain(value) for value in row], allow_nan=False) for row in some]
            size += sum(map(len, rows[-len(some) :]))
            if size > ANSWER_BYTES_MAX:
                raise UsageError(f"The answer is longer than {ANSWER_BYTES_MAX >> 20} MiB; ask for less at once")
    finally:
        stop.cancel()
    return f'{{"columns": {json.dumps(columns)}, "rows": [{", ".join(rows)}]}}'


def _only_reading(sql: str) -> str:
    """The one statement in `sql`, if it is one that only reads.  Raises UsageError, duckdb.Error."""
    import duckdb

    found = duckdb.extract_statements(sql)
    if len(found) != 1:
        raise UsageError(f"A query is one statement; here are {len(found)}")
    kind, text = found[0].type, found[0].query
    if kind == duckdb.StatementType.EXPLAIN:
        explained = re.sub(r"^\s*explain(\s+analyze)?\s", "", text, count=1, flags=re.IGNORECASE)
        inner = duckdb.extract_statements(explained) if explained != text else []
        kind = inner[0].type if len(inner) == 1 else kind
        if kind == duckdb.StatementType.SELECT:
            return text
    if kind != duckdb.StatementType.SELECT:
        raise UsageError(
            "The catalog is read-only: a query is SELECT, WITH, FROM, DESCRIBE, SHOW, SUMMARIZE or EXPLAIN"
        )
    return text


def _without_zones(con: DuckDBPyConnection, statement: str) -> str:
    """The same query with moments that need no time zone database: DuckDB asks for pytz to hand out the others."""
    if statement.lstrip()[:7].lower() == "explain":
        return statement
    text = statement.replace("'", "''")
    source = f"FROM query('{text}')"
    described = con.execute(f"DESCRIBE {source}").fetchall()
    if not any("WITH TIME ZONE" in kind for _, kind, *_ in described):
        return source
    return f"SELECT {', '.join(_column(i, *column[:2]) for i, column in enumerate(described, 1))} {source}"


def _column(number: int, name: str, kind: str) -> str:
    quoted = '"' + name.replace('"', '""') + '"'
    if kind == "TIMESTAMP WITH TIME ZONE":
        return f"strftime(#{number}::TIMESTAMP, '%Y-%m-%dT%H:%M:%S.%fZ') AS {quoted}"
    if "TIMESTAMP WITH TIME ZONE" in kind:
        return f"#{number}::VARCHAR AS {quoted}"
    return f"#{number} AS {quoted}"


def _plain(value: Any) -> Any:
    """A value of DuckDB as JSON has it."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(_plain(k)): _plain(v) for k, v in value.items()}
    return _other(value)


def _other(value: Any) -> Any:
    import datetime
    import decimal

    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    return str(value)
