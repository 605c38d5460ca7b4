# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Rollback: which way leads back, what it would lose, whether it is allowed; then the way itself.

At each moment the real name is the database as it was found or the proven one from before. Nothing is dropped.
"""

from __future__ import annotations

import contextlib
import re
import time
import typing as t
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils import _manifest, _snapshot
from ansible_collections.settler.runbook.plugins.module_utils._catalog import digest, snapshot
from ansible_collections.settler.runbook.plugins.module_utils._connection import (
    MAINTENANCE_DB,
    connect,
    connect_if_exists,
    set_role,
)
from ansible_collections.settler.runbook.plugins.module_utils._database import apply_properties, row_counts
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import (
    Fingerprint,
    Table,
    read_fingerprints,
    unchanged,
)
from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import compare as compare_data
from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger
from ansible_collections.settler.runbook.plugins.module_utils._lost import (
    Key,
    Lost,
    Others,
    Since,
    lost_rows,
    moment,
    told,
    transactions_of,
    untouched,
    with_own_values,
)
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg
from ansible_collections.settler.runbook.plugins.module_utils._readers import naming_holders, wait_no_longer
from ansible_collections.settler.runbook.plugins.module_utils._restore import (
    LOCK_SECONDS,
    check_target,
    read_again,
    restore_beside,
    session,
)
from ansible_collections.settler.runbook.plugins.module_utils._swap import (
    RESTORING,
    Names,
    alone,
    drop_marked,
    dropped_on_failure,
    exists,
    half_swapped,
    let_in,
    mend,
    names_for,
    only_one,
    shut_on_failure,
    swap,
)

if t.TYPE_CHECKING:
    Say = t.Callable[[str], None]

#: Environments whose data no other environment's may ever replace: a word of their names begins so, or is "main".
PRODUCTION = "(?<![a-z])(prod|prd|live|main(?![a-z]))"


@dataclass(frozen=True)
class Options:
    """What to go back to, and what is allowed.

    C(source) is the folder of a backup; without it the newest whole one below C(directory) is taken. C(lost_folder) is
    where rows are written to that would be lost, C(only_run) the run that must have committed something, and C(changes)
    the tables and columns that its files say they change. C(production) is a regular expression for the names of
    environments that take no other one's data.
    """

    source: Path | None
    run_id: str
    environment: str
    role: str | None
    ledger_schema: str
    client_bin: str | None
    jobs: int
    maintenance_work_mem: str
    confirm: str
    accept_data_loss: bool
    directory: Path | None = None
    method: str = "auto"
    only_run: str = ""
    allow_foreign: str = ""
    lost_folder: Path | None = None
    changes: tuple[str, ...] = ()
    production: str = PRODUCTION


@dataclass
class Way:
    """The way back: C(method) is none, snapshot, dump or pgbackrest.

    C(measured) says how C(minutes) are known, C(difference) is rows now minus rows then by table, C(changed) says of
    which tables values are others, C(lost) what exactly would be lost, where both databases stand beside each other
    already. C(same) are tables and relations of which nothing would be lost, and C(since) when that was so. C(sampled)
    are tables of which the values of only each so many rows were compared.
    """

    method: str
    about: str
    at: str = ""
    minutes: float | None = None
    measured: str = ""
    of_run: str = ""
    source: Path | None = None
    manifest: dict[str, t.Any] | None = None
    snapshot: _snapshot.Snapshot | None = None
    difference: dict[str, int] | None = None
    changed: list[str] | None = None
    lost: list[Lost] | None = None
    sampled: dict[str, int] = field(default_factory=dict)
    same: set[Key] = field(default_factory=set)
    since: Since | None = None
    #: Of the catalogue as it is to be afterwards, where a backup tells.
    catalogue_digest: str = ""


def mend_swap(params: t.Mapping[str, t.Any], options: Options, *, check: bool = False) -> None:
    """Open the database again if a killed rollback has left it closed: nothing could look into it before.

    Raises:
        RunbookError: in check mode, which opens nothing; or another rollback is at work.
    """
    database = params["login_db"]
    with connect(params, dbname=MAINTENANCE_DB, application=f"runbook:{options.run_id}:restore") as connection:
        if not half_swapped(connection, database):
            return
        if check:
            raise RunbookError(
                f"{database} lets nobody in: a rollback was killed just before its swap, or is about to swap; nothing "
                "is lost, and nothing was touched",
                hint="playbooks/rollback.yml without --check opens it again, before it looks for the way back.",
            )
        only_one(connection, database)
        mend(connection, database)


def choose(params: t.Mapping[str, t.Any], options: Options) -> Way:
    """Find the way back; touch nothing.

    Raises:
        RunbookError: there is none, or the backup is damaged, or of another system, database or environment.
    """
    if options.only_run and not _committed(params, options):
        return Way("none", f"run {options.only_run} has committed nothing, so there is nothing to take back")
    copy = _snapshot_for(params, options)
    source, manifest = _newest(params, options)
    if copy and (manifest is None or copy.run_id == manifest["run_id"] or copy.at > manifest["snapshot_time"]):
        about = f"swap in the snapshot {copy.name} of {copy.at}"
        way = Way("snapshot", about, copy.at, 0.1, "estimated: two renames")
        way.snapshot = copy
        if manifest and manifest["run_id"] == copy.run_id:
            way.catalogue_digest = manifest["catalogue_digest"]
        return way
    if source is None or manifest is None:
        where = f" in {options.directory}" if options.directory and options.method != "snapshot" else ""
        what = {"snapshot": "no snapshot", "dump": "no whole backup"}.get(
            options.method, "no snapshot and no whole backup"
        )
        raise RunbookError(
            f"there is {what} of {params['login_db']} of environment {options.environment}{where}; nothing was touched",
            hint="playbooks/status.yml lists the backups; name one with -e rollback_backup=<folder>.",
        )
    if manifest.get("method") == _manifest.PGBACKREST:
        return Way(_manifest.PGBACKREST, str(manifest.get("restore_command", "")), source=source, manifest=manifest)
    _manifest.check_files(source, manifest)
    proof = _manifest.read_proof(source)
    way = Way("dump", "", manifest["snapshot_time"], source=source, manifest=manifest)
    way.catalogue_digest = manifest["catalogue_digest"]
    way.minutes, way.measured = _minutes(params, options, manifest, proof)
    way.about = (
        f"restore the backup of {manifest['snapshot_time']} ({source.name}, "
        f"{'proven by a drill' if proof else 'whole by its checksums, not proven by a drill'})"
    )
    return way


def _minutes(
    params: t.Mapping[str, t.Any],
    options: Options,
    manifest: t.Mapping[str, t.Any],
    proof: t.Mapping[str, t.Any] | None,
) -> tuple[float, str]:
    """Return how long a restore takes, and how that is known.

    The drill of this very backup has measured it; that of another one of the same database, for its size. Without any
    it is twice the dump, which reads what a restore has to write, index and compare.
    """
    if proof:
        return round(proof["minutes"], 1), "measured by its drill"
    rows = _manifest.list_backups(options.directory, params["login_db"]) if options.directory else []
    for row in rows:
        if row["proof"] and row["size"] and row["environment"] == manifest["environment"]:
            minutes = row["proof"]["minutes"] * manifest["size"] / row["size"]
            return round(minutes, 1), f"estimated by the drill of {row['run_id']}, for its size"
    return round(2 * manifest["duration_s"] / 60, 1), "estimated as twice the dump, because no drill has measured it"


def _present(params: t.Mapping[str, t.Any], options: Options) -> psycopg.Connection[t.Any] | None:
    """Connect to the present database, if there is one, to read it."""
    connection = connect_if_exists(params, application=f"runbook:{options.run_id}:restore")
    if connection:
        set_role(connection, options.role)
        wait_no_longer(connection, LOCK_SECONDS)
    return connection


def _committed(params: t.Mapping[str, t.Any], options: Options) -> bool:
    """Tell whether a run has left anything in the ledger; a database that cannot be asked counts as changed."""
    connection = _present(params, options)
    if connection is None:
        return True
    with connection, naming_holders(connection, params["login_db"]):
        return any(row.run_id == options.only_run for row in Ledger(connection, options.ledger_schema).rows())


def _snapshot_for(params: t.Mapping[str, t.Any], options: Options) -> _snapshot.Snapshot | None:
    if options.method == "dump" or (options.source and not options.only_run):
        return None
    with connect(params, dbname=MAINTENANCE_DB, application=f"runbook:{options.run_id}:restore") as connection:
        found = _snapshot.found(connection, params["login_db"])
    mine = [one for one in found if one.environment == options.environment]
    return next((one for one in mine if options.only_run in ("", one.run_id)), None)


def _newest(params: t.Mapping[str, t.Any], options: Options) -> tuple[Path | None, dict[str, t.Any] | None]:
    """Return the backup to restore: the one that is named, or the newest whole one of this environment."""
    if options.method == "snapshot":
        return None, None
    if options.source:
        manifest = _manifest.read_manifest(options.source)
        _refuse_foreign(params, options, options.source, manifest)
        return options.source, manifest
    rows = _manifest.list_backups(options.directory, params["login_db"]) if options.directory else []
    for row in rows:
        if not row["error"] and row["environment"] == options.environment:
            return Path(row["path"]), _manifest.read_manifest(Path(row["path"]))
    return None, None


def is_production(environment: str, pattern: str) -> bool:
    """Tell whether a pattern is somewhere in the name of an environment, in capitals or not.

    Raises:
        RunbookError: it is no regular expression; then nobody knows.
    """
    try:
        return re.search(pattern, environment, re.IGNORECASE) is not None
    except re.error as error:
        raise RunbookError(f"production: {pattern} is no regular expression: {error}; nothing was touched") from error


def _refuse_foreign(
    params: t.Mapping[str, t.Any], options: Options, source: Path, manifest: t.Mapping[str, t.Any]
) -> None:
    """Refuse a backup of another database or environment that is not named, and for production in any case."""
    theirs, mine = manifest["environment"], options.environment
    if theirs != mine and is_production(mine, options.production):
        raise RunbookError(
            f"{source}: a backup of environment {theirs}; no other environment's data ever replaces that of {mine}; "
            "nothing was touched"
        )
    for what, wanted in (("database", params["login_db"]), ("environment", mine)):
        if manifest[what] != wanted and options.allow_foreign != manifest["run_id"]:
            raise RunbookError(
                f"{source}: a backup of {what} {manifest[what]}, not of {wanted}; nothing was touched",
                hint=f"If this very backup is meant: -e rollback_allow_foreign_backup={manifest['run_id']}.",
            )


def _refuse_foreign_system(connection: psycopg.Connection[t.Any], options: Options, way: Way) -> None:
    """Refuse a backup of another server that is not named."""
    assert way.manifest is not None
    row = connection.execute("SELECT system_identifier::text FROM pg_catalog.pg_control_system()").fetchone()
    assert row is not None
    if row[0] != way.manifest["system_identifier"] and options.allow_foreign != way.manifest["run_id"]:
        raise RunbookError(
            f"{way.source}: a backup of another server (system {way.manifest['system_identifier']}, this one is "
            f"{row[0]}); nothing was touched",
            hint="A server that was made anew or upgraded is another one. If this very backup is meant: "
            f"-e rollback_allow_foreign_backup={way.manifest['run_id']}.",
        )


def weigh(params: t.Mapping[str, t.Any], options: Options, way: Way) -> None:
    """Find out what the way would lose, and write it into it; touch nothing but a snapshot's ALLOW_CONNECTIONS.

    Raises:
        RunbookError: the server cannot take the backup.
    """
    application = f"runbook:{options.run_id}:restore"
    with connect(params, dbname=MAINTENANCE_DB, application=application) as connection:
        failed = names_for(params["login_db"], options.run_id).failed
        if exists(connection, failed):
            raise RunbookError(
                f"run {options.run_id} has taken {params['login_db']} back before: there is {failed}; nothing was "
                "touched",
                hint="Leave runbook_run_id out, or give another one.",
            )
        if way.manifest:
            assert way.source is not None
            _refuse_foreign_system(connection, options, way)
            check_target(connection, way.source, way.manifest)
        present = _present(params, options)
        if present is None:
            return
        with present, naming_holders(connection, params["login_db"]):
            if options.only_run:  # in its window the application could not write; others are looked for at the swap
                way.difference, way.of_run = {}, options.only_run
                return
            way.since = moment(present, ledger_schema=options.ledger_schema)
            if way.snapshot:
                let_in(connection, way.snapshot.name, allow=True)
                try:
                    other = session(params, options, way.snapshot.name)
                finally:  # at once: a run that is killed while it compares leaves it shut
                    let_in(connection, way.snapshot.name, allow=False)
                with other:
                    way.lost = lost_rows(present, other, ledger_schema=options.ledger_schema)
                way.difference = {one.table: one.rows for one in way.lost}
                way.same = {key for key in way.since.counts if ".".join(key) not in way.difference}
            else:
                _weigh_dump(params, options, way, present)


def _weigh_dump(params: t.Mapping[str, t.Any], options: Options, way: Way, present: psycopg.Connection[t.Any]) -> None:
    """Compare the present database with a manifest: row counts, and where they are the same the content."""
    assert way.manifest is not None
    assert way.source is not None
    before: dict[str, Fingerprint] = {}
    after: dict[str, Fingerprint] = {}
    tables: list[Table] = []
    if "fingerprints" in way.manifest:
        before = read_fingerprints(way.source)
        after, tables = read_again(params, present, options, before, params["login_db"])
    now = row_counts(present, {name: one.rows for name, one in after.items()})
    then = way.manifest["tables"]
    way.difference = {
        name: now.get(name, 0) - then.get(name, 0)
        for name in sorted({*now, *then})
        if now.get(name, 0) != then.get(name, 0) and not name.startswith(f"{options.ledger_schema}.")
    }
    if before:
        columns = {name: one.columns for name, one in before.items()}
        newer = with_own_values(present, columns, ledger_schema=options.ledger_schema)
        way.same = unchanged(before, after, tables) - newer
        failed = [row for row in compare_data(before, after, tables) if row.status == "failed"]
        changed = {row.object.rpartition(".")[0] for row in failed if row.check == "data column"}
        way.changed = sorted((changed | {".".join(key) for key in newer}) - set(way.difference))
        known = {*way.difference, *way.changed}
        way.sampled = {name: one.sample for name, one in before.items() if one.sample > 1 and name not in known}


def describe(way: Way) -> str:
    """Say which way it is, how long it takes, and what it would lose."""
    minutes = f"about {way.minutes:g} minutes" if way.minutes and way.minutes >= 0.2 else "some seconds"
    lines = [f"{way.about}: {minutes} ({way.measured})"]
    if way.of_run:
        lines.append(f"  what run {way.of_run} has written stays in the failed database; the application was kept out")
    elif way.lost is not None:
        lines.append(told(way.lost) if way.lost else "  no row was written since")
    elif way.difference is not None:
        lines += [f"  {name}: {rows:+,d} rows since the backup" for name, rows in way.difference.items()]
        lines += [f"  {name}: as many rows as in the backup, with other values" for name in way.changed or ()]
        lines += [
            f"  {name}: as many rows as in the backup; of one in {sample} the values were compared, "
            "of all before the swap"
            for name, sample in way.sampled.items()
        ]
        if not way.difference and not way.changed:
            lines.append(f"  every {'other ' if way.sampled else ''}table is as it was in the backup")
    return "\n".join(lines)


def loses(way: Way) -> bool:
    """Tell whether something was written since."""
    return bool(way.lost or way.changed or any(way.difference.values() if way.difference else ()))


def allow(params: t.Mapping[str, t.Any], options: Options, way: Way) -> None:
    """Refuse what was not confirmed.

    Raises:
        RunbookError: with what would be done and lost; nothing was touched.
    """
    database = params["login_db"]
    if way.difference is None:
        return  # there is no such database: nothing is replaced
    facts = {"method": way.method, "difference": way.difference, "changed_tables": way.changed or []}
    if options.confirm != database:
        raise RunbookError(
            f"this replaces database {database}; nothing was touched\n{describe(way)}",
            hint=f"If that is meant: -e rollback_confirm={database}. The present database is kept, renamed.",
            **facts,
        )
    if loses(way) and not options.accept_data_loss:
        raise RunbookError(
            f"{database} was written to since {way.at}; nothing was touched\n{describe(way)}",
            hint="If these rows may be lost: -e rollback_accept_data_loss=true. They are written into files first.",
            **facts,
        )


def roll_back(
    params: t.Mapping[str, t.Any], options: Options, way: Way, say: Say = lambda _line: None
) -> dict[str, t.Any]:
    """Go the way back: at each moment the real name is the old database or the whole new one.

    Raises:
        RunbookError: see M(weigh) and M(allow); or something failed: then the real name still is the old database.
    """
    started = time.monotonic()
    database = params["login_db"]
    with connect(params, dbname=MAINTENANCE_DB, application=f"runbook:{options.run_id}:restore") as connection:
        only_one(connection, database)
        weigh(params, options, way)
        allow(params, options, way)
        for line in describe(way).splitlines():
            say(line)
        drop_marked(connection, RESTORING, database)
        names = names_for(database, options.run_id)
        if way.snapshot:
            wanted, incoming = way.snapshot.properties, way.snapshot.name
        else:
            assert way.manifest is not None
            assert way.source is not None
            wanted, incoming = way.manifest["properties"], names.restored
            restore_beside(params, connection, way.source, options, way.manifest, incoming, RESTORING)
        kept_shut = shut_on_failure if way.snapshot else dropped_on_failure
        with kept_shut(connection, incoming):
            apply_properties(connection, incoming, wanted)
            restored_s = round(time.monotonic() - started, 2)
            say(f"proven beside {database} after {restored_s} s; now the swap")
            began = time.monotonic()
            there = exists(connection, database)
            names = replace(names, restored=incoming)
            lost = _replace(params, options, way, connection, names, wanted["comment"], say, there=there)
            swap_s = round(time.monotonic() - began, 2)
    verified = _settle(params, options, way, names.failed if there else "", lost)
    return {
        "failed_database": names.failed if there else "",
        "lost": [asdict(one) for one in lost],
        "verified": verified,
        "restored_s": restored_s,
        "swap_s": swap_s,
        "duration_s": round(time.monotonic() - started, 2),
    }


def _replace(
    params: t.Mapping[str, t.Any],
    options: Options,
    way: Way,
    connection: psycopg.Connection[t.Any],
    names: Names,
    comment: str | None,
    say: Say,
    *,
    there: bool,
) -> list[Lost]:
    """Keep everybody out, keep what would be lost, swap.

    What a run has done in its own window stays in the failed database; what others have written meanwhile is kept, and
    never stops the way back.
    """
    if not there:
        with alone(connection, names.restored):
            swap(connection, names, comment=comment, there=there, run_id=options.run_id)
        return []
    let_in(connection, names.restored, allow=True)
    present = session(params, options, names.real)
    with alone(connection, names.real, but=[present.info.backend_pid]):
        with present, session(params, options, names.restored) as other:
            if options.only_run:
                lost = _of_others(present, other, options, way, say)
            else:
                schema, same = options.ledger_schema, _same(present, options, way)
                with _kept_in(options, names.real):
                    lost = lost_rows(present, other, ledger_schema=schema, same=same, folder=options.lost_folder)
                if lost and not options.accept_data_loss:
                    raise RunbookError(
                        f"{names.real} was written to until now; it is as it was\n{told(lost)}",
                        hint="If these rows may be lost: -e rollback_accept_data_loss=true.",
                    )
        with alone(connection, names.real), alone(connection, names.restored):  # sessions may take a moment to end
            swap(connection, names, comment=comment, there=True, run_id=options.run_id)
    return lost


def _of_others(
    present: psycopg.Connection[t.Any], other: psycopg.Connection[t.Any], options: Options, way: Way, say: Say
) -> list[Lost]:
    """Return and keep the rows that others than the run have written in its window, who are not kept out by it."""
    since = way.snapshot.transaction if way.snapshot else (way.manifest or {}).get("transaction", "")
    if not since:
        return []
    schema = options.ledger_schema
    try:
        own = transactions_of(present, options.only_run, ledger_schema=schema)
        others = Others(since, own, options.changes)
        return lost_rows(present, other, ledger_schema=schema, others=others, folder=options.lost_folder)
    except (psycopg.Error, OSError) as error:
        say(f"what others may have written since stays in the failed database, and could not be kept in files: {error}")
        return []


def _same(present: psycopg.Connection[t.Any], options: Options, way: Way) -> set[Key]:
    """Return the relations of which nothing is lost: they were the same when the way was weighed, and still are."""
    if way.since is None:
        return set()
    still = untouched(present, way.since, ledger_schema=options.ledger_schema)
    return {key for key, root in still.items() if key in way.same or root in way.same}


@contextlib.contextmanager
def _kept_in(options: Options, database: str) -> t.Iterator[None]:
    """Say what it means that files cannot be written.

    Raises:
        RunbookError: no room, or no folder of ours.
    """
    try:
        yield
    except OSError as error:
        raise RunbookError(
            f"rows that would be lost cannot be written into {options.lost_folder}: {error.strerror or error}; "
            f"{database} is as it was",
            hint="Make room there, or name another folder: -e runbook_diagnostics_directory=<folder>. Then run again.",
        ) from error


def _name_of(way: Way) -> str:
    """Return which backup or snapshot it was; of a decrypted copy, what it is a copy of."""
    if way.manifest and "opened_from" in way.manifest:
        return str(way.manifest["opened_from"])
    return str(way.source or (way.snapshot.name if way.snapshot else ""))


def _settle(params: t.Mapping[str, t.Any], options: Options, way: Way, failed: str, lost: t.Sequence[Lost]) -> bool:
    """Look at what has the real name now, and note in its ledger what was done; tell whether a backup vouches for it.

    Raises:
        RunbookError: it has not the catalogue that it had; can only be if somebody has changed it since.
    """
    with session(params, options, params["login_db"]) as database:
        if way.catalogue_digest and digest(snapshot(database)) != way.catalogue_digest:
            raise RunbookError(
                f"{params['login_db']} was swapped, and has not the catalogue of its backup; what it was is {failed}",
                hint="playbooks/verify.yml names the differences. Keep the application out until they are understood.",
            )
        ledger = Ledger(database, options.ledger_schema)
        if ledger.exists():
            ledger.record_event(
                "rolled_back",
                run_id=options.run_id,
                method=way.method,
                backup=_name_of(way),
                failed_database=failed,
                lost={one.table: one.rows for one in lost},
            )
    return bool(way.catalogue_digest)
