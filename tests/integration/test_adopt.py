"""Adopting: a schema that is there already, by hand or by another tool, becomes a ledger only if that is true."""

from __future__ import annotations

import zlib

import pytest
import yaml
from ansible_collections.settler.runbook.plugins.module_utils import _adopt
from ansible_collections.settler.runbook.plugins.module_utils._adopt import (
    flyway_checksum,
    foreign_ledgers,
    shape_of,
)
from ansible_collections.settler.runbook.plugins.module_utils._fleet import databases_of

from tests.support import PROJECT, as_migrator, call_module, write_migrations
from tools import legacy

FILES = {
    "001_a.sql": "CREATE EXTENSION IF NOT EXISTS citext;\nCREATE SCHEMA apart;\n"
    "CREATE TABLE a (id int PRIMARY KEY, note text);\n",
    "002_b.sql": "CREATE TABLE b (id int REFERENCES a);\nCREATE INDEX b_id ON b (id);\n",
    "003_c.sql": "ALTER TABLE a ADD COLUMN more int;\n",
    "R__view.sql": "CREATE OR REPLACE VIEW ids AS SELECT id FROM a;\n",
}
FLYWAY = """
CREATE TABLE flyway_schema_history (installed_rank int PRIMARY KEY, version text, description text, type text,
    script text, checksum int, installed_by text, installed_on timestamp DEFAULT now(), execution_time int,
    success bool)
"""


@pytest.fixture
def adopt(cluster, roles, tmp_path):
    """Run the module adopt on the folder."""
    write_migrations(tmp_path, FILES)

    def run(dbname, check=False, **changes):
        arguments = {
            **as_migrator(cluster, roles, dbname),
            "directory": str(tmp_path),
            "optional": [],
            "source": "baseline",
            "version": "",
            "table": "",
            "accept_changed": False,
            "run_id": "adopt-1",
            "set_role": roles.owner,
            "project": "settler",
            "ledger_schema": "runbook",
            "lock_wait": 60,
            "scripts_file": None,
            **changes,
        }
        return call_module("adopt", arguments, check=check)

    return run


@pytest.fixture
def by_hand(new_database, connect, roles):
    """Return a database that has what 001 and 002 make, without a ledger."""
    name = new_database()
    connect(name, role=roles.owner).execute(FILES["001_a.sql"] + FILES["002_b.sql"])
    return name


def _databases(ask, name):
    return ask(name, "SELECT count(*) FROM pg_database WHERE datname LIKE '%baseline%'")


@pytest.mark.every_major
def test_a_baseline_is_taken_when_the_database_has_what_the_files_make(by_hand, adopt, apply, ask, tmp_path):
    planned = adopt(by_hand, check=True, version="002")
    assert planned["adopted"] == ["001_a.sql", "002_b.sql"]
    assert ask(by_hand, "SELECT to_regnamespace('runbook')") is None
    assert adopt(by_hand, version="002")["changed"]
    assert ask(by_hand, "SELECT string_agg(event, ' ') FROM runbook.events") == "baselined baselined"
    assert not adopt(by_hand, version="2")["changed"]
    assert _databases(ask, by_hand) == 0
    outcome = apply(by_hand, write_migrations(tmp_path, FILES))
    assert [one.file for one in outcome.applied] == ["003_c.sql", "R__view.sql"]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("DROP INDEX b_id", "b_id"),
        ("ALTER TABLE a DROP COLUMN note", "note"),
        ("ALTER TABLE a ALTER note TYPE varchar(10)", "note"),
        ("DROP TABLE b", "b"),
        ("DROP EXTENSION citext", "citext"),
        ("DROP SCHEMA apart", "apart"),
    ],
)
def test_a_baseline_is_refused_when_something_is_missing_or_otherwise(by_hand, adopt, connect, ask, damage, named):
    connect(by_hand).execute(damage)
    result = adopt(by_hand, version="002")
    assert "does not have what 002_b.sql" in result["msg"]
    assert any(named in problem for problem in result["problems"])
    assert ask(by_hand, "SELECT to_regnamespace('runbook')") is None
    assert _databases(ask, by_hand) == 0


def test_the_scratch_database_is_meant_by_no_pattern_of_a_fleet(by_hand, adopt, server, monkeypatch):
    real, seen = _adopt.migrate, []

    def seeing(session, *arguments, **options):
        seen.append((session.info.dbname, databases_of(server, [f"{by_hand}*"])))
        return real(session, *arguments, **options)

    monkeypatch.setattr(_adopt, "migrate", seeing)
    assert not adopt(by_hand, version="002").get("failed")
    assert seen == [(f"{by_hand}_baseline_adopt-1", [by_hand])]


def test_what_the_database_has_beyond_the_baseline_is_told(by_hand, adopt, connect):
    connect(by_hand).execute("CREATE TABLE stray (i int)")
    assert adopt(by_hand, version="002")["unexpected"] == ["table public.stray"]


def test_a_baseline_that_is_no_file_and_one_beside_a_ledger_are_refused(by_hand, new_database, adopt, apply, tmp_path):
    assert "there is no migration 007" in adopt(by_hand, version="007")["msg"]
    other = new_database()
    apply(other, write_migrations(tmp_path, FILES)[:1])
    assert "the ledger has rows already: 001_a.sql" in adopt(other, version="002")["msg"]


def test_flyway_checksums_are_over_lines_without_their_ends():
    assert (
        flyway_checksum("a\nb\n")
        == flyway_checksum("a\nb")
        == zlib.crc32(b"ab") - (1 << 32) * (zlib.crc32(b"ab") >> 31)
    )
    assert flyway_checksum("") == 0


def _flyway(connect, name, roles, *rows):
    session = connect(name, role=roles.owner)
    session.execute(FLYWAY)
    for rank, (version, kind, script, text, success) in enumerate(rows, 1):
        session.execute(
            "INSERT INTO flyway_schema_history VALUES (%s, %s, 'x', %s, %s, %s, 'me', now(), 5, %s)",
            [rank, version, kind, script, flyway_checksum(text) if text else None, success],
        )


def test_flyway_s_ledger_is_taken_over(by_hand, adopt, apply, connect, roles, ask, tmp_path):
    _flyway(
        connect,
        by_hand,
        roles,
        (None, "SCHEMA", '"public"', "", True),
        ("1", "SQL", "V1__a.sql", FILES["001_a.sql"], True),
        ("002", "SQL", "V002__b.sql", FILES["002_b.sql"], True),
        ("3", "SQL", "V3__c.sql", FILES["003_c.sql"], True),
        ("3", "DELETE", "V3__c.sql", "", True),
        (None, "SQL", "R__view.sql", "older", True),
        (None, "SQL", "R__view.sql", FILES["R__view.sql"], True),
    )
    assert adopt(by_hand, source="flyway")["adopted"] == ["001_a.sql", "002_b.sql", "R__view.sql"]
    assert ask(by_hand, "SELECT count(*) FROM runbook.events WHERE event = 'adopted'") == 3
    assert [one.file for one in apply(by_hand, write_migrations(tmp_path, FILES)).applied] == ["003_c.sql"]


def test_flyway_s_baseline_stands_for_all_before_it(by_hand, adopt, connect, roles):
    _flyway(connect, by_hand, roles, ("2", "BASELINE", "<< Flyway Baseline >>", "", True))
    assert adopt(by_hand, source="flyway")["adopted"] == ["001_a.sql", "002_b.sql"]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (("1", "SQL", "V1__a.sql", "something else", True), "is not what Flyway applied"),
        (("1.5", "SQL", "V1_5__a.sql", "x", True), "there is no file with the number 1.5"),
        (("1", "SQL", "V1__a.sql", FILES["001_a.sql"], False), "it failed there"),
        (("1.1", "BASELINE", "<< Flyway Baseline >>", "", True), "a baseline of 1.1, which no file's number is"),
        (("1", "JDBC", "db.V1", "", True), "an entry of the type JDBC"),
    ],
)
def test_what_of_flyway_s_ledger_cannot_be_taken_is_named(by_hand, adopt, connect, roles, ask, row, told):
    _flyway(connect, by_hand, roles, row)
    assert told in adopt(by_hand, source="flyway")["msg"]
    assert ask(by_hand, "SELECT to_regnamespace('runbook')") is None


def test_a_file_that_flyway_knows_otherwise_can_be_taken_on_demand(by_hand, adopt, connect, roles):
    _flyway(connect, by_hand, roles, ("1", "SQL", "V1__a.sql", "something else", True))
    assert adopt(by_hand, source="flyway", accept_changed=True)["adopted"] == ["001_a.sql"]


def test_dbmate_s_ledger_is_taken_over(by_hand, adopt, connect, roles):
    session = connect(by_hand, role=roles.owner)
    session.execute("CREATE TABLE schema_migrations (version varchar PRIMARY KEY)")
    session.execute("INSERT INTO schema_migrations VALUES ('001'), ('002')")
    assert adopt(by_hand, source="dbmate")["adopted"] == ["001_a.sql", "002_b.sql"]
    session.execute("INSERT INTO schema_migrations VALUES ('20260101000000')")
    assert "20260101000000: there is no file" in adopt(by_hand, source="dbmate")["msg"]


def test_golang_migrate_s_ledger_is_not_taken_for_dbmate_s(by_hand, adopt, connect, ask):
    connect(by_hand).execute("CREATE TABLE schema_migrations (version bigint PRIMARY KEY, dirty bool NOT NULL);"
                             "INSERT INTO schema_migrations VALUES (2, false)")  # fmt: skip
    result = adopt(by_hand, source="dbmate")
    assert "golang-migrate's ledger, which names only the newest version" in result["msg"]
    assert "migrate_baseline=NNN" in result["hint"]
    assert ask(by_hand, "SELECT to_regnamespace('runbook')") is None


def test_a_ledger_that_is_not_there_is_a_clear_error(by_hand, adopt):
    assert "cannot read Flyway's ledger flyway_schema_history" in adopt(by_hand, source="flyway")["msg"]


TOOLS = {
    "Flyway (public.flyway_schema_history, newest entry V1__a.sql)": "CREATE TABLE flyway_schema_history "
    "(installed_rank int, version text, script text, checksum int);"
    "INSERT INTO flyway_schema_history VALUES (1, '1', 'V1__a.sql', 5)",
    "Sqitch (sqitch.changes, newest entry users)": "CREATE SCHEMA sqitch; CREATE TABLE sqitch.changes "
    "(change_id text, change text, project text, committed_at timestamptz);"
    "INSERT INTO sqitch.changes VALUES ('1', 'users', 'p', now())",
    "golang-migrate (public.schema_migrations, newest entry 7)": "CREATE TABLE schema_migrations (version bigint, "
    "dirty bool); INSERT INTO schema_migrations VALUES (7, false)",
    "golang-migrate (public.schema_migrations, newest entry 8, which failed there)": "CREATE TABLE schema_migrations "
    "(version bigint, dirty bool); INSERT INTO schema_migrations VALUES (8, true)",
    "dbmate or Rails (public.schema_migrations, newest entry 2024)": "CREATE TABLE schema_migrations (version varchar);"
    "INSERT INTO schema_migrations VALUES ('2023'), ('2024')",
    "Alembic (public.alembic_version, newest entry abc)": "CREATE TABLE alembic_version (version_num varchar(32));"
    "INSERT INTO alembic_version VALUES ('abc')",
    "Prisma (public._prisma_migrations, newest entry init)": "CREATE TABLE _prisma_migrations (id text, "
    "migration_name text, started_at timestamptz, finished_at timestamptz);"
    "INSERT INTO _prisma_migrations VALUES ('1', 'init', now(), now())",
    "node-pg-migrate (public.pgmigrations, newest entry one)": "CREATE TABLE pgmigrations (id serial, name text, "
    "run_on timestamp); INSERT INTO pgmigrations (name, run_on) VALUES ('one', now())",
    "Knex (public.knex_migrations, newest entry k.js)": "CREATE TABLE knex_migrations (id serial, name text, batch int,"
    " migration_time timestamptz); INSERT INTO knex_migrations (name) VALUES ('k.js')",
    "Liquibase (public.databasechangelog)": "CREATE TABLE databasechangelog (id text, author text, orderexecuted int)",
}


@pytest.mark.parametrize("tool", TOOLS)
def test_the_ledger_of_another_tool_is_named(new_database, connect, tool):
    session = connect(new_database())
    session.execute(TOOLS[tool])
    assert [str(one) for one in foreign_ledgers(session)] == [tool]


@pytest.mark.parametrize("shape", legacy.SHAPES)
def test_each_legacy_shape_is_told_by_its_own_name(new_database, connect, shape):
    shapes = yaml.safe_load((PROJECT / "sql/verify/shapes.yml").read_text())
    session = connect(new_database())
    legacy.create(session, shape)
    assert [*shapes].index(shape_of(session, shapes)) == len(legacy.SHAPES) - legacy.SHAPES.index(shape)


def test_a_table_that_only_has_the_name_is_no_ledger(new_database, connect):
    session = connect(new_database())
    session.execute("CREATE TABLE changes (id int); CREATE TABLE pgmigrations (i int)")
    assert foreign_ledgers(session) == []


def test_a_shape_is_the_first_that_fits(new_database, connect):
    session = connect(new_database())
    session.execute("CREATE TABLE a (i int); CREATE TABLE b (i int)")
    shapes = {"newer": {"with": ["a", "c"]}, "middle": {"with": ["a", "b"]}, "old": {"with": ["a"], "without": ["b"]}}
    assert shape_of(session, shapes) == "middle"
    session.execute("DROP TABLE b")
    assert shape_of(session, shapes) == "old"
    session.execute("DROP TABLE a")
    assert shape_of(session, shapes) == ""
