"""The summary of a run: its lines, its file, and which phases it tells."""

from __future__ import annotations

import json
import re
import stat

import pytest
from ansible.errors import AnsibleActionFail
from ansible_collections.settler.runbook.plugins.action.phase import noted
from ansible_collections.settler.runbook.plugins.action.report import WIDTH, render, write

CONTENT = {
    "title": "migrate · settler · local",
    "phases": [
        {"name": "backup", "state": "changed", "text": "37,400 rows", "seconds": 1.14},
        {"name": "migrate", "state": "failed", "text": "001_a.sql\n002_b.sql", "seconds": None},
        {"name": "verify", "state": "skipped", "text": "", "seconds": 0.0},
    ],
    "outcome": "rolled back",
    "state": "failed",
    "facts": {"backup": "/b", "log": "", "nothing": None, "head": "002"},
    "hints": ["see the log"],
}


def lines(**changes):
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in render({**CONTENT, **changes})]


def test_a_line_a_phase_with_mark_and_time():
    phases = lines()[2:6]
    assert phases[0].startswith("  ✔ backup      37,400 rows ")
    assert phases[0].endswith("1.1 s")
    assert phases[1] == "  ✘ migrate     001_a.sql"
    assert phases[2] == "                002_b.sql"
    assert phases[3].startswith("  – verify")
    assert phases[3].endswith("0.0 s")


def test_times_stand_in_one_column_that_is_the_rules_end():
    assert {len(line) for line in lines() if line.endswith(" s")} == {WIDTH + 2}
    assert max(map(len, lines())) == WIDTH + 2


def test_title_rule_outcome_facts_and_hints_in_this_order():
    told = lines()
    assert told[0] == "  migrate · settler · local"
    assert told[1] == told[6] == "  " + "─" * WIDTH
    assert told[7:] == ["  ✘ rolled back", "    backup   /b", "    head     002", "", "    see the log"]


def test_no_phases_no_facts_no_hints():
    told = lines(phases=[], facts={}, hints=[], state="ok")
    assert told[2:] == ["  " + "─" * WIDTH, "  ✔ rolled back"]


def test_long_names_of_phases_widen_the_column():
    told = lines(phases=[{"name": "create_database", "state": "ok", "text": "made", "seconds": None}])
    assert told[2] == "  ✔ create_database  made"


def test_long_texts_are_not_cut():
    text = "x" * 200
    assert text in lines(phases=[{"name": "a", "state": "ok", "text": text, "seconds": 2}])[2]


def test_file_is_private_and_whole(tmp_path):
    path = tmp_path / "new" / "reports" / "run.json"
    write(path, CONTENT)
    assert json.loads(path.read_text(encoding="utf-8")) == CONTENT
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]


def test_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AnsibleActionFail, match=str(tmp_path / "file")):
        write(tmp_path / "file" / "run.json", CONTENT)


def test_phases_of_this_run_are_told_and_those_of_another_not():
    facts = {"ansible_facts": {"runbook": {"run_id": "r1", "phases": [{"name": "backup"}]}}}
    assert noted({**facts, "runbook_run_id": "r1"}) == [{"name": "backup"}]
    assert noted({**facts, "runbook_run_id": "r2"}) == []
    assert noted({}) == []
