"""Retention: what one rule keeps stays, and the last one that was proven; and the room that a backup will need."""

from __future__ import annotations

import datetime as dt
import shutil

import pytest
from ansible_collections.settler.runbook.plugins.module_utils import _manifest, _space
from ansible_collections.settler.runbook.plugins.module_utils._retention import superfluous

from tests.support import refused

NOW = dt.datetime(2026, 6, 30, tzinfo=dt.UTC)


def backups(*ages, proven=()):
    return [
        {
            "finished_at": (NOW - dt.timedelta(days=age)).isoformat(),
            "age": age,
            "proof": {"at": "2026"} if age in proven else None,
        }
        for age in ages
    ]


@pytest.mark.parametrize(
    ("keep", "days", "proven", "gone"),
    [
        (0, 0, (), []),
        (2, 0, (), [2, 9, 40]),
        (1, 0, (9, 40), [1, 2, 40]),
        (1, 0, (0,), [1, 2, 9, 40]),
        (0, 3, (), [9, 40]),
        (0, 0.5, (), [1, 2, 9, 40]),
        (4, 3, (), [40]),
        (1, 3, (40,), [9]),
        (9, 0, (), []),
    ],
)
def test_only_what_no_rule_keeps_goes(keep, days, proven, gone):
    rows = backups(0, 1, 2, 9, 40, proven=proven)
    assert [row["age"] for row in superfluous(rows, keep=keep, keep_days=days, now=NOW)] == gone


def test_newest_stays_however_old_it_is():
    assert superfluous(backups(50), keep=0, keep_days=3, now=NOW) == []


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A folder on a disk with 100 MB free."""
    monkeypatch.setattr(_space.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(2**30, 2**30, 100 * 2**20))
    return tmp_path


def keep_one(directory, **changes):
    folder = directory / "settler" / "r1"
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format": 2, "run_id": "r1", "environment": "test", "compression": "zstd:1", "finished_at": "2026", "files": {},
        "size": 1000, "bytes": 300, **changes,
    }  # fmt: skip
    (folder / _manifest.NAME).write_text(_manifest.seal(content), encoding="utf-8")


def test_first_backup_is_expected_to_be_as_large_as_the_database(directory):
    _space.check_space(directory / "not-yet", "settler", 100 * 2**20, environment="test", compression="zstd:1")
    error = refused(_space.check_space, directory, "settler", 100 * 2**20 + 1, environment="test", compression="zstd:1")
    assert (
        "100 MB free, the backup may need 101 MB (the database has 100 MB, and there is no backup yet" in error.message
    )
    assert "runbook_backup_directory" in error.hint


def test_later_ones_are_expected_as_the_last_one_was_and_a_quarter_more(directory):
    keep_one(directory)
    _space.check_space(directory, "settler", 266 * 2**20, environment="test", compression="zstd:1")
    error = refused(_space.check_space, directory, "settler", 268 * 2**20, environment="test", compression="zstd:1")
    assert "may need 101 MB (the database has 268 MB, as run r1 lets expect)" in error.message


@pytest.mark.parametrize(
    "changes", [{"environment": "prod"}, {"compression": "none"}, {"files": {"gone": {"size": 1}}}]
)
def test_nothing_is_learned_from_another_environment_compression_or_a_damaged_one(directory, changes):
    keep_one(directory, **changes)
    assert (
        "no backup yet"
        in refused(
            _space.check_space, directory, "settler", 268 * 2**20, environment="test", compression="zstd:1"
        ).message
    )
