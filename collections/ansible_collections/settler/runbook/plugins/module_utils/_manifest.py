# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The manifest of a backup: what was in the database, and the checksum of every file. Only this proves a dump.

A backup is a folder C(<directory>/<database>/<run id>/) with C(manifest.json), C(catalogue.json) and C(dump/).
A restore drill that has succeeded writes C(proven.json) beside them.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import typing as t
from concurrent.futures import ThreadPoolExecutor

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError

if t.TYPE_CHECKING:
    from pathlib import Path

FORMAT = 2
READABLE = (1, 2)
NAME = "manifest.json"
PROOF = "proven.json"
#: Keys and hashes of some rows of each table, to trace differences.
KEYS = "keys.json.gz"
#: What C(method) says where the data is not beside the manifest, but in pgBackRest's repository.
PGBACKREST = "pgbackrest"
#: What lies in a backup without being in its manifest.
BESIDE = frozenset({NAME, PROOF, f".{PROOF}.partial"})


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size of every file of a backup, by relative name; what is no part of the manifest is left out."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and str(path.relative_to(folder)) not in BESIDE
    }


def file_digests(folder: Path) -> dict[str, dict[str, t.Any]]:
    """Return size and SHA-256 of every file of a backup, by relative name; a file for each core at a time."""
    sizes = file_sizes(folder)
    return {name: {"size": sizes[name], "sha256": digest} for name, digest in _digests(folder, sizes).items()}


def _digests(folder: Path, names: t.Iterable[str]) -> dict[str, str]:
    names = list(names)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(names, pool.map(_sha256, [folder / name for name in names]), strict=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(content: t.Mapping[str, t.Any]) -> str:
    """Return the manifest's text, with a checksum of itself."""
    return _sealed(content, "manifest_sha256")


def _sealed(content: t.Mapping[str, t.Any], key: str) -> str:
    return json.dumps({**content, key: _self_digest(content)}, indent=2, ensure_ascii=False) + "\n"


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
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunbookError(
            f"{folder}: no backup: {NAME} is missing", hint="playbooks/status.yml lists the backups."
        ) from None
    except (OSError, ValueError) as error:
        raise RunbookError(f"{path}: damaged: {error}", hint="Use another backup.") from error
    return manifest_in(text, str(path))


def manifest_in(text: str | bytes, where: str) -> dict[str, t.Any]:
    """Return the manifest that a file has, checked against its own checksum.

    Raises:
        RunbookError: it is not what was written; begins with C(where).
    """
    try:
        content = json.loads(text)
        sealed = content.pop("manifest_sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RunbookError(f"{where}: damaged: {error}", hint="Use another backup.") from error
    if sealed != _self_digest(content):
        raise RunbookError(f"{where}: damaged: its checksum does not fit", hint="Use another backup.")
    if content.get("format") not in READABLE:
        raise RunbookError(
            f"{where}: format {content.get('format')}, this version reads {' and '.join(map(str, READABLE))}",
            hint="Restore it with the version of the runbook that made it.",
        )
    return t.cast("dict[str, t.Any]", content)


def check_files(folder: Path, manifest: t.Mapping[str, t.Any], *, checksums: bool = True) -> None:
    """Compare every file with the manifest.

    Args:
        folder: the backup.
        manifest: what M(read_manifest) has read.
        checksums: whether the files are read; without, names and sizes are compared, which costs nothing.

    Raises:
        RunbookError: a file is missing, is one too many, or is not what was written; all are named.
    """
    wanted = manifest["files"]
    found = file_sizes(folder)
    problems = [f"{name}: missing" for name in wanted if name not in found]
    problems += [f"{name}: not in the manifest" for name in found if name not in wanted]
    problems += [
        f"{name}: {found[name]} bytes, the manifest says {facts['size']}"
        for name, facts in wanted.items()
        if name in found and found[name] != facts["size"]
    ]
    if checksums:
        digests = _digests(folder, (name for name, facts in wanted.items() if found.get(name) == facts["size"]))
        problems += [
            f"{name}: checksum does not fit" for name, digest in digests.items() if digest != wanted[name]["sha256"]
        ]
    if problems:
        raise RunbookError(
            f"{folder}: the backup is damaged; nothing was touched\n" + "\n".join(f"  {line}" for line in problems),
            hint="Use another backup: playbooks/status.yml lists them.",
            problems=problems,
        )


def write_proof(folder: Path, facts: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """Write beside a backup that it was restored and found whole; return what was written.

    The proof is bound to this very manifest and sealed as it is. A proof of an earlier drill is replaced.

    Args:
        folder: the backup.
        facts: what the drill has seen, at least C(counts_match) and C(minutes). C(manifest_sha256) and C(at) are added.

    Raises:
        RunbookError: there is no backup, or its manifest is damaged.
    """
    content = {
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        **facts,
        "manifest_sha256": _self_digest(read_manifest(folder)),
    }
    write_durably(folder / PROOF, _sealed(content, "proof_sha256"))
    return content


def read_proof(folder: Path) -> dict[str, t.Any] | None:
    """Return what the last restore drill wrote beside a backup; None if the backup is not proven.

    It is not where the file is missing, damaged or of another manifest, or does not say that the counts matched.

    Raises:
        RunbookError: there is no backup, or its manifest is damaged.
    """
    return _proof_of(folder, read_manifest(folder))


def _proof_of(folder: Path, manifest: t.Mapping[str, t.Any]) -> dict[str, t.Any] | None:
    try:
        return proof_in((folder / PROOF).read_bytes(), manifest)
    except OSError:
        return None


def proof_in(text: bytes, manifest: t.Mapping[str, t.Any]) -> dict[str, t.Any] | None:
    """Return the proof that a file has; None if it is damaged, of another manifest, or proves nothing."""
    try:
        content = json.loads(text)
        sealed = content.pop("proof_sha256")
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    whole = sealed == _self_digest(content) and content.get("manifest_sha256") == _self_digest(manifest)
    return content if whole and content.get("counts_match") is True else None


def write_durably(path: Path, text: str) -> None:
    """Write a file of the owner's that is there whole or not at all, also after the power has failed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def home_of(directory: Path, database: str) -> Path:
    """Return the folder of a database's backups; a name that is no folder's is written so that it stays inside."""
    name = database.replace("/", "%2F")
    return directory / (f"%2E{name[1:]}" if name.startswith(".") else name)


def used_run_id(run_id: str, what: str) -> RunbookError:
    """Return the error of a change whose run id has been used: what an earlier run made lacks all that came since."""
    return RunbookError(
        f"the run id {run_id} has been used before: there is {what}; nothing was changed",
        hint="Leave runbook_run_id out, or give another one: a change goes back only to what its own window has made.",
    )


def earlier(final: Path, *, fresh: bool) -> dict[str, t.Any] | None:
    """Return what a backup returns of a run that has one already, None if it has none; C(fresh) refuses it."""
    if not final.exists():
        return None
    if fresh:
        raise used_run_id(final.name, f"a backup in {final}")
    return {**read_manifest(final), "path": str(final), "pruned": []}


def list_backups(directory: Path, database: str, *, checksums: bool = False) -> list[dict[str, t.Any]]:
    """Return the manifests of a database's backups, newest first, each with C(path), C(proof) and C(error).

    C(error) says what is damaged: the manifest, a file's name or size, with C(checksums) also what is in a file.
    """
    rows: list[dict[str, t.Any]] = []
    folder = home_of(directory, database)
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_dir() or path.name.startswith("."):
            continue
        row: dict[str, t.Any] = {"run_id": path.name, "finished_at": "", "proof": None, "error": ""}
        try:
            manifest = read_manifest(path)
            row |= {**manifest, "proof": _proof_of(path, manifest)}
            check_files(path, manifest, checksums=checksums)
        except RunbookError as error:
            row["error"] = error.message
        rows.append({**row, "path": str(path)})
    return sorted(rows, key=lambda row: (not row["error"], str(row["finished_at"])), reverse=True)
