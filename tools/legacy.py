"""The schemas that old Settler databases have; ``tools.generate`` fills them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psycopg
    from psycopg.rows import TupleRow

    Connection = psycopg.Connection[TupleRow]

_SQL = Path(__file__).resolve().parent.parent / "sql"
_LEGACY = {path.stem.split("_", 1)[1]: path for path in sorted((_SQL / "legacy").glob("[0-9]*.sql"))}

#: The shapes of sql/legacy, oldest first; each is all its files up to and including its own.
SHAPES = list(_LEGACY)
#: The schema of sql/migrations, which the engine makes: it can be filled, not created, here.
CURRENT = "current"


def create(connection: Connection, shape: str) -> None:
    """Create the empty schema of a legacy shape."""
    for name in SHAPES[: SHAPES.index(shape) + 1]:
        connection.execute(_LEGACY[name].read_bytes())
