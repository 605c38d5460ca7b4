"""Makes Settler's schema without the engine: for reference databases, and for tests that need no ledger."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pglast

from tools import project

sys.path.insert(0, str(project.ROOT / "collections"))
from ansible_collections.settler.runbook.plugins.module_utils._files import read_migrations

if TYPE_CHECKING:
    from collections.abc import Sequence

    import psycopg
    from ansible_collections.settler.runbook.plugins.module_utils._files import MigrationFile

#: Names of the folders of sql/optional.
OPTIONAL = sorted(path.name for path in (project.ROOT / "sql" / "optional").iterdir())


def files_of(*optional: str) -> list[MigrationFile]:
    """Return all files of sql/migrations and of optional folders, as the engine orders them."""
    return read_migrations(project.ROOT / "sql" / "migrations", optional)


def build(connection: psycopg.Connection[Any], files: Sequence[MigrationFile] | None = None) -> None:
    """Run files (all of sql/migrations if none are given) as the engine does: whole, or statement by statement."""
    for file in files_of() if files is None else files:
        statements = pglast.split(file.text)
        if file.directives.transaction:
            with connection.transaction():
                for statement in statements:
                    connection.execute(statement.encode())
        else:
            for statement in statements:
                connection.execute(statement.encode())
