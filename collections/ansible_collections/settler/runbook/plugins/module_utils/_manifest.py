# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The manifest of a backup: what was in the database, and the checksum of every file. Only this proves a dump.

A backup is a folder C(<directory>/<database>/<run id>/) with C(manifest.json), C(catalogue.json) and C(dump/).
"""

from __future__ import annotations

import hashlib
import json
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import Fingerprint, from_data

if t.TYPE_CHECKING:
    from pathlib import Path

FORMAT = 1
NAME = "manifest.json"
#: Keys and hashes of some rows of each table, to trace differences.
KEYS = "keys.json.gz"


def file_digests(folder: Path) -> dict[str, dict[str, t.Any]]:
    """Return size and SHA-256 of every file below a folder, by relative name; the manifest itself is left out."""
    return {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / NAME
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(content: t.Mapping[str, t.Any]) -> str:
    """Return the manifest's text, with a checksum of itself."""
    return json.dumps({**content, "manifest_sha256": _self_digest(content)}, indent=2, ensure_ascii=False) + "\n"


def _self_digest(content: t.Mapping[str, t.Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, t.Any]:
    """Read a manifest and check it against its own checksum.

    Raises:
        RunbookError: there is none, or it is not what was written.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sealed = content.pop("manifest_sha256")
    except FileNotFoundError:
        raise RunbookError(
            f"{folder}: no backup: {NAME} is missing", hint="playbooks/status.yml lists the backups."
        ) from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise RunbookError(f"{path}: damaged: {error}", hint="Use another backup.") from error
    if sealed != _self_digest(content):
        raise RunbookError(f"{path}: damaged: its checksum does not fit", hint="Use another backup.")
    if content.get("format") != FORMAT:
        raise RunbookError(f"{path}: format {content.get('format')}, this version reads {FORMAT}")
    return t.cast("dict[str, t.Any]", content)


def check_files(folder: Path, manifest: t.Mapping[str, t.Any]) -> None:
    """Compare every file with the manifest.

    Raises:
        RunbookError: a file is missing, is one too many, or is not what was written; all are named.
    """
    wanted, found = manifest["files"], file_digests(folder)
    problems = [f"{name}: missing" for name in wanted if name not in found]
    problems += [f"{name}: not in the manifest" for name in found if name not in wanted]
    for name, facts in wanted.items():
        have = found.get(name)
        if have and have["size"] != facts["size"]:
            problems.append(f"{name}: {have['size']} bytes, the manifest says {facts['size']}")
        elif have and have["sha256"] != facts["sha256"]:
            problems.append(f"{name}: checksum does not fit")
    if problems:
        raise RunbookError(
            f"{folder}: the backup is damaged; nothing was touched\n" + "\n".join(f"  {line}" for line in problems),
            hint="Use another backup: playbooks/status.yml lists them.",
            problems=problems,
        )


def home_of(directory: Path, database: str) -> Path:
    """Return the folder of a database's backups; a name that is no folder's is written so that it stays inside."""
    name = database.replace("/", "%2F")
    return directory / (f"%2E{name[1:]}" if name.startswith(".") else name)


def read_fingerprints(folder: Path) -> dict[str, Fingerprint]:
    """Return what the data was when the backup was made, keys of rows included.

    Raises:
        RunbookError: there is no whole backup.
    """
    manifest, keys = read_manifest(folder), folder / KEYS
    if "fingerprints" not in manifest:
        raise RunbookError(f"{folder}: made by an older version, without fingerprints of the data")
    return from_data(manifest["fingerprints"], keys.read_bytes() if keys.exists() else None)


def list_backups(directory: Path, database: str) -> list[dict[str, t.Any]]:
    """Return the manifests of a database's backups, newest first, each with its C(path); damaged ones with C(error)."""
    rows = []
    folder = home_of(directory, database)
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_dir() or path.name.startswith("."):
            continue
        try:
            rows.append({**read_manifest(path), "path": str(path), "error": ""})
        except RunbookError as error:
            rows.append({"path": str(path), "run_id": path.name, "finished_at": "", "error": error.message})
    return sorted(rows, key=lambda row: str(row["finished_at"]), reverse=True)
