"""What verification expects of Settler's schema, for tests that spoil a database and those that must find nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ansible_collections.settler.runbook.plugins.module_utils._catalog import snapshot
from ansible_collections.settler.runbook.plugins.module_utils._verify import Check, compare, health, orphans, sequences
from ansible_collections.settler.runbook.plugins.modules.verify import read_expectation

from tests.support import PROJECT

if TYPE_CHECKING:
    import psycopg

EXPECTED = read_expectation(str(PROJECT / "sql/verify/expected.yml"))
NAMES = {"settler_owner": "$owner", "settler_migrator": "$migrator", "settler_app": "$app"}


def catalogue_of(session: psycopg.Connection[Any]) -> Any:
    """Return the catalogue as the role verify reads it."""
    return snapshot(session, exclude=["runbook"], role_names=NAMES)


def bad_checks(session: psycopg.Connection[Any], *, rows_too: bool = True) -> list[Check]:
    """Return the checks that are not ok."""
    rows = compare(EXPECTED, catalogue_of(session))
    if rows_too:
        rows += health(session) + sequences(session)[0] + orphans(session, 1 << 30)[0]
    return [row for row in rows if row.status != "ok"]


def line(row: Check) -> str:
    """Return a check as one line."""
    return f"{row.check} {row.object}: {row.expected} | {row.actual}"


def problems(session: psycopg.Connection[Any], *, rows_too: bool = True) -> list[str]:
    """Return what is wrong, a line each."""
    return [line(row) for row in bad_checks(session, rows_too=rows_too)]
