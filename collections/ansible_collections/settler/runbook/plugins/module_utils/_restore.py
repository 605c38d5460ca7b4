# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Restore: into a new database, compared with the manifest, swapped in by rename.

Nothing is dropped but what a killed restore of ours has left half made.
"""

from __future__ import annotations

import json
import re
import time
import typing as t
from dataclasses import dataclass

from ansible_collections.settler.runbook.plugins.module_utils import _manifest
from ansible_collections.settler.runbook.plugins.module_utils._catalog import digest, snapshot
from ansible_collections.settler.runbook.plugins.module_utils._connection import (
    MAINTENANCE_DB,
    client_arguments,
    client_environment,
    connect,
    connect_if_exists,
    database_argument,
    set_role,
)
from ansible_collections.settler.runbook.plugins.module_utils._database import apply_properties, create_as, row_counts
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError, from_postgres
from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger
from ansible_collections.settler.runbook.plugins.module_utils._programs import find_programs, run_program
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql
from ansible_collections.settler.runbook.plugins.module_utils._verify import compare, table_of

if t.TYPE_CHECKING:
    from pathlib import Path


def _mark(database: str) -> str:
    """Return how the comment of a database begins that is being restored: only such a one is ever dropped."""
    return f"settler.runbook: being restored for {database}, run "


@dataclass(frozen=True)
class Options:
    """What to restore, and what is allowed."""

    source: Path
    run_id: str
    environment: str
    role: str | None
    ledger_schema: str
    client_bin: str | None
    jobs: int
    confirm: str
    accept_data_loss: bool


@dataclass(frozen=True)
class Names:
    """The three names of a swap: the real one, the one it is restored under, the one the failed database keeps."""

    real: str
    restored: str
    failed: str


def names_for(database: str, run_id: str) -> Names:
    """Return names that carry the run's id; what is cut to PostgreSQL's 63 bytes is the database, then the id."""
    suffix = re.sub(r"[^a-z0-9]+", "_", run_id.lower())[:40]

    def name(kind: str) -> str:
        tail = f"_{kind}_{suffix}"
        return database.encode()[: 63 - len(tail)].decode(errors="ignore") + tail

    return Names(database, name("restore"), name("failed"))


def check(params: t.Mapping[str, t.Any], options: Options) -> dict[str, t.Any]:
    """Check that a restore is allowed and what it would lose; touch nothing.

    Returns:
        the manifest, the names, and C(difference): rows now minus rows in the backup, for tables where they differ.

    Raises:
        RunbookError: the backup is damaged, of another database or environment, or would lose rows unasked.
    """
    manifest = _sound(params, options)
    return {
        "manifest": manifest,
        "names": names_for(params["login_db"], options.run_id),
        "difference": _allowed(params, options, manifest),
    }


def _sound(params: t.Mapping[str, t.Any], options: Options) -> dict[str, t.Any]:
    """Return the manifest of a backup that is whole and of this database and environment; asks no server."""
    manifest = _manifest.read_manifest(options.source)
    _manifest.check_files(options.source, manifest)
    for what, mine in (("database", params["login_db"]), ("environment", options.environment)):
        if manifest[what] != mine:
            raise RunbookError(
                f"{options.source}: a backup of {what} {manifest[what]}, not of {mine}; nothing was touched"
            )
    return manifest


def _allowed(params: t.Mapping[str, t.Any], options: Options, manifest: t.Mapping[str, t.Any]) -> dict[str, int]:
    """Return the difference that a restore would undo, if that was confirmed."""
    database = params["login_db"]
    difference = _difference(params, options, manifest)
    if difference is not None:
        if options.confirm != database:
            raise RunbookError(
                f"this replaces database {database} by its backup of {manifest['snapshot_time']}; nothing was touched\n"
                + _told(difference),
                hint=f"If that is meant: -e rollback_confirm={database}. The present database is kept, renamed.",
                difference=difference,
            )
        if any(rows for rows in difference.values()) and not options.accept_data_loss:
            raise RunbookError(
                f"{database} differs from its backup of {manifest['snapshot_time']}; nothing was touched\n"
                + _told(difference),
                hint="If these rows may be lost: -e rollback_accept_data_loss=true.",
                difference=difference,
            )
    return difference or {}


def _difference(
    params: t.Mapping[str, t.Any], options: Options, manifest: t.Mapping[str, t.Any]
) -> dict[str, int] | None:
    """Return rows now minus rows then, for tables where they differ; None if there is no such database."""
    connection = connect_if_exists(params, application=f"runbook:{options.run_id}:restore")
    if connection is None:
        return None
    with connection:
        set_role(connection, options.role)
        now = row_counts(connection)
    then, ledger = manifest["tables"], f"{options.ledger_schema}."
    return {
        name: now.get(name, 0) - then.get(name, 0)
        for name in sorted({*now, *then})
        if now.get(name, 0) != then.get(name, 0) and not name.startswith(ledger)
    }


def _told(difference: t.Mapping[str, int]) -> str:
    if not difference:
        return "  every table has as many rows as in the backup"
    return "\n".join(f"  {name}: {rows:+d} rows since the backup" for name, rows in difference.items())


def restore(params: t.Mapping[str, t.Any], options: Options) -> dict[str, t.Any]:
    """Restore a backup and put it in the database's place.

    At each moment the real name is the old database or the whole new one; the old one stays as C(failed_database).

    Raises:
        RunbookError: see M(check); or the restore failed or does not match its manifest: then the real name still
            is the old database.
    """
    started = time.monotonic()
    manifest = _sound(params, options)
    application = f"runbook:{options.run_id}:restore"
    with connect(params, dbname=MAINTENANCE_DB, application=application) as connection:
        _mend(connection, params["login_db"])
        difference = _allowed(params, options, manifest)
        names = names_for(params["login_db"], options.run_id)
        _drop_leftovers(connection, names.real)
        _create(connection, names, manifest["properties"], options.run_id)
        _load(params, options, names.restored, connection.info.server_version // 10000)
        with connect(params, dbname=names.restored, application=application) as restored:
            set_role(restored, options.role)
            restored.execute("ANALYZE")
            _compare(restored, options, manifest)
        restored_s = round(time.monotonic() - started, 2)
        apply_properties(connection, names.restored, manifest["properties"])
        replaced = _swap(connection, names, manifest["properties"]["comment"])
    with connect(params, application=application) as database:
        set_role(database, options.role)
        ledger = Ledger(database, options.ledger_schema)
        if ledger.exists():
            ledger.record_event(
                "rolled_back", run_id=options.run_id, backup=manifest.get("opened_from", str(options.source)), failed_database=names.failed
            )
    return {
        "database": names.real,
        "failed_database": names.failed if replaced else "",
        "rows": manifest["rows"],
        "tables": len(manifest["tables"]),
        "snapshot_time": manifest["snapshot_time"],
        "difference": difference,
        "restored_s": restored_s,
        "duration_s": round(time.monotonic() - started, 2),
    }


def _mend(connection: psycopg.Connection[t.Any], database: str) -> None:
    """Open a database again that a restore, killed just before its swap, has closed: its half is still there."""
    closed = connection.execute(
        "SELECT FROM pg_catalog.pg_database d WHERE d.datname = %s AND NOT d.datallowconn AND EXISTS ("
        "SELECT FROM pg_catalog.pg_database h WHERE starts_with(shobj_description(h.oid, 'pg_database'), %s))",
        [database, _mark(database)],
    ).fetchone()
    if closed is not None:
        connection.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(sql.Identifier(database)))


def _drop_leftovers(connection: psycopg.Connection[t.Any], database: str) -> None:
    """Drop databases that a killed restore of this database has left half made; they carry our mark."""
    found = connection.execute(
        "SELECT datname FROM pg_catalog.pg_database WHERE starts_with(shobj_description(oid, 'pg_database'), %s)",
        [_mark(database)],
    )
    for (name,) in found.fetchall():
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _create(connection: psycopg.Connection[t.Any], names: Names, wanted: t.Mapping[str, t.Any], run_id: str) -> None:
    """Make an empty database with the original's owner, encoding and locale."""
    try:
        create_as(connection, names.restored, wanted)
    except psycopg.Error as error:
        raise from_postgres(error, f"cannot create database {names.restored}") from error
    database = sql.Identifier(names.restored)
    connection.execute(
        sql.SQL("COMMENT ON DATABASE {} IS {}").format(database, sql.Literal(_mark(names.real) + run_id))
    )
    connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database))


def _load(params: t.Mapping[str, t.Any], options: Options, name: str, server_major: int) -> None:
    """Restore the dump into the new database; the first error ends it."""
    programs, _major = find_programs(server_major, options.client_bin)
    command: list[str | Path] = [
        programs / "pg_restore",
        *client_arguments(params),
        database_argument(name),
        "--exit-on-error",
        f"--jobs={options.jobs}",
        *([f"--role={options.role}"] if options.role else []),
        options.source / "dump",
    ]
    with client_environment(params) as environment:
        run_program(command, environment)


def _compare(connection: psycopg.Connection[t.Any], options: Options, manifest: t.Mapping[str, t.Any]) -> None:
    """Compare row counts and catalogue of the restored database with the manifest."""
    counts = row_counts(connection)
    if counts != manifest["tables"]:
        wrong = {name for name in {*counts, *manifest["tables"]} if counts.get(name) != manifest["tables"].get(name)}
        lines = [
            f"  {name}: {counts.get(name)} rows, the manifest says {manifest['tables'].get(name)}"
            for name in sorted(wrong)
        ]
        raise RunbookError("the restored database has not the rows of its backup\n" + "\n".join(lines))
    catalogue = snapshot(connection)
    if digest(catalogue) != manifest["catalogue_digest"]:
        expected = json.loads((options.source / "catalogue.json").read_text(encoding="utf-8"))
        raise RunbookError(
            "the restored database has not the catalogue of its backup\n" + table_of(compare(expected, catalogue))
        )


def _swap(connection: psycopg.Connection[t.Any], names: Names, comment: str | None) -> bool:
    """Rename the restored database to the real name and the real one out of the way, in one transaction.

    The comment of the original replaces our mark in the same transaction: from then on nothing drops it.

    Returns:
        whether there was a database under the real name.
    """
    real, restored, failed = (sql.Identifier(name) for name in (names.real, names.restored, names.failed))
    there = (
        connection.execute("SELECT FROM pg_catalog.pg_database WHERE datname = %s", [names.real]).fetchone() is not None
    )
    if there:
        connection.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(real))
    try:
        if there:
            _empty(connection, names.real)
        connection.execute("BEGIN")
        if there:
            connection.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(real, failed))
        connection.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(restored, real))
        connection.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(real, sql.Literal(comment)))
        connection.execute("COMMIT")
    except BaseException:
        if not connection.closed:
            connection.execute("ROLLBACK")
            if there:
                connection.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(real))
        raise
    if there:
        connection.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(failed))
    return there


def _empty(connection: psycopg.Connection[t.Any], database: str) -> None:
    """End all sessions of a database that lets no new ones in.

    Raises:
        RunbookError: one does not leave, or may not be ended by this role.
    """
    deadline = time.monotonic() + 10
    while True:
        left = connection.execute(
            "SELECT pid, usename FROM pg_catalog.pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
            [database],
        ).fetchall()
        if not left:
            return
        if time.monotonic() > deadline:
            told = ", ".join(f"pid {pid} ({user})" for pid, user in left)
            raise RunbookError(
                f"sessions of {database} do not leave: {told}",
                hint="End them as a superuser, then run again.",
            )
        for pid, user in left:
            try:
                connection.execute("SELECT pg_terminate_backend(%s)", [pid])
            except psycopg.errors.InsufficientPrivilege as error:
                raise RunbookError(
                    f"pid {pid} of role {user} uses {database}, and this role may not end it",
                    hint=f"As a superuser: SELECT pg_terminate_backend({pid}); then run again.",
                ) from error
        time.sleep(0.05)
