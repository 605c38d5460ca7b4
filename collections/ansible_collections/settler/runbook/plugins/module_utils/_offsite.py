# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Copies off the host: whole or none, compared with the backup, kept by its rule, and fetched back as it was.

A copy is C(<place>/<database>/<run id>/) with the files of the backup and C(copy.json), which says who made it. That
is written first and the manifest last, so that without a manifest there is no copy; they are removed the other way
round. What has no C(copy.json) of this database, environment and server, or anything beside it, is never removed.
"""

from __future__ import annotations

import datetime as dt
import json
import typing as t
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils import _manifest
from ansible_collections.settler.runbook.plugins.module_utils._backup_folder import (
    half_made,
    make_private,
    only_one,
    remove_leftovers,
)
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._rclone import Place
from ansible_collections.settler.runbook.plugins.module_utils._retention import superfluous

MARK = "copy.json"

_LIKE = ("database", "environment", "system_identifier")
_ABANDONED = dt.timedelta(days=1)


@dataclass(frozen=True)
class Rule:
    """How copies are compared, and how many of them stay."""

    download: bool
    keep: int
    keep_days: float


@dataclass(frozen=True)
class Copy:
    """What came of one place; C(proven) are the run ids of copies that were given the proof of a drill."""

    place: str
    verified: str = ""
    sent: bool = False
    bytes: int = 0
    proven: tuple[str, ...] = ()
    pruned: tuple[str, ...] = ()
    error: str = ""


def copy_all(folder: Path, roots: t.Sequence[str], config: Path | None, rule: Rule, *, check: bool) -> list[Copy]:
    """Copy a backup to all places; one that fails does not keep the others from being tried.

    Raises:
        RunbookError: the backup itself is damaged.
    """
    manifest = _manifest.read_manifest(folder)
    _manifest.check_files(folder, manifest)
    copies = []
    for root in roots:
        try:
            copies.append(_copy(folder, manifest, Place.of(root, config), rule, check=check))
        except RunbookError as error:
            told = f"{error.message}\n  {error.hint}" if error.hint else error.message
            copies.append(Copy(root, error=told))
    return copies


def _copy(folder: Path, manifest: t.Mapping[str, t.Any], place: Place, rule: Rule, *, check: bool) -> Copy:
    """Copy a backup to one place, compare, and remove there what no rule keeps."""
    home, run_id = folder.parent.name, manifest["run_id"]
    sealed = (folder / _manifest.NAME).read_bytes()
    there = place.listing(home, run_id)
    if _manifest.NAME in there and place.read(home, run_id, _manifest.NAME) != sealed:
        raise RunbookError(
            f"{place.at(home, run_id)}: another backup lies there under this name; it was not touched",
            hint="Copy to another place, or move that one away.",
        )
    names = sorted(manifest["files"])
    size = sum(file["size"] for file in manifest["files"].values())
    sent = _manifest.NAME not in there
    if check:
        return Copy(place.root, sent=sent, bytes=size)
    if sent:
        mark = {key: manifest[key] for key in (*_LIKE, "run_id", "finished_at")}
        mark |= {"files": names, "copied_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds")}
        place.write(json.dumps(mark, indent=1).encode() + b"\n", home, run_id, MARK)
        place.send(folder, names, home, run_id)
    verified = place.compare(folder, names, home, run_id, download=rule.download)
    if sent:
        place.send(folder, [_manifest.NAME], home, run_id)
        if place.read(home, run_id, _manifest.NAME) != sealed:
            raise RunbookError(f"{place.at(home, run_id)}: the manifest there is not the one that was sent")
    if place.is_local:
        _flush(Path(place.at(home, run_id)))
    marks = [
        mark for mark in _marks(place, home) if all(mark[key] == manifest[key] for key in _LIKE) and not mark["foreign"]
    ]
    proven = [mark["run_id"] for mark in marks if mark["whole"] and _prove(place, folder.parent, mark)]
    return Copy(place.root, verified, sent, size, tuple(proven), tuple(_prune(place, home, marks, rule)))


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder, folder.parent):
        _manifest.sync(path)


def _prove(place: Place, backups: Path, mark: dict[str, t.Any]) -> bool:
    """Write into a copy's mark which proof it has; tell whether it was given a newer one, that of its backup here."""
    home, run_id = backups.name, mark["run_id"]
    local = backups / run_id / _manifest.PROOF
    here = local.read_bytes() if local.is_file() else b""
    there = place.read(home, run_id, _manifest.PROOF) if mark["proof"] else b""
    mark["proof"] = None
    if not (here or there):
        return False
    try:
        manifest = _manifest.manifest_in(place.read(home, run_id, _manifest.NAME), place.at(home, run_id))
    except RunbookError:  # damaged there, which no proof changes
        return False
    newer = _manifest.proof_in(here, manifest)
    mark["proof"] = newer or _manifest.proof_in(there, manifest)
    if newer is None or here == there:
        return False
    place.send(local.parent, [local.name], home, run_id)
    if place.is_local:
        _flush(Path(place.at(home, run_id)))
    return True


def _prune(place: Place, home: str, marks: t.Sequence[t.Mapping[str, t.Any]], rule: Rule) -> list[str]:
    """Remove copies that no rule keeps, and those that were begun and given up; return their places."""
    now = dt.datetime.now(dt.UTC)
    whole = [mark for mark in marks if mark["whole"]]
    gone = [*superfluous(whole, keep=rule.keep, keep_days=rule.keep_days, now=now)]
    gone += [
        mark for mark in marks if not mark["whole"] and now - dt.datetime.fromisoformat(mark["copied_at"]) > _ABANDONED
    ]
    for mark in gone:
        where = (home, mark["run_id"])
        for names in ([_manifest.NAME], [*mark["files"], _manifest.PROOF], [MARK]):
            place.remove(names, *where)
        place.remove_empty(*where)
    return [place.at(home, mark["run_id"]) for mark in gone]


def _marks(place: Place, home: str) -> list[dict[str, t.Any]]:
    """Return what the copies of a database say of themselves, newest first, with C(whole), C(proof) and C(foreign)."""
    there: dict[str, set[str]] = {}
    for path in place.listing(home):
        run_id, _slash, name = path.partition("/")
        there.setdefault(run_id, set()).add(name)
    marks = []
    for run_id, names in there.items():
        if MARK not in names:
            continue
        try:
            mark = json.loads(place.read(home, run_id, MARK))
            ours = {MARK, _manifest.NAME, _manifest.PROOF, *mark["files"]}
            if mark["run_id"] == run_id:
                facts = {
                    "whole": _manifest.NAME in names,
                    "proof": _manifest.PROOF in names,
                    "foreign": not names <= ours,
                }
                marks.append({**dict.fromkeys((*_LIKE, "finished_at", "copied_at"), ""), **mark, **facts})
        except (ValueError, KeyError, TypeError):  # half written, or somebody else's
            continue
    return sorted(marks, key=lambda mark: str(mark["finished_at"]), reverse=True)


@dataclass(frozen=True)
class Wanted:
    """Which copy to fetch, and where to."""

    database: str
    environment: str
    run_id: str
    directory: Path


def find_copy(place: Place, wanted: Wanted) -> str:
    """Return the run id of the copy that is wanted: the one that is named, or the newest of its environment.

    Raises:
        RunbookError: there is none that is whole; names those that are there.
    """
    home = _manifest.home_of(wanted.directory, wanted.database).name
    whole = [mark for mark in _marks(place, home) if mark["whole"]]
    fitting = [
        mark["run_id"]
        for mark in whole
        if (mark["run_id"] == wanted.run_id if wanted.run_id else mark["environment"] == wanted.environment)
    ]
    if not fitting:
        there = ", ".join(f"{mark['run_id']} ({mark['environment']})" for mark in whole) or "none"
        raise RunbookError(
            f"{place.at(home)}: no whole copy {wanted.run_id or 'of environment ' + wanted.environment}; "
            f"nothing was fetched. Whole ones: {there}"
        )
    return str(fitting[0])


def fetch(place: Place, wanted: Wanted, run_id: str) -> bool:
    """Fetch a copy into the folder of backups, where it is a backup like any other; tell whether it was not there.

    Raises:
        RunbookError: what came is not what the manifest says. Then nothing appears under the backup's name.
    """
    home = _manifest.home_of(wanted.directory, wanted.database)
    final = home / run_id
    make_private(wanted.directory)
    make_private(home)
    with only_one(home) as lock:
        remove_leftovers(home, lock)
        if final.exists():
            _manifest.check_files(final, _manifest.read_manifest(final))
            return False
        partial = home / f".{run_id}.partial"
        with half_made(partial, lock):  # what does not become whole is tidied by the next run
            place.receive([_manifest.NAME], partial, home.name, run_id)
            manifest = _manifest.read_manifest(partial)
            beside = {_manifest.PROOF} & place.listing(home.name, run_id).keys()
            place.receive(sorted({*manifest["files"], *beside}), partial, home.name, run_id)
            _manifest.check_files(partial, manifest)
            _flush(partial)
        partial.rename(final)
        _manifest.sync(home)
    return True
