"""The template that restores on PostgreSQL 14 begin with: made once, only where it is needed, and nobody else's."""

from __future__ import annotations

import pytest
from psycopg import sql

from tests.support import as_migrator, call_module, login

pytestmark = pytest.mark.every_major


@pytest.fixture
def database(new_database, connect, roles):
    name = new_database()
    connect(name, role=roles.owner).execute("CREATE TABLE a AS SELECT g AS id FROM generate_series(1, 10) g")
    return name


@pytest.fixture
def template(cluster, roles, database, connect):
    """Call the module for the database; what it has made is dropped."""

    def run(check=False):
        return call_module("template", {**login(cluster, database), "owner": roles.owner}, check=check)

    yield run
    with connect("postgres") as server:
        for (name,) in server.execute(
            "SELECT datname FROM pg_database WHERE datname LIKE '%\\_template\\_owner'"
        ).fetchall():
            server.execute(sql.SQL("ALTER DATABASE {} IS_TEMPLATE false").format(sql.Identifier(name)))
            server.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(name)))


@pytest.fixture
def restored(cluster, roles, database, tmp_path):
    """Back up and prove it by a restore, both as the migrator; return what the drill says."""

    def run():
        usual = {
            **as_migrator(cluster, roles, database), "directory": str(tmp_path / "backups"), "run_id": "r1",
            "environment": "test", "set_role": roles.owner, "client_bin": cluster.state.bin, "jobs": 1,
        }  # fmt: skip
        made = call_module("backup", usual)
        drill = call_module("drill", usual) if not made.get("failed") else made
        call_module("drill", {**usual, "state": "absent"})
        return drill

    return run


def told(cluster, roles, database):
    checks = call_module(
        "preflight",
        {**as_migrator(cluster, roles, database), "owner": roles.owner, "application": roles.app, "way_back": "dump"},
    )["checks"]
    return [row["detail"] for row in checks if "the schema public of a new database" in row["detail"]]


def test_the_migrator_restores_where_there_is_one(cluster, roles, database, template, restored, connect):
    if cluster.state.major > 14:
        assert (template()["changed"], template()["name"]) == (False, "")
        return
    assert told(cluster, roles, database)
    assert "schema public" in restored()["msg"]
    name = f"{database}_template_owner"
    assert (template(check=True)["changed"], template(check=True)["name"]) == (True, name)
    found = "SELECT datistemplate, datallowconn, datconnlimit FROM pg_database WHERE datname = %s"
    assert connect("postgres").execute(found, [name]).fetchone() is None
    assert template()["changed"]
    assert connect("postgres").execute(found, [name]).fetchone() == (True, False, -1)
    assert (template()["changed"], template()["name"]) == (False, name)
    assert told(cluster, roles, database) == []
    assert not restored().get("failed"), restored()["msg"]


def test_a_schema_public_of_the_installer_comes_back_as_that(cluster, database, template, restored, connect):
    if cluster.state.major > 14:  # where nobody's template is taken
        return
    template()
    connect(database).execute(
        "ALTER SCHEMA public OWNER TO postgres; REVOKE ALL ON SCHEMA public FROM settler_app;"
        "GRANT ALL ON SCHEMA public TO PUBLIC"
    )
    result = restored()
    assert not result.get("failed"), result


def test_one_that_a_killed_run_left_is_made_anew_and_somebody_s_database_is_not(cluster, database, template, connect):
    if cluster.state.major > 14:
        assert not template()["changed"]
        return
    server, name = connect("postgres"), sql.Identifier(f"{database}_template_owner")
    server.execute(sql.SQL("CREATE DATABASE {}").format(name))
    assert "it is no template of settler_owner; nothing was changed" in template()["msg"]
    server.execute(sql.SQL("ALTER DATABASE {} CONNECTION LIMIT 0").format(name))
    assert template()["changed"]
