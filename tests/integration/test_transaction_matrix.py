"""The table of commands that refuse a transaction is the server's own: each one is asked, on each major."""

from __future__ import annotations

import contextlib

import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.module_utils._statements import refuses_transaction
from pglast import parse_sql

SETUP = """
CREATE TABLE t (id int PRIMARY KEY, v text);
CREATE INDEX t_v ON t (v);
CREATE TABLE parted (id int NOT NULL) PARTITION BY RANGE (id);
CREATE TABLE part_1 PARTITION OF parted FOR VALUES FROM (0) TO (10);
CREATE INDEX parted_id ON parted (id);
CREATE MATERIALIZED VIEW m AS SELECT id FROM t;
CREATE UNIQUE INDEX m_id ON m (id);
CREATE TYPE mood AS ENUM ('sad');
"""

#: Those that only the server can judge, because the catalogue decides; the engine learns it from the error.
BY_CATALOGUE = {"REINDEX TABLE parted", "REINDEX INDEX parted_id", "CLUSTER parted USING parted_id"}

#: Refused by the server only of a subscription that is there; the engine refuses them all.
STRICTER = {
    "DROP SUBSCRIPTION IF EXISTS never",
    "ALTER SUBSCRIPTION never REFRESH PUBLICATION",
    "ALTER SUBSCRIPTION never SET PUBLICATION p",
    "ALTER SUBSCRIPTION never ADD PUBLICATION p WITH (copy_data = false)",
}

COMMANDS = [
    "CREATE DATABASE never",
    "DROP DATABASE never",
    "CREATE TABLESPACE never LOCATION '/nowhere'",
    "DROP TABLESPACE never",
    "ALTER SYSTEM SET work_mem = '4MB'",
    "VACUUM t",
    "VACUUM",
    "VACUUM (ANALYZE) t",
    "ANALYZE t",
    "CLUSTER",
    "CLUSTER t USING t_v",
    "CLUSTER parted USING parted_id",
    "CREATE INDEX CONCURRENTLY t_w ON t (v)",
    "CREATE INDEX t_w ON t (v)",
    "DROP INDEX CONCURRENTLY t_v",
    "DROP INDEX t_v",
    "REINDEX TABLE t",
    "REINDEX INDEX t_v",
    "REINDEX TABLE CONCURRENTLY t",
    "REINDEX (CONCURRENTLY) TABLE t",
    "REINDEX (CONCURRENTLY off) TABLE t",
    "REINDEX SCHEMA public",
    "REINDEX TABLE parted",
    "REINDEX INDEX parted_id",
    "ALTER TABLE parted DETACH PARTITION part_1 CONCURRENTLY",
    "ALTER TABLE parted DETACH PARTITION part_1",
    "REFRESH MATERIALIZED VIEW m",
    "REFRESH MATERIALIZED VIEW CONCURRENTLY m",
    "TRUNCATE t",
    "CREATE EXTENSION IF NOT EXISTS pgcrypto",
    "SELECT pg_create_restore_point('x')",
    "ALTER TYPE mood ADD VALUE 'glad'",
    "DISCARD ALL",
    "DISCARD TEMP",
    "CREATE SUBSCRIPTION s CONNECTION 'dbname=nowhere' PUBLICATION p",
    "CREATE SUBSCRIPTION s CONNECTION 'dbname=nowhere' PUBLICATION p WITH (connect = false)",
    "CREATE SUBSCRIPTION s CONNECTION 'dbname=nowhere' PUBLICATION p WITH (connect = false, create_slot = false)",
    "DROP SUBSCRIPTION IF EXISTS never",
    "ALTER SUBSCRIPTION never REFRESH PUBLICATION",
    "ALTER SUBSCRIPTION never SET PUBLICATION p",
    "ALTER SUBSCRIPTION never SET PUBLICATION p WITH (refresh = false)",
    "ALTER SUBSCRIPTION never ADD PUBLICATION p WITH (copy_data = false)",
    "ALTER DATABASE never SET TABLESPACE pg_default",
    "ALTER DATABASE never SET work_mem = '4MB'",
    "REINDEX DATABASE never",
    "REINDEX SYSTEM never",
    "COMMENT ON TABLE t IS 'x'",
    "LOCK TABLE t",
]


def _refused(session, command):
    """Ask the server whether it refuses a command in a transaction block; the transaction is rolled back."""
    try:
        with session.transaction(force_rollback=True):
            session.execute(command)
    except psycopg.errors.ActiveSqlTransaction:
        return True
    except psycopg.Error:
        return False  # refused for another reason: it would have got as far as that
    return False


@pytest.mark.every_major
def test_the_parser_says_of_each_command_what_the_server_says(new_database, connect, cluster):
    session = connect(new_database())
    session.execute(SETUP)
    wrong = []
    for command in COMMANDS:
        server, ours = _refused(session, command), bool(refuses_transaction(parse_sql(command)[0].stmt))
        if command.startswith("CLUSTER parted") and cluster.state.major < 15:
            server = False  # no such command before 15
        expected = (server and command not in BY_CATALOGUE) or command in STRICTER
        if ours != expected:
            wrong.append(f"{command}: the server {'refuses' if server else 'allows'} it, the parser says {ours}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.every_major
@pytest.mark.parametrize("command", ["DO $$ BEGIN COMMIT; END $$", "CALL commits()"])
def test_a_commit_inside_of_code_is_refused_by_the_server_in_a_transaction(new_database, connect, command):
    session = connect(new_database())
    session.execute("CREATE PROCEDURE commits() LANGUAGE plpgsql AS 'BEGIN COMMIT; END'")
    with pytest.raises(psycopg.errors.InvalidTransactionTermination), session.transaction():
        session.execute(command)


@pytest.mark.every_major
def test_prepared_transactions_cannot_be_ended_in_a_transaction(new_database, connect):
    session = connect(new_database())
    for command in ("COMMIT PREPARED 'x'", "ROLLBACK PREPARED 'x'"):
        assert _refused(session, command)
        with contextlib.suppress(psycopg.Error):
            session.execute(command)
