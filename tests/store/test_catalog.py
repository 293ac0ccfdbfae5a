"""The catalog: only an index, whatever happened to it; and nobody's SQL can do more than read it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pytest

from hvbackup.errors import Busy, HvbackupError, SpaceExhausted, UsageError
from hvbackup.model import PointId
from hvbackup.store.catalog import catalog as module
from hvbackup.store.catalog.catalog import FILE, STAMP, Catalog
from hvbackup.store.format import keys
from hvbackup.store.store import Store
from tests.world import KEY, MACHINE, World

JOURNALS = ("segments", "gaps", "marks", "journals")
VIEWS = ("packs", "chunks", "runs", "points", "disks", "machines", "growth", "change_rate", "reduction", *JOURNALS)
RAW = ("packs", "chunks", "points", "disks", "runs")


@pytest.fixture
def world(ram: Path) -> World:
    return World(ram, KEY).life(3)


@pytest.fixture
def store(world: World) -> Iterator[Store]:
    with world.opened() as store:
        yield store


@pytest.fixture
def catalog(store: Store) -> Catalog:
    found = Catalog(store.state)
    assert found.reconcile(store) == []
    return found


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    """A catalog that no test changes."""
    with World(tmp_path_factory.mktemp("still"), KEY).life(3).opened() as store:
        found = Catalog(store.state)
        found.reconcile(store)
        yield found


def dump(catalog: Catalog) -> dict[str, list[list[Any]]]:
    """Everything people can see."""
    return {view: ask(catalog, f"FROM {view} ORDER BY ALL")["rows"] for view in VIEWS}


def one(catalog: Catalog, sql: str) -> Any:
    return ask(catalog, sql)["rows"][0][0]


def ask(catalog: Catalog, sql: str, seconds: float = 120) -> Any:
    """The answer, or the refusal, of a query's process, without the process and its limits."""
    return json.loads(module._answer({"path": str(catalog.path), "sql": sql, "seconds": seconds, "rows": 1000}))


def change(catalog: Catalog, *statements: str) -> None:
    """Somebody else writes to the file."""
    with duckdb.connect(str(catalog.path)) as con:
        for statement in statements:
            con.execute(statement)


# --- only an index --------------------------------------------------------------------------------------------------------


def test_the_catalog_is_only_an_index(world: World) -> None:
    with world.opened() as store:
        catalog = Catalog(store.state)
        catalog.reconcile(store)
        before = dump(catalog)
    shutil.rmtree(world.state_path)
    with world.opened(owner=False) as store:
        catalog = Catalog(store.state)
        catalog.reconcile(store)
        assert dump(catalog) == before
    assert all(before[view] for view in VIEWS if view not in JOURNALS)


def test_reconciling_step_by_step_is_the_same_as_from_empty(world: World) -> None:
    with world.opened() as store:
        catalog = Catalog(store.state)
        for _ in range(3):
            world.scribble()
            world.capture(store)
            catalog.reconcile(store)
        before = dump(catalog)
        catalog.remove()
        catalog.reconcile(store)
        assert dump(catalog) == before
        assert len(before["points"]) == 6


def test_what_the_store_lost_leaves_the_catalog(world: World) -> None:
    with world.opened() as store:
        catalog = Catalog(store.state)
        catalog.reconcile(store)
        gone = store.point_paths(store.machine_folders()[0])[0]
        pack = one(catalog, "SELECT name FROM packs WHERE kind = 'data' LIMIT 1")
        rows = one(catalog, "SELECT count(*) FROM chunks")
        lost = one(catalog, f"SELECT count(*) FROM chunks WHERE pack = '{pack}'")
    (world.store_path / gone).unlink()
    (world.store_path / f"packs/{pack[:2]}/{pack}.pack").unlink()
    with world.opened(owner=False) as store:
        catalog.reconcile(store)
        assert one(catalog, "SELECT count(*) FROM points") == 2
        assert one(catalog, f"SELECT count(*) FROM disks WHERE point = '{gone[-16:]}'") == 0
        assert one(catalog, "SELECT count(*) FROM chunks") == rows - lost
        assert one(catalog, f"SELECT count(*) FROM packs WHERE name = '{pack}'") == 0


@pytest.mark.parametrize("table", RAW)
def test_rows_that_were_lost_come_back(catalog: Catalog, store: Store, table: str) -> None:
    before = dump(catalog)
    change(catalog, f"DELETE FROM raw.{table} WHERE rowid = (SELECT min(rowid) FROM raw.{table})")
    assert dump(catalog) != before
    assert catalog.reconcile(store) == []
    assert dump(catalog) == before


def test_a_torn_wal_loses_rows_silently_and_reconcile_finds_them(catalog: Catalog, store: Store) -> None:
    before = dump(catalog)
    catalog.remove()
    script = (
        "import duckdb, os, sys\n"
        "con = duckdb.connect(sys.argv[1])\n"
        "con.execute(\"PRAGMA wal_autocheckpoint='1TB'; PRAGMA disable_checkpoint_on_shutdown\")\n"
        "con.execute('CREATE TABLE junk (a INTEGER)')\n"
        "for i in range(50): con.execute('INSERT INTO junk VALUES (1)')\n"
        "os._exit(0)\n"
    )
    catalog.reconcile(store)
    subprocess.run([sys.executable, "-c", script, str(catalog.path)], check=True, timeout=60)
    wal = Path(f"{catalog.path}.wal")
    os.truncate(wal, wal.stat().st_size - 7)
    (store.state.path(STAMP)).unlink()
    assert catalog.reconcile(store) == []
    assert dump(catalog) == before


@pytest.mark.parametrize("damage", ["garbage", "empty", "cut", "other version", "other store", "no tables of ours"])
def test_a_file_that_is_not_ours_is_made_again_and_that_is_said(catalog: Catalog, store: Store, damage: str) -> None:
    before = dump(catalog)
    match damage:
        case "garbage":
            catalog.path.write_bytes(os.urandom(50_000))
        case "empty":
            catalog.path.write_bytes(b"")
        case "cut":
            os.truncate(catalog.path, catalog.path.stat().st_size // 2)
        case "other version":
            change(catalog, "UPDATE raw.meta SET schema = 999")
        case "other store":
            change(catalog, "UPDATE raw.meta SET store = 'another'")
        case "no tables of ours":
            catalog.path.unlink()
            change(catalog, "CREATE TABLE theirs (a INTEGER)")
    notes = catalog.reconcile(store)
    assert dump(catalog) == before
    if damage != "empty":  # which some versions of DuckDB call new
        assert len(notes) == 1
    assert all(str(catalog.path) in note for note in notes)


def test_a_reconcile_that_is_killed_leaves_a_catalog_the_next_one_completes(world: World) -> None:
    script = (
        "import sys, os, threading\n"
        "from hvbackup.store.format import keys; from hvbackup.store.catalog import catalog\n"
        "from hvbackup.store.store import Store\n"
        "real = catalog.load_runs\n"
        "catalog.load_runs = lambda *a: (real(*a), os.kill(os.getpid(), 9))\n"
        "key = keys.parse_key_text(sys.argv[3], 'key')\n"
        "with Store.open(sys.argv[1], sys.argv[2], [key]) as store:\n"
        "    catalog.Catalog(store.state).reconcile(store)\n"
    )
    text = keys.new_key_text()
    fresh = World(world.path / "two", keys.parse_key_text(text, "key")).life(2)
    command = [sys.executable, "-c", script, str(fresh.store_path), str(fresh.state_path), text]
    assert subprocess.run(command, check=False, timeout=60).returncode == -9
    with fresh.opened() as store:
        catalog = Catalog(store.state)
        assert catalog.reconcile(store) == []
        assert one(catalog, "SELECT count(*) FROM points") == 2


def test_with_nothing_new_the_file_is_not_even_opened(
    catalog: Catalog, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_connect", lambda *_, **__: pytest.fail("it was opened"))
    assert catalog.reconcile(store) == []


def test_a_damaged_point_is_shown_as_such_until_it_is_whole_again(world: World) -> None:
    with world.opened() as store:
        path = store.point_paths(store.machine_folders()[0])[1]
        record = next(iter(store.runs)).path
        catalog = Catalog(store.state)
        catalog.reconcile(store)
        before = dump(catalog)
        catalog.remove()
        for file in (store.files.path(path), store.files.path(record)):
            file.rename(file.parent.parent / "aside")
            file.write_bytes(b"x" + (file.parent.parent / "aside").read_bytes()[1:])
        notes = catalog.reconcile(store)
        assert len(notes) == 1
        assert "2 points, run records or segments can't be read" in notes[0]
        assert catalog.query("SELECT id, status, machine FROM points WHERE status = 'damaged'")[1] == [
            [path[-16:], "damaged", None]
        ]
        assert one(catalog, "SELECT points FROM machines") == 2
        for file in (store.files.path(path), store.files.path(record)):
            (file.parent.parent / "aside").rename(file)
        assert catalog.reconcile(store) == []
        assert dump(catalog) == before


def test_a_pack_whose_file_vanished_has_no_size(world: World) -> None:
    with world.opened() as store:
        catalog = Catalog(store.state)
        pack = store.index.packs[0]
        store.files.path(f"packs/{pack[:2]}/{pack}.pack").unlink()
        catalog.reconcile(store)
        assert one(catalog, f"SELECT bytes FROM packs WHERE name = '{pack}'") is None


def test_points_and_records_that_vanish_while_they_are_read_are_no_matter(world: World) -> None:
    with world.opened() as store:
        catalog = Catalog(store.state)
        contents = module._Contents.of(store)
        ghosts = module._Contents(
            contents.packs,
            contents.points | {"points/aa/1-b"},
            contents.runs | {"runs/aa/1"},
            contents.segments | {"journals/aa/00000001-00000000000000000001.seg"},
        )
        assert catalog._reconciled(store, ghosts) == []
        assert one(catalog, "SELECT count(*) FROM points") == len(contents.points)


# --- what it tells ---------------------------------------------------------------------------------------------------------


def test_points_tell_what_their_captures_cost(catalog: Catalog, store: Store) -> None:
    figures = {r.value["point"]: r.value["figures"] for r in store.runs if r.value["kind"] == "capture"}
    columns, rows = catalog.query(
        "SELECT path, read_bytes, changed_bytes, new_bytes, stored_bytes, seconds FROM points"
    )
    assert {row[0]: row[1:] for row in rows} == {k: [v[c] for c in columns[1:]] for k, v in figures.items()}
    assert one(catalog, "SELECT sum(stored_bytes) FROM growth") == sum(f["stored_bytes"] for f in figures.values())
    assert one(catalog, "SELECT changed_bytes FROM change_rate") == sum(f["changed_bytes"] for f in figures.values())


def test_chunks_and_packs_agree_with_the_index_and_the_files(catalog: Catalog, store: Store) -> None:
    assert one(catalog, "SELECT count(*) FROM chunks") == store.index.chunks
    sizes = dict(catalog.query("SELECT name, bytes FROM packs")[1])
    assert sizes == {p.stem: p.stat().st_size for p in store.files.root.glob("packs/*/*.pack")}
    assert {row[0] for row in catalog.query("SELECT DISTINCT kind FROM chunks")[1]} == {"block", "page", "point"}
    ids = [bytes.fromhex(row[0]) for row in catalog.query("SELECT id FROM chunks")[1]]
    assert all(store.index.everywhere(chunk) for chunk in ids)
    assert one(catalog, "SELECT count(*) FROM packs WHERE kind = 'data'") > 0


def test_a_moment_is_the_one_of_the_point(catalog: Catalog, store: Store) -> None:
    point = store.newest(store.find_machine(MACHINE))
    assert point is not None
    shown = one(catalog, f"SELECT time FROM points WHERE id = '{point.id}'")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", shown)
    assert one(catalog, f"SELECT epoch_us(time) FROM points WHERE id = '{point.id}'") == point.t // 1000


def test_every_view_and_column_is_documented_and_every_example_works(still: Catalog) -> None:
    text = (Path(__file__).parents[2] / "docs" / "sql.md").read_text()
    described = {
        section.split("`", 1)[0]: re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
        for section in text.split("\n### `")[1:]
    }
    there = {v: [row[0] for row in ask(still, f"DESCRIBE {v}")["rows"]] for v in VIEWS}
    assert described == there
    assert {row[0] for row in still.query("SHOW TABLES")[1]} == set(VIEWS)
    examples = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    assert len(examples) >= 6
    for example in examples:
        assert "columns" in ask(still, example)


@pytest.mark.parametrize(
    ("sql", "value"),
    [
        ("SELECT NULL", None),
        ("SELECT 'Ünïcode \"quoted\" ''s'", 'Ünïcode "quoted" \'s'),
        ("SELECT '\\xAB\\x00'::BLOB", "ab00"),
        ("SELECT 1.50::DECIMAL(10,2)", 1.5),
        ("SELECT 3.00::DECIMAL(10,2)", 3),
        ("SELECT 'nan'::DOUBLE", "nan"),
        ("SELECT 2.5::DOUBLE", 2.5),
        ("SELECT 170141183460469231731687303715884105727::HUGEINT", 170141183460469231731687303715884105727),
        ("SELECT DATE '2026-11-22'", "2026-11-22"),
        ("SELECT TIMESTAMP '2026-11-22 10:00:00'", "2026-11-22T10:00:00"),
        ("SELECT TIMESTAMPTZ '2026-11-22 10:00:00+02'", "2026-11-22T08:00:00.000000Z"),
        ("SELECT [TIMESTAMPTZ '2026-11-22 10:00:00+02']", "['2026-11-22 08:00:00+00']"),
        ("SELECT {'a': [1, 2], 'b': MAP {1: 'x'}} -- with a comment", {"a": [1, 2], "b": {"1": "x"}}),
        ("SELECT INTERVAL 3 DAY;", "3 days, 0:00:00"),
        ("SELECT true", True),
    ],
)
def test_values_are_what_json_has(still: Catalog, sql: str, value: Any) -> None:
    found = ask(still, sql)["rows"][0][0]
    assert found == value
    assert json.loads(json.dumps(found)) == value


def test_columns_keep_their_names_also_beside_a_moment(still: Catalog) -> None:
    columns, rows = still.query('SELECT now() AS "a ""b""", 1 AS c, 2 AS d ORDER BY 1')
    assert columns == ['a "b"', "c", "d"]
    assert rows[0][1:] == [1, 2]


def test_order_is_kept_where_moments_are_rewritten(still: Catalog) -> None:
    rows = still.query("SELECT time FROM points ORDER BY time DESC")[1]
    assert rows == sorted(rows, reverse=True)
    assert len(rows) == 3


@pytest.mark.parametrize(
    "sql", ["EXPLAIN SELECT 1", "explain analyze FROM points", "SUMMARIZE packs", "DESCRIBE disks"]
)
def test_the_catalog_can_be_looked_at(still: Catalog, sql: str) -> None:
    assert still.query(sql)[1]


# --- strangers -------------------------------------------------------------------------------------------------------------

SECRET = "the secret of another file"

WRITES = [
    "DROP TABLE raw.points",
    "DELETE FROM raw.points",
    "INSERT INTO raw.meta VALUES (1, 'x')",
    "UPDATE raw.meta SET schema = 2",
    "CREATE TABLE mine (a INTEGER)",
    "CREATE TEMP TABLE mine AS SELECT 1",
    "CREATE MACRO m() AS 1",
    "CREATE OR REPLACE VIEW points AS SELECT 1",
    "WITH gone AS (DELETE FROM raw.points RETURNING *) SELECT * FROM gone",
    "EXPLAIN ANALYZE DELETE FROM raw.points",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{dir}/out'",
    "EXPLAIN (FORMAT json) COPY (SELECT 1) TO '{dir}/out'",
    "/* hidden */ EXPLAIN ANALYZE CREATE TABLE mine (a INTEGER)",
    "COPY raw.points TO '{dir}/out'",
    "COPY (SELECT 1) TO '{dir}/out' (FORMAT parquet)",
    "COPY raw.points FROM '{dir}/secret'",
    "EXPORT DATABASE '{dir}/out'",
    "IMPORT DATABASE '{dir}'",
    "VACUUM",
    "CHECKPOINT",
    "FORCE CHECKPOINT",
    "TRUNCATE raw.points",
    "BEGIN",
    "PIVOT packs ON kind USING count(*)",
]
REACHES = [
    "FROM '{dir}/secret'",
    "FROM '{dir}/secret.csv'",
    "FROM '{dir}/secret.parquet'",
    "FROM '{dir}/other.duckdb'",
    "SELECT * FROM read_csv('{dir}/secret')",
    "SELECT * FROM read_csv_auto(['{dir}/secret'])",
    "SELECT * FROM read_text('{dir}/secret')",
    "SELECT * FROM read_text('{dir}/*')",
    "SELECT * FROM read_blob('{dir}/secret')",
    "SELECT * FROM read_json('{dir}/secret')",
    "SELECT * FROM read_ndjson_objects('{dir}/secret')",
    "SELECT * FROM read_parquet('{dir}/secret')",
    "SELECT * FROM parquet_metadata('{dir}/secret')",
    "SELECT * FROM read_duckdb('{dir}/other.duckdb')",
    "SELECT * FROM sniff_csv('{dir}/secret')",
    "SELECT * FROM glob('{dir}/*')",
    "SELECT * FROM query('SELECT * FROM read_text(''{dir}/secret'')')",
    "SELECT * FROM query_table('{dir}/secret.csv')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT * FROM read_text(''{dir}/secret'')'))",
    "DESCRIBE SELECT * FROM read_csv('{dir}/secret')",
    "SUMMARIZE '{dir}/secret.csv'",
    "EXPLAIN ANALYZE SELECT * FROM read_text('{dir}/secret')",
    "EXPLAIN SELECT * FROM read_csv('{dir}/secret')",
    "SELECT * FROM read_text('http://127.0.0.1:9/x')",
    "SELECT * FROM read_csv('https://127.0.0.1:9/x')",
    "SELECT * FROM read_parquet('s3://bucket/x')",
    "SELECT * FROM read_text('hf://datasets/x')",
    "SELECT * FROM read_text('/proc/self/environ')",
    "ATTACH '{dir}/other.duckdb' AS other",
    "ATTACH ':memory:' AS other",
    "DETACH catalog",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{dir}/secret'",
    "FORCE INSTALL json FROM 'http://127.0.0.1:9'",
    "PRAGMA database_list",
    "PRAGMA table_info('raw.points')",
    "PRAGMA enable_profiling",
    "CALL pragma_version()",
    "CALL enable_logging()",
    "SET enable_external_access = true",
    "SET memory_limit = '100GB'",
    "SET VARIABLE a = 1",
    "RESET lock_configuration",
    "USE raw",
    "CREATE SECRET s (TYPE http, BEARER_TOKEN 'x')",
    "DROP SECRET s",
    "SELECT * FROM duckdb_secrets(redact = false)",
    "SELECT getenv('HOME')",
    "SELECT * FROM secret_variable",
    "SELECT * FROM asked",
    "SELECT * FROM sys",
    "SELECT * FROM pandas_scan(1)",
    "SELECT * FROM arrow_scan(1, 2, 3)",
    "SELECT * FROM python_map_function(1)",
    "SELECT * FROM enable_logging(storage_path = '{dir}/out')",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY (SELECT 1) TO '{dir}/out'",
    "SELECT 1) TO '{dir}/out' --",
    "",
    " ; ",
    "-- nothing",
    "nonsense",
    "SELECT",
    "SELECT ?",
    "SELECT $1",
]


@pytest.mark.parametrize("sql", WRITES + REACHES)
def test_a_query_reads_the_catalog_and_nothing_else(still: Catalog, tmp_path: Path, sql: str) -> None:
    here = tmp_path
    for name in ("secret", "secret.csv", "secret.parquet"):
        (here / name).write_text(f"a\n{SECRET}\n")
    with duckdb.connect(str(here / "other.duckdb")) as con:
        con.execute(f"CREATE TABLE t AS SELECT '{SECRET}' AS a")
    there = sorted(here.iterdir())
    stamp = still.path.stat()
    said = ask(still, sql.format(dir=here))
    assert said.keys() == {"error", "class"}
    assert SECRET not in said["error"]
    assert sorted(here.iterdir()) == there
    assert (still.path.stat().st_mtime_ns, still.path.stat().st_size) == (stamp.st_mtime_ns, stamp.st_size)
    assert ask(still, "SELECT count(*) FROM raw.points")["rows"] == [[3]]


@pytest.mark.parametrize(
    "sql", ["COPY (SELECT 1) TO '{dir}/out'", "SELECT * FROM read_text('{dir}/secret')", "SELECT 1; SELECT 2"]
)
def test_what_is_refused_is_a_usage_error(still: Catalog, tmp_path: Path, sql: str) -> None:
    (tmp_path / "secret").write_text(SECRET)
    with pytest.raises(UsageError) as refused:
        still.query(sql.format(dir=tmp_path))
    assert SECRET not in str(refused.value)


def test_settings_say_that_the_process_is_sealed(still: Catalog) -> None:
    names = ("enable_external_access", "lock_configuration", "autoload_known_extensions", "access_mode")
    columns = ", ".join(f"current_setting('{name}')" for name in names)
    assert still.query(f"SELECT {columns}")[1] == [[False, True, False, "read_only"]]


def test_the_process_of_a_query_can_write_no_file(still: Catalog, tmp_path: Path) -> None:
    """Even where DuckDB lets it: the first seal is taken away, and the second holds."""
    script = (
        "import sys; from hvbackup.store.catalog import catalog as c\n"
        "c.SEALED = {}\n"
        "c._only_reading = lambda sql: sql\n"
        "c._without_zones = lambda con, sql: sql\n"
        "c.main()"
    )
    asked = {"path": str(still.path), "sql": f"COPY (SELECT 1) TO '{tmp_path}/out'", "seconds": 20, "rows": 10}
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(asked).encode(), capture_output=True, timeout=60
    )
    assert not (tmp_path / "out").exists() or (tmp_path / "out").stat().st_size == 0
    assert b'"error"' in done.stdout or done.returncode != 0


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) FROM range(1000000000000) a, range(1000000) b",
        "WITH RECURSIVE t AS (SELECT 1 a UNION ALL SELECT a + 1 FROM t) SELECT count(*) FROM t",
        "EXPLAIN ANALYZE SELECT count(*) FROM range(1000000000000) a, range(1000000) b",
        "SELECT sleep_ms(3600000)",
    ],
)
def test_a_query_ends_when_its_time_is_up(still: Catalog, monkeypatch: pytest.MonkeyPatch, sql: str) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 1)
    monkeypatch.setattr(module, "GRACE_SECONDS", 2)
    with pytest.raises(UsageError, match=r"took longer than 0\.5 s|sleep_ms does not exist"):
        still.query(sql, timeout_seconds=0.5)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT list(range) FROM range(1000000000)",
        "SELECT string_agg(repeat('x', 10000000), '') FROM range(1000)",
        "SELECT length(repeat('x', 4000000000) || repeat('y', 4000000000))",
    ],
)
def test_a_query_that_outgrows_its_memory_is_told_so(still: Catalog, sql: str) -> None:
    with pytest.raises(UsageError, match=r"memory|longer|[Ss]tring|limit"):
        still.query(sql, timeout_seconds=30)


def test_rows_are_limited_and_endless_results_are_not_fetched(still: Catalog) -> None:
    assert still.query("SELECT range FROM range(1000000000000)", max_rows=3)[1] == [[0], [1], [2]]
    assert still.query("SELECT 1", max_rows=0)[1] == []


@pytest.mark.walk
def test_an_answer_is_limited_in_length(still: Catalog) -> None:
    with pytest.raises(UsageError, match=r"answer is longer|memory|took longer"):
        still.query("SELECT repeat('x', 1000000) FROM range(1000)", timeout_seconds=30)


# --- several processes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def holder(catalog: Catalog) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the file open for writing."""
    script = "import duckdb, sys; con = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(catalog.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_catalog_held_by_another_process_is_busy_and_says_by_whom(
    world: World, catalog: Catalog, store: Store, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.3)
    world.capture(store)
    with pytest.raises(Busy, match=str(holder.pid)):
        catalog.reconcile(store)


def test_a_query_waits_for_a_writer_to_end(catalog: Catalog, holder: subprocess.Popen[str]) -> None:
    threading.Timer(0.7, holder.kill).start()
    assert catalog.query("SELECT count(*) FROM raw.points")[1] == [[3]]


def test_a_query_on_a_held_catalog_is_busy(
    catalog: Catalog, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = json.dumps({"error": f"in use by process {holder.pid}", "class": "busy"})
    done = subprocess.CompletedProcess([], 0, refused.encode())
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(Busy, match=str(holder.pid)):
        catalog.query("SELECT 1")


# --- trouble ---------------------------------------------------------------------------------------------------------------


def test_asking_before_there_is_a_catalog_says_so(store: Store) -> None:
    with pytest.raises(HvbackupError, match="no catalog"):
        Catalog(store.state).query("SELECT 1")


def test_a_damaged_catalog_is_said_to_be_only_a_cache(catalog: Catalog) -> None:
    catalog.path.write_bytes(os.urandom(50_000))
    with pytest.raises(HvbackupError, match=rf"{FILE}.* cache"):
        catalog.query("SELECT 1")


def test_a_full_disk_is_named(world: World, store: Store, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    world.capture(store)

    def full(*_: object) -> None:
        raise duckdb.IOException("Could not write: No space left on device")

    monkeypatch.setattr(module, "load_packs", full)
    with pytest.raises(SpaceExhausted, match="No room left"):
        catalog.reconcile(store)


def test_a_catalog_that_cannot_be_written_at_all_is_an_error(
    world: World, store: Store, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.capture(store)

    def broken(*_: object) -> None:
        raise duckdb.IOException("Input/output error")

    monkeypatch.setattr(module, "load_packs", broken)
    with pytest.raises(HvbackupError, match="Cannot write the catalog"):
        catalog.reconcile(store)


@pytest.mark.parametrize(
    ("script", "seconds", "error", "said"),
    [
        ("import os; os.abort()", 60.0, UsageError, "more memory or time"),
        ("import no_such_module", 60.0, HvbackupError, "No module named 'no_such_module'"),
        ("raise SystemExit(3)", 60.0, HvbackupError, "failed: 3"),
        ("import time; time.sleep(3600)", 0.2, UsageError, "took longer than 0.2 s"),
    ],
)
def test_a_process_that_ends_otherwise_is_an_error_too(
    still: Catalog, monkeypatch: pytest.MonkeyPatch, script: str, seconds: float, error: type[HvbackupError], said: str
) -> None:
    real = subprocess.run
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.2)
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(module.subprocess, "run", lambda c, **more: real([*c[:-1], script], **more))
    with pytest.raises(error, match=said):
        still.query("SELECT 1", timeout_seconds=seconds)


def test_modules_that_lie_about_are_not_run(still: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person may ask from any directory, also from one that somebody else can write to."""
    for name in ("json.py", "duckdb.py", "blake3.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    assert still.query("SELECT 1")[1] == [[1]]
    assert not (tmp_path / "ran").exists()


def test_refusals_keep_their_class(still: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.3)
    assert ask(still, "SELECT count(*) FROM range(1000000000000) a, range(1000000) b", 0.3)["class"] == "usage"
    assert ask(still, "SELECT list(range) FROM range(1000000000)")["class"] == "usage"
    monkeypatch.setattr(module, "ANSWER_BYTES_MAX", 1000)
    assert "longer than" in ask(still, "SELECT repeat('x', 1000)")["error"]


def test_a_point_that_was_folded_tells_its_cost_too(world: World) -> None:
    with world.opened() as store:
        newest = store.newest(store.find_machine(MACHINE))
        assert newest is not None
        folded = replace(newest, id=PointId("00000000000000aa"), seq=5)
        store.commit(folded, store.writer())
        store.tell("fold", world.clock(), machine=MACHINE, point=store.path_of(folded), figures={"stored_bytes": 7})
        catalog = Catalog(store.state)
        catalog.reconcile(store)
        assert one(catalog, "SELECT stored_bytes FROM points WHERE id = '00000000000000aa'") == 7
        assert len(dump(catalog)["points"]) == 4
