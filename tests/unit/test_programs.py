"""Client programs: the version that fits, from folders of fake programs."""

from __future__ import annotations

import os
import signal

import pytest
from ansible_collections.settler.runbook.plugins.module_utils import _programs
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._programs import (
    compression_for,
    find_programs,
    offers,
    run_program,
    start_program,
    wait_program,
)

from tests.support import wait_until


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def programs(folder, version):
    for name in ("pg_dump", "pg_restore"):
        script(folder / name, f'echo "{name} (PostgreSQL) {version}"')
    return folder


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host whose programs lie below a folder of the test and nowhere else."""
    monkeypatch.setattr(_programs, "_FOLDERS", (f"{tmp_path}/*/bin",))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    return tmp_path


def test_oldest_that_is_not_older_than_the_server_is_taken(host):
    for version in ("13.4", "15.18 (Debian 15.18-0+deb12u1)", "18.1", "17beta2"):
        programs(host / version.split()[0] / "bin", version)
    assert find_programs(15) == (host / "15.18" / "bin", 15)
    assert find_programs(14) == (host / "15.18" / "bin", 15)
    assert find_programs(17) == (host / "17beta2" / "bin", 17)
    assert find_programs(18) == (host / "18.1" / "bin", 18)


def test_older_ones_are_refused_and_named(host):
    programs(host / "14" / "bin", "14.2")
    with pytest.raises(RunbookError, match="fit a server of version 15") as refused:
        find_programs(15)
    assert f"14 in {host}/14/bin" in refused.value.message
    assert "postgresql-client-15" in refused.value.hint


def test_server_before_17_does_not_get_a_pg_restore_that_cannot_restore_there(host):
    programs(host / "17" / "bin", "17.1")
    with pytest.raises(RunbookError, match=r"from 16 to 16, as pg_restore 17 cannot restore there.*17 in"):
        find_programs(16)
    sixteen = programs(host / "16" / "bin", "16.4")
    assert find_programs(14) == find_programs(16) == (sixteen, 16)
    assert find_programs(17) == (host / "17" / "bin", 17)


def test_none_at_all_is_said_so(host):
    with pytest.raises(RunbookError, match="none at all"):
        find_programs(15)


def test_folder_that_is_named_is_the_only_one(host):
    programs(host / "15" / "bin", "15.1")
    mine = programs(host / "mine", "16.1")
    assert find_programs(15, str(mine)) == (mine, 16)
    with pytest.raises(RunbookError, match="16 in"):
        find_programs(17, str(mine))
    with pytest.raises(RunbookError, match="none at all"):
        find_programs(15, str(host / "nothing"))


def test_folder_without_pg_restore_does_not_count(host):
    (programs(host / "15" / "bin", "15.1") / "pg_restore").unlink()
    whole = programs(host / "16" / "bin", "16.1")
    assert find_programs(15) == (whole, 16)


@pytest.mark.parametrize("text", ["exit 1", "echo no version", "exec /no/such/program"])
def test_program_that_does_not_work_does_not_count(host, text):
    broken = programs(host / "15" / "bin", "15.1")
    script(broken / "pg_dump", text)
    with pytest.raises(RunbookError, match="none at all"):
        find_programs(15)


def test_programs_on_the_path_count_but_not_debians_wrapper(host, monkeypatch):
    folder = programs(host / "on-path", "15.1")
    monkeypatch.setenv("PATH", str(folder))
    assert find_programs(15) == (folder, 15)
    wrapper = script(host / "wrapped" / "pg_wrapper", 'echo "pg_dump (PostgreSQL) 15.1"')
    for name in ("pg_dump", "pg_restore"):
        (wrapper.parent / name).symlink_to(wrapper)
    monkeypatch.setenv("PATH", str(wrapper.parent))
    with pytest.raises(RunbookError, match="none at all"):
        find_programs(15)


def test_failure_tells_the_program_its_code_and_its_last_lines(tmp_path):
    failing = script(tmp_path / "pg_dump", 'for n in 1 2 3 4 5 6 7 8; do echo "line $n" >&2; echo >&2; done; exit 3')
    with pytest.raises(RunbookError) as failed:
        run_program([failing, "--secret=x"], {})
    assert failed.value.message.splitlines()[0] == "pg_dump failed with exit code 3:"
    assert failed.value.message.splitlines()[1:] == [f"  line {number}" for number in range(3, 9)]


def test_program_sees_only_the_environment_that_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "hidden")
    program = script(tmp_path / "program", f'/usr/bin/env > "{tmp_path}/seen"; cat >> "{tmp_path}/seen"')
    run_program([program], {"MARK": "1", "PATH": os.defpath})
    seen = (tmp_path / "seen").read_text(encoding="utf-8")
    assert "MARK=1" in seen
    assert "hidden" not in seen


def test_waiting_that_is_interrupted_kills_the_program(tmp_path):
    process = start_program([script(tmp_path / "program", "exec sleep 60")], {})

    def interrupt(*_arguments):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            wait_program(process)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert process.wait(5) == -signal.SIGKILL


# Compression


def dumps_with(folder, version, *methods):
    """Make programs of which pg_dump compresses so; it answers as the real one does that finds no server."""
    programs(folder, version)
    known = "|".join(f"--compress={method}" for method in methods) or "none"
    script(
        folder / "pg_dump",
        f'[ "$1" = --version ] && exec echo "pg_dump (PostgreSQL) {version}"\ncase "$1" in\n'
        f'{known}) echo "connection to server on socket \\"${{3#--host=}}/.s.PGSQL.5432\\" failed" >&2;;\n'
        '*) echo "pg_dump: error: this build does not support compression with it" >&2;;\nesac\nexit 1',
    )
    return folder


@pytest.mark.parametrize(
    ("major", "methods", "taken"),
    [
        (18, ("zstd:1", "lz4", "gzip:1"), ("zstd:1", "zstd:1")),
        (16, ("lz4", "gzip:1"), ("lz4", "lz4")),
        (16, ("gzip:1",), ("gzip:1", "gzip:1")),
        (15, (), ("gzip:1", "1")),
    ],
)
def test_auto_takes_the_best_that_this_pg_dump_can(tmp_path, major, methods, taken):
    assert compression_for(dumps_with(tmp_path, f"{major}.1", *methods), major, "auto") == taken


def test_before_16_all_there_is_is_a_level_of_gzip(tmp_path):
    folder = dumps_with(tmp_path, "15.1")
    told = {wanted: compression_for(folder, 15, wanted)[1] for wanted in ("none", "gzip", "gzip:1", "gzip:9")}
    assert told == {"none": "0", "gzip": "6", "gzip:1": "1", "gzip:9": "9"}


@pytest.mark.parametrize(
    ("major", "wanted"), [(15, "zstd:3"), (15, "lz4"), (15, "gzip:10"), (18, "brotli"), (16, "zstd")]
)
def test_what_it_cannot_is_refused_by_name_before_anything_runs(tmp_path, major, wanted):
    with pytest.raises(RunbookError, match=f"pg_dump {major} in {tmp_path} cannot compress with {wanted}") as refused:
        compression_for(dumps_with(tmp_path, f"{major}.1", "lz4"), major, wanted)
    assert "backup_compression: auto" in refused.value.hint


def test_the_machines_own_pg_dump_is_asked_the_same_way():
    folder, major = find_programs(14)
    assert compression_for(folder, major, "none")[0] == "none"
    if major >= 16:
        assert not offers(folder, "brotli")
        assert offers(folder, "none")


def test_failure_of_a_program_ends_what_it_has_started(tmp_path):
    parent = script(tmp_path / "pg_dump", f'sleep 60 &\necho $! > "{tmp_path}/pid"\nexit 1')
    with pytest.raises(RunbookError, match=r"failed with exit code 1$"):
        run_program([parent], {"PATH": os.defpath})
    pid = int((tmp_path / "pid").read_text(encoding="ascii"))
    with pytest.raises(ProcessLookupError):
        wait_until(lambda: os.kill(pid, 0))


def test_program_that_was_killed_tells_by_what(tmp_path):
    with pytest.raises(RunbookError, match=r"^pg_dump was ended by SIGKILL$"):
        run_program([script(tmp_path / "pg_dump", "kill -9 $$")], {})
