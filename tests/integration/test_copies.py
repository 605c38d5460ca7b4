"""Copies off the host by the real rclone: to a second folder, and to an S3 server on 127.0.0.1."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import requests
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._manifest import (
    FORMAT,
    file_digests,
    read_proof,
    seal,
    write_proof,
)
from ansible_collections.settler.runbook.plugins.module_utils._rclone import Place
from ansible_collections.settler.runbook.plugins.modules import backup_copy, backup_fetch
from moto.server import ThreadedMotoServer

from tests.support import MODULES, refused, run_module, run_on_small_disk
from tools import apt

if TYPE_CHECKING:
    from collections.abc import Iterator

on_s3 = pytest.mark.parametrize("target", ["s3"], indirect=True)

SECRET = "the-secret-access-key-of-S3"
DATABASE = "settler"


@dataclass(frozen=True)
class Target:
    """A place for copies as a test sees it: C(root) as rclone names it, and how to look into it and to harm it."""

    root: str
    config: str | None
    url: str = ""

    def listing(self) -> dict[str, int]:
        return Place.of(self.root, Path(self.config) if self.config else None).listing()

    def read(self, name: str) -> bytes:
        return self._ask("GET", name).content if self.url else Path(self.root, name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        if self.url:
            self._ask("PUT", name, content)
        else:
            path = Path(self.root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def delete(self, name: str) -> None:
        if self.url:
            self._ask("DELETE", name)
        else:
            Path(self.root, name).unlink()

    def _ask(self, method: str, name: str, content: bytes | None = None) -> requests.Response:
        signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=AKIA/20260101/us-east-1/s3/aws4_request"}
        answer = requests.request(method, f"{self.url}/{name}", data=content, headers=signed, timeout=60)
        answer.raise_for_status()
        return answer


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Yield the address of an S3 server; rclone is Debian's."""
    if shutil.which("rclone") is None:
        assert apt.usable(), "rclone is missing, and only root can install it: apt-get install rclone"
        apt.install("rclone")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


@pytest.fixture
def config(s3, tmp_path) -> str:
    path = tmp_path / "rclone.conf"
    path.touch(mode=0o600)
    path.write_text(
        "[offsite]\ntype = s3\nprovider = Other\naccess_key_id = AKIA\n"
        f"secret_access_key = {SECRET}\nendpoint = {s3}\nforce_path_style = true\n"
        f"[nowhere]\ntype = s3\nprovider = Other\naccess_key_id = AKIA\nsecret_access_key = {SECRET}\n"
        "endpoint = http://127.0.0.1:9\n",
        encoding="utf-8",
    )
    return str(path)


@pytest.fixture(params=["folder", "s3"])
def target(request, s3, config, tmp_path) -> Target:
    if request.param == "folder":
        (tmp_path / "second").mkdir()
        return Target(str(tmp_path / "second"), None)
    bucket = f"bucket-{time.monotonic_ns()}"
    requests.put(f"{s3}/{bucket}", timeout=60).raise_for_status()
    return Target(f"offsite:{bucket}/pre fix", config, f"{s3}/{bucket}/pre fix")


@pytest.fixture
def make(tmp_path):
    """Make a whole backup without a server; return its folder."""

    def backup(run_id: str, day: int = 1, **changes: Any) -> Path:
        folder = tmp_path / "backups" / DATABASE / run_id
        (folder / "dump").mkdir(parents=True)
        for name, content in {
            "dump/toc.dat": b"toc",
            "dump/1 ü.dat.gz": os.urandom(9000),
            "catalogue.json": b"{}",
        }.items():
            (folder / name).write_bytes(content)
        facts = {"database": DATABASE, "environment": "test", "system_identifier": "7", "run_id": run_id}
        content = {"format": FORMAT, "finished_at": f"2026-01-{day:02d}T00:00:00+00:00", **facts, **changes}
        (folder / "manifest.json").write_text(seal({**content, "files": file_digests(folder)}), encoding="utf-8")
        return folder

    return backup


def work(module: Any, arguments: dict[str, Any], *, check: bool) -> dict[str, Any]:
    """Do a module's work in this process, with its defaults."""
    warnings: list[str] = []
    params = {name: option.get("default") for name, option in module.ARGUMENTS.items()} | arguments
    try:
        done = module.work(SimpleNamespace(params=params, check_mode=check, warn=warnings.append))
    except RunbookError as error:
        return {"failed": True, **error.as_result()}
    return {**done, "warnings": warnings}


def copy(folder: Path, *targets: Target, check: bool = False, how: Any = work, **changes: Any) -> dict[str, Any]:
    config = next((target.config for target in targets if target.config), None)
    arguments = {"src": str(folder), "places": [target.root for target in targets], "rclone_config": config, **changes}
    return how(backup_copy, arguments, check=check)


def fetch(target: Target, directory: Path, *, check: bool = False, how: Any = work, **changes: Any) -> dict[str, Any]:
    arguments = {"place": target.root, "database": DATABASE, "environment": "test", "directory": str(directory)}
    return how(backup_fetch, arguments | {"rclone_config": target.config} | changes, check=check)


def process(module: Any, arguments: dict[str, Any], *, check: bool) -> dict[str, Any]:
    """Run a module as Ansible does."""
    given = {name: value for name, value in arguments.items() if value is not None}
    return run_module(module.__name__.rpartition(".")[2], given, check=check)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_four_runs(make, target):
    folder = make("b1")
    assert copy(folder, target, check=True)["changed"] is True
    assert target.listing() == {}
    done = copy(folder, target)
    assert (done["changed"], done["copies"][0]["error"], done["copies"][0]["verified"]) == (True, "", "checksum"), done
    there = target.listing()
    assert set(there) == {f"{DATABASE}/b1/{name}" for name in (*contents(folder), "copy.json")}
    for name, content in contents(folder).items():
        assert target.read(f"{DATABASE}/b1/{name}") == content
    assert copy(folder, target, check=True)["changed"] is False
    again = copy(folder, target, verify="download")
    assert (again["changed"], again["copies"][0]["verified"]) == (False, "download")
    assert target.listing() == there


def test_copies_in_a_folder_are_for_their_owner_only(make, tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    copy(make("b1"), Target(str(second), None))
    for path in second.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_copy_that_is_damaged_there_is_told_and_nothing_is_mended_silently(make, target):
    folder = make("b1")
    copy(folder, target)
    name = f"{DATABASE}/b1/dump/1 ü.dat.gz"
    bad = bytearray(target.read(name))
    bad[5] ^= 1
    target.write(name, bytes(bad))
    failed = copy(folder, target)
    assert failed["failed"]
    assert "1 ü.dat.gz" in failed["msg"]
    assert "the backup itself is whole" in failed["msg"]
    assert target.read(name) == bytes(bad)


def test_without_a_manifest_there_is_no_copy_and_the_next_run_completes_it(make, target, tmp_path):
    folder = make("b1")
    copy(folder, target)
    target.delete(f"{DATABASE}/b1/manifest.json")
    target.write(f"{DATABASE}/b1/dump/toc.dat", b"t")  # half of it
    gone = fetch(target, tmp_path / "other")
    assert gone["failed"]
    assert "no whole copy" in gone["msg"]
    done = copy(folder, target)
    assert (done["changed"], done["copies"][0]["error"]) == (True, "")
    assert fetch(target, tmp_path / "other")["changed"] is True


@on_s3
def test_another_backup_under_the_same_name_is_not_touched(make, target):
    copy(make("b1"), target)
    before = target.read(f"{DATABASE}/b1/manifest.json")
    shutil.rmtree(make("other").parent / "b1")
    again = make("b1", environment="prod")
    failed = copy(again, target)
    assert failed["failed"]
    assert "another backup lies there" in failed["msg"]
    assert target.read(f"{DATABASE}/b1/manifest.json") == before


def test_retention_removes_what_it_made_and_nothing_else(make, target):
    kept = {"foreign": {"environment": "prod"}, "moved": {"system_identifier": "8"}, "noted": {}}
    for name, changes in kept.items():
        copy(make(name, 1, **changes), target, keep=0)
    target.write(f"{DATABASE}/noted/note.txt", b"keep this one")
    target.write(f"{DATABASE}/unmarked/manifest.json", b"{}")
    target.write("readme.txt", b"mine")
    before = target.listing()
    pruned = [copy(make(f"b{day}", day), target, keep=2)["copies"][0]["pruned"] for day in range(2, 5)]
    place = Place.of(target.root, Path(target.config) if target.config else None)
    assert pruned == [(), (), (place.at(DATABASE, "b2"),)]
    after = target.listing()
    assert {name: size for name, size in after.items() if name in before} == before
    assert {name.split("/")[1] for name in after if name not in before} == {"b3", "b4"}
    if not target.url:
        assert not Path(target.root, DATABASE, "b2").exists()


def test_the_proof_of_a_drill_travels_and_the_last_proven_copy_stays_without_the_local_disk(make, target, tmp_path):
    old = make("b1", 1)
    copy(old, target)
    write_proof(old, {"counts_match": True, "minutes": 2})
    new = make("b2", 2)
    done = copy(new, target, keep=2)
    assert (done["changed"], done["copies"][0]["proven"]) == (True, ("b1",))
    assert target.read(f"{DATABASE}/b1/proven.json") == (old / "proven.json").read_bytes()
    again = copy(new, target, keep=2)
    assert (again["changed"], again["copies"][0]["proven"]) == (False, ())
    shutil.rmtree(tmp_path / "backups")
    for day in (3, 4):
        copy(make(f"b{day}", day), target, keep=1)
    assert {name.split("/")[1] for name in target.listing()} == {"b1", "b4"}
    fetched = Path(fetch(target, tmp_path / "other", run_id="b1")["path"])
    assert read_proof(fetched)["minutes"] == 2


@pytest.mark.parametrize("proof", [b"{}", b"half", b"of another"])
def test_what_proves_nothing_keeps_no_copy_and_does_not_travel(make, tmp_path, proof):
    second = Target(str(tmp_path / "second"), None)
    Path(second.root).mkdir()
    there, here, other = make("b1", 1), make("b2", 2), make("b3", 3)
    write_proof(other, {"counts_match": True, "minutes": 2})
    proof = (other / "proven.json").read_bytes() if proof == b"of another" else proof
    copy(there, second)
    second.write(f"{DATABASE}/b1/proven.json", proof)
    (here / "proven.json").write_bytes(proof)
    copy(here, second)
    assert f"{DATABASE}/b2/proven.json" not in second.listing()
    done = copy(make("b4", 4), second, keep=1)
    assert sorted(Path(path).name for path in done["copies"][0]["pruned"]) == ["b1", "b2"]


@on_s3
def test_a_begun_copy_that_nobody_completes_is_tidied_after_a_day(make, target):
    for run_id, at in (("dead", "2026-01-01T00:00:00+00:00"), ("alive", "2999-01-01T00:00:00+00:00")):
        copy(make(run_id), target, keep=0)
        target.delete(f"{DATABASE}/{run_id}/manifest.json")
        mark = json.loads(target.read(f"{DATABASE}/{run_id}/copy.json"))
        target.write(f"{DATABASE}/{run_id}/copy.json", json.dumps({**mark, "copied_at": at}).encode())
    copy(make("b1"), target, keep=0)
    assert {name.split("/")[1] for name in target.listing()} == {"alive", "b1"}


def test_fetched_on_another_host_it_is_the_backup_that_it_was(make, target, tmp_path):
    old, new = make("b1", 1), make("b2", 2)
    for folder in (old, new, make("b3", 3, environment="prod")):
        copy(folder, target, keep=0)
    other = tmp_path / "other host"
    assert fetch(target, other, check=True)["path"] == str(other / DATABASE / "b2")
    assert not other.exists()
    done = fetch(target, other)
    assert (done["changed"], done["path"]) == (True, str(other / DATABASE / "b2"))
    assert contents(Path(done["path"])) == contents(new)
    assert fetch(target, other)["changed"] is False
    assert contents(Path(fetch(target, other, run_id="b1")["path"])) == contents(old)
    for path in other.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    missing = fetch(target, other, run_id="b9")
    assert "no whole copy b9" in missing["msg"]
    assert "b2 (test)" in missing["msg"]


def test_a_damaged_copy_does_not_become_a_backup(make, target, tmp_path):
    copy(make("b1"), target)
    target.write(f"{DATABASE}/b1/dump/toc.dat", b"tox")
    failed = fetch(target, tmp_path / "other")
    assert "dump/toc.dat: checksum does not fit" in failed["msg"]
    assert [
        path.name for path in (tmp_path / "other" / DATABASE).iterdir() if path.is_dir() and path.name[0] != "."
    ] == []


@on_s3
def test_all_places_are_tried_and_a_failure_is_red_or_a_warning(make, target, config, tmp_path):
    folder, dead = make("b1"), Target("nowhere:bucket", config)
    unmounted = Target(str(tmp_path / "unmounted"), None)
    failed = copy(folder, dead, unmounted, target, rclone_config=config)
    assert failed["failed"]
    assert "2 of the copies" in failed["msg"]
    assert "backup_copy_required=false" in failed["msg"]
    assert "no such folder" in failed["msg"]
    assert [bool(row["error"]) for row in failed["copies"]] == [True, True, False]
    assert f"{DATABASE}/b1/manifest.json" in target.listing()
    warned = copy(folder, dead, target, rclone_config=config, required=False)
    assert not warned.get("failed")
    assert "1 of the copies" in json.dumps(warned["warnings"])


def test_a_copy_on_a_full_disk_is_red_and_counts_for_none(make, tmp_path):
    folder, second, after = make("b1"), tmp_path / "second", tmp_path / "after"
    second.mkdir()
    arguments = {"src": str(folder), "places": [str(second)]}
    script = f'"{sys.executable}" "{MODULES}/backup_copy.py"; cp -a "{second}" "{after}"'
    result, _errors = run_on_small_disk(second, "8k", script, arguments)
    assert result["failed"]
    assert re.search("no space left on device|too big for remaining disk space", result["msg"])
    assert "could not be made or proven" in result["msg"]
    assert not list(after.rglob("manifest.json"))
    assert contents(folder)
    assert not copy(folder, Target(str(second), None)).get("failed")


@on_s3
def test_a_damaged_backup_is_not_copied(make, target):
    folder = make("b1")
    (folder / "dump" / "toc.dat").write_bytes(b"tox")
    assert "damaged" in copy(folder, target)["msg"]
    assert target.listing() == {}


def test_places_and_configurations_that_could_tell_a_secret_are_refused(config, tmp_path):
    open_one = tmp_path / "open.conf"
    shutil.copy(config, open_one)
    open_one.chmod(0o644)
    assert "can be read by other accounts" in refused(Place.of, "offsite:bucket", open_one).message
    assert "no configuration" in refused(Place.of, "offsite:bucket", None).message
    for root in (
        f":s3,secret_access_key={SECRET}:bucket",
        f"offsite,secret_access_key={SECRET}:b",
        "bucket",
        "--config=x",
    ):
        error = refused(Place.of, root, Path(config))
        assert "no place for copies" in error.message
        assert SECRET not in error.message + error.hint


@on_s3
def test_no_secret_is_an_argument_in_the_environment_or_told(make, target, config, tmp_path, monkeypatch):
    """A wrapper writes down what rclone is started with; the environment has a secret that must not reach it."""
    seen, folder = tmp_path / "seen", tmp_path / "bin"
    folder.mkdir()
    real = shutil.which("rclone")
    script = f'#!/bin/sh\ncat /proc/$$/cmdline /proc/$$/environ >> {seen}\nexec {real} "$@"\n'
    (folder / "rclone").write_text(script, encoding="utf-8")
    (folder / "rclone").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("RCLONE_CONFIG_OFFSITE_SECRET_ACCESS_KEY", SECRET)
    backup = make("b1")
    runs = [
        copy(backup, target, how=process, rclone_config=config),
        copy(backup, Target("nowhere:b", config), how=process),
        fetch(target, tmp_path / "other", how=process, rclone_config=config),
    ]
    assert [bool(run.get("failed")) for run in runs] == [False, True, False], runs
    assert "--config=" in seen.read_text(errors="replace")
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path != Path(config)]
    assert [path for path in kept if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in json.dumps(runs)


@on_s3
def test_a_killed_copy_is_completed(make, target, tmp_path, monkeypatch):
    """rclone is stopped for good in front of each of its calls in turn: what is there then is no copy or all of it."""
    backup, step = make("b1"), 0
    real, count, folder = shutil.which("rclone"), tmp_path / "count", tmp_path / "bin"
    folder.mkdir()
    while True:
        step += 1
        count.write_text("")
        script = f'#!/bin/sh\necho >> {count}\n[ $(wc -l < {count}) -lt {step} ] || exit 9\nexec {real} "$@"\n'
        (folder / "rclone").write_text(script, encoding="utf-8")
        (folder / "rclone").chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
            done = copy(backup, target)
        if not done.get("failed"):
            break
        got = fetch(target, tmp_path / f"other{step}")
        whole = not got.get("failed")
        assert whole == (f"{DATABASE}/b1/manifest.json" in target.listing())
        if whole:
            assert contents(Path(got["path"])) == contents(backup)
    assert step > 5
    assert contents(Path(fetch(target, tmp_path / "end")["path"])) == contents(backup)
