"""The tables of the catalog, and the views people ask: `docs/sql.md` explains each to its users.

Tables live in the schema `raw` and are nobody's business but the catalog's.  There are no migrations: whatever is changed
here, SCHEMA is raised, and every catalog is made again from the store.
"""

from __future__ import annotations

SCHEMA = 3

# No primary key anywhere: it would cost twenty times the time of the insert, and `reconcile` keeps rows apart by name.
COLUMNS = {
    "meta": ("schema INTEGER", "store VARCHAR"),
    "packs": ("number INTEGER", "name VARCHAR", "kind VARCHAR", "bytes BIGINT", "chunks BIGINT"),
    "chunks": (
        *("id BLOB", "pack INTEGER", "record_at BIGINT", "stored UINTEGER", "chunk_at UINTEGER", "plain UINTEGER"),
        "kind UTINYINT",
    ),
    "points": (
        *("path VARCHAR", "id VARCHAR", "t BIGINT", "machine VARCHAR", "name VARCHAR", "platform VARCHAR"),
        *("consistency VARCHAR", "config VARCHAR", "status VARCHAR", "notes VARCHAR", "disks INTEGER"),
        *(
            "read_bytes BIGINT",
            "changed_bytes BIGINT",
            "new_bytes BIGINT",
            "seq BIGINT",
            "origin VARCHAR",
            "tags VARCHAR",
        ),
    ),
    "disks": (
        *("point VARCHAR", "position INTEGER", "disk VARCHAR", "size BIGINT", "sector INTEGER", "root VARCHAR"),
        *("how VARCHAR", "path VARCHAR"),
    ),
    "runs": (
        *("path VARCHAR", "kind VARCHAR", "t BIGINT", "machine VARCHAR", "point VARCHAR", "status VARCHAR"),
        *("notes VARCHAR", "read_bytes BIGINT", "changed_bytes BIGINT", "new_bytes BIGINT", "stored_bytes BIGINT"),
        *("seconds DOUBLE", "cpu_seconds DOUBLE", "details VARCHAR"),
    ),
    "segments": (
        *("path VARCHAR", "folder VARCHAR", "epoch INTEGER", "first_seq BIGINT", "last_seq BIGINT", "first_t BIGINT"),
        *("last_t BIGINT", "moments BIGINT", "facts BIGINT", "changed_bytes BIGINT", "bytes BIGINT"),
    ),
    "gaps": ("folder VARCHAR", "start BIGINT", "stop BIGINT", "why VARCHAR"),
    "marks": ("folder VARCHAR", "seq BIGINT", "t BIGINT", "label VARCHAR", "consistency VARCHAR"),
}

# A moment is kept in nanoseconds and shown in microseconds, which is what a TIMESTAMPTZ can hold.
VIEWS = """
CREATE VIEW packs AS SELECT name, kind, bytes, chunks FROM raw.packs;

CREATE VIEW chunks AS
SELECT c.id, p.name AS pack, c.record_at, c.stored, c.chunk_at, c.plain,
       CASE c.kind WHEN 1 THEN 'block' WHEN 2 THEN 'page' WHEN 3 THEN 'point' ELSE 'unknown' END AS kind
FROM raw.chunks c JOIN raw.packs p ON p.number = c.pack;

CREATE VIEW runs AS
WITH names AS (SELECT machine, arg_max(name, t) AS name FROM raw.points WHERE status <> 'damaged' GROUP BY machine)
SELECT r.kind, make_timestamp(r.t // 1000)::TIMESTAMPTZ AS time, r.machine, n.name,
       parse_filename(r.point)[-16:] AS point, r.status,
       r.read_bytes, r.changed_bytes, r.new_bytes, r.stored_bytes, r.seconds, r.cpu_seconds,
       r.notes, r.details, r.path
FROM raw.runs r LEFT JOIN names n USING (machine);

CREATE VIEW points AS
WITH sizes AS (SELECT point, sum(size)::BIGINT AS size FROM raw.disks GROUP BY point),
     told AS (SELECT point, any_value(stored_bytes) AS stored_bytes, any_value(seconds) AS seconds
              FROM raw.runs WHERE kind IN ('capture', 'fold', 'copy') GROUP BY point)
SELECT p.id, make_timestamp(p.t // 1000)::TIMESTAMPTZ AS time, p.machine, p.name, p.consistency, p.status,
       p.disks, coalesce(s.size, 0) AS size,
       p.read_bytes, p.changed_bytes, p.new_bytes, t.stored_bytes, t.seconds, p.config, p.seq, p.tags, p.origin, p.notes, p.path
FROM raw.points p LEFT JOIN sizes s ON s.point = p.path LEFT JOIN told t ON t.point = p.path;

CREATE VIEW disks AS
SELECT p.id AS point, make_timestamp(p.t // 1000)::TIMESTAMPTZ AS time, p.machine, p.name,
       d.disk, d.size, d.sector, d.how, d.root, d.path
FROM raw.disks d JOIN raw.points p ON p.path = d.point;

CREATE VIEW machines AS
SELECT machine AS id, arg_max(name, time) AS name, arg_max(platform, time) AS platform, count(*) AS points,
       min(time) AS oldest, max(time) AS newest, arg_max(size, time) AS size
FROM points JOIN (SELECT path, platform FROM raw.points) USING (path)
WHERE status <> 'damaged' GROUP BY machine;

CREATE VIEW growth AS
SELECT machine, arg_max(name, time) AS name, (time AT TIME ZONE 'UTC')::DATE AS day, count(*) AS points,
       sum(read_bytes)::BIGINT AS read_bytes, sum(changed_bytes)::BIGINT AS changed_bytes,
       sum(new_bytes)::BIGINT AS new_bytes, sum(stored_bytes)::BIGINT AS stored_bytes
FROM points WHERE status <> 'damaged' GROUP BY machine, day;

CREATE VIEW change_rate AS
SELECT machine, arg_max(name, time) AS name, date_trunc('hour', time AT TIME ZONE 'UTC') AT TIME ZONE 'UTC' AS hour,
       count(*) AS points, sum(changed_bytes)::BIGINT AS changed_bytes
FROM points WHERE status <> 'damaged' GROUP BY machine, hour;

CREATE VIEW reduction AS
SELECT machine, arg_max(name, time) AS name, count(*) AS points, sum(size)::BIGINT AS full_copies_bytes,
       sum(changed_bytes)::BIGINT AS changed_bytes, sum(new_bytes)::BIGINT AS new_bytes,
       sum(stored_bytes)::BIGINT AS stored_bytes,
       round(sum(changed_bytes) / nullif(sum(new_bytes), 0), 2) AS deduplication,
       round(sum(new_bytes) / nullif(sum(stored_bytes), 0), 2) AS compression,
       round(1 - sum(stored_bytes) / nullif(sum(size), 0), 4) AS reduction
FROM points WHERE status <> 'damaged' GROUP BY machine;

-- Journals are in folders with the keyed names of their machines, as points are.
CREATE VIEW raw.owners AS
SELECT split_part(path, '/', 2) AS folder, any_value(machine) AS machine, arg_max(name, t) AS name
FROM raw.points WHERE status <> 'damaged' GROUP BY folder;

CREATE VIEW segments AS
SELECT o.machine, o.name, s.epoch, s.first_seq, s.last_seq, make_timestamp(s.first_t // 1000)::TIMESTAMPTZ AS oldest,
       make_timestamp(s.last_t // 1000)::TIMESTAMPTZ AS newest, s.moments, s.facts, s.changed_bytes, s.bytes, s.path
FROM raw.segments s LEFT JOIN raw.owners o USING (folder);

CREATE VIEW gaps AS
SELECT o.machine, o.name, make_timestamp(g.start // 1000)::TIMESTAMPTZ AS begins,
       make_timestamp(g.stop // 1000)::TIMESTAMPTZ AS ends, (g.stop - g.start) / 1e9 AS seconds, g.why
FROM raw.gaps g LEFT JOIN raw.owners o USING (folder);

CREATE VIEW marks AS
SELECT o.machine, o.name, make_timestamp(m.t // 1000)::TIMESTAMPTZ AS time, m.seq, m.label AS tag, m.consistency
FROM raw.marks m LEFT JOIN raw.owners o USING (folder);

CREATE VIEW journals AS
WITH lost AS (SELECT folder, count(*) AS gaps, sum(stop - start) / 1e9 AS gap_seconds FROM raw.gaps GROUP BY folder)
SELECT any_value(o.machine) AS machine, any_value(o.name) AS name, count(*) AS segments,
       make_timestamp(min(s.first_t) // 1000)::TIMESTAMPTZ AS oldest,
       make_timestamp(max(s.last_t) // 1000)::TIMESTAMPTZ AS newest, sum(s.moments)::BIGINT AS moments,
       sum(s.changed_bytes)::BIGINT AS changed_bytes, sum(s.bytes)::BIGINT AS bytes,
       coalesce(any_value(l.gaps), 0) AS gaps, coalesce(any_value(l.gap_seconds), 0) AS gap_seconds
FROM raw.segments s LEFT JOIN raw.owners o USING (folder) LEFT JOIN lost l USING (folder) GROUP BY s.folder;
"""
