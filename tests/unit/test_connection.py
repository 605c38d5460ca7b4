"""Connections without a server: what reaches client programs, and that secrets do not."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._connection import (
    client_arguments,
    client_environment,
    libpq_parameters,
    prove_direct,
)
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError

PARAMS = {
    "login_host": "db.example.org",
    "login_port": 5433,
    "login_user": "migrator",
    "login_password": "s3cret",
    "login_db": "settler",
    "ssl_mode": "verify-full",
    "ca_cert": "/ca.pem",
}


def test_password_is_in_a_private_file_and_nowhere_else():
    with client_environment(PARAMS) as environment:
        passfile = Path(environment["PGPASSFILE"])
        assert passfile.read_text(encoding="utf-8") == "*:*:*:*:s3cret\n"
        assert stat.S_IMODE(passfile.stat().st_mode) == 0o600
        assert stat.S_IMODE(passfile.parent.stat().st_mode) == 0o700
        assert not any("s3cret" in value for value in environment.values())
    assert "s3cret" not in " ".join(client_arguments(PARAMS))


def test_password_file_is_private_whatever_the_umask():
    before = os.umask(0)
    try:
        with client_environment(PARAMS) as environment:
            assert stat.S_IMODE(Path(environment["PGPASSFILE"]).stat().st_mode) == 0o600
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("password", "written"),
    [("a:b", r"a\:b"), ("a\\b", r"a\\b"), (r"\:", r"\\\:"), ("ü#*", "ü#*"), (" spaces ", " spaces "), (None, "")],
)
def test_password_is_escaped_as_libpq_reads_it(password, written):
    with client_environment({**PARAMS, "login_password": password}) as environment:
        assert Path(environment["PGPASSFILE"]).read_text(encoding="utf-8") == f"*:*:*:*:{written}\n"


def test_password_file_is_removed_afterwards():
    with client_environment(PARAMS) as environment:
        folder = Path(environment["PGPASSFILE"]).parent
        assert folder.exists()
    assert not folder.exists()


def test_password_file_is_removed_after_an_error():
    folders = []

    def fail():
        with client_environment(PARAMS) as environment:
            folders.append(Path(environment["PGPASSFILE"]).parent)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not folders[0].exists()


def test_settings_of_the_caller_are_dropped_and_others_kept(monkeypatch):
    for name in ("PGHOST", "PGPASSWORD", "PGSERVICE", "PGOPTIONS", "PGDATABASE", "PGSSLROOTCERT"):
        monkeypatch.setenv(name, "foreign")
    monkeypatch.setenv("LANG", "C.UTF-8")
    with client_environment({**PARAMS, "ca_cert": None}) as environment:
        assert {name for name in environment if name.startswith("PG")} == {"PGPASSFILE", "PGSSLMODE"}
        assert environment["LANG"] == "C.UTF-8"
        assert "foreign" not in environment.values()


def test_tls_reaches_client_programs():
    with client_environment({**PARAMS, "ssl_cert": "/c.pem", "ssl_key": "/k.pem"}) as environment:
        assert environment["PGSSLMODE"] == "verify-full"
        assert environment["PGSSLROOTCERT"] == "/ca.pem"
        assert environment["PGSSLCERT"] == "/c.pem"
        assert environment["PGSSLKEY"] == "/k.pem"


def test_arguments_say_where_and_never_ask_for_a_password():
    assert client_arguments(PARAMS) == [
        "--host=db.example.org", "--port=5433", "--username=migrator", "--no-password",
    ]  # fmt: skip


def test_further_parameters_take_precedence_and_empty_ones_are_left_out():
    parameters = libpq_parameters(
        {**PARAMS, "ca_cert": "", "connect_params": {"connect_timeout": 3, "options": "-c a=b"}}
    )
    assert parameters["connect_timeout"] == 3
    assert parameters["options"] == "-c a=b"
    assert "sslrootcert" not in parameters
    assert not {"password", "sslkey"} & set(parameters)


def test_pooler_is_refused():
    def connection(announced, answering):
        return SimpleNamespace(
            info=SimpleNamespace(backend_pid=announced),
            execute=lambda _query: SimpleNamespace(fetchone=lambda: (answering,)),
        )

    prove_direct(connection(7, 7))
    with pytest.raises(RunbookError, match="pooler") as refused:
        prove_direct(connection(7, 8))
    assert "Connect to PostgreSQL itself" in refused.value.hint
