# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fleet: the same work in many databases of one server, a canary first, then the rest with bounded parallelism."""

from __future__ import annotations

import concurrent.futures
import fnmatch
import itertools
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError, from_postgres
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg
from ansible_collections.settler.runbook.plugins.module_utils._swap import stands_beside

Result = dict[str, t.Any]

#: A limit of 0 is that of a database which is about to get our mark.
_DATABASES = """
SELECT datname, shobj_description(oid, 'pg_database') FROM pg_catalog.pg_database
WHERE datallowconn AND NOT datistemplate AND datconnlimit <> 0 ORDER BY 1
"""


def databases_of(connection: psycopg.Connection[t.Any], wanted: t.Sequence[str]) -> list[str]:
    """Return the server's databases that names and patterns (fnmatch) mean, in the order of the list, each once.

    What the runbook has made or put beside a database (copies, scratch databases, what a rollback has replaced) is
    meant by no pattern.

    Raises:
        RunbookError: one of them means none, or such a one is named.
    """
    comments = dict(connection.execute(_DATABASES).fetchall())
    there = [name for name, comment in comments.items() if not stands_beside(name, comment)]
    if beside := [name for name in wanted if name in comments and name not in there]:
        raise RunbookError(
            f"{beside[0]} is no database to migrate ({comments[beside[0]]}); nothing was applied",
            hint="It is the runbook's. If it has become a database of yours: COMMENT ON DATABASE … IS NULL.",
        )
    found: dict[str, None] = {}
    missing = []
    for pattern in wanted:
        matching = [pattern] if pattern in there else fnmatch.filter(there, pattern)
        missing += [pattern] * (not matching)
        found.update(dict.fromkeys(matching))
    if missing:
        raise RunbookError(
            f"no database is meant by {', '.join(missing)}; nothing was applied",
            hint=f"The server has {len(there)}: {', '.join(there[:20])}{', …' * (len(there) > 20)}.",
        )
    return list(found)


def run_fleet(
    names: t.Sequence[str],
    work: t.Callable[[str], Result],
    *,
    canary: str = "",
    workers: int = 4,
    max_failures: int = 1,
) -> list[Result]:
    """Work in each database, the canary alone and first; stop to begin new ones after some failures.

    Args:
        names: databases, in order.
        work: does it in one; returns its result, with C(changed).
        canary: the first one; by default the first of the names.
        workers: how many at a time.
        max_failures: after so many nothing more is begun; what has begun is finished. A canary that fails ends it all.

    Returns:
        For each database, in the order of the names, its result with C(database) and C(state): V(ok), V(changed),
        V(failed) with C(msg) and C(hint), or V(left) if it was not begun.

    Raises:
        RunbookError: the canary is none of the names.
    """
    first = canary or names[0]
    if first not in names:
        raise RunbookError(f"the canary {first} is none of the databases", hint=f"They are {', '.join(names)}.")
    results = {first: _one(first, work)}
    if results[first]["state"] != "failed":
        rest = iter(name for name in names if name != first)
        with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
            running = {pool.submit(_one, name, work) for name in itertools.islice(rest, max(1, workers))}
            failures = 0
            while running:
                done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for result in (future.result() for future in done):
                    results[result["database"]] = result
                    failures += result["state"] == "failed"
                    following = next(rest, None) if failures < max_failures else None
                    if following is not None:
                        running.add(pool.submit(_one, following, work))
    return [results.get(name, {"database": name, "state": "left"}) for name in names]


def _one(name: str, work: t.Callable[[str], Result]) -> Result:
    """Return what became of one database; its failure is not the others'."""
    try:
        result = work(name)
    except RunbookError as error:
        return {**error.as_result(), "database": name, "state": "failed"}
    except psycopg.Error as error:
        return {**from_postgres(error, f"database {name}").as_result(), "database": name, "state": "failed"}
    return {**result, "database": name, "state": "changed" if result["changed"] else "ok"}
