# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Migration files: names, bytes, checksums. Nothing here knows a database."""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError

#: How a checksum was made; stored with each ledger row, so that it can change one day without a lie.
CHECKSUM_ALGORITHM = "sha256-lf"

_NAME = re.compile(r"(?P<version>[0-9]{3,})_(?P<name>[a-z0-9_]+)\.sql")
_BOM = "\ufeff"


@dataclass(frozen=True)
class MigrationFile:
    """One C(NNN_name.sql): C(version) keeps its zeros, C(text) has LF line ends and no byte order mark."""

    version: str
    name: str
    path: Path
    text: str
    checksum: str

    @property
    def file(self) -> str:
        """The file's name, which identifies it in the ledger."""
        return self.path.name

    @property
    def order(self) -> int:
        """Position in the sequence: C(9) comes before C(10), whatever the zeros."""
        return int(self.version)


def read_migrations(directory: str | Path) -> list[MigrationFile]:
    """Read all migrations of a folder, in order.

    Raises:
        RunbookError: no folder, a name that is no C(NNN_name.sql), a version twice, bytes that are not UTF-8 text.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise RunbookError(f"{folder}: no such folder of migrations", hint="Set migrate_directory.")
    files = sorted(
        (read_migration(path) for path in sorted(folder.iterdir()) if path.suffix.lower() == ".sql"),
        key=lambda file: file.order,
    )
    for earlier, later in itertools.pairwise(files):
        if earlier.order == later.order:
            raise RunbookError(
                f"{later.path}: version {later.version} is taken by {earlier.file}",
                hint="Two branches have used one number: rename the file that is applied nowhere yet.",
            )
    return files


def read_migration(path: Path) -> MigrationFile:
    """Read one migration; the errors are those of M(read_migrations)."""
    match = _NAME.fullmatch(path.name)
    if not match:
        raise RunbookError(
            f"{path}: not a migration's name",
            hint="Write NNN_name.sql: three or more digits, an underscore, then a-z, 0-9 and underscores.",
        )
    text = decode(path.read_bytes(), path)
    return MigrationFile(match["version"], match["name"], path, text, checksum(text))


def decode(content: bytes, path: Path) -> str:
    """Return a file's text with LF line ends and without a byte order mark.

    A NUL byte is refused because libpq would send what stands before it and report success.
    """
    nul = content.find(b"\0")
    if nul >= 0:
        raise RunbookError(
            f"{path}:{line_at(content, nul)}: NUL byte",
            hint="PostgreSQL would silently stop reading there: remove it.",
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RunbookError(
            f"{path}:{line_at(content, error.start)}: not UTF-8 ({error.reason})",
            hint="Save the file as UTF-8.",
        ) from error
    return text.removeprefix(_BOM).replace("\r\n", "\n").replace("\r", "\n")


def checksum(text: str) -> str:
    """Return the SHA-256 of a normalised text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def line_at(text: str | bytes, offset: int) -> int:
    """Return the line, from 1, of an offset."""
    before = text[:offset]
    return (before.count(b"\n") if isinstance(before, bytes) else before.count("\n")) + 1
