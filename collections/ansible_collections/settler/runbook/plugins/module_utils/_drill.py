# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A restore drill: a backup is restored into a scratch database, compared with its manifest, and called proven."""

from __future__ import annotations

import contextlib
import datetime as dt
import time
import typing as t
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils import _manifest
from ansible_collections.settler.runbook.plugins.module_utils._connection import (
    MAINTENANCE_DB,
    connect,
    set_role,
)
from ansible_collections.settler.runbook.plugins.module_utils._database import apply_properties
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql
from ansible_collections.settler.runbook.plugins.module_utils._restore import check_target, restore_beside
from ansible_collections.settler.runbook.plugins.module_utils._swap import (
    DRILLING,
    beside,
    drop,
    mark,
    marked,
    unmarked,
)

#: How long a scratch database is left to the drill that has restored it, and now verifies it task by task.
_ABANDONED = dt.timedelta(hours=12)
_SINCE = "; restored "


@dataclass(frozen=True)
class Options:
    """What to restore, as whom."""

    source: Path
    run_id: str
    role: str | None
    ledger_schema: str
    client_bin: str | None
    jobs: int
    maintenance_work_mem: str


def newest(directory: Path, database: str, environment: str) -> Path:
    """Return the newest whole backup of a database and environment that the runbook itself can restore.

    Raises:
        RunbookError: there is none.
    """
    for row in _manifest.list_backups(directory, database):
        restorable = row.get("method") != _manifest.PGBACKREST
        if not row["error"] and row["environment"] == environment and restorable:
            return Path(row["path"])
    raise RunbookError(
        f"there is no whole backup by pg_dump of {database} of environment {environment} in {directory}",
        hint="playbooks/backup.yml makes one.",
    )


def restored(params: t.Mapping[str, t.Any], options: Options, *, check: bool = False) -> dict[str, t.Any]:
    """Restore a backup into a scratch database and compare it with its manifest; the scratch database stays.

    Args:
        params: the module's options; C(login_db) is the database that the backup is of, which need not be there.
        options: what to restore.
        check: only look whether it could be done.

    Raises:
        RunbookError: the backup is damaged, the server cannot take it, it is not what was backed up, or this very run
            is at work in another process.
    """
    started = time.monotonic()
    manifest = _manifest.read_manifest(options.source)
    _manifest.check_files(options.source, manifest)
    name = beside(params["login_db"], "drill", options.run_id)
    application = f"runbook:{options.run_id}:drill"
    with connect(params, dbname=MAINTENANCE_DB, application=application) as connection:
        check_target(connection, options.source, manifest)
        if not check:
            _drop_left(connection, params["login_db"], options.run_id)
            restore_beside(params, connection, options.source, options, manifest, name, DRILLING)
            apply_properties(connection, name, manifest["properties"])
            since = f"{_SINCE}{dt.datetime.now(dt.UTC).isoformat(timespec='seconds')}"
            comment = sql.Literal(mark(DRILLING, params["login_db"]) + options.run_id + since)
            connection.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(sql.Identifier(name), comment))
        server = connection.info.parameter_status("server_version")
    return {
        "database": "" if check else name,
        "path": str(options.source),
        "rows": manifest["rows"],
        "tables": len(manifest["tables"]),
        "fingerprints": len(manifest.get("fingerprints", {})),
        "catalogue_digest": manifest["catalogue_digest"],
        "server_version": server,
        "minutes": round((time.monotonic() - started) / 60, 3),
    }


def dropped(params: t.Mapping[str, t.Any], run_id: str) -> None:
    """Drop the scratch database of this run, and those that other drills of the database have left."""
    with connect(params, dbname=MAINTENANCE_DB, application=f"runbook:{run_id}:drill") as connection:
        _drop_left(connection, params["login_db"], run_id)


def _drop_left(connection: psycopg.Connection[t.Any], database: str, run_id: str) -> None:
    """Drop this run's scratch database and all that nobody works on; this run's name is locked until the session ends.

    Raises:
        RunbookError: this very run is at work in another process.
    """
    own = beside(database, "drill", run_id)
    if not _locked(connection, own):
        raise RunbookError(
            f"run {run_id} restores {own} at this moment; nothing was touched",
            hint="Wait for it, or leave runbook_run_id out.",
        )
    drop(connection, own)
    abandoned = [name for name, comment in marked(connection, DRILLING, database) if _is_abandoned(comment)]
    for name in [*abandoned, *unmarked(connection, DRILLING, database)]:
        if _locked(connection, name):
            with contextlib.suppress(psycopg.errors.ObjectInUse):  # somebody looks at it
                drop(connection, name, force=False)


def _locked(connection: psycopg.Connection[t.Any], name: str) -> bool:
    """Lock a scratch database's name for this session; tell whether no drill that restores it holds it."""
    row = connection.execute(
        "SELECT pg_try_advisory_lock(hashtextextended('settler.runbook drill ' || %s, 0))", [name]
    ).fetchone()
    return bool(row and row[0])


def _is_abandoned(comment: str) -> bool:
    """Tell whether a scratch database is not between two tasks of its drill, by what its comment says."""
    at = comment.rpartition(_SINCE)[2] if _SINCE in comment else ""
    try:
        return dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(at) > _ABANDONED
    except (ValueError, TypeError):  # half restored: then only a lock keeps it
        return True


def proven(params: t.Mapping[str, t.Any], options: Options, facts: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """Write beside the backup, and into the ledger of its database, that it is proven; return what was written."""
    told = {
        "run_id": options.run_id,
        "counts_match": True,
        "fingerprints_match": bool(facts["fingerprints"]),
        "catalogue_match": True,
        **{key: facts[key] for key in ("minutes", "rows", "tables", "fingerprints", "server_version", "verified")},
    }
    written = _manifest.write_proof(options.source, told)
    with connect(params, application=f"runbook:{options.run_id}:drill") as connection:
        set_role(connection, options.role)
        _record(connection, options, told)
    return written


def _record(connection: psycopg.Connection[t.Any], options: Options, told: t.Mapping[str, t.Any]) -> None:
    ledger = Ledger(connection, options.ledger_schema)
    if not ledger.exists():
        return
    with connection.transaction():
        if not ledger.is_current():
            ledger.create()
        detail = {key: value for key, value in told.items() if key != "run_id"}
        ledger.record_event("proven", run_id=options.run_id, backup=str(options.source), **detail)
