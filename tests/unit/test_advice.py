"""Advice: the real squawk says what no hazard covers, file by file; without it nothing is said and nothing fails."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from ansible_collections.settler.runbook.plugins.module_utils import _advice
from ansible_collections.settler.runbook.plugins.module_utils._files import read_migrations

from tests.support import write_migrations

FILES = {
    "001_a.sql": "CREATE TABLE a (id bigint PRIMARY KEY,\n  code char(5),\n  n smallint);\n",
    "002_b.sql": "-- runbook: no-transaction\nDROP INDEX CONCURRENTLY nothing;\n",
    "003_c.sql": "CREATE INDEX ON a (code);\n",
}


def test_what_no_hazard_covers_is_told_by_file_and_line(tmp_path):
    files = write_migrations(tmp_path, FILES)
    told = _advice.advice(files)
    assert sorted(told) == [str(tmp_path / "001_a.sql"), str(tmp_path / "002_b.sql")]
    first, second = told[str(tmp_path / "001_a.sql")]
    assert first.startswith("advice at line 2: ")
    assert first.endswith("(ban-char-field)")
    assert second.startswith("advice at line 3: ")
    assert second.endswith("(prefer-bigint-over-smallint)")
    (robust,) = told[str(tmp_path / "002_b.sql")]  # outside of a transaction a file may stop half way
    assert robust.startswith("advice at line 2: ")
    assert robust.endswith("(prefer-robust-stmts)")


def test_every_rule_is_one_that_squawk_knows():
    program = shutil.which("squawk", path=str(_advice.Path(_advice.sys.executable).parent))
    assert program, "squawk is of the development requirements"
    for rule in _advice._RULES:
        done = subprocess.run([program, "--exclude", rule, "/dev/null"], capture_output=True, text=True, check=False)
        assert "invalid value" not in done.stderr, done.stderr


@pytest.mark.parametrize("program", [None, "/bin/false", "/bin/echo"])
def test_advice_is_never_worth_a_failure(tmp_path, monkeypatch, program):
    files = read_migrations(write_migrations(tmp_path, FILES)[0].path.parent)
    monkeypatch.setattr(_advice.shutil, "which", lambda *_name, **_path: program)
    assert _advice.advice(files) == {}
