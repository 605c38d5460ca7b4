# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Connections: said once, direct, with a session that no server setting can cut short."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import typing as t
import weakref
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils._errors import (
    RunbookError,
    from_postgres,
    hint_for,
)
from ansible_collections.settler.runbook.plugins.module_utils._private import private_folder
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import pq, psycopg, sql

#: The database that is always there: for CREATE and ALTER DATABASE, and to ask whether another one exists.
MAINTENANCE_DB = "postgres"

#: What the server says when it has no slot left; libpq keeps the SQLSTATE for itself.
_NO_SLOT = ("too many clients", "too many connections", "remaining connection slots")
#: What the server says of a database that lets nobody in.
_SHUT = "is not currently accepting connections"
_SHUT_HINT = (
    "A snapshot lets nobody in. Of the database itself: a rollback was killed just before its swap, and "
    "playbooks/rollback.yml opens it again."
)

#: Folders of password files.
_PASSFILES = ".settler-runbook-*.pgpass"

#: What every session of the runbook sets for itself, whatever ALTER ROLE or ALTER DATABASE have set.
SESSION_SETTINGS: dict[str, tuple[int, str]] = {  # name: (first server version, value)
    "statement_timeout": (0, "0"),
    "lock_timeout": (0, "0"),
    "idle_in_transaction_session_timeout": (0, "0"),
    "idle_session_timeout": (140000, "0"),
    "transaction_timeout": (170000, "0"),
    "client_connection_check_interval": (140000, "1000"),
    "standard_conforming_strings": (0, "on"),
    "search_path": (0, "public"),
    "client_min_messages": (0, "notice"),
    "datestyle": (0, "ISO, YMD"),
    "intervalstyle": (0, "postgres"),
    "row_security": (0, "on"),
}

#: Undoes whatever a file has done to the session, but keeps its advisory locks: DISCARD ALL would drop them.
RESET: t.LiteralString = (
    "RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL; CLOSE ALL; UNLISTEN *; "
    "DEALLOCATE ALL; DISCARD TEMP; DISCARD SEQUENCES"
)

#: Sessions on servers that cannot see that their client is gone.
_UNABLE_TO_CHECK: weakref.WeakSet[psycopg.Connection[t.Any]] = weakref.WeakSet()


def connection_argument_spec() -> dict[str, t.Any]:
    """Return the options of the fragment C(settler.runbook.connection)."""
    return {
        "login_host": {"type": "str", "required": True},
        "login_port": {"type": "int", "default": 5432},
        "login_user": {"type": "str", "required": True},
        "login_password": {"type": "str", "default": "", "no_log": True},
        "ssl_mode": {
            "type": "str",
            "default": "prefer",
            "choices": ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"],
        },
        "ca_cert": {"type": "path"},
        "ssl_cert": {"type": "path"},
        "ssl_key": {"type": "path"},
        "connect_params": {"type": "dict", "default": {}},
    }


def database_argument_spec() -> dict[str, t.Any]:
    """Return the option of the fragment C(settler.runbook.connection.database)."""
    return {"login_db": {"type": "str", "required": True}}


def libpq_parameters(params: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """Translate module options to libpq's names; the password is left out."""
    named = {
        "host": params["login_host"],
        "port": params["login_port"],
        "user": params["login_user"],
        "sslmode": params["ssl_mode"],
        "sslrootcert": params.get("ca_cert"),
        "sslcert": params.get("ssl_cert"),
        "sslkey": params.get("ssl_key"),
        "connect_timeout": 10,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        **(params.get("connect_params") or {}),
    }
    return {name: value for name, value in named.items() if value not in (None, "")}


def connect(
    params: t.Mapping[str, t.Any], *, dbname: str | None = None, application: str = "runbook"
) -> psycopg.Connection[t.Any]:
    """Open a direct autocommit connection.

    Args:
        params: the module's options.
        dbname: another database than C(login_db).
        application: C(application_name); carries the run's id, so that a later run finds what this one left.

    Raises:
        RunbookError: no connection, with C(sqlstate) C(3D000) in its facts when only the database is missing;
            or a pooler stands in between.
    """
    database = dbname or params["login_db"]
    where = f"{params['login_host']}:{params['login_port']}"
    try:
        connection = psycopg.connect(
            **libpq_parameters(params),
            password=params.get("login_password") or None,
            dbname=database,
            application_name=application[:63],
            client_encoding="UTF8",
            autocommit=True,
            prepare_threshold=None,
        )
    except psycopg.Error as error:
        text = str(error).strip()
        missing = f'database "{database}" does not exist' in text
        known = "3D000" if missing else "53300" if any(words in text for words in _NO_SLOT) else None
        raise RunbookError(
            f"cannot connect to database {database} on {where} as {params['login_user']}: {text}",
            hint=hint_for(known)
            or (_SHUT_HINT if _SHUT in text else "Check host, port, role, password and pg_hba.conf."),
            sqlstate=known or error.sqlstate or "08001",
        ) from error
    try:
        prove_direct(connection)
        settle(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def connect_if_exists(
    params: t.Mapping[str, t.Any], *, application: str = "runbook"
) -> psycopg.Connection[t.Any] | None:
    """Open a connection, or return None if the database does not exist: then everything is still pending."""
    try:
        return connect(params, application=application)
    except RunbookError as error:
        if error.facts.get("sqlstate") == "3D000":
            return None
        raise


def prove_direct(connection: psycopg.Connection[t.Any]) -> None:
    """Refuse a pooler: the process that libpq was told of must be the one that answers.

    Through a pooler an advisory lock may be held twice and settings reach other clients.
    """
    announced = connection.info.backend_pid
    row = connection.execute("SELECT pg_backend_pid()").fetchone()
    answering = row[0] if row else None
    if announced != answering:
        raise RunbookError(
            f"the connection goes through a pooler (announced backend {announced}, answering backend {answering})",
            hint="Connect to PostgreSQL itself: locks and settings of a session do not survive a pooler.",
        )


def prove_primary(connection: psycopg.Connection[t.Any]) -> None:
    """Refuse a standby, and name its primary where the server tells."""
    row = connection.execute(
        "SELECT pg_is_in_recovery(), (SELECT sender_host || ':' || sender_port FROM pg_catalog.pg_stat_wal_receiver)"
    ).fetchone()
    if row and row[0]:
        raise RunbookError(
            f"{connection.info.host}:{connection.info.port} is a standby: nothing can be written there",
            hint=f"Connect to its primary{f', {row[1]}' if row[1] else ''}.",
        )


def settle(connection: psycopg.Connection[t.Any]) -> None:
    """Give the session the runbook's own settings."""
    try:
        connection.execute(settings_call(connection))
    except psycopg.errors.InvalidParameterValue:
        # client_connection_check_interval needs a platform whose poll() tells of a closed socket
        _UNABLE_TO_CHECK.add(connection)
        connection.execute(settings_call(connection))


def settings_call(connection: psycopg.Connection[t.Any]) -> sql.SQL:
    """Return the statements that set all settings of the session, for one round trip."""
    return sql.SQL(_settings_call(connection.info.server_version // 10000 * 10000, connection in _UNABLE_TO_CHECK))


@functools.cache
def _settings_call(version: int, unable_to_check: bool) -> t.LiteralString:
    return "; ".join(
        f"SET {name} = '{value}'"
        for name, (since, value) in SESSION_SETTINGS.items()
        if version >= since and not (unable_to_check and name == "client_connection_check_interval")
    )


def reset(connection: psycopg.Connection[t.Any]) -> None:
    """Undo whatever a file has done to the session and give it the runbook's own settings again."""
    connection.execute(reset_call(connection))


def reset_call(connection: psycopg.Connection[t.Any]) -> sql.Composed:
    """Return the statements of M(reset), for a round trip that others share."""
    return sql.SQL(RESET + "; ") + settings_call(connection)


def literal(connection: psycopg.Connection[t.Any], value: str | int | None) -> bytes:
    """Return a value as SQL writes it, for statements that share a round trip and so cannot have parameters."""
    if isinstance(value, str):
        return pq.Escaping(connection.pgconn).escape_literal(value.encode())
    return b"NULL" if value is None else b"%d" % value


def set_role(connection: psycopg.Connection[t.Any], role: str | None) -> None:
    """Work as C(role) from here on; None keeps the role that logged in."""
    if not role:
        return
    try:
        connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
    except psycopg.Error as error:
        raise from_postgres(error, f"cannot become role {role}") from error


def connect_as(
    params: t.Mapping[str, t.Any], role: str | None, *, dbname: str | None = None, application: str
) -> psycopg.Connection[t.Any]:
    """Open a connection as M(connect) does, and work as C(role)."""
    connection = connect(params, dbname=dbname, application=application)
    try:
        set_role(connection, role)
    except BaseException:
        connection.close()
        raise
    return connection


def beside(connection: psycopg.Connection[t.Any], application: str) -> psycopg.Connection[t.Any]:
    """Open another session of the same login in the same database, also where the first one is broken."""
    info = connection.info
    return psycopg.connect(
        info.dsn,
        password=info.password or None,
        application_name=application[:63],
        autocommit=True,
        prepare_threshold=None,
    )


def may_become(connection: psycopg.Connection[t.Any], role: str | None) -> bool:
    """Tell whether the login may work as C(role); check mode does without where it may not."""
    if not role:
        return True
    row = connection.execute(
        "SELECT pg_has_role(current_user, oid, 'MEMBER') FROM pg_catalog.pg_roles WHERE rolname = %s", [role]
    ).fetchone()
    return bool(row and row[0])


@contextlib.contextmanager
def client_environment(
    params: t.Mapping[str, t.Any], settings: t.Mapping[str, str] | None = None
) -> t.Iterator[dict[str, str]]:
    """Yield the environment for libpq programs: the password in a private file, nothing of it in the environment.

    The caller's own PG* variables are dropped, so that they cannot turn a program to another server. The settings are
    those of the program's sessions.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    parameters = libpq_parameters(params)
    with private_folder(Path(tempfile.gettempdir()), _PASSFILES) as folder:
        passfile = folder / "pgpass"
        escaped = str(params.get("login_password") or "").replace("\\", "\\\\").replace(":", "\\:")
        passfile.touch(mode=0o600)
        passfile.write_text(f"*:*:*:*:{escaped}\n", encoding="utf-8")
        environment["PGPASSFILE"] = str(passfile)
        environment["PGSSLMODE"] = str(parameters["sslmode"])
        if settings:
            environment["PGOPTIONS"] = " ".join(f"-c {name}={value}" for name, value in settings.items())
        for name, variable in (
            ("sslrootcert", "PGSSLROOTCERT"),
            ("sslcert", "PGSSLCERT"),
            ("sslkey", "PGSSLKEY"),
        ):
            if name in parameters:
                environment[variable] = str(parameters[name])
        yield environment


def database_argument(name: str) -> str:
    """Return the database as an argument of a libpq program, which would take a name with C(=) for more than a name."""
    return f"--dbname={psycopg.conninfo.make_conninfo(dbname=name)}"


def client_arguments(params: t.Mapping[str, t.Any]) -> list[str]:
    """Return host, port and user as arguments of a libpq program; never the password."""
    parameters = libpq_parameters(params)
    return [
        f"--host={parameters['host']}",
        f"--port={parameters['port']}",
        f"--username={parameters['user']}",
        "--no-password",
    ]
