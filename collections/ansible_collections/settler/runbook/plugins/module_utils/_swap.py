# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Put one database in another's place, by two renames in one transaction.

What stands beside a database for that carries a mark in its comment: only what has our mark is ever dropped or swapped
in. At each moment the real name is the old database or the new one, or nobody can connect to it and C(mend) opens it.
"""

from __future__ import annotations

import contextlib
import re
import time
import typing as t
from dataclasses import dataclass

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._prepared import refuse_prepared
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql

#: Seconds that sessions get to end before a swap gives up.
LEAVE_SECONDS = 10


@dataclass(frozen=True)
class Names:
    """The names of a swap: the real one, the one it is restored under, the one the failed database keeps."""

    real: str
    restored: str
    failed: str


def beside(database: str, kind: str, run_id: str) -> str:
    """Return a name that carries the run's id; what is cut to PostgreSQL's 63 bytes is the database, then the id."""
    tail = f"_{kind}_{re.sub(r'[^a-z0-9]+', '_', run_id.lower())[:40]}"
    return database.encode()[: 63 - len(tail)].decode(errors="ignore") + tail


def is_beside(name: str, database: str, kind: str) -> bool:
    """Tell whether M(beside) gives this name to some run's."""
    begin = f"_{kind}_"
    starts = (found.start() for found in re.finditer(f"(?={begin})", name))
    return any(beside(database, kind, name[start + len(begin) :]) == name for start in starts)


def names_for(database: str, run_id: str) -> Names:
    """Return the names of a restore."""
    return Names(database, beside(database, "restore", run_id), beside(database, "failed", run_id))


_MARK = "settler.runbook: "


def mark(what: str, database: str) -> str:
    """Return how the comment begins of what we made beside a database; C(what) is such as V(being restored for)."""
    return f"{_MARK}{what} {database}, run "


#: A half made database, which nobody needs: the next run drops it.
RESTORING = "being restored for"
#: A restore drill's, dropped likewise.
DRILLING = "restore drill of"
#: A copy of the database as it was, the way back of a run.
SNAPSHOT = "snapshot of"
#: What a rollback has put out of the way; only people drop it.
FAILED = "put aside by a rollback of"
#: An empty one, to make files in and compare.
SCRATCH = "scratch database beside"
#: What stands in their names.
_KIND = {RESTORING: "restore", DRILLING: "drill", SNAPSHOT: "snapshot"}


def marked(connection: psycopg.Connection[t.Any], what: str, database: str) -> list[tuple[str, str]]:
    """Return name and comment of all databases with a mark."""
    found = connection.execute(
        "SELECT datname, shobj_description(oid, 'pg_database') FROM pg_catalog.pg_database "
        "WHERE starts_with(shobj_description(oid, 'pg_database'), %s) ORDER BY datname",
        [mark(what, database)],
    )
    return found.fetchall()


def stands_beside(name: str, comment: str | None) -> bool:
    """Tell by its comment whether we made a database, or put it, beside another one that it has not become since."""
    return comment is not None and comment.startswith(_MARK) and f" {name}, run " not in comment


def exists(connection: psycopg.Connection[t.Any], database: str) -> bool:
    """Tell whether there is a database of this name."""
    found = connection.execute("SELECT FROM pg_catalog.pg_database WHERE datname = %s", [database])
    return found.fetchone() is not None


def only_one(connection: psycopg.Connection[t.Any], database: str) -> None:
    """Refuse a second rollback or snapshot of a database at a time; the lock ends with the session.

    Raises:
        RunbookError: another run does not end.
    """
    deadline = time.monotonic() + LEAVE_SECONDS
    while True:
        row = connection.execute(
            "SELECT pg_try_advisory_lock(hashtextextended('settler.runbook rollback of ' || %s, 0))", [database]
        ).fetchone()
        if row and row[0]:
            return
        if time.monotonic() > deadline:
            raise RunbookError(
                f"another run takes {database} back, or copies it, at this moment; nothing was touched",
                hint="Wait for it, then look at playbooks/status.yml.",
            )
        time.sleep(0.2)


def unmarked(connection: psycopg.Connection[t.Any], what: str, database: str) -> list[str]:
    """Return the names of what a run that was killed could not mark any more.

    It is known by a name of ours, no comment, and a connection limit of 0: so it comes into being.
    """
    found = connection.execute(
        "SELECT datname FROM pg_catalog.pg_database WHERE datconnlimit = 0 "
        "AND shobj_description(oid, 'pg_database') IS NULL ORDER BY datname"
    )
    return [name for (name,) in found if is_beside(name, database, _KIND[what])]


def drop_marked(connection: psycopg.Connection[t.Any], what: str, database: str) -> None:
    """Drop what a killed run has left half made; it carries our mark, or was to get it when the run was killed."""
    marks = [name for name, _comment in marked(connection, what, database)]
    for name in [*marks, *unmarked(connection, what, database)]:
        drop(connection, name)


def drop(connection: psycopg.Connection[t.Any], name: str, *, force: bool = True) -> None:
    """Drop a database that we have made; without C(force) not if somebody is connected."""
    how = sql.SQL(" WITH (FORCE)" if force else "")
    connection.execute(sql.SQL("DROP DATABASE IF EXISTS {}{}").format(sql.Identifier(name), how))


@contextlib.contextmanager
def dropped_on_failure(connection: psycopg.Connection[t.Any], name: str) -> t.Iterator[None]:
    """Drop what we made beside a database if it does not come into its place.

    At once, and not by the next run: it may have taken the room that the present database needs.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(psycopg.Error):
            drop(connection, name)
        raise


@contextlib.contextmanager
def shut_on_failure(connection: psycopg.Connection[t.Any], name: str) -> t.Iterator[None]:
    """Let nobody into a snapshot if it does not come into the database's place: it stays what it was."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(psycopg.Error):
            let_in(connection, name, allow=False)
        raise


def set_mark(connection: psycopg.Connection[t.Any], name: str, comment: str) -> None:
    """Mark what was made with a connection limit of 0, and take the limit away."""
    database = sql.Identifier(name)
    with connection.transaction():
        connection.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(database, sql.Literal(comment)))
        connection.execute(sql.SQL("ALTER DATABASE {} CONNECTION LIMIT -1").format(database))
        connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database))


def half_swapped(connection: psycopg.Connection[t.Any], database: str) -> bool:
    """Tell whether a run has closed a database for its swap and not gone on: what was to come in still stands."""
    closed = connection.execute(
        "SELECT FROM pg_catalog.pg_database WHERE datname = %s AND NOT datallowconn", [database]
    ).fetchone()
    return closed is not None and any(marked(connection, what, database) for what in (RESTORING, SNAPSHOT))


def mend(connection: psycopg.Connection[t.Any], database: str) -> None:
    """Open a database again that a run, killed just before its swap, has closed."""
    if half_swapped(connection, database):
        let_in(connection, database, allow=True)


def let_in(connection: psycopg.Connection[t.Any], database: str, *, allow: bool) -> None:
    """Let sessions into a database, or none: also not those of its owner."""
    command = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    connection.execute(command.format(sql.Identifier(database), sql.SQL("true" if allow else "false")))


@contextlib.contextmanager
def alone(connection: psycopg.Connection[t.Any], database: str, *, but: t.Sequence[int] = ()) -> t.Iterator[None]:
    """Keep everybody out of a database and end its sessions; after an error it lets in again.

    Args:
        connection: a session in another database.
        database: what is closed.
        but: backends that stay; they see what is final.

    Raises:
        RunbookError: a session does not leave.
    """
    let_in(connection, database, allow=False)
    try:
        _empty(connection, database, [*but, connection.info.backend_pid])
        yield
    except BaseException:
        if not connection.closed:
            if connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
                connection.execute("ROLLBACK")
            let_in(connection, database, allow=True)
        raise


def swap(connection: psycopg.Connection[t.Any], names: Names, *, comment: str | None, there: bool, run_id: str) -> None:
    """Rename the new database to the real name and the real one out of the way, in one transaction.

    The comment of the original replaces our mark in the same transaction: from then on nothing drops it. What was put
    out of the way has a mark that nothing drops either.

    Args:
        connection: a session in another database.
        names: of the new database, the real one, and the one that the present database keeps.
        comment: the comment of the original.
        there: whether there is a database under the real name; it must be empty of sessions.
        run_id: of this run.
    """
    one, new, old = (sql.Identifier(name) for name in (names.real, names.restored, names.failed))
    with connection.transaction():
        if there:
            connection.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(one, old))
            aside = sql.Literal(mark(FAILED, names.real) + run_id)
            connection.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(old, aside))
            let_in(connection, names.failed, allow=True)
        connection.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(new, one))
        connection.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(one, sql.Literal(comment)))
        let_in(connection, names.real, allow=True)


def _empty(connection: psycopg.Connection[t.Any], database: str, but: t.Sequence[int]) -> None:
    """End all sessions of a database that lets no new ones in.

    What works for no role is autovacuum: a rename, a drop and a copy end it with the server's own right to do so.

    Raises:
        RunbookError: one does not leave, or may not be ended by this role; a prepared transaction stays in any case.
    """
    refuse_prepared(connection, database)
    deadline = time.monotonic() + LEAVE_SECONDS
    while True:
        left = connection.execute(
            "SELECT pid, coalesce(usename, usesysid::text) FROM pg_catalog.pg_stat_activity "
            "WHERE datname = %s AND usesysid IS NOT NULL AND pid <> ALL (%s)",
            [database, list(but)],
        ).fetchall()
        if not left:
            return
        if time.monotonic() > deadline:
            told = ", ".join(f"pid {pid} ({user})" for pid, user in left)
            raise RunbookError(
                f"sessions of {database} do not leave: {told}; the database is as it was",
                hint="End them as a superuser, then run again.",
            )
        for pid, user in left:
            try:
                connection.execute("SELECT pg_terminate_backend(%s)", [pid])
            except psycopg.errors.InsufficientPrivilege as error:
                raise RunbookError(
                    f"pid {pid} of role {user} uses {database}, and this role may not end it; "
                    "the database is as it was",
                    hint=f"As a superuser: SELECT pg_terminate_backend({pid}); then run again.",
                ) from error
        time.sleep(0.05)
