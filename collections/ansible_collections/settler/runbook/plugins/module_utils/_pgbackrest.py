# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""pgBackRest: a backup of the whole server, a restore point behind it, and the command that goes back to it.

What is written here is a manifest, with fingerprints of the data: the data is in pgBackRest's repository.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import os
import pwd
import re
import shlex
import shutil
import subprocess
import time
import typing as t
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils import _manifest
from ansible_collections.settler.runbook.plugins.module_utils._backup_folder import (
    half_made,
    make_private,
    only_one,
    remove_leftovers,
    remove_whole,
)
from ansible_collections.settler.runbook.plugins.module_utils._catalog import digest, snapshot
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect, connect_as, set_role
from ansible_collections.settler.runbook.plugins.module_utils._database import check_sight
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import (
    Fingerprint,
    Limits,
    read_now,
    write_fingerprints,
)
from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg

TYPES = ("full", "diff", "incr")

_ANNOTATION = "settler-run"

_FACTS = """
SELECT current_setting('server_version') AS server_version, system_identifier::text,
    pg_database_size(current_database()) AS size, pg_is_in_recovery() AS standby,
    current_setting('archive_mode') AS archive_mode,
    has_function_privilege('pg_catalog.pg_create_restore_point(text)', 'EXECUTE')
        AND has_function_privilege('pg_catalog.pg_switch_wal()', 'EXECUTE') AS allowed
FROM pg_catalog.pg_control_system()
"""

_POINT = """
SELECT lsn::text, pg_walfile_name(lsn), to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
FROM pg_create_restore_point(%s) lsn
"""


@dataclass(frozen=True)
class Options:
    """What to back up, how, and where its manifest goes. Times are in seconds; without limits no data is read.

    C(fresh) refuses the backup that an earlier run of the same id has made; without it that one is returned.
    """

    directory: Path
    run_id: str
    environment: str
    role: str | None
    ledger_schema: str
    stanza: str
    type: str
    config: str | None
    account: str
    archive_timeout: float
    limits: Limits | None = None
    fresh: bool = False


def backup(params: t.Mapping[str, t.Any], options: Options, *, check: bool = False) -> dict[str, t.Any]:
    """Back the server up and make a restore point; return the manifest with C(path) and C(pruned).

    Raises:
        RunbookError: the stanza is not of this server or not in order, the login may not make a restore point, the
            backup failed, or the restore point did not reach the archive.
    """
    home = _manifest.home_of(options.directory, params["login_db"])
    final = home / options.run_id
    program = Program(options)
    if check:
        with connect(params, application=f"runbook:{options.run_id}:backup") as connection:
            _look(connection, program)
        nothing = dict.fromkeys(("path", "label", "lsn", "restore_point", "restore_command"), "")
        return {**nothing, "bytes": 0, "pruned": []}
    make_private(options.directory)
    make_private(home)
    with only_one(home) as lock:
        remove_leftovers(home, lock)
        if there := _manifest.earlier(final, fresh=options.fresh):
            return there
        manifest, data = _back_up(params, options, program)
        partial = home / f".{options.run_id}.partial"
        with half_made(partial, lock):
            if data is not None:
                manifest |= write_fingerprints(partial, data)
                _manifest.sync(partial / _manifest.KEYS)
                manifest |= {"files": _manifest.file_digests(partial)}
            _manifest.write_durably(partial / _manifest.NAME, _manifest.seal(manifest))
        partial.rename(final)
        _manifest.sync(home)
        pruned = _forget_expired(options, params["login_db"], manifest, program)
    return {**manifest, "path": str(final), "pruned": pruned}


class Program:
    """pgbackrest with a stanza and a configuration, run as the account of the cluster."""

    def __init__(self, options: Options) -> None:
        """Refuse where it is not installed or cannot be run as that account."""
        if shutil.which("pgbackrest") is None:
            raise RunbookError("pgbackrest is not installed on this host", hint="apt-get install pgbackrest")
        self._base = ["pgbackrest", *([f"--config={options.config}"] if options.config else [])]
        self._base += [f"--stanza={options.stanza}"]
        self._account = _account(options.account)
        self.stanza = options.stanza

    def info(self) -> dict[str, t.Any]:
        """Return what the repository has of the stanza.

        Raises:
            RunbookError: there is no such stanza, or it is not in order.
        """
        told = json.loads(self.run("info", "--output=json"))
        found = next((row for row in told if row["name"] == self.stanza), None)
        empty = 2  # «no valid backups» is all right: the first one is about to be made
        if found is None or found["status"]["code"] not in (0, empty):
            problem = found["status"]["message"] if found else "it does not exist"
            raise RunbookError(
                f"pgBackRest's stanza {self.stanza}: {problem}; nothing was changed",
                hint="Make it as pgBackRest's guide says (stanza-create, check), or set backup_pgbackrest_stanza.",
            )
        return t.cast("dict[str, t.Any]", found)

    def run(self, command: str, *arguments: str) -> str:
        """Run a command to its end and return what it says."""
        account: dict[str, t.Any] = {}
        if self._account is not None and os.geteuid() == 0:
            groups = os.getgrouplist(self._account.pw_name, self._account.pw_gid)
            account = {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": groups}
        done = subprocess.run(
            [*self._base, "--log-level-console=off", "--log-level-stderr=error", *arguments, command],
            cwd="/",
            env={name: value for name, value in os.environ.items() if not name.startswith(("PGBACKREST_", "PG"))},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            **account,
        )
        if done.returncode:
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line][-6:]
            raise RunbookError(
                f"pgbackrest {command} failed with exit code {done.returncode}:\n"
                + "\n".join(f"  {line}" for line in lines)
            )
        return str(done.stdout)

    def restore_command(self, label: str, point: str) -> str:
        """Return the command that restores a backup and goes on to a restore point."""
        switch = ["runuser", "-u", self._account.pw_name, "--"] if self._account is not None else []
        how = [f"--set={label}", "--delta", "--type=name", f"--target={point}", "--target-action=promote"]
        return shlex.join([*switch, *self._base, *how, "--target-timeline=current", "restore"])


def _account(name: str) -> pwd.struct_passwd | None:
    """Return the account to become; None where we are it already."""
    mine = pwd.getpwuid(os.geteuid()).pw_name
    if name in ("", mine):
        return None
    try:
        account = pwd.getpwnam(name)
    except KeyError:
        raise RunbookError(
            f"there is no account {name} on this host: pgBackRest runs as the account of the cluster",
            hint="Run on the database's host, and set backup_pgbackrest_account.",
        ) from None
    if os.geteuid() != 0:
        raise RunbookError(
            f"pgBackRest runs as {name}, the account of the cluster, and {mine} cannot become it",
            hint=f"Connect as root or as {name} (ansible_user, ansible_become), or set backup_pgbackrest_account.",
        )
    return account


def _look(connection: psycopg.Connection[t.Any], program: Program) -> dict[str, t.Any]:
    """Return facts of the server, if stanza, archive and rights are in order for a backup with a restore point."""
    cursor = connection.execute(_FACTS)
    row = cursor.fetchone()
    assert row is not None
    assert cursor.description is not None
    facts = {column.name: value for column, value in zip(cursor.description, row, strict=True)}
    if facts.pop("standby") or facts.pop("archive_mode") == "off":
        raise RunbookError(
            "a restore point needs the primary, with archive_mode on; nothing was changed",
            hint="Set archive_mode = on and archive_command as pgBackRest's guide says.",
        )
    if not facts.pop("allowed"):
        user = connection.info.user
        raise RunbookError(
            f"{user} may not make a restore point; nothing was changed",
            hint=f"As a superuser, in {connection.info.dbname}: GRANT EXECUTE ON FUNCTION "
            f"pg_create_restore_point(text), pg_switch_wal() TO {user};",
        )
    known = {str(database["system-id"]) for database in program.info()["db"]}
    if facts["system_identifier"] not in known:
        raise RunbookError(
            f"pgBackRest's stanza {program.stanza} is of another server (system {', '.join(sorted(known))}, "
            f"this one is {facts['system_identifier']}); nothing was changed",
            hint="Set backup_pgbackrest_stanza to the stanza of this server.",
        )
    return facts


def _back_up(
    params: t.Mapping[str, t.Any], options: Options, program: Program
) -> tuple[dict[str, t.Any], dict[str, Fingerprint] | None]:
    """Take the backup, make the restore point, wait for it to be archived; return the manifest and what the data is."""
    started = time.monotonic()
    with connect(params, application=f"runbook:{options.run_id}:backup") as connection:
        facts = _look(connection, program)
        if options.limits:
            set_role(connection, options.role)
            check_sight(connection)
            connection.execute("RESET ROLE")
        made = _backup_of(options, program)
        if made is None:  # else a run that was killed has taken it
            program.run("backup", f"--type={options.type}", f"--annotation={_ANNOTATION}={options.run_id}")
            made = _backup_of(options, program)
        if made is None or made.get("error"):
            problem = "has pages with wrong checksums" if made else "is not listed"
            raise RunbookError(
                f"pgBackRest's backup of run {options.run_id} {problem}: it proves nothing; nothing was changed",
                hint=f"pgbackrest --stanza={options.stanza} info, and its log, say more.",
            )
        where = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
        assert where is not None
        # a name of its own also where a killed run has made one: recovery would stop at the first of a name
        point = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{options.run_id[:40]}-{where[0]}")
        row = connection.execute(_POINT, [point]).fetchone()
        assert row is not None
        lsn, segment, at = row
        connection.execute("SELECT pg_switch_wal()")
        _wait_archived(connection, options, program, segment)
        set_role(connection, options.role)
        head = Ledger(connection, options.ledger_schema).head()
        catalogue = digest(snapshot(connection))
        data = _data(connection, params, options)
    manifest = {
        "format": _manifest.FORMAT,
        "method": _manifest.PGBACKREST,
        "run_id": options.run_id,
        "environment": options.environment,
        "database": params["login_db"],
        **facts,
        "lsn": lsn,
        "snapshot_time": at,
        "stanza": options.stanza,
        "label": made["label"],
        "type": made["type"],
        "backup_lsn": made["lsn"],
        "restore_point": point,
        "restore_command": program.restore_command(made["label"], point),
        "client_version": made["backrest"]["version"],
        "compression": _manifest.PGBACKREST,
        "ledger_head": head,
        "catalogue_digest": catalogue,
        "tables": {},
        "rows": 0,
        "files": {},
        "bytes": made["info"]["repository"]["delta"],
        "finished_at": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
        "duration_s": round(time.monotonic() - started, 2),
    }
    return manifest, data


def _data(
    connection: psycopg.Connection[t.Any], params: t.Mapping[str, t.Any], options: Options
) -> dict[str, Fingerprint] | None:
    """Return the fingerprints of all tables but the ledger's, if they are wanted."""
    if options.limits is None:
        return None

    sessions = functools.partial(connect_as, params, options.role, application=f"runbook:{options.run_id}:backup")
    return read_now(connection, sessions, options.limits, exclude=[options.ledger_schema])


def _backup_of(options: Options, program: Program) -> dict[str, t.Any] | None:
    """Return what pgBackRest says of the backup that this run has made; None if there is none."""
    made = [row for row in program.info()["backup"] if (row.get("annotation") or {}).get(_ANNOTATION) == options.run_id]
    return made[-1] if made else None


def _wait_archived(connection: psycopg.Connection[t.Any], options: Options, program: Program, segment: str) -> None:
    """Wait until the repository has the segment with the restore point: before that nobody can go back to it."""
    deadline = time.monotonic() + options.archive_timeout
    while not any((row["max"] or "") >= segment for row in program.info()["archive"]):
        if time.monotonic() > deadline:
            failed = connection.execute("SELECT last_failed_wal FROM pg_catalog.pg_stat_archiver").fetchone()
            raise RunbookError(
                f"the write-ahead log {segment} with the restore point is not in pgBackRest's archive after "
                f"{options.archive_timeout:g} s (last failure: {failed[0] if failed and failed[0] else 'none'}); "
                "the backup is there, but nobody could go back to this moment",
                hint="Look at archive_command and the server's log, then run again.",
            )
        time.sleep(0.2)


def _forget_expired(options: Options, database: str, made: t.Mapping[str, t.Any], program: Program) -> list[str]:
    """Remove manifests of backups that pgBackRest's own retention has removed; return their paths."""
    labels = {row["label"] for row in program.info()["backup"]}
    like = ("method", "environment", "system_identifier", "stanza")
    gone = [
        row["path"]
        for row in _manifest.list_backups(options.directory, database)
        if not row["error"] and all(row.get(key) == made[key] for key in like) and row["label"] not in labels
    ]
    for path in gone:
        remove_whole(Path(path))
    return gone
