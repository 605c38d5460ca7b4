# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is kept of a failed run: a folder for its owner only, with what an investigation needs and no secrets."""

from __future__ import annotations

import functools
import json
import platform
import re
import typing as t
from dataclasses import dataclass

from ansible_collections.settler.runbook.plugins.module_utils._connection import (
    MAINTENANCE_DB,
    connect,
    may_become,
    set_role,
)
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError, describe
from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger
from ansible_collections.settler.runbook.plugins.module_utils._private import make_folder
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import dict_row, psycopg, sql

if t.TYPE_CHECKING:
    import datetime as dt
    from pathlib import Path

#: Bytes of the server's log that are read from its end, and that are kept where no line has a time.
_LOG_BYTES = 4 * 2**20
_UNTIMED_BYTES = 256 * 2**10

_SESSIONS = """
SELECT pid, usename AS role, datname AS database, application_name AS application, backend_type, state,
    wait_event_type, wait_event, pg_blocking_pids(pid) AS blocked_by,
    extract(epoch FROM clock_timestamp() - xact_start)::float AS transaction_s,
    extract(epoch FROM clock_timestamp() - query_start)::float AS query_s, left(query, 2000) AS query
FROM pg_catalog.pg_stat_activity WHERE pid <> pg_backend_pid() ORDER BY xact_start NULLS LAST
"""

_SETTINGS = """
SELECT name, setting, unit, source FROM pg_catalog.pg_settings
WHERE source NOT IN ('default', 'override', 'client', 'session') ORDER BY name
"""

_SIZES = """
SELECT n.nspname || '.' || c.relname AS "table", pg_total_relation_size(c.oid) AS bytes, c.reltuples::bigint AS rows
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'm') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
ORDER BY bytes DESC LIMIT 100
"""

#: What a snapshot's comment keeps has the settings of the database, which may be secrets.
_DATABASES = r"""
SELECT datname AS database, pg_get_userbyid(datdba) AS owner, datallowconn AS allows_connections,
    regexp_replace(shobj_description(oid, 'pg_database'), '^(settler\.runbook: [^;]*); .*', '\1') AS comment,
    CASE WHEN has_database_privilege(oid, 'CONNECT') THEN pg_database_size(oid) END AS bytes
FROM pg_catalog.pg_database ORDER BY 1
"""

#: Where the log is, when the run began as the log writes it, whether its lines have a time, and what else may be read.
_LOG = """
SELECT file, to_char(%s::timestamptz AT TIME ZONE current_setting('log_timezone'), 'YYYY-MM-DD HH24:MI:SS'),
    file ~ '[.](csv|json)$' OR current_setting('log_line_prefix') ~ '%%-?[0-9]*[mnt]',
    has_function_privilege('pg_ls_logdir()', 'EXECUTE')
FROM pg_current_logfile() file
"""
_LOG_FILES = """
SELECT regexp_replace(%(file)s, '[^/]*$', '') || name FROM pg_ls_logdir()
WHERE modification >= date_trunc('second', %(since)s::timestamptz)
  AND substring(name FROM '[.][^.]*$') IS NOT DISTINCT FROM substring(%(file)s FROM '[.][^.]*$')
ORDER BY modification DESC, name DESC
"""
_LOG_END = """
SELECT size, pg_read_file(%(file)s, greatest(0, size - %(bytes)s), %(bytes)s, true)
FROM pg_stat_file(%(file)s)
"""

_SECRET_NAME = re.compile(r"passw|passphrase|secret|token|conninfo|_command$|ssl_key", re.IGNORECASE)
#: A word such as PASSWORD and the value after it.
_NAMED = r"\b((?:password|passphrase|passwd|secret|token)\b[\"']?\s*[=:]?\s*)(?:E?'(?:[^']|'')*'|[^\s,;)]+)"
#: A name that ends in such a word, and its value.
_SETTING = r"\b([\w.]*(?:password|passphrase|passwd|secret|token)[\"']?\s*[=:]\s*)(?:E?'(?:[^']|'')*'|[^\s,;)\]\"]+)"
_SECRETS = (
    (re.compile(r"(://[^\s:/@]+:)[^\s@]+@"), r"\1***@"),
    (re.compile(r"SCRAM-SHA-256\$[^\s'\"]+|\bmd5[0-9a-f]{32}\b"), "***"),
    (re.compile(_NAMED, re.IGNORECASE), r"\1***"),
    (re.compile(_SETTING, re.IGNORECASE), r"\1***"),
)


@dataclass(frozen=True)
class Options:
    """What to keep, and where.

    C(notes) maps names of files to their content: a text, or data. C(since) is when the run began.
    """

    folder: Path
    run_id: str
    role: str | None
    ledger_schema: str
    since: dt.datetime
    notes: t.Mapping[str, t.Any]
    secrets: t.Sequence[str] = ()


def keep(params: t.Mapping[str, t.Any], options: Options) -> dict[str, t.Any]:
    """Write the folder; what cannot be read is named in C(left_out) with the reason, and stops nothing.

    Returns:
        C(files), the names of what was written, and C(left_out).
    """
    content: dict[str, t.Any] = dict(options.notes)
    left_out: dict[str, str] = {}
    for database, parts in ((params["login_db"], _OF_DATABASE), (MAINTENANCE_DB, _OF_SERVER)):
        try:
            with connect(params, dbname=database, application=f"runbook:{options.run_id}:diagnostics") as connection:
                for name, read in parts.items():
                    _read(content, left_out, name, functools.partial(read, connection, options))
        except RunbookError as error:
            left_out |= dict.fromkeys(parts.keys() - content.keys(), error.message)
    make_folder(options.folder)
    options.folder.chmod(0o700)
    files = []
    for name, value in [*content.items(), ("left_out", left_out)]:
        try:
            files.append(_write(options.folder, name, value, options.secrets))
        except OSError as error:  # of a full disk the smaller files still find room
            left_out[name] = error.strerror or str(error)
    return {"files": sorted(files), "left_out": left_out}


def _read(content: dict[str, t.Any], left_out: dict[str, str], name: str, read: t.Callable[[], t.Any]) -> None:
    try:
        content[name] = read()
    except psycopg.Error as error:
        left_out[name] = describe(error)
    except RunbookError as error:
        left_out[name] = error.message


def _write(folder: Path, name: str, value: t.Any, secrets: t.Sequence[str]) -> str:
    text = isinstance(value, str)
    path = folder / f"{name}.{'txt' if text else 'json'}"
    clean = without_secrets(value, secrets)
    path.touch(mode=0o600)
    try:
        path.write_text(
            clean if text else json.dumps(clean, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8"
        )
    except BaseException:
        path.unlink()  # a part could be taken for all
        raise
    return path.name


def without_secrets(value: t.Any, secrets: t.Sequence[str]) -> t.Any:
    """Return texts, also within data, without what looks like a secret and without those that are known."""
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "***") if secret else value
        for pattern, instead in _SECRETS:
            value = pattern.sub(instead, value)
        return value
    if isinstance(value, t.Mapping):
        return {
            key: "***" if _SECRET_NAME.search(str(key)) and part else without_secrets(part, secrets)
            for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(part, secrets) for part in value]
    return value


def _rows(connection: psycopg.Connection[t.Any], query: t.LiteralString) -> list[dict[str, t.Any]]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query).fetchall()


def _ledger(connection: psycopg.Connection[t.Any], options: Options) -> dict[str, t.Any]:
    if may_become(connection, options.role):
        set_role(connection, options.role)
    try:
        ledger = Ledger(connection, options.ledger_schema)
        found = {"migrations": ledger.applied(), "events": ledger.events(200), "journal": []}
        if ledger.is_current():
            query = sql.SQL("SELECT to_jsonb(j) FROM {}.journal j ORDER BY file, statement")
            rows = connection.execute(query.format(sql.Identifier(options.ledger_schema)))
            found["journal"] = [row[0] for row in rows]
        return found
    finally:
        connection.execute("RESET ROLE")


def _server_log(connection: psycopg.Connection[t.Any], options: Options) -> str:
    """Return the server's log since the run began, of all its files; what is missing is noted in a first line."""
    row = connection.execute(_LOG, [options.since]).fetchone()
    if row is None or row[0] is None:
        raise RunbookError("the server writes no log file of its own (logging_collector): its system's journal has it")
    file, since, timed, may_list = row
    names = [file]
    if may_list:
        found = connection.execute(_LOG_FILES, {"file": file, "since": options.since})
        names += [name for (name,) in found if name != file]
    text, room = "", _LOG_BYTES
    for name in names:
        size, part = connection.execute(_LOG_END, {"file": name, "bytes": room}).fetchone() or (0, "")
        text, room = f"{part}{text}", room - size
        if room <= 0:
            break
    lines, whole = since_then(text.splitlines(), since, options.since.timestamp()) if timed else ([], True)
    if not timed:
        lines = text[-_UNTIMED_BYTES:].splitlines()
        note = "log_line_prefix has no time, so this is the end of the log, also from before the run"
    elif whole and room <= 0:
        note = f"the run began before this: only the last {_LOG_BYTES // 2**20} MB of the log were read"
    elif whole and not may_list:
        note = "the run began before this file: an earlier one needs the right to call pg_ls_logdir()"
    else:
        note = "" if lines else "nothing was written since the run began"
    return "".join(f"{line}\n" for line in [*([f"({note})"] if note else []), *lines])


#: A time as %m, %t, csvlog and jsonlog write it, or as %n does; it is looked for where a line begins.
_TIME = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)|\b(\d{10}\.\d{3})\b")
_HEAD = 120


def since_then(lines: t.Sequence[str], since: str, epoch: float) -> tuple[list[str], bool]:
    """Return the lines of a log from the first one on that is not older, and whether no line before it is.

    Args:
        lines: of a log in any format whose lines have a time; those of a statement that goes on have none.
        since: the moment as the log writes it, to the second.
        epoch: the moment as seconds since 1970.
    """
    whole = True
    for number, line in enumerate(lines):
        times = [] if line.startswith("\t") else _TIME.findall(line[:_HEAD])
        if any(text >= since if text else float(seconds) >= int(epoch) for text, seconds in times):
            return list(lines[number:]), whole
        whole = whole and not times
    return [], False


def _versions(connection: psycopg.Connection[t.Any], options: Options) -> dict[str, t.Any]:
    row = connection.execute(
        "SELECT version(), (SELECT jsonb_object_agg(extname, extversion) FROM pg_catalog.pg_extension)"
    ).fetchone()
    assert row is not None
    return {
        "server": row[0],
        "extensions": row[1],
        "run_id": options.run_id,
        "python": platform.python_version(),
        "psycopg": psycopg.__version__,
        "libpq": psycopg.pq.version(),
    }


_Read = t.Callable[["psycopg.Connection[t.Any]", Options], t.Any]

_OF_DATABASE: dict[str, _Read] = {
    "ledger": _ledger,
    "sizes": lambda connection, _options: {
        "tables": _rows(connection, _SIZES),
        "databases": _rows(connection, _DATABASES),
    },
    "versions": _versions,
}

#: Read in another database, which the run has not touched: who may read the log is written in its catalogue. In the
#: run's own it would be dumped, and no owner could restore it.
_OF_SERVER: dict[str, _Read] = {
    "sessions": lambda connection, _options: _rows(connection, _SESSIONS),
    "settings": lambda connection, _options: {
        row["name"]: "***" if _SECRET_NAME.search(row["name"]) else row for row in _rows(connection, _SETTINGS)
    },
    "server_log": _server_log,
}
