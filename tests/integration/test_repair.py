"""Repair of the ledger: explicit, with a reason, kept as an event."""

from __future__ import annotations

import pytest

from tests.support import as_migrator, call_module, migration, refused, write_migrations

TABLE = migration("CREATE TABLE t (i int);")


@pytest.fixture
def fix(cluster, roles, tmp_path):
    """Run the module repair on a file of the folder."""

    def run(dbname, file="001_test.sql", check=False, **changes):
        arguments = {
            **as_migrator(cluster, roles, dbname),
            "directory": str(tmp_path),
            "optional": [],
            "file": file,
            "action": "accept",
            "reason": "a comment only",
            "run_id": "repair-1",
            "set_role": roles.owner,
            "project": "settler",
            "ledger_schema": "runbook",
            "lock_wait": 60,
            **changes,
        }
        return call_module("repair", arguments, check=check)

    return run


def test_changed_file_is_accepted_once_with_its_reason(tmp_path, new_database, apply, ask, fix):
    database = new_database()
    apply(database, [TABLE])
    (changed,) = write_migrations(tmp_path, {"001_test.sql": "-- what it is for\nCREATE TABLE t (i int);"})
    assert "playbooks/repair.yml" in refused(apply, database, [changed]).hint
    assert fix(database, check=True)["changed"]
    assert "changed after it was applied" in refused(apply, database, [changed]).message
    assert [fix(database)["changed"], fix(database)["changed"]] == [True, False]
    assert apply(database, [changed]).applied == []
    detail = ask(database, "SELECT detail FROM runbook.events WHERE event = 'repaired'")
    assert (detail["reason"], detail["after"]) == ("a comment only", f"checksum {changed.checksum}")


def test_missing_file_is_forgotten(tmp_path, new_database, apply, ask, fix):
    database = new_database()
    apply(database, [TABLE, migration("SELECT 1;", "002_gone.sql")])
    write_migrations(tmp_path, {"001_test.sql": TABLE.text})
    assert "repair_action=forget" in fix(database, "002_gone.sql")["hint"]
    assert fix(database, "002_gone.sql", action="forget")["changed"]
    assert not fix(database, "002_gone.sql", action="forget")["changed"]
    assert apply(database, [TABLE]).applied == []


@pytest.mark.parametrize(("action", "rows"), [("done", 1), ("again", 2)])
def test_statement_in_doubt_is_settled(tmp_path, new_database, connect, apply, ask, fix, action, rows):
    database = new_database()
    step = "-- runbook: no-transaction\nDO $$ BEGIN INSERT INTO t VALUES (1); COMMIT; END $$;"
    files = write_migrations(tmp_path, {"001_test.sql": TABLE.text, "002_do.sql": step})
    apply(database, files)
    with connect(database) as session:
        session.execute("UPDATE runbook.migrations SET state = 'running' WHERE file = '002_do.sql'")
        session.execute("UPDATE runbook.journal SET state = 'running'")
    assert "nobody can know" in refused(apply, database, files).message
    assert fix(database, "002_do.sql", action=action)["changed"]
    assert len(apply(database, files).applied) == 1
    assert ask(database, "SELECT count(*) FROM t") == rows
    assert not fix(database, "002_do.sql", action=action)["changed"]


def test_repair_without_a_reason_or_a_row_is_refused(tmp_path, new_database, apply, fix):
    database = new_database()
    apply(database, [TABLE])
    write_migrations(tmp_path, {"001_test.sql": TABLE.text})
    assert "needs a reason" in fix(database, reason=" ")["msg"]
    result = fix(database, "007_x.sql")
    assert "007_x.sql: the ledger has no row for it" in result["msg"]
    assert "001_test.sql" in result["hint"]
