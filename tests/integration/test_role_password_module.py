"""Passwords of roles on a real server: set once, and never readable in a log, an output or a statement."""

from __future__ import annotations

import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.modules.role_password import fits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from tests.support import call_module, login, run_module, wait_until

SECRET = "Hidden-ü-7f3a'9$"


@pytest.fixture
def role(connect):
    """A role without a password."""
    admin = connect("postgres")
    admin.execute("CREATE ROLE someone LOGIN")
    yield "someone"
    admin.execute("DROP ROLE someone")


@pytest.fixture
def verifier(connect):
    query = "SELECT rolpassword FROM pg_authid WHERE rolname = 'someone'"
    return lambda: connect("postgres").execute(query).fetchone()[0]


@pytest.fixture
def set_password(cluster, role):
    def run(password=SECRET, check=False, how=call_module, **changes):
        return how(
            "role_password", {**login(cluster, "postgres"), "role": role, "password": password, **changes}, check=check
        )

    return run


def test_password_works_and_is_set_once(cluster, set_password, verifier):
    assert set_password()["changed"]
    psycopg.connect(cluster.conninfo("postgres", "someone", SECRET)).close()
    made = verifier()
    assert made.startswith("SCRAM-SHA-256$")
    assert not set_password()["changed"]
    assert verifier() == made


def test_other_password_replaces_it(cluster, set_password):
    set_password()
    assert set_password("another")["changed"]
    psycopg.connect(cluster.conninfo("postgres", "someone", "another")).close()
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(cluster.conninfo("postgres", "someone", SECRET))


def test_old_md5_verifier_is_replaced(set_password, verifier, connect):
    admin = connect("postgres")
    admin.execute("SET password_encryption = 'md5'")
    admin.execute(sql.SQL("ALTER ROLE someone PASSWORD {}").format(sql.Literal(SECRET)))
    assert verifier().startswith("md5")
    assert set_password()["changed"]
    assert verifier().startswith("SCRAM-SHA-256$")


def test_check_mode_says_so_and_sets_nothing(set_password, verifier):
    assert set_password(check=True)["changed"]
    assert verifier() is None
    set_password()
    assert not set_password(check=True)["changed"]


def test_missing_role_fails_but_not_in_check_mode(set_password):
    result = set_password(role="nobody")
    assert result["failed"]
    assert result["msg"].startswith("no such role: nobody")
    assert set_password(role="nobody", check=True)["changed"]


@pytest.mark.parametrize("superuser", [True, False])
def test_password_is_in_no_log_and_no_output(cluster, new_database, connect, set_password, verifier, superuser):
    """The server logs every statement; a superuser can keep even the verifier out of it."""
    database, admin = new_database(), connect("postgres")
    admin.execute(sql.SQL("ALTER DATABASE {} SET log_statement = 'all'").format(sql.Identifier(database)))
    admin.execute(sql.SQL("ALTER DATABASE {} SET log_min_duration_statement = 0").format(sql.Identifier(database)))
    params = login(cluster, database)
    if not superuser:
        admin.execute("CREATE ROLE maker LOGIN CREATEROLE PASSWORD 'maker-1'")
        admin.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO maker, someone").format(sql.Identifier(database)))
        if cluster.state.major >= 16:
            admin.execute("GRANT someone TO maker WITH ADMIN OPTION")
        params = login(cluster, database, "maker", "maker-1")
    size = cluster.log_file.stat().st_size
    try:
        outputs = [
            set_password(how=run_module, **params)["_output"],
            set_password(how=run_module, **params)["_output"],
            set_password(how=run_module, **params, check=True)["_output"],
        ]
        connect(database).execute("SELECT 'end of the test'")
        wait_until(lambda: b"end of the test" in cluster.log_file.read_bytes()[size:])
        log = cluster.log_file.read_bytes()[size:].decode()
    finally:
        if not superuser:
            admin.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM maker, someone").format(sql.Identifier(database)))
            admin.execute("DROP ROLE maker")
    assert "pg_backend_pid" in log
    for text in (log, *outputs):
        assert SECRET not in text
        assert "Hidden" not in text
        assert params["login_password"] not in text
    assert not any(verifier() in output for output in outputs)
    if superuser:
        assert "SCRAM" not in log


def test_failure_tells_no_secret(set_password):
    result = set_password(how=run_module, login_password="Wrong-5c1e")
    assert result["failed"]
    assert "Wrong-5c1e" not in result["_output"]
    assert SECRET not in result["_output"]


def test_login_that_may_not_read_verifiers_still_knows_whether_it_fits(cluster, connect, set_password):
    admin = connect("postgres")
    admin.execute("CREATE ROLE maker LOGIN CREATEROLE PASSWORD 'maker-1'")
    if cluster.state.major >= 16:
        admin.execute("GRANT someone TO maker WITH ADMIN OPTION")
    try:
        params = login(cluster, "postgres", "maker", "maker-1")
        assert [set_password(**params)["changed"] for _time in range(2)] == [True, False]
        assert set_password("another", **params)["changed"]
    finally:
        admin.execute("DROP ROLE maker")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12))
def test_verifiers_of_libpq_fit_their_password(connect, password):
    verifier = _session(connect).pgconn.encrypt_password(password.encode(), b"x", b"scram-sha-256").decode()
    assert fits(password, verifier)
    assert not fits(password + "x", verifier)


@pytest.mark.parametrize(
    "password", ["soft\u00adhyphen", "\u00a0", "\u2168", "a\u0007\u2168", "\U0001fae0\u2168", "\u0627\u2168"]
)
def test_verifiers_fit_where_saslprep_is_subtle(connect, password):
    verifier = connect("postgres").pgconn.encrypt_password(password.encode(), b"x", b"scram-sha-256").decode()
    assert fits(password, verifier)


_sessions = {}


def _session(connect):
    if "one" not in _sessions or _sessions["one"].closed:
        _sessions["one"] = connect("postgres")
    return _sessions["one"]
