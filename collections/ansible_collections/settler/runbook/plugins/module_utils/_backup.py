# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Backup: a parallel dump and its proof, from one snapshot, under its real name only when it is whole."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import time
import typing as t
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ansible_collections.settler.runbook.plugins.module_utils import _manifest
from ansible_collections.settler.runbook.plugins.module_utils._backup_folder import (
    HalfMade,
    check_private,
    half_made,
    make_private,
    only_one,
    remove_leftovers,
)
from ansible_collections.settler.runbook.plugins.module_utils._catalog import digest, snapshot
from ansible_collections.settler.runbook.plugins.module_utils._connection import (
    client_arguments,
    client_environment,
    connect,
    connect_as,
    database_argument,
    may_become,
    set_role,
)
from ansible_collections.settler.runbook.plugins.module_utils._database import (
    check_sight,
    needs,
    properties,
    referenced_roles,
    row_counts,
)
from ansible_collections.settler.runbook.plugins.module_utils._encryption import (
    UNENCRYPTED,
    Encryption,
    encrypt,
    remove_plain,
)
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError, from_postgres
from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import (
    Limits,
    describe,
    fingerprints,
    write_fingerprints,
)
from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger
from ansible_collections.settler.runbook.plugins.module_utils._programs import (
    compression_for,
    end_program,
    find_programs,
    start_program,
    wait_program,
)
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg
from ansible_collections.settler.runbook.plugins.module_utils._readers import naming_holders, wait_no_longer
from ansible_collections.settler.runbook.plugins.module_utils._retention import prune
from ansible_collections.settler.runbook.plugins.module_utils._space import MORE_SPACE, check_space, is_of_space

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import Fingerprint

_FACTS = """
SELECT current_setting('server_version') AS server_version, system_identifier::text,
    CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END::text AS lsn,
    to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS snapshot_time,
    pg_snapshot_xmin(pg_current_snapshot())::text AS transaction,
    pg_database_size(current_database()) AS size, pg_export_snapshot() AS snapshot
FROM pg_catalog.pg_control_system()
"""


@dataclass(frozen=True)
class Options:
    """What to write and where. Times are in seconds, or in days where the name says so.

    C(fresh) refuses the backup that an earlier run of the same id has made; without it that one is returned.
    """

    directory: Path
    run_id: str
    environment: str
    role: str | None
    ledger_schema: str
    client_bin: str | None
    jobs: int
    limits: Limits
    compression: str
    lock_timeout: float
    keep: int
    keep_days: float = 0
    encryption: Encryption = UNENCRYPTED
    fresh: bool = False


def backup(params: t.Mapping[str, t.Any], options: Options) -> dict[str, t.Any]:
    """Dump a database; return its manifest with C(path) and the paths that retention removed as C(pruned).

    Raises:
        RunbookError: the role does not see all rows, no client program fits, the folder is not private, no space,
            pg_dump failed. Nothing that could be taken for a backup is left.
    """
    home = _manifest.home_of(options.directory, params["login_db"])
    final = home / options.run_id
    make_private(options.directory)
    make_private(home)
    with only_one(home) as lock:
        remove_leftovers(home, lock)
        if there := _manifest.earlier(final, fresh=options.fresh):
            return there
        remove_plain(home)
        partial = home / f".{options.run_id}.partial"
        try:
            with half_made(partial, lock) as place:
                manifest = _write(params, options, place)
            partial.rename(final)
            _manifest.sync(home)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if is_of_space(error):
                raise RunbookError(
                    f"{home}: the disk is full, nothing is left of this backup\n  {error}", hint=MORE_SPACE
                ) from error
            raise
        pruned = prune(options.directory, manifest, keep=options.keep, keep_days=options.keep_days)
    return {**manifest, "path": str(final), "pruned": pruned}


def rehearse(params: t.Mapping[str, t.Any], options: Options) -> dict[str, t.Any]:
    """Look whether a backup could be made, and how many rows it would have; write nothing.

    A login that may not become the dump's role cannot count: C(rows) is 0 then.

    Raises:
        RunbookError: as M(backup), as far as that can be known before.
    """
    started = time.monotonic()
    check_private(options.directory)
    check_private(_manifest.home_of(options.directory, params["login_db"]))
    with connect(params, application=f"runbook:{options.run_id}:backup") as connection:
        programs, major = find_programs(connection.info.server_version // 10000, options.client_bin)
        compression, _argument = compression_for(programs, major, options.compression)
        rows: dict[str, int] = {}
        if may_become(connection, options.role):
            set_role(connection, options.role)
            check_sight(connection)
            _check_space(params, options, compression, _size(connection))
            wait_no_longer(connection, options.lock_timeout)
            with naming_holders(connection, params["login_db"]):
                rows = row_counts(connection)
    return {
        "path": "",
        "rows": sum(rows.values()),
        "tables": rows,
        "bytes": 0,
        "compression": compression,
        "duration_s": round(time.monotonic() - started, 2),
        "pruned": [],
    }


def _check_space(params: t.Mapping[str, t.Any], options: Options, compression: str, size: int) -> None:
    check_space(options.directory, params["login_db"], size, environment=options.environment, compression=compression)


def _size(connection: psycopg.Connection[t.Any]) -> int:
    row = connection.execute("SELECT pg_database_size(current_database())").fetchone()
    assert row is not None
    return int(row[0])


def _write(params: t.Mapping[str, t.Any], options: Options, place: HalfMade) -> dict[str, t.Any]:
    """Write dump, catalogue and manifest into a folder, and all of it to the disk."""
    started = time.monotonic()
    folder = place.folder
    with connect_as(params, options.role, application=f"runbook:{options.run_id}:backup") as connection:
        check_sight(connection)
        programs, client_major = find_programs(connection.info.server_version // 10000, options.client_bin)
        compression, argument = compression_for(programs, client_major, options.compression)
        wait_no_longer(connection, options.lock_timeout)
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        facts = _facts(connection)
        _check_space(params, options, compression, facts["size"])
        command: list[str | Path] = [
            programs / "pg_dump",
            *client_arguments(params),
            database_argument(params["login_db"]),
            "--format=directory",
            f"--file={folder / 'dump'}",
            f"--jobs={options.jobs}",
            f"--snapshot={facts['snapshot']}",
            f"--lock-wait-timeout={int(options.lock_timeout * 1000)}",
            f"--compress={argument}",
            "--no-sync",  # all files are flushed below
        ]
        if options.role:
            command.append(f"--role={options.role}")
        with client_environment(params) as environment:
            process = start_program(command, environment, inherits=[place.descriptor])
            place.note_group(process.pid)
            try:  # counting beside the dump costs nothing: it waits for the server, in the same snapshot
                data = _fingerprints(params, options, connection, facts)
                content = _content(connection, options, data)
            except BaseException as error:
                end_program(process)
                if isinstance(error, psycopg.Error):
                    raise from_postgres(error, f"cannot read {params['login_db']} for the manifest") from error
                raise
            wait_program(process)
    catalogue = content.pop("catalogue")
    _write_file(folder / "catalogue.json", json.dumps(catalogue, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    content |= write_fingerprints(folder, data)
    content = encrypt(folder, content, options.encryption, options.jobs)
    files = _settle(folder)
    manifest = {
        "format": _manifest.FORMAT,
        "run_id": options.run_id,
        "environment": options.environment,
        "database": params["login_db"],
        **{name: value for name, value in facts.items() if name != "snapshot"},
        "client_version": client_major,
        "compression": compression,
        **content,
        "files": files,
        "bytes": sum(file["size"] for file in files.values()),
        "finished_at": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
        "duration_s": round(time.monotonic() - started, 2),
    }
    _manifest.write_durably(folder / _manifest.NAME, _manifest.seal(manifest))
    return manifest


def _content(
    connection: psycopg.Connection[t.Any], options: Options, data: t.Mapping[str, Fingerprint]
) -> dict[str, t.Any]:
    """Return what the manifest says of the database, and its catalogue, in the snapshot of the dump."""
    rows = row_counts(connection, {name: one.rows for name, one in data.items()})
    catalogue = snapshot(connection)
    return {
        "properties": properties(connection),
        "roles": referenced_roles(connection),
        **needs(connection),
        "ledger_head": Ledger(connection, options.ledger_schema).head(),
        "catalogue": catalogue,
        "catalogue_digest": digest(catalogue),
        "tables": rows,
        "rows": sum(rows.values()),
    }


def _fingerprints(
    params: t.Mapping[str, t.Any],
    options: Options,
    connection: psycopg.Connection[t.Any],
    facts: t.Mapping[str, t.Any],
) -> dict[str, Fingerprint]:
    """Return the fingerprints of all tables but the ledger's, read by sessions that see what the dump sees."""

    def session() -> psycopg.Connection[t.Any]:
        opened = connect_as(params, options.role, application=f"runbook:{options.run_id}:backup")
        wait_no_longer(opened, options.lock_timeout)
        return opened

    tables = describe(connection, exclude=[options.ledger_schema])
    return fingerprints(session, facts["snapshot"], tables, options.limits)


def _facts(connection: psycopg.Connection[t.Any]) -> dict[str, t.Any]:
    cursor = connection.execute(_FACTS)
    row = cursor.fetchone()
    assert row is not None
    assert cursor.description is not None
    return {column.name: value for column, value in zip(cursor.description, row, strict=True)}


def _write_file(path: Path, content: str) -> None:
    path.touch(mode=0o600)
    path.write_text(content, encoding="utf-8")


def _settle(folder: Path) -> dict[str, dict[str, t.Any]]:
    """Take rights from everybody else, flush all to the disk, and return the size and checksum of every file."""
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o700 if path.is_dir() else 0o600)
    with ThreadPoolExecutor() as pool:
        for _flushed in pool.map(_manifest.sync, [folder, *folder.rglob("*")]):
            pass
    return _manifest.file_digests(folder)
