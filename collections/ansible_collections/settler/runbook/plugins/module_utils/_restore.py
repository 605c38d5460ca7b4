# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Restore: into a new database, compared with the manifest, swapped in by rename.

Nothing is dropped but what a killed restore of ours has left half made. What may be restored where is checked by
C(_rollback).
"""

from __future__ import annotations

import functools
import json
import re
import typing as t
from concurrent.futures import ThreadPoolExecutor

from ansible_collections.settler.runbook.plugins.module_utils._catalog import digest, snapshot
from ansible_collections.settler.runbook.plugins.module_utils._connection import (
    client_arguments,
    client_environment,
    connect,
    connect_as,
    database_argument,
)
from ansible_collections.settler.runbook.plugins.module_utils._database import (
    create_as,
    prepare_for_dump,
    role_statements,
    row_counts,
)
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError, from_postgres
from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import (
    Fingerprint,
    Limits,
    Table,
    read_fingerprints,
)
from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import (
    compare as compare_data,
)
from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import read_again as fingerprints_again
from ansible_collections.settler.runbook.plugins.module_utils._programs import find_programs, run_program
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg
from ansible_collections.settler.runbook.plugins.module_utils._readers import wait_no_longer
from ansible_collections.settler.runbook.plugins.module_utils._space import is_of_space
from ansible_collections.settler.runbook.plugins.module_utils._swap import dropped_on_failure, mark, set_mark
from ansible_collections.settler.runbook.plugins.module_utils._verify import compare, table_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.settler.runbook.plugins.module_utils._verify import Check


#: Seconds that a table may be locked that is to be read.
LOCK_SECONDS = 30


class How(t.Protocol):
    """How to restore, whatever it is for."""

    @property
    def run_id(self) -> str: ...
    @property
    def role(self) -> str | None: ...
    @property
    def ledger_schema(self) -> str: ...
    @property
    def client_bin(self) -> str | None: ...
    @property
    def jobs(self) -> int: ...
    @property
    def maintenance_work_mem(self) -> str: ...


def check_target(connection: psycopg.Connection[t.Any], source: Path, manifest: t.Mapping[str, t.Any]) -> None:
    """Refuse a server that cannot take a backup; all that is missing is named.

    Raises:
        RunbookError: the server is older than the backup's, or lacks a role or an extension.
    """
    theirs, mine = _major(manifest["server_version"]), connection.info.server_version // 10000
    if theirs > mine:
        raise RunbookError(
            f"{source}: made on PostgreSQL {theirs}; this server is {mine}, and a dump cannot be restored into an "
            "older version; nothing was touched",
            hint=f"Restore it on PostgreSQL {theirs} or newer.",
        )
    roles = {role["name"] for role in manifest["roles"]} | {manifest["properties"]["owner"]}
    there = {row[0] for row in connection.execute("SELECT rolname FROM pg_catalog.pg_roles")}
    if lacking := sorted(roles - there):
        raise RunbookError(
            f"{source}: the server lacks {_counted(lacking, 'role')} that the backup refers to: {', '.join(lacking)}; "
            "nothing was touched",
            hint="playbooks/create_database.yml makes the runbook's own roles. As they were, but without a password, a "
            f"superuser makes them by: {role_statements(manifest['roles'], lacking)}",
            missing_roles=lacking,
        )
    spaces = {row[0] for row in connection.execute("SELECT spcname FROM pg_catalog.pg_tablespace")}
    if lacking := sorted(set(manifest.get("tablespaces", ())) - spaces):
        raise RunbookError(
            f"{source}: the server lacks {_counted(lacking, 'tablespace')} that the backup refers to: "
            f"{', '.join(lacking)}; nothing was touched",
            hint="CREATE TABLESPACE as a superuser, then run again.",
        )
    wanted = set(json.loads((source / "catalogue.json").read_text(encoding="utf-8")).get("extensions", {}))
    known = {row[0] for row in connection.execute("SELECT name FROM pg_catalog.pg_available_extensions")}
    if lacking := sorted(wanted - known):
        raise RunbookError(
            f"{source}: the server lacks the files of {_counted(lacking, 'extension')} that the backup has: "
            f"{', '.join(lacking)}; nothing was touched",
            hint="Install the package that has them on the server (contrib, for most), then run again.",
            missing_extensions=lacking,
        )


def _counted(names: t.Sequence[str], what: str) -> str:
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''}"


def _major(version: str) -> int:
    number = re.match(r"\d+", version)
    return int(number[0]) if number else 0


def restore_beside(
    params: t.Mapping[str, t.Any],
    connection: psycopg.Connection[t.Any],
    source: Path,
    how: How,
    manifest: t.Mapping[str, t.Any],
    name: str,
    what: str,
) -> None:
    """Restore a backup into a new database and prove that it is what was backed up.

    Args:
        params: the module's options.
        connection: a session in another database.
        source: folder of the backup.
        how: the restore's options.
        manifest: of the backup, whose files were compared with it.
        name: of the new database.
        what: the mark that lets the next run drop it, should this one be killed.

    Raises:
        RunbookError: the restore failed, or does not match its manifest.
    """
    settings = _tuned(connection, how)
    create(connection, name, manifest["properties"], mark(what, params["login_db"]) + how.run_id)
    with dropped_on_failure(connection, name):
        with connect(params, dbname=name, application=f"runbook:{how.run_id}:restore") as empty:
            prepare_for_dump(empty, manifest["client_version"])
        major = max(connection.info.server_version // 10000, manifest["client_version"])
        try:
            _load(params, source, how, name, major, settings)
        except RunbookError as error:
            if is_of_space(error):
                raise RunbookError(
                    f"the server's disk is full; what was restored so far is dropped again\n{error.message}",
                    hint="Make room on the server for a second database of this size: both stand beside each other "
                    "until the swap. Then run again.",
                ) from error
            raise
        with session(params, how, name) as restored, session(params, how, name) as other, ThreadPoolExecutor(1) as pool:
            # beside the proof, because it may have to wait for autovacuum, which has found the new tables
            wait_no_longer(other, 0)
            analysed = pool.submit(other.execute, "ANALYZE")
            _compare(params, restored, source, how, manifest, name)
            analysed.result()


def session(params: t.Mapping[str, t.Any], how: How, name: str) -> psycopg.Connection[t.Any]:
    """Connect to one of the databases of a restore, as its role; it waits for no table for long."""
    connection = connect_as(params, how.role, dbname=name, application=f"runbook:{how.run_id}:restore")
    wait_no_longer(connection, LOCK_SECONDS)
    return connection


def create(
    connection: psycopg.Connection[t.Any],
    name: str,
    wanted: t.Mapping[str, t.Any],
    comment: str,
) -> None:
    """Make an empty database with the original's owner, encoding and locale."""
    try:
        create_as(connection, name, wanted)
    except psycopg.Error as error:
        raise from_postgres(error, f"cannot create database {name}") from error
    set_mark(connection, name, comment)


def _tuned(connection: psycopg.Connection[t.Any], how: How) -> dict[str, str]:
    """Return the settings of the sessions that restore: more memory to sort indexes in, and no wait for the disk.

    Nobody uses the new database yet; the rename that lets them waits until all before it is on the disk. Several
    sessions build their indexes alone: with workers of their own they would be more than the cores meant for them.
    """
    settings = {"synchronous_commit": "off"}
    if how.jobs > 1:
        settings["max_parallel_maintenance_workers"] = "0"
    try:
        row = connection.execute(
            "SELECT pg_size_bytes(%(size)s) > pg_size_bytes(current_setting('maintenance_work_mem'))",
            {"size": how.maintenance_work_mem},
        ).fetchone()
    except psycopg.Error as error:
        raise from_postgres(error, "maintenance_work_mem; nothing was touched") from error
    if row and row[0]:
        settings["maintenance_work_mem"] = how.maintenance_work_mem.replace(" ", "")
    return settings


def _load(
    params: t.Mapping[str, t.Any], source: Path, how: How, name: str, major: int, settings: t.Mapping[str, str]
) -> None:
    """Restore the dump into the new database; the first error ends it."""
    programs, _major = find_programs(major, how.client_bin)
    command: list[str | Path] = [
        programs / "pg_restore",
        *client_arguments(params),
        database_argument(name),
        "--exit-on-error",
        f"--jobs={how.jobs}",
        *([f"--role={how.role}"] if how.role else []),
        source / "dump",
    ]
    with client_environment(params, settings) as environment:
        run_program(command, environment)


def _compare(
    params: t.Mapping[str, t.Any],
    connection: psycopg.Connection[t.Any],
    source: Path,
    how: How,
    manifest: t.Mapping[str, t.Any],
    name: str,
) -> None:
    """Compare row counts, content and catalogue of the restored database with the manifest."""
    checks: list[Check] = []
    counted: dict[str, int] = {}
    if "fingerprints" in manifest:
        before = read_fingerprints(source)
        after, now = read_again(params, connection, how, before, name)
        checks = compare_data(before, after, now)
        counted = {name: one.rows for name, one in after.items()}
    counts = row_counts(connection, counted)
    if counts != manifest["tables"]:
        wrong = {name for name in {*counts, *manifest["tables"]} if counts.get(name) != manifest["tables"].get(name)}
        lines = [
            f"  {name}: {counts.get(name)} rows, the manifest says {manifest['tables'].get(name)}"
            for name in sorted(wrong)
        ]
        raise RunbookError("the restored database has not the rows of its backup\n" + "\n".join(lines))
    catalogue = snapshot(connection)
    if digest(catalogue) != manifest["catalogue_digest"]:
        expected = json.loads((source / "catalogue.json").read_text(encoding="utf-8"))
        raise RunbookError(
            "the restored database has not the catalogue of its backup\n" + table_of(compare(expected, catalogue))
        )
    if failed := [row for row in checks if row.status == "failed"]:
        raise RunbookError("the restored database has not the data of its backup\n" + table_of(failed))


def read_again(
    params: t.Mapping[str, t.Any],
    connection: psycopg.Connection[t.Any],
    how: How,
    before: t.Mapping[str, Fingerprint],
    name: str,
) -> tuple[dict[str, Fingerprint], list[Table]]:
    """Return the fingerprints of a database, read as those of a backup were, and its tables."""
    sessions = functools.partial(session, params, how, name)
    return fingerprints_again(connection, sessions, before, Limits(jobs=how.jobs), exclude=[how.ledger_schema])
