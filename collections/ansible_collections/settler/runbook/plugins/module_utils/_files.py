# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Migration files: names, bytes, checksums, order. Nothing here knows a database."""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import typing as t
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils._directives import Directives, read_directives
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError

#: How a checksum was made; stored with each ledger row, so that it can change one day without a lie.
CHECKSUM_ALGORITHM = "sha256-lf"

VERSIONED = "versioned"
REPEATABLE = "repeatable"
BATCH = "batch"

_NAME = re.compile(
    r"(?:(?P<version>[0-9]{3,})_(?P<name>[a-z0-9_]+?)(?P<batch>\.batch)?|R__(?P<repeatable>[a-z0-9_]+))"
    r"(?P<verify>\.verify)?\.sql"
)
_BOM = "\ufeff"
_VERIFY = ".verify.sql"


@dataclass(frozen=True)
class MigrationFile:
    """One migration: C(version) keeps its zeros, C(text) has LF line ends and no byte order mark.

    C(kind) is V(versioned), V(batch) or V(repeatable), which has no version. C(folder) is the optional folder that
    it lies in, with a sequence of its own. C(verify) is its C(.verify.sql), if it has one.
    """

    version: str
    name: str
    path: Path
    text: str
    checksum: str
    kind: str = VERSIONED
    folder: str = ""
    verify: MigrationFile | None = None

    @functools.cached_property
    def file(self) -> str:
        """The file's name, which identifies it in the ledger."""
        return f"{self.folder}/{self.path.name}" if self.folder else self.path.name

    @property
    def order(self) -> int:
        """Position in the sequence: C(9) comes before C(10), whatever the zeros."""
        return int(self.version) if self.version else -1

    @functools.cached_property
    def directives(self) -> Directives:
        """What the file says of itself."""
        return read_directives(self.text, self.path)


def read_migrations(directory: str | Path, optional: t.Sequence[str] = ()) -> list[MigrationFile]:
    """Read all migrations: the versioned ones of the folder, those of each optional folder, the repeatable ones.

    Args:
        directory: folder of the migrations.
        optional: names of folders in C(../optional) that are switched on, in order.

    Raises:
        RunbookError: no folder, a name that is none of a migration, a version twice, bytes that are not UTF-8 text,
            a C(.verify.sql) without its migration.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise RunbookError(f"{folder}: no such folder of migrations", hint="Set migrate_directory.")
    found = _read_folder(folder, "")
    for name in optional:
        place = folder.parent / "optional" / name
        if not re.fullmatch(r"[a-z0-9_]+", name) or not place.is_dir():
            known = sorted(path.name for path in place.parent.glob("*") if path.is_dir())
            raise RunbookError(
                f"{place}: no such optional folder",
                hint=f"migrate_optional names folders of {place.parent}: {', '.join(known) or 'there are none'}.",
            )
        found += _read_folder(place, name)
    # sorted() is stable: repeatable files follow, in the order of their names
    return sorted(found, key=lambda file: file.kind == REPEATABLE)


def _read_folder(folder: Path, optional: str) -> list[MigrationFile]:
    """Read one folder, in order, each file with its C(.verify.sql)."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ".sql")
    checks = {name for name in names if name.endswith(_VERIFY)}
    files = []
    for name in (name for name in names if not name.endswith(_VERIFY)):
        check = name.removesuffix(".sql") + _VERIFY
        verify = read_migration(folder / check) if check in checks else None
        files.append(read_migration(folder / name, optional, verify))
        checks.discard(check)
    files.sort(key=lambda file: file.order)  # stable: of one version, the names decide
    for earlier, later in itertools.pairwise(file for file in files if file.version):
        if earlier.order == later.order:
            raise RunbookError(
                f"{later.path}: version {later.version} is taken by {earlier.file}",
                hint="Two branches have used one number: rename the file that is applied nowhere yet.",
            )
    for orphan in sorted(checks):
        raise RunbookError(
            f"{folder / orphan}: there is no {orphan.removesuffix(_VERIFY)}.sql that it could verify",
            hint="It runs after the migration of the same name.",
        )
    return files


def read_migration(path: Path, optional: str = "", verify: MigrationFile | None = None) -> MigrationFile:
    """Read one file, of an C(optional) folder or of none; the errors are those of M(read_migrations)."""
    match = _NAME.fullmatch(path.name)
    if not match:
        raise RunbookError(
            f"{path}: not a migration's name",
            hint="Write NNN_name.sql: three or more digits, an underscore, then a-z, 0-9 and underscores; "
            "or R__name.sql, NNN_name.batch.sql, NNN_name.verify.sql.",
        )
    kind = REPEATABLE if match["repeatable"] else BATCH if match["batch"] else VERSIONED
    text = decode(path.read_bytes(), path)
    return MigrationFile(
        match["version"] or "",
        match["name"] or match["repeatable"],
        path,
        text,
        checksum(text),
        kind,
        optional,
        verify,
    )


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
