# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Backup: a parallel dump and its proof, from one snapshot, under its real name only when it is whole."""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import json
import os
import shutil
import time
import typing as t
from dataclasses import dataclass

from ansible_collections.settler.runbook.plugins.module_utils import _manifest
from ansible_collections.settler.runbook.plugins.module_utils._catalog import digest, snapshot
from ansible_collections.settler.runbook.plugins.module_utils._connection import (
    client_arguments,
    client_environment,
    connect,
    database_argument,
    may_become,
    set_role,
)
from ansible_collections.settler.runbook.plugins.module_utils._database import (
    blind_tables,
    properties,
    referenced_roles,
    row_counts,
)
from ansible_collections.settler.runbook.plugins.module_utils._encryption import Encryption, encrypt, remove_plain
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger
from ansible_collections.settler.runbook.plugins.module_utils._programs import (
    find_programs,
    start_program,
    wait_program,
)

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg

_FACTS = """
SELECT current_setting('server_version') AS server_version, system_identifier::text,
    CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END::text AS lsn,
    to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS snapshot_time,
    pg_database_size(current_database()) AS size, pg_export_snapshot() AS snapshot
FROM pg_catalog.pg_control_system()
"""


@dataclass(frozen=True)
class Options:
    """What to write and where. Times are in seconds."""

    directory: Path
    run_id: str
    environment: str
    role: str | None
    ledger_schema: str
    client_bin: str | None
    jobs: int
    compression: str
    lock_timeout: float
    keep: int
    encryption: Encryption = Encryption()


def backup(params: t.Mapping[str, t.Any], options: Options) -> dict[str, t.Any]:
    """Dump a database; return its manifest with C(path) and the paths that retention removed as C(pruned).

    Raises:
        RunbookError: the role does not see all rows, no client program fits, no space, pg_dump failed. Nothing
            that could be taken for a backup is left.
    """
    home = _manifest.home_of(options.directory, params["login_db"])
    final = home / options.run_id
    make_private(options.directory)
    make_private(home)
    with _only_one(home):
        if final.exists():
            return {**_manifest.read_manifest(final), "path": str(final), "pruned": []}
        for leftover in home.glob(".*.partial"):  # no other backup runs: these are of runs that died
            shutil.rmtree(leftover)
        remove_plain(home)
        partial = home / f".{options.run_id}.partial"
        partial.mkdir(mode=0o700)
        try:
            manifest = _write(params, options, partial)
            _make_durable(partial)
            partial.rename(final)
            _sync(home)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return {**manifest, "path": str(final), "pruned": _prune(options, params["login_db"])}


def rehearse(params: t.Mapping[str, t.Any], options: Options) -> dict[str, t.Any]:
    """Look whether a backup could be made, and how many rows it would have; write nothing.

    A login that may not become the dump's role cannot count: C(rows) is 0 then.

    Raises:
        RunbookError: as M(backup), as far as that can be known before.
    """
    started = time.monotonic()
    with connect(params, application=f"runbook:{options.run_id}:backup") as connection:
        find_programs(connection.info.server_version // 10000, options.client_bin)
        rows: dict[str, int] = {}
        if may_become(connection, options.role):
            set_role(connection, options.role)
            check_sight(connection)
            rows = row_counts(connection)
    duration = round(time.monotonic() - started, 2)
    return {
        "path": "",
        "rows": sum(rows.values()),
        "tables": rows,
        "bytes": 0,
        "duration_s": duration,
        "pruned": [],
    }


def make_private(folder: Path) -> None:
    """Make a folder for its owner only; one that exists is left as it is."""
    if not folder.is_dir():
        folder.mkdir(mode=0o700, parents=True)


@contextlib.contextmanager
def _only_one(home: Path) -> t.Iterator[None]:
    """Hold the lock of a database's backups; the system frees it when the process dies."""
    lock = home / ".lock"
    lock.touch(mode=0o600)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunbookError(
                f"{home}: another backup is being written", hint="Wait for it, then run again."
            ) from None
        yield


def _write(params: t.Mapping[str, t.Any], options: Options, folder: Path) -> dict[str, t.Any]:
    """Write dump, catalogue and manifest into a folder."""
    started = time.monotonic()
    with connect(params, application=f"runbook:{options.run_id}:backup") as connection:
        set_role(connection, options.role)
        check_sight(connection)
        programs, client_major = find_programs(connection.info.server_version // 10000, options.client_bin)
        connection.execute("SELECT set_config('lock_timeout', %s, false)", [f"{options.lock_timeout * 1000:.0f}ms"])
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        facts = _facts(connection)
        check_space(folder, facts["size"])
        command: list[str | Path] = [
            programs / "pg_dump",
            *client_arguments(params),
            database_argument(params["login_db"]),
            "--format=directory",
            f"--file={folder / 'dump'}",
            f"--jobs={options.jobs}",
            f"--snapshot={facts.pop('snapshot')}",
            f"--lock-wait-timeout={int(options.lock_timeout * 1000)}",
            f"--compress={_level(options.compression, client_major)}",
        ]
        if options.role:
            command.append(f"--role={options.role}")
        with client_environment(params) as environment:
            process = start_program(command, environment)
            try:  # counting beside the dump costs nothing: it waits for the server, in the same snapshot
                rows = row_counts(connection)
                catalogue = snapshot(connection)
                database = properties(connection)
                roles = referenced_roles(connection)
                ledger = [row.version for row in Ledger(connection, options.ledger_schema).rows()]
            finally:
                wait_program(process)
    _write_file(folder / "catalogue.json", json.dumps(catalogue, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    content = {
        "format": _manifest.FORMAT,
        "run_id": options.run_id,
        "environment": options.environment,
        "database": params["login_db"],
        **facts,
        "client_version": client_major,
        "compression": options.compression,
        "properties": database,
        "roles": roles,
        "ledger_head": max(ledger, key=int, default=None),
        "catalogue_digest": digest(catalogue),
        "tables": rows,
        "rows": sum(rows.values()),
        "finished_at": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
    }
    content = encrypt(folder, content, options.encryption, options.jobs)
    content["files"] = _manifest.file_digests(folder)
    content["duration_s"] = round(time.monotonic() - started, 2)
    content["bytes"] = sum(file["size"] for file in content["files"].values())
    _write_file(folder / _manifest.NAME, _manifest.seal(content))
    return content


def _facts(connection: psycopg.Connection[t.Any]) -> dict[str, t.Any]:
    cursor = connection.execute(_FACTS)
    row = cursor.fetchone()
    assert row is not None
    assert cursor.description is not None
    return {column.name: value for column, value in zip(cursor.description, row, strict=True)}


def check_sight(connection: psycopg.Connection[t.Any]) -> None:
    """Refuse a role that does not see all rows."""
    blind = blind_tables(connection)
    if blind:
        raise RunbookError(
            f"the role sees only a part of the rows of {', '.join(blind)}: the backup would be partial",
            hint="Back up as the tables' owner without FORCE ROW LEVEL SECURITY, or as a role with BYPASSRLS.",
            tables=blind,
        )


def check_space(folder: Path, size: int) -> None:
    """Refuse to start where the dump might not fit: it is at most as large as the database."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise RunbookError(
            f"{folder.parent}: {free // 2**20} MB free, the database has {size // 2**20} MB",
            hint="Free space, or set runbook_backup_directory to a larger disk.",
        )


def _level(compression: str, client_major: int) -> str:
    """Return the value of --compress; before 16 it is a level of gzip."""
    method, _colon, level = compression.partition(":")
    if client_major >= 16:
        return compression
    if method not in ("gzip", "none"):
        raise RunbookError(
            f"pg_dump {client_major} compresses with gzip only, not {method}",
            hint="Set backup_compression: gzip:1.",
        )
    return level or "6" if method == "gzip" else "0"


def _write_file(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")


def _make_durable(folder: Path) -> None:
    """Take rights from everybody else and flush all to the disk, so that the rename means that it is there."""
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o700 if path.is_dir() else 0o600)
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(options: Options, database: str) -> list[str]:
    """Remove the oldest whole backups of this environment beyond the number to keep; return their paths."""
    if options.keep < 1:
        return []
    whole = [
        row
        for row in _manifest.list_backups(options.directory, database)
        if not row["error"] and row["environment"] == options.environment
    ]
    pruned = [row["path"] for row in whole[options.keep :]]
    for path in pruned:
        shutil.rmtree(path)
    return pruned
