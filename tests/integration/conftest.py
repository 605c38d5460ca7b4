"""What the tests of the engine share: apply files as the runbook does, ask the database, a good database to spoil."""

from __future__ import annotations

import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect as engine_connect
from ansible_collections.settler.runbook.plugins.module_utils._files import read_migrations
from ansible_collections.settler.runbook.plugins.module_utils._migrate import migrate
from ansible_collections.settler.runbook.plugins.module_utils._run import Options, Outcome
from psycopg import sql

from tests.support import PROJECT, as_migrator
from tools import generate, legacy


@pytest.fixture
def apply(cluster, roles):
    """Apply files as the runbook does: as the migrator, who becomes the owner."""

    def run(dbname, migrations, outcome=None, say=None, **changes):
        outcome = outcome or Outcome()
        usual = {"run_id": "run-1", "role": roles.owner, "lock_wait": 60, "hazards_allowed": ("all",)}
        options = Options(**(usual | changes))
        with engine_connect(
            as_migrator(cluster, roles, dbname), application=f"runbook:{options.run_id}:migrate"
        ) as session:
            migrate(session, migrations, options, outcome, say=say)
        return outcome

    return run


@pytest.fixture
def ask(connect):
    """Ask for one value, as the superuser."""

    def one(dbname, query, *arguments):
        with connect(dbname) as session:
            row = session.execute(query, arguments or None).fetchone()
        return row[0] if row else None

    return one


@pytest.fixture(scope="module")
def good(cluster, roles, _template):
    """Make a good database with rows, which every test leaves as it was."""
    name = "settler_test_good"
    with psycopg.connect(cluster.conninfo("postgres"), autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name} OWNER settler_owner TEMPLATE {_template}".encode())
        server.execute(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC".encode())
        with psycopg.connect(cluster.conninfo(name), autocommit=True) as session:
            session.execute("GRANT USAGE ON SCHEMA public TO PUBLIC")
            with engine_connect(as_migrator(cluster, roles, name)) as engine:
                options = Options(run_id="r", role=roles.owner, hazards_allowed=("all",))
                migrate(engine, read_migrations(PROJECT / "sql/migrations"), options, Outcome())
            session.execute("DROP SCHEMA runbook CASCADE")
            generate.fill(session, shape=legacy.CURRENT, rows=2000, seed=7)
        yield name
        server.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def session(good, cluster):
    """Open a transaction of the superuser that is rolled back."""
    with psycopg.connect(cluster.conninfo(good), autocommit=True) as connection:
        connection.execute("SET search_path = public")
        with connection.transaction(force_rollback=True):
            yield connection


@pytest.fixture
def server(cluster):
    """A session of the superuser in another database than those of the tests."""
    with psycopg.connect(cluster.conninfo("postgres"), autocommit=True) as session:
        yield session


@pytest.fixture
def tidy_server(server):
    """Drop what a test leaves beside its databases: failed, half restored and renamed ones, snapshots."""

    def names():
        return {row[0] for row in server.execute("SELECT datname FROM pg_database WHERE NOT datistemplate")}

    before = names()
    yield
    for name in names() - before:
        server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
