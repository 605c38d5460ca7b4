"""Encryption at rest with the real age and GnuPG: nothing plain stays, and only the right private key reads it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.module_utils import _encryption
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect as engine_connect
from ansible_collections.settler.runbook.plugins.module_utils._encryption import Encryption, opened, prove
from ansible_collections.settler.runbook.plugins.module_utils._keys import Tool
from ansible_collections.settler.runbook.plugins.module_utils._manifest import check_files, list_backups, read_manifest
from ansible_collections.settler.runbook.plugins.module_utils._migrate import Options as MigrateOptions
from ansible_collections.settler.runbook.plugins.module_utils._migrate import Outcome, migrate
from psycopg import sql

from tests.support import (
    MODULES,
    as_migrator,
    call_module,
    migration,
    refused,
    run_module,
    run_on_small_disk,
    start_module,
    wait_until,
)
from tools import apt

SECRET = b"a value that nobody may read"
SCHEMA = """
CREATE TABLE papers (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, text text DEFAULT 'plain default');
INSERT INTO papers (text) SELECT 'a value that nobody may read ' || n FROM generate_series(1, 50) n;
CREATE TABLE others (id int PRIMARY KEY);
"""


@dataclass(frozen=True)
class Pair:
    """A pair of keys: C(public) for backup_recipients, C(private) for rollback_identity."""

    method: str
    public: str
    private: Path

    @property
    def secret(self) -> bytes:
        """Return what must be nowhere else than in its file."""
        lines = [line for line in self.private.read_bytes().splitlines() if not line.startswith((b"#", b"-"))]
        return max(lines, key=len)


def age_pair(folder: Path) -> Pair:
    folder.mkdir(mode=0o700)
    private = folder / "age.key"
    subprocess.run(["age-keygen", "--output", private], check=True, capture_output=True)
    public = subprocess.run(["age-keygen", "-y", private], check=True, capture_output=True, text=True).stdout.strip()
    return Pair("age", public, private)


def gpg_pair(folder: Path) -> Pair:
    folder.mkdir(mode=0o700)
    base = ["gpg", "--batch", "--quiet", "--homedir", str(folder)]
    try:
        make = [*base, "--passphrase", "", "--quick-generate-key", "backups@example.org", "future-default", "default"]
        subprocess.run([*make, "never"], check=True, capture_output=True)
        public = subprocess.run([*base, "--armor", "--export"], check=True, capture_output=True, text=True).stdout
        private = folder / "gpg.key"
        private.touch(mode=0o600)
        with private.open("wb") as file:
            subprocess.run([*base, "--armor", "--export-secret-keys"], check=True, stdout=file)
    finally:
        subprocess.run(["gpgconf", "--homedir", str(folder), "--kill", "all"], check=False)
    return Pair("gpg", public, private)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, tuple[Pair, Pair]]:
    """Return for each method a pair of keys and a wrong one; the programs are Debian's."""
    missing = [program for program in ("age", "gpg", "gpg-agent") if shutil.which(program) is None]
    if missing:
        assert apt.usable(), f"{missing} are missing, and only root can install them: apt-get install age gpg gpg-agent"
        apt.install("age", "gpg", "gpg-agent")
    folder = Path("/tmp") / f"settler-keys-{os.getpid()}"  # a path that is short enough for the socket of gpg-agent
    folder.mkdir(mode=0o700)
    try:
        yield {
            make.__name__.partition("_")[0]: (make(folder / f"{make.__name__}1"), make(folder / f"{make.__name__}2"))
            for make in (age_pair, gpg_pair)
        }
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=["age", "gpg"])
def method(request) -> str:
    return request.param


@pytest.fixture
def pair(pairs, method) -> Pair:
    return pairs[method][0]


@pytest.fixture
def wrong(pairs, method) -> Pair:
    return pairs[method][1]


@pytest.fixture
def database(new_database, cluster, roles):
    name = new_database()
    with engine_connect(as_migrator(cluster, roles, name)) as session:
        migrate(session, [migration(SCHEMA)], MigrateOptions(run_id="r0", role="settler_owner"), Outcome())
    with psycopg.connect(cluster.conninfo(name), autocommit=True) as server:
        server.execute(
            sql.SQL("ALTER DATABASE {} SET application_name = 'setting-secret'").format(sql.Identifier(name))
        )
    yield name
    with psycopg.connect(cluster.conninfo("postgres"), autocommit=True) as server:
        left = server.execute("SELECT datname FROM pg_database WHERE datname ~ %s", [f"^{name}_(failed|restore)_"])
        for (other,) in left.fetchall():
            server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(other)))


@pytest.fixture
def arguments(cluster, roles, database, tmp_path) -> dict[str, Any]:
    return {
        **as_migrator(cluster, roles, database), "environment": "test", "set_role": "settler_owner", "jobs": 2,
        "client_bin": cluster.state.bin, "connect_params": {}, "ledger_schema": "runbook",
    }  # fmt: skip


@pytest.fixture
def back_up(arguments, tmp_path):
    """Back up with a pair's public key; return the folder."""

    def run(pair: Pair, run_id: str = "b1", **changes: Any) -> Path:
        own = {"compression": "none", "lock_timeout": 10.0, "keep": 0, "keep_days": 0.0, "run_id": run_id}
        own |= {"directory": str(tmp_path / "backups"), "encryption": pair.method, "recipients": [pair.public]}
        result = call_module("backup", {**arguments, **own, **changes})
        assert not result.get("failed"), result
        return Path(result["path"])

    return run


@pytest.fixture
def restoring(arguments, database, tmp_path):
    """Return the arguments of a restore."""

    def make(folder: Path, identity: Path | None, **changes: Any) -> dict[str, Any]:
        own = {"src": str(folder), "run_id": "x1", "confirm": database, "accept_data_loss": True, "method": "dump"}
        own |= {"directory": None, "only_run": "", "allow_foreign": "", "lost_directory": str(tmp_path / "lost")}
        own |= {"progress_file": None}
        return {**arguments, **own, "identity": str(identity) if identity else None, **changes}

    return make


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def fake_program(folder: Path, name: str, text: str) -> str:
    """Make a folder whose program does something before the real one; return a PATH with it in front."""
    folder.mkdir()
    (folder / name).write_text(f'#!/bin/sh\nREAL="{shutil.which(name)}"\n{text}\n', encoding="utf-8")
    (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_full_disk_while_encrypting_leaves_nothing(arguments, database, pair, method, connect, roles, tmp_path):
    connect(database, role=roles.owner).execute(
        "CREATE TABLE large AS SELECT sha256(n::text::bytea) || sha256((-n)::text::bytea) AS b "
        "FROM generate_series(1, 100000) n"
    )
    small, after = tmp_path / "small", tmp_path / "after"
    small.mkdir(mode=0o700)
    options = {
        **arguments, "run_id": "b1", "directory": str(small), "compression": "none", "encryption": pair.method,
        "recipients": [pair.public],
    }  # fmt: skip
    script = f'"{sys.executable}" "{MODULES}/backup.py"; cp -a "{small}" "{after}"'
    result, _errors = run_on_small_disk(small, "20m", script, options)
    assert result["failed"]
    assert "the disk is full, nothing is left of this backup" in result["msg"]
    assert [path for path in after.rglob("*") if path.is_file() and "b1" in str(path)] == []


def test_nothing_but_the_manifest_can_be_read_without_the_key(back_up, pair, method):
    folder = back_up(pair)
    manifest = read_manifest(folder)
    check_files(folder, manifest)  # the checksums are those of the encrypted files
    assert manifest["encryption"]["method"] == method
    (recipient,) = manifest["encryption"]["recipients"]
    assert recipient == pair.public if method == "age" else len(recipient) == 40
    assert {path.suffix for path in files(folder)} == {f".{method}", ".json"}
    assert [path.name for path in files(folder) if path.suffix == ".json"] == ["manifest.json"]
    assert any(path.name.startswith("toc.dat") for path in files(folder))
    for path in files(folder):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for word in (SECRET, b"plain default", b"setting-secret"):
            assert word not in path.read_bytes(), path


def test_an_encrypted_backup_is_listed_like_any_other(back_up, pair, tmp_path, database, method):
    back_up(pair)
    row = run_module("backup_info", {"directory": str(tmp_path / "backups"), "database": database})["backups"][0]
    assert (row["error"], row["encryption"], row["method"]) == ("", method, "dump")
    assert row["rows"] > 50


def test_restore_with_the_key_brings_everything_back_and_leaves_nothing_plain(
    back_up, pair, restoring, connect, roles, database
):
    folder = back_up(pair)
    before = files(folder.parent)
    connect(database, role=roles.owner, user=roles.migrator).execute("DELETE FROM papers")
    result = call_module("restore", restoring(folder, pair.private))
    assert result.get("rows", 0) > 50, result
    session = connect(database)
    assert session.execute("SELECT count(*), min(text) FROM papers").fetchone() == (50, f"{SECRET.decode()} 1")
    setting = (
        "SELECT setconfig::text FROM pg_db_role_setting s JOIN pg_database d ON d.oid = setdatabase WHERE datname = %s"
    )
    assert session.execute(setting, [database]).fetchone() == ("{application_name=setting-secret}",)
    assert files(folder.parent) == before
    (backup,) = session.execute("SELECT detail ->> 'backup' FROM runbook.events WHERE event = 'rolled_back'").fetchone()
    assert backup == str(folder)


def test_the_first_use_of_a_key_is_alone(back_up, pair, monkeypatch):
    """gpg-agent writes an imported key anew at its first use: a second decryption beside it fails now and then."""
    folder = back_up(pair)
    spans = []
    decrypt = Tool.decrypt

    def recorded(tool: Tool, source: Path, target: Path) -> None:
        start = time.monotonic()
        decrypt(tool, source, target)
        spans.append((start, time.monotonic()))

    monkeypatch.setattr(Tool, "decrypt", recorded)
    with opened(folder, pair.private, 8):
        (_, end), *others = sorted(spans)
        assert len(others) > 2
        assert all(start >= end for start, _ in others)


@pytest.mark.parametrize("case", ["none", "wrong", "open to others", "missing"])
def test_without_the_right_key_nothing_is_touched(back_up, pair, wrong, restoring, connect, database, case, tmp_path):
    folder = back_up(pair)
    shared = tmp_path / "shared"
    shutil.copy(pair.private, shared)
    shared.chmod(0o640)
    identity = {"none": None, "wrong": wrong.private, "open to others": shared, "missing": tmp_path / "no"}[case]
    before = files(folder.parent), connect(database).execute("SELECT datname FROM pg_database").fetchall()
    result = call_module("restore", restoring(folder, identity))
    assert result["failed"]
    assert "nothing was touched" in result["msg"]
    wanted = {
        "none": "rollback_identity", "wrong": "does not decrypt it",
        "open to others": "chmod 0600", "missing": "No such",
    }  # fmt: skip
    assert wanted[case] in result["msg"]
    assert (files(folder.parent), connect(database).execute("SELECT datname FROM pg_database").fetchall()) == before
    assert connect(database).execute("SELECT count(*) FROM papers").fetchone() == (50,)
    assert wanted[case] in call_module("restore", restoring(folder, identity), check=True)["msg"]


def test_a_flipped_bit_in_any_file_is_seen_without_a_key(back_up, pair):
    folder = back_up(pair)
    for path in files(folder):
        good = path.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        path.write_bytes(bad)
        assert "damaged" in refused(lambda: check_files(folder, read_manifest(folder))).message, path
        path.write_bytes(good)
    check_files(folder, read_manifest(folder))


def test_an_encryption_that_fails_leaves_no_backup(back_up, pair, arguments, tmp_path, database, monkeypatch, method):
    text = 'case "$*" in *3*.dat*) echo "broken pipe" >&2; exit 1;; esac\nexec "$REAL" "$@"'
    monkeypatch.setenv("PATH", fake_program(tmp_path / "bin", method, text))
    with pytest.raises(AssertionError, match="broken pipe"):
        back_up(pair)
    assert list_backups(tmp_path / "backups", database) == []
    assert [path.name for path in (tmp_path / "backups" / database).iterdir()] == [".lock"]


def test_a_backup_killed_while_it_encrypts_is_none_and_is_tidied(
    back_up, pairs, arguments, tmp_path, database, monkeypatch
):
    pair = pairs["age"][0]
    own = {"directory": str(tmp_path / "backups"), "run_id": "killed", "compression": "none"}
    own |= {"encryption": "age", "recipients": [pair.public], "jobs": 1}
    flag = tmp_path / "flag"
    text = f'case "$*" in *catalogue*) echo $$ > {flag}; exec sleep 600;; esac\nexec "$REAL" "$@"'
    with monkeypatch.context() as patch:
        patch.setenv("PATH", fake_program(tmp_path / "bin", "age", text))
        process = start_module("backup", {key: value for key, value in {**arguments, **own}.items() if value})
    try:
        child = int(wait_until(lambda: flag.exists() and flag.read_text()))
    finally:
        process.kill()
        process.communicate()
    os.kill(child, signal.SIGKILL)
    home = tmp_path / "backups" / database
    assert any(SECRET in path.read_bytes() for path in files(home)), "killed too late to mean anything"
    assert list_backups(tmp_path / "backups", database) == []
    back_up(pair)
    assert sorted(path.name for path in home.iterdir()) == [".lock", "b1"]
    assert not any(SECRET in path.read_bytes() for path in files(home))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restore_that_is_ended_leaves_nothing_plain_at_the_latest_until_the_next_run(
    back_up, pairs, restoring, tmp_path, number, cluster, database
):
    pair = pairs["age"][0]
    folder = back_up(pair)
    home = folder.parent
    slow, flag = tmp_path / "slow", tmp_path / "flag"
    slow.mkdir()
    for name in ("pg_dump", "pg_restore"):
        (slow / name).symlink_to(Path(cluster.state.bin) / name)
    (slow / "pg_restore").unlink()
    version = f'[ "$1" = --version ] && exec {cluster.state.bin}/pg_restore --version'
    (slow / "pg_restore").write_text(f"#!/bin/sh\n{version}\necho $$ > {flag}; exec sleep 600\n", encoding="utf-8")
    (slow / "pg_restore").chmod(0o755)
    arguments = restoring(folder, pair.private, client_bin=str(slow))
    process = start_module("restore", {key: value for key, value in arguments.items() if value})
    try:
        child = int(wait_until(lambda: flag.exists() and flag.read_text()))
        assert any(SECRET in path.read_bytes() for path in files(home) if path.name.endswith(".dat"))
        back_up(pair, "b2")  # a copy that is in use is not tidied
        assert len(list(home.glob(".runbook-*.plain"))) == 1
        os.kill(process.pid, number)
        process.communicate(timeout=300)
    finally:
        process.kill()
        process.communicate()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    if number == signal.SIGTERM:
        assert list(home.glob(".runbook-*.plain")) == []
    back_up(pair, "b3")
    assert list(home.glob(".runbook-*.plain")) == []
    assert sorted(path.name for path in home.iterdir()) == [".lock", "b1", "b2", "b3"]


def test_the_private_key_is_in_no_argument_output_or_file(back_up, pair, restoring, tmp_path, method):
    """Every program that is started writes its arguments and its environment down."""
    folder = back_up(pair)
    seen = tmp_path / "seen"
    text = f'{{ tr "\\0" "\\n" < /proc/$$/cmdline; env; }} >> {seen}; exec "$REAL" "$@"'
    path = fake_program(tmp_path / "bin", method, text)
    arguments = {key: value for key, value in restoring(folder, pair.private).items() if value}
    before = os.environ["PATH"]
    os.environ["PATH"] = path
    try:
        process = start_module("restore", arguments)
        lines = set()
        while process.poll() is None:
            for entry in Path("/proc").glob("[0-9]*"):
                for name in ("cmdline", "environ"):
                    try:
                        lines.add((entry / name).read_bytes())
                    except OSError:
                        continue
            time.sleep(0.005)
        output = process.communicate()
    finally:
        os.environ["PATH"] = before
    assert json.loads(output[0])["changed"] is True, output
    assert str(pair.private) in seen.read_text()
    for told in (*lines, seen.read_bytes(), *(text.encode() for text in output)):
        assert pair.secret not in told
    assert [path for path in files(tmp_path) if pair.secret in path.read_bytes()] == []
    left = [path for path in Path("/dev/shm").glob("settler-runbook-*") if path.stat().st_uid == os.geteuid()]
    assert left == []


def test_what_would_keep_a_backup_from_being_read_is_known_before_the_window(pair, wrong, method, tmp_path):
    good = Encryption(method, (pair.public,))
    assert "1 public keys" in prove(good, None, must_open=False)
    assert "read again" in prove(good, pair.private, must_open=True)
    both = tmp_path / "recipients"
    both.write_text(f"# both\n{pair.public}\n{wrong.public}\n", encoding="utf-8")
    assert "2 public keys" in prove(Encryption(method, (str(both),)), wrong.private, must_open=True)
    assert "neither rollback_identity nor backup_snapshot" in refused(prove, good, None, must_open=True).message
    assert "cannot decrypt" in refused(prove, good, wrong.private, must_open=True).message
    assert "backup_recipients is empty" in refused(prove, Encryption(method, ()), None, must_open=False).message
    for nonsense in ("age1nonsense", "/no/such/file", "-----BEGIN PGP PUBLIC KEY BLOCK-----"):
        assert "backup_recipients" in refused(prove, Encryption(method, (nonsense,)), None, must_open=False).message


def test_a_private_key_among_the_recipients_is_refused_and_not_repeated(pair, method):
    text = pair.private.read_text(encoding="utf-8")
    for recipient in (text, str(pair.private)):
        error = refused(prove, Encryption(method, (recipient,)), None, must_open=False)
        assert "has a private key" in error.message
        assert pair.secret.decode() not in f"{error.message}{error.hint}"


def test_preflight_refuses_a_run_that_could_not_read_its_own_backup(arguments, pairs, tmp_path):
    pair = pairs["age"][0]
    own = {"owner": "settler_owner", "application": "settler_app", "extensions": [], "database_required": True}
    own |= {"backup_directory": str(tmp_path), "encryption": "age", "recipients": [pair.public], "identity": None}
    result = call_module("preflight", {**arguments, **own, "way_back": "dump"})
    assert result["failed"]
    assert "neither rollback_identity nor backup_snapshot" in result["msg"]
    told = call_module("preflight", {**arguments, **own, "way_back": "dump", "identity": str(pair.private)})
    assert [row["status"] for row in told["checks"] if row["check"] == "encryption"] == ["ok"]


def test_a_disk_without_space_for_the_decrypted_copy_is_said_before(back_up, pairs, monkeypatch):
    pair = pairs["age"][0]
    folder = back_up(pair)
    monkeypatch.setattr(_encryption.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(Exception, match="0 MB free"), opened(folder, pair.private, 1):
        pass
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "b1"]
