"""The folder of backups: whose paths are refused, who holds its lock, what is left of the dead."""

from __future__ import annotations

import os

import pytest
from ansible_collections.settler.runbook.plugins.module_utils import _backup_folder
from ansible_collections.settler.runbook.plugins.module_utils._backup_folder import (
    check_private,
    half_made,
    make_private,
    only_one,
    remove_leftovers,
)
from ansible_collections.settler.runbook.plugins.module_utils._programs import end_program, start_program

from tests.support import refused


def test_missing_folders_are_made_for_their_owner_only_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        make_private(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [oct((tmp_path / name).stat().st_mode & 0o7777) for name in ("a", "a/b")] == ["0o700", "0o700"]


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o702, 0o1777])
def test_folder_that_others_can_write_to_is_refused(tmp_path, mode):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    error = refused(check_private, tmp_path / "open")
    assert f"{tmp_path}/open: it can be written by others (mode {mode:04o}); nothing was written" in error.message
    assert "runbook_backup_directory" in error.hint


def test_on_the_way_everybody_may_write_only_where_each_moves_only_his_own(tmp_path):
    (tmp_path / "open" / "mine").mkdir(parents=True, mode=0o700)
    (tmp_path / "open").chmod(0o777)
    assert (
        f"{tmp_path}/open on its path can be written by others"
        in refused(check_private, tmp_path / "open" / "mine").message
    )
    (tmp_path / "open").chmod(0o1777)
    check_private(tmp_path / "open" / "mine")
    check_private(tmp_path / "open" / "not-yet")


def test_group_may_write_only_if_it_is_that_of_one_user(tmp_path, monkeypatch):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours").chmod(0o770)
    status = (tmp_path / "ours").stat()
    owner = _backup_folder.pwd.getpwuid(status.st_uid)
    real = _backup_folder.grp.getgrgid(owner.pw_gid)

    def members(name, *others):
        group = type(real)((name, "x", status.st_gid, list(others)))
        monkeypatch.setattr(_backup_folder.grp, "getgrgid", lambda _gid: group)

    members(owner.pw_name)
    check_private(tmp_path / "ours")
    members(owner.pw_name, "somebody")
    assert "can be written by others" in refused(check_private, tmp_path / "ours").message
    members("staff")
    assert "can be written by others" in refused(check_private, tmp_path / "ours").message


def test_symbolic_link_anywhere_in_the_path_is_refused_and_told(tmp_path):
    (tmp_path / "real" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for path in (tmp_path / "link", tmp_path / "link" / "below", tmp_path / "link" / "missing", tmp_path / "x/../link"):
        message = refused(check_private, path).message
        assert f"is a symbolic link (to {tmp_path}/real)" in message
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "symbolic link" in refused(make_private, tmp_path / "dangling").message
    assert not (tmp_path / "nowhere").exists()


def test_folder_of_another_user_and_a_file_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert "is no folder" in refused(check_private, tmp_path / "file").message
    real = os.stat_result
    monkeypatch.setattr(
        _backup_folder.Path,
        "lstat",
        lambda path: real((0o40755, 0, 0, 1, 4242 if path == tmp_path else 0, 0, 0, 0, 0, 0)),
    )
    assert "belongs to another user (uid 4242)" in refused(check_private, tmp_path / "below").message


def test_folder_that_cannot_be_written_is_told_by_its_last_part_that_exists(tmp_path, monkeypatch):
    monkeypatch.setattr(_backup_folder.os, "access", lambda path, _how: path != tmp_path)
    assert f"{tmp_path} on its path is not writable" in refused(check_private, tmp_path / "a" / "b").message


def test_lock_is_held_by_one_at_a_time(tmp_path):
    with only_one(tmp_path):
        assert "another backup is being written" in refused(only_one(tmp_path).__enter__).message
    with only_one(tmp_path):
        pass


def test_what_the_dead_left_is_removed_and_whole_backups_stay(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / ".a.partial" / "dump").mkdir(parents=True)
    (tmp_path / ".b.partial").mkdir()
    with only_one(tmp_path) as lock:
        remove_leftovers(tmp_path, lock)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "whole"]


def test_program_that_works_on_for_nobody_is_ended_by_its_group(tmp_path):
    with only_one(tmp_path) as lock, half_made(tmp_path / ".a.partial", lock) as place:
        orphan = start_program(["/bin/sh", "-c", "sleep 60 & wait"], {}, inherits=[place.descriptor])
        place.note_group(orphan.pid)
    with only_one(tmp_path) as lock:
        remove_leftovers(tmp_path, lock)
    assert orphan.wait(5) == -9
    assert not list(tmp_path.glob(".*.partial"))


def test_program_whose_group_was_never_noted_is_not_guessed(tmp_path, monkeypatch):
    monkeypatch.setattr(_backup_folder, "_PATIENCE_S", 0.1)
    with only_one(tmp_path) as lock, half_made(tmp_path / ".a.partial", lock) as place:
        orphan = start_program(["/bin/sleep", "60"], {}, inherits=[place.descriptor])
    try:
        with only_one(tmp_path) as lock:
            error = refused(remove_leftovers, tmp_path, lock)
        assert "still writes (process group unknown)" in error.message
        assert orphan.poll() is None
        assert (tmp_path / ".a.partial").is_dir()
    finally:
        end_program(orphan)
