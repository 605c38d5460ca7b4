"""A session of the engine fences itself: no setting of a role or database cuts it short; it ends with its client."""

from __future__ import annotations

import socket

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect as engine_connect
from ansible_collections.settler.runbook.plugins.module_utils._connection import reset
from psycopg import sql

from tests.support import as_migrator, migration

pytestmark = pytest.mark.every_major

#: What each session has, and the first major that knows the setting.
PROMISED = {
    "client_connection_check_interval": ("1s", 14),
    "idle_in_transaction_session_timeout": ("0", 14),
    "idle_session_timeout": ("0", 14),
    "transaction_timeout": ("0", 17),
    "statement_timeout": ("0", 14),
    "lock_timeout": ("0", 14),
}
#: What somebody has set for the migrator, or for the database: each of it would end a migration, or keep a dead one.
HOSTILE = dict.fromkeys(PROMISED, "30min") | {"client_connection_check_interval": "0"}


@pytest.fixture(params=["ALTER ROLE {migrator} SET", "ALTER DATABASE {database} SET",
                        "ALTER ROLE {migrator} IN DATABASE {database} SET"])  # fmt: skip
def hostile(request, new_database, server, cluster, roles):
    """Yield a database, and the settings that this server knows, all set otherwise than promised."""
    database = new_database()
    known = [name for name, (_value, since) in PROMISED.items() if cluster.state.major >= since]
    names = {"migrator": sql.Identifier(roles.migrator), "database": sql.Identifier(database)}
    who = sql.SQL(request.param).format(**names)
    for name in known:
        server.execute(sql.SQL("{} {} = {}").format(who, sql.Identifier(name), HOSTILE[name]))
    yield database, {name: PROMISED[name][0] for name in known}
    server.execute(sql.SQL("ALTER ROLE {migrator} RESET ALL").format(**names))


def settings(session, names):
    return {name: session.execute("SELECT current_setting(%s)", [name]).fetchone()[0] for name in names}


def test_session_has_what_is_promised_whatever_role_and_database_say(hostile, connect, cluster, roles):
    database, promised = hostile
    assert settings(connect(database, user=roles.migrator), promised) == {name: HOSTILE[name] for name in promised}
    with engine_connect(as_migrator(cluster, roles, database)) as session:
        assert settings(session, promised) == promised
        reset(session)
        assert settings(session, promised) == promised


@pytest.mark.parametrize("head", ["", "-- runbook: no-transaction\n"])
def test_files_have_it_too_one_after_the_other(hostile, apply, ask, head):
    database, promised = hostile
    del promised["lock_timeout"]  # a file has that of its statements
    table = migration("CREATE TABLE seen (step text, name text, setting text);")
    note = "INSERT INTO seen SELECT '{}', name, current_setting(name) FROM pg_settings;"
    resets = migration(f"{head}RESET ALL;", "003_resets.sql")
    steps = [migration(head + note.format(number), f"{number}_step.sql") for number in ("002", "004")]
    apply(database, [table, steps[0], resets, steps[1]])
    seen = "SELECT jsonb_object_agg(name, setting) FROM seen WHERE step = %s AND name = ANY (%s)"
    assert [ask(database, seen, step, list(promised)) for step in ("002", "004")] == [promised] * 2


def test_connection_notices_a_host_that_is_gone(new_database, cluster, roles):
    with (
        engine_connect(as_migrator(cluster, roles, new_database())) as session,
        socket.socket(fileno=socket.dup(session.fileno())) as link,
    ):
        assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        kept = {
            name: link.getsockopt(socket.IPPROTO_TCP, getattr(socket, option))
            for name, option in (("idle", "TCP_KEEPIDLE"), ("interval", "TCP_KEEPINTVL"), ("count", "TCP_KEEPCNT"))
        }
    assert kept == {"idle": 30, "interval": 10, "count": 3}
