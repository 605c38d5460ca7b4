"""Fingerprints of data: what changes them, what does not, and what a comparison says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import (
    Fingerprint,
    Limits,
    as_before,
    compare,
    describe,
    fingerprints,
    from_data,
    keys_file,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    from psycopg import Connection

    from tests.conftest import Connect, NewDatabase

pytestmark = pytest.mark.every_major

_TABLES = """
CREATE TABLE jobs (id uuid PRIMARY KEY, name varchar(50), amount numeric(10,2), rules jsonb, at timestamptz, ok boolean,
                   n integer, tags text[], price float8, made timestamp DEFAULT '2026-01-01', raw bytea);
INSERT INTO jobs SELECT md5(g::text)::uuid, 'job ' || g, g + 0.10, jsonb_build_object('n', g, 'x', 1.0),
    '2026-01-01 00:00+00'::timestamptz + g * interval '1 hour', g % 2 = 0, nullif(g, 7), ARRAY['a', NULL, g::text],
    g / 3.0, '1950-01-01', decode(md5(g::text), 'hex') FROM generate_series(1, 500) g;
CREATE TABLE pairs (a integer, b text, c text, PRIMARY KEY (a, b));
INSERT INTO pairs SELECT g, 'é' || g, '' FROM generate_series(1, 20) g;
CREATE TABLE loose (v integer, w text);
INSERT INTO loose SELECT g % 5, 'w' FROM generate_series(1, 50) g;
CREATE TABLE months (id bigint, at date, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE months_1 PARTITION OF months FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
CREATE TABLE months_rest PARTITION OF months DEFAULT;
INSERT INTO months SELECT g, '2026-01-01'::date + g::int FROM generate_series(1, 60) g;
CREATE TABLE "odd "" name" ("a ""column" integer PRIMARY KEY, "_runbook" text);
INSERT INTO "odd "" name" VALUES (1, NULL);
CREATE TABLE empty ();
CREATE TABLE moments (id integer PRIMARY KEY, at timestamptz, code char(4));
INSERT INTO moments VALUES (1, 'infinity', 'a'), (2, '-infinity', ''), (3, '1883-11-18 12:03:57-04:56:02', 'é  '),
    (4, '294276-12-31 23:59:59.999999+00', NULL), (5, NULL, 'abcd');
ANALYZE;
"""


_LIMITS = Limits(part_blocks=2)


class Database:
    """A database, what it was, and what a comparison with that says."""

    def __init__(self, name: str, connect: Connect, limits: Limits = _LIMITS) -> None:
        self._name, self._connect, self._limits = name, connect, limits
        self.connection: Connection[Any] = connect(name)
        self.connection.execute(_TABLES)
        self.before = self.read()

    def read(self, samples: dict[str, Fingerprint] | None = None) -> dict[str, Fingerprint]:
        """Return its fingerprints, after a way through the files of a backup."""
        with self.connection.transaction():
            self.connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            tables = describe(self.connection)
            row = self.connection.execute("SELECT pg_export_snapshot()").fetchone()
            assert row is not None
            found = fingerprints(
                lambda: self._connect(self._name),
                row[0],
                as_before(tables, samples) if samples else tables,
                self._limits,
                samples=samples,
            )
        return from_data({name: one.as_data() for name, one in found.items()}, keys_file(found))

    def wrong(self, change: str, changes: Collection[str] = ()) -> list[tuple[str, str, str]]:
        """Change something, and return check, object and the trace of what is not as before; then undo it."""
        rows = self.rows(change, changes)
        return [(row.check, row.object, row.hint) for row in rows if row.status != "ok"]

    def rows(self, change: str, changes: Collection[str] = ()) -> list[Any]:
        """Change something for good and compare."""
        self.connection.execute(change.encode())
        after = self.read(self.before)
        return compare(self.before, after, describe(self.connection), changes)


@pytest.fixture
def database(new_database: NewDatabase, connect: Connect) -> Database:
    return Database(new_database(), connect)


def test_nothing_that_keeps_the_data_changes_it(database: Database) -> None:
    for statement in ("UPDATE jobs SET n = n", "CLUSTER jobs USING jobs_pkey", "VACUUM FULL pairs"):
        assert database.wrong(statement) == []
    assert (
        database.wrong(
            "ALTER TABLE jobs ADD COLUMN tenant_id uuid DEFAULT gen_random_uuid(), DROP COLUMN ok, "
            "ALTER n TYPE bigint, "
            "ALTER name TYPE text; CREATE TABLE more (id int); INSERT INTO more VALUES (1);"
            "ALTER TABLE pairs DROP CONSTRAINT pairs_pkey; ALTER TABLE loose ADD COLUMN x int"
        )
        == []
    )
    assert database.wrong("ALTER TABLE loose DROP COLUMN w") == []
    assert len(database.before) == 7
    assert database.before["public.months"].rows == 60


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ("DELETE FROM jobs WHERE n = 3", {"public.jobs"}),
        ("INSERT INTO loose VALUES (1, 'w')", {"public.loose"}),
        ("INSERT INTO loose SELECT * FROM loose LIMIT 1", {"public.loose"}),
        ("UPDATE jobs SET name = name || ' ' WHERE n = 3", {"public.jobs.name"}),
        ("UPDATE jobs SET amount = amount + 0.01 WHERE n = 3", {"public.jobs.amount"}),
        ("UPDATE jobs SET rules = rules || '{\"x\": 1.00}' WHERE n = 3", {"public.jobs.rules"}),
        ("UPDATE jobs SET at = at + interval '1 us' WHERE n = 3", {"public.jobs.at"}),
        ("UPDATE jobs SET ok = NULL WHERE n = 3", {"public.jobs.ok"}),
        ("UPDATE jobs SET n = 0 WHERE n IS NULL", {"public.jobs.n"}),
        ("UPDATE jobs SET tags = ARRAY['a', 'NULL', '3'] WHERE n = 3", {"public.jobs.tags"}),
        ("UPDATE jobs SET raw = set_byte(raw, 3, get_byte(raw, 3) # 1) WHERE n = 3", {"public.jobs.raw"}),
        ("UPDATE jobs SET price = price + 1e-9 WHERE n = 3", {"public.jobs.price"}),
        ("UPDATE jobs SET made = '1950-01-02' WHERE n = 3", {"public.jobs.made"}),
        ("UPDATE jobs SET amount = -amount WHERE n = 3", {"public.jobs.amount"}),
        ('UPDATE jobs SET rules = \'{"n": -3, "x": 1.0}\' WHERE n = 3', {"public.jobs.rules"}),
        ('UPDATE jobs SET rules = \'{"n": 3, "x": 1.00}\' WHERE n = 3', {"public.jobs.rules"}),
        ("UPDATE moments SET at = '-infinity' WHERE id = 1", {"public.moments.at"}),
        ("UPDATE moments SET code = 'e' WHERE id = 3", {"public.moments.code"}),
        ("ALTER TABLE moments ALTER code TYPE text", {"public.moments.code"}),
        # two rows change places: sums without the key would be equal
        ("UPDATE jobs SET n = 7 - n WHERE n IN (3, 4)", {"public.jobs.n"}),
        ("UPDATE pairs SET c = NULL WHERE a = 1", {"public.pairs.c"}),
        ("UPDATE loose SET v = 4 - v WHERE v IN (1, 3)", set()),  # the same rows in another order
        ("UPDATE months SET at = at + 1 WHERE id = 1", {"public.months.id", "public.months.at"}),
        ("DROP TABLE pairs", {"public.pairs"}),
        ("TRUNCATE pairs", {"public.pairs"}),
        ("ALTER TABLE jobs ALTER made TYPE timestamptz", {"public.jobs.made"}),
        ('UPDATE "odd "" name" SET "_runbook" = \'\'', {'public.odd " name._runbook'}),
        ("ALTER TABLE jobs RENAME TO work", {"public.jobs"}),
        # without its key nothing tells rows apart: that is said, whether values are others or not
        ("ALTER TABLE jobs RENAME id TO uid; UPDATE jobs SET name = 'other'", {"public.jobs by id"}),
        ("ALTER TABLE jobs DROP COLUMN id", {"public.jobs by id"}),
    ],
)
def test_each_change_is_named(database: Database, change: str, wrong: set[str]) -> None:
    assert {name for _check, name, _hint in database.wrong(change)} == wrong


def test_what_is_declared_may_change(database: Database) -> None:
    change = "UPDATE jobs SET n = 0; DELETE FROM pairs; UPDATE months SET at = at + 1"
    declared = ["jobs.n", "public.pairs", "months"]
    assert database.wrong(change, declared) == []
    assert {name for _check, name, _hint in database.wrong("UPDATE jobs SET ok = true", declared)} == {"public.jobs.ok"}


def test_rows_are_named_by_their_keys(database: Database) -> None:
    database.connection.execute("UPDATE pairs SET c = 'x' WHERE a = 1; DELETE FROM pairs WHERE a = 2")
    [(_check, _name, hint)] = database.wrong("INSERT INTO pairs VALUES (99, 'é', '')")[:1]
    assert "By a, b: gone: 2, é2, new: 99, é, changed: 1, é1." in hint
    assert "changes=pairs" in hint


def test_a_part_of_a_large_table_is_always_the_same(new_database: NewDatabase, connect: Connect) -> None:
    database = Database(new_database(), connect, Limits(sample_above=30_000, keys=100, part_blocks=2, jobs=3))
    jobs = database.before["public.jobs"]
    assert (jobs.rows, jobs.sample > 1, jobs.keys_sample) == (500, True, 5)
    assert jobs.keys is not None
    assert 50 < len(jobs.keys) < 150
    assert database.wrong("UPDATE jobs SET n = n") == []
    [(check, name, hint)] = database.wrong("UPDATE jobs SET name = 'all'")
    assert (check, name) == ("data column", "public.jobs.name")
    assert "of one row in 5: changed:" in hint
    assert "public.jobs" in [name for _check, name, _hint in database.wrong("DELETE FROM jobs WHERE n = 3")]


def test_a_table_that_has_grown_keeps_no_more_keys_than_wanted(new_database: NewDatabase, connect: Connect) -> None:
    database = Database(new_database(), connect, Limits(keys=30, part_blocks=2))
    assert database.before["public.moments"].keys_sample == 1
    database.connection.execute("INSERT INTO moments (id) SELECT generate_series(10, 30000); ANALYZE moments")
    moments = database.read(database.before)["public.moments"]
    assert moments.keys is not None
    assert len(moments.keys) < 200
    [row] = [row for row in compare(database.before, {"public.moments": moments}, []) if row.object == "public.moments"]
    assert (row.status, row.hint.startswith("If that was meant")) == ("failed", True), "no key is said to be gone"


def test_large_objects_count(database: Database) -> None:
    database.connection.execute("SELECT lo_from_bytea(4711, 'content')")
    before = database.before = database.read()
    assert before["large objects"].rows == 1
    assert database.wrong("SELECT 1") == []
    assert database.wrong("SELECT lo_put(4711, 0, 'C')") != []


def test_the_hashes_are_the_same_on_every_server(database: Database) -> None:
    known = ("public.pairs", "public.loose", "public.moments")
    assert {name: one.columns for name, one in database.before.items() if name in known} == {
        "public.pairs": {
            "a": "int:-23815857511325911098",
            "b": "string:-1682913591805547849",
            "c": "string:-3991888959297098115",
        },
        "public.loose": {
            "v": "int:-11502159564656999230",
            "w": "string:-183907160088260085600",
            "(row)": "text:95028477407840758780",
        },
        "public.moments": {
            "id": "int:18773162843623852695",
            "at": "timestamptz:-4614378910994578353",
            "code": "bpchar:-22087569782240243502",
        },
    }


def test_partitioned_table_without_a_key_of_its_own_has_that_of_its_partitions(new_database, connect) -> None:
    with connect(new_database()) as session:
        session.execute(
            "CREATE TABLE logs (id uuid NOT NULL, at date, what text) PARTITION BY RANGE (at); "
            "CREATE TABLE logs_1 PARTITION OF logs (PRIMARY KEY (id)) FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');"
            "CREATE TABLE logs_2 PARTITION OF logs (PRIMARY KEY (id)) DEFAULT; "
            "CREATE TABLE mixed (LIKE logs) PARTITION BY RANGE (at); "
            "CREATE TABLE mixed_1 PARTITION OF mixed (PRIMARY KEY (id)) DEFAULT; "
            "CREATE TABLE mixed_2 PARTITION OF mixed FOR VALUES FROM ('2026-01-01') TO ('2026-02-01'); "
            "CREATE TABLE bare (at date) PARTITION BY RANGE (at)"
        )
        assert {table.name: table.key for table in describe(session)} == {"bare": (), "logs": ("id",), "mixed": ()}
