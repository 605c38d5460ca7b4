"""The plan: what is pending, what stands, and what stops a run."""

from __future__ import annotations

import dataclasses

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._plan import LedgerRow, Plan, plan
from hypothesis import given
from hypothesis import strategies as st

from tests.support import migration

A, B, C = (migration(f"SELECT {number};", f"00{number}_step.sql") for number in (1, 2, 3))


def row(file, **changes):
    made = LedgerRow(file.file, file.version, file.checksum, "2026-11-23 03:15:00+00", "run-1")
    return dataclasses.replace(made, **changes)


def test_everything_is_pending_without_a_ledger():
    todo = plan([A, B, C], [])
    assert todo == Plan((A, B, C), ())
    assert (todo.head, todo.target) == (None, "003")


def test_nothing_is_pending_when_all_is_applied():
    todo = plan([A, B], [row(B), row(A)])
    assert todo.pending == ()
    assert [applied.file for applied in todo.applied] == [A.file, B.file]
    assert (todo.head, todo.target) == ("002", "002")


def test_head_and_target_are_numbers_and_not_texts():
    nine, ten = migration("SELECT 9;", "999_a.sql"), migration("SELECT 10;", "1000_b.sql")
    assert plan([nine, ten], [row(nine), row(ten)]).head == "1000"
    todo = plan([A, nine, ten], [row(A)])
    assert (todo.head, todo.target) == ("001", "1000")


def test_changed_file_is_named_with_both_checksums_and_when():
    with pytest.raises(RunbookError, match="do not agree with the ledger") as refused:
        plan([A, B], [row(A, checksum="0" * 64), row(B)])
    (problem,) = refused.value.facts["problems"]
    for part in (str(A.path), A.checksum[:12], "000000000000", "2026-11-23 03:15:00+00"):
        assert part in problem


def test_missing_file_is_named_with_its_run():
    with pytest.raises(RunbookError) as refused:
        plan([B], [row(A), row(B)])
    (problem,) = refused.value.facts["problems"]
    assert problem.startswith(A.file)
    assert "run-1" in problem


def test_all_problems_are_told_at_once():
    with pytest.raises(RunbookError) as refused:
        plan([B, C], [row(A), row(B, checksum="1"), row(C, checksum="2")])
    assert len(refused.value.facts["problems"]) == 3
    assert all(file.file in refused.value.message for file in (A, B, C))


def test_renamed_file_is_a_missing_one():
    renamed = migration("SELECT 1;", "001_other.sql")
    with pytest.raises(RunbookError, match="001_step"):
        plan([renamed, B], [row(A)], out_of_order=True)


def test_older_file_stops_the_run_and_is_named():
    with pytest.raises(RunbookError, match="older than what the database has") as refused:
        plan([A, B, C], [row(A), row(C)])
    assert refused.value.facts["problems"] == [B.file]
    assert "migrate_out_of_order" in refused.value.hint


def test_older_file_is_pending_when_that_is_allowed():
    todo = plan([A, B, C], [row(A), row(C)], out_of_order=True)
    assert todo.pending == (B,)
    assert todo.head == "003"


def test_allowing_out_of_order_allows_nothing_else():
    with pytest.raises(RunbookError, match="do not agree"):
        plan([A, B], [row(B, checksum="0")], out_of_order=True)


def test_target_is_never_older_than_the_head():
    todo = plan([A, B, C], [row(A), row(C)], out_of_order=True)
    assert todo.target == "003"


def test_diff_shows_what_comes_and_what_stands():
    diff = plan([A, B], [row(A)]).as_diff()
    assert diff["before"] == f"{A.file}  {A.checksum[:12]}\n"
    assert diff["after"] == f"{A.file}  {A.checksum[:12]}\n{B.file}  {B.checksum[:12]}\n"


@st.composite
def situations(draw):
    """Files of all kinds in order, a ledger that may not agree with them, and how to run.

    There are two sequences, the main one and that of an optional folder, and repeatable files after both.
    """
    files = []
    for folder in ("", "parts"):
        for number in sorted(draw(st.lists(st.integers(1, 1200), unique=True, max_size=6))):
            ending = draw(st.sampled_from([".sql", ".batch.sql"]))
            phase = draw(st.sampled_from(["", "", "-- runbook: phase=contract\n"]))
            made = migration(f"{phase}SELECT {number};", f"{number:03d}_step{ending}")
            files.append(dataclasses.replace(made, folder=folder))
    files += [migration(f"SELECT '{name}';", f"R__{name}.sql") for name in "abc" if draw(st.booleans())]
    states = st.sampled_from(["absent", "applied", "applied", "running"])
    known = [(file, draw(states)) for file in files]
    rows = [row(file, kind=file.kind, state=state) for file, state in known if state != "absent"]
    rows = [
        dataclasses.replace(one, checksum="changed")
        if draw(st.integers(0, 9 if one.kind == "versioned" else 1)) == 0
        else one
        for one in rows
    ]
    if draw(st.integers(0, 7)) == 0:
        rows.append(LedgerRow("555_gone.sql", "555", "x", "then", "run-0"))
    named = st.lists(st.sampled_from([file.file for file in files] or ["none"])).map(set)
    return files, draw(st.permutations(rows)), draw(st.booleans() | named), draw(st.sampled_from(["all", "expand"]))


def _reason(files, rows, out_of_order):
    """Say in other words than the code's why a run must not go on."""
    texts = {file.file: file for file in files}
    for known in rows:
        if known.file not in texts:
            return "agree"
        is_fixed = known.state == "applied" and known.kind != "repeatable"
        if is_fixed and known.checksum != texts[known.file].checksum:
            return "agree"
    begun = {found.file for found in rows}
    for file in files:
        allowed = file.file in out_of_order if isinstance(out_of_order, set) else out_of_order
        if not file.version or file.file in begun or allowed:
            continue
        beside = [found.version for found in rows if found.version and found.folder == file.folder]
        if any(int(version) > int(file.version) for version in beside):
            return "older"
    return ""


@given(situations())
def test_plan_is_total_and_never_runs_a_file_again(situation):
    files, rows, out_of_order, phase = situation
    reason = _reason(files, rows, out_of_order)
    if reason:
        with pytest.raises(RunbookError, match=reason):
            plan(files, rows, out_of_order=out_of_order, phase=phase)
        return
    todo = plan(files, rows, out_of_order=out_of_order, phase=phase)
    done = {(found.file, found.checksum) for found in rows if found.state == "applied"}
    assert [*todo.pending, *todo.later] == [file for file in files if (file.file, file.checksum) not in done]
    assert [file.directives.phase for file in todo.later][:1] in ([], ["contract"])
    assert phase == "all" or "contract" not in {file.directives.phase for file in todo.pending}
    assert {found.file for found in todo.applied} == {file for file, _checksum in done}


@given(situations(), st.randoms())
def test_plan_does_not_depend_on_the_ledgers_order(situation, random):
    files, rows, *how = situation
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert _answer(files, rows, *how) == _answer(files, shuffled, *how)


def _answer(files, rows, out_of_order, phase):
    try:
        return plan(files, rows, out_of_order=out_of_order, phase=phase)
    except RunbookError as error:
        return sorted(error.facts["problems"])


@given(situations())
def test_after_a_run_nothing_is_pending(situation):
    files, rows, out_of_order, phase = situation
    try:
        todo = plan(files, rows, out_of_order=out_of_order, phase=phase)
    except RunbookError:
        return
    done = {file.file for file in todo.pending}
    after = [found for found in rows if found.file not in done]
    after += [row(file, kind=file.kind) for file in todo.pending]
    again = plan(files, after, out_of_order=out_of_order, phase=phase)
    assert (again.pending, again.later) == ((), todo.later)
    assert again.head == todo.target
