"""Private folders: gone afterwards, gone with the next run after a kill, and never somebody else's."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading

import pytest
from ansible_collections.settler.runbook.plugins.module_utils import _connection, _module, _private
from ansible_collections.settler.runbook.plugins.module_utils._private import private_folder, remove_abandoned

from tests.support import COLLECTIONS

PATTERN = ".ours-*.kind"
KILLED = """
import os, signal, tempfile
from pathlib import Path
from ansible_collections.settler.runbook.plugins.module_utils._connection import client_environment
tempfile.tempdir = {place!r}
options = {{"login_host": "h", "login_port": 1, "login_user": "u", "login_password": "s3cret", "ssl_mode": "prefer"}}
with client_environment(options) as environment:
    print(environment["PGPASSFILE"], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_folder_is_for_its_owner_only_and_gone_afterwards(tmp_path):
    with private_folder(tmp_path, PATTERN, "about-") as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder.name.startswith(".ours-about-")
        assert folder.name.endswith(".kind")
        (folder / "secret").touch()
    assert list(tmp_path.iterdir()) == []


def test_abandoned_ones_are_removed_by_the_next_and_no_others(tmp_path):
    for name in (".ours-dead.kind", ".ours-dead.other", "theirs.kind"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".ours-link.kind").symlink_to(tmp_path / "elsewhere")
    with private_folder(tmp_path, PATTERN) as first, private_folder(tmp_path, PATTERN) as second:
        assert first.exists()  # it is held
        left = {path.name for path in tmp_path.iterdir()} - {first.name, second.name}
    assert left == {".ours-dead.other", "theirs.kind", "elsewhere", ".ours-link.kind"}


def test_what_belongs_to_another_user_stays(tmp_path, monkeypatch):
    (tmp_path / ".ours-dead.kind").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    remove_abandoned(tmp_path, PATTERN)
    assert (tmp_path / ".ours-dead.kind").exists()


def test_folder_that_is_taken_for_abandoned_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    taken = []

    def make(**options):
        folder = mkdtemp(**options)
        if len(taken) < 3:
            taken.append(folder)
            remove_abandoned(tmp_path, PATTERN)
        return folder

    mkdtemp = _private.tempfile.mkdtemp
    monkeypatch.setattr(_private.tempfile, "mkdtemp", make)
    with private_folder(tmp_path, PATTERN) as folder:
        assert folder.exists()
        assert str(folder) not in taken
    assert len(taken) == 3


def test_password_of_a_killed_run_is_gone_with_the_next(tmp_path, monkeypatch):
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(place=str(tmp_path))],
        env={**os.environ, "PYTHONPATH": str(COLLECTIONS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.read_text(encoding="utf-8") for path in tmp_path.rglob("pgpass")] == ["*:*:*:*:s3cret\n"]
    monkeypatch.setattr(_private.tempfile, "tempdir", str(tmp_path))
    options = {"login_host": "h", "login_port": 1, "login_user": "u", "login_password": "other", "ssl_mode": "prefer"}
    with _connection.client_environment(options):
        assert [path.read_text(encoding="utf-8") for path in tmp_path.rglob("pgpass")] == ["*:*:*:*:other\n"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hours", [0.5, 2])
def test_progress_that_no_controller_has_removed_is_removed_when_it_is_old(tmp_path, hours):
    """A file without a writer may still be read by its controller, which looks every few seconds."""
    dead, held, other = (tmp_path / f"runbook-progress-{digit * 32}" for digit in "abz")
    for path in (dead, held, other):
        path.touch()
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as ours:
        _module.teller(stack, str(held))("a line")
        for path in (dead, held, other):
            then = path.stat().st_mtime - hours * 3600
            os.utime(path, (then, then))
        mine = tmp_path / f"runbook-progress-{'c' * 32}"
        _module.teller(ours, str(mine))("a line")
    assert {path for path in tmp_path.iterdir() if path != mine} == (
        {dead, held, other} if hours < 1 else {held, other}
    )
    assert mine.read_text(encoding="utf-8") == "a line\n"


def test_progress_that_cannot_be_written_does_not_end_a_run():
    with contextlib.ExitStack() as stack:
        _module.teller(stack, "/dev/full")("a line")


def test_lines_of_progress_that_threads_tell_at_once_stay_whole(tmp_path):
    path = tmp_path / f"runbook-progress-{'c' * 32}"
    with contextlib.ExitStack() as stack:
        say = _module.teller(stack, str(path))
        threads = [threading.Thread(target=lambda text=text: [say(text * 50) for _ in range(500)]) for text in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2000
    assert {len(line) for line in lines} == {50}
