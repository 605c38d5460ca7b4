"""Directives: each with good and bad values; what is wrong is named with file and line."""

from __future__ import annotations

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._directives import Directives, read_directives

from tests.support import refused


def read(*lines):
    return read_directives("".join(f"{line}\n" for line in lines), "003_x.sql")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("no-transaction", {"transaction": False}),
        ("irreversible", {"irreversible": True}),
        ("lock-timeout=500ms", {"lock_timeout": 0.5}),
        ("lock-timeout=1.5s", {"lock_timeout": 1.5}),
        ("statement-timeout=10min", {"statement_timeout": 600.0}),
        ("statement-timeout=2h", {"statement_timeout": 7200.0}),
        ("role=app_owner", {"role": "app_owner"}),
        ('role="odd name"', {"role": "odd name"}),
        ("requires=001,reports/002", {"requires": ("001", "reports/002")}),
        ("requires=001 requires=002", {"requires": ("001", "002")}),
        ("phase=contract", {"phase": "contract"}),
        ("batch-table=public.jobs batch-key=id", {"batch_table": "public.jobs", "batch_key": "id"}),
        ("batch-size=50 batch-target=250ms", {"batch_size": 50, "batch_target": 0.25}),
        ('allow=drop-table reason="it is empty"', {"allows": (("drop-table", "it is empty"),)}),
        ("allow=truncate reason=empty irreversible", {"allows": (("truncate", "empty"),), "irreversible": True}),
    ],
)
def test_a_directive_is_read(line, wanted):
    assert read(f"-- runbook: {line}", "SELECT 1;") == Directives(**wanted)


def test_directives_of_several_lines_add_up_between_other_comments():
    found = read("-- What it is for.", "", "-- runbook: no-transaction", "--runbook: role=a", "SELECT 1;")
    assert (found.transaction, found.role) == (False, "a")


def test_a_file_without_directives_has_the_defaults():
    assert read("SELECT 1; -- runbooks are fine") == Directives()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("no-transactions", "unknown directive: no-transactions"),
        ("lock_timeout=1s", "unknown directive: lock_timeout=1s"),
        ("no-transaction=true", "directive no-transaction takes no value"),
        ("role", "directive role needs a value"),
        ("role=", "directive role needs a value"),
        ("lock-timeout=5", "not a time such as 500ms"),
        ("lock-timeout=-5s", "not a time such as 500ms"),
        ("phase=middle", "phase is expand or contract"),
        ("batch-size=0", "not a number of rows"),
        ("allow=drop-table", "allow=drop-table says no reason"),
        ('allow=drop-table reason=""', "allow=drop-table says no reason"),
        ("allow= reason=x", "allow= says no reason"),
        ("reason=x", "unknown directive: reason=x"),
        ('allow=a reason="open', "No closing quotation"),
        ("", "a directive without a name"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(line, told):
    message = refused(read, "-- first", f"-- runbook: {line}", "SELECT 1;").message
    assert message.startswith("003_x.sql:2: ")
    assert told in message


@pytest.mark.parametrize(
    "line",
    ["-- Runbook: no-transaction", "--- runbook: irreversible", "-- runbook : role=x", "/* runbook: role=x */",
     "-- runbook no-transaction", "-- RUNBOOK phase=expand"],
)  # fmt: skip
def test_what_was_meant_as_a_directive_is_no_comment(line):
    assert refused(read, "-- first", line, "SELECT 1;").message == f"003_x.sql:2: not written as a directive: {line}"


@pytest.mark.parametrize("line", ["-- runbook section 3", "-- the runbook: see docs", "/* Runbook 4 */"])
def test_a_comment_may_name_the_runbook(line):
    assert read_directives(f"{line}\nSELECT 1;\n", "003_x.sql") == Directives()


def test_a_directive_below_the_first_statement_is_refused():
    message = refused(read, "SELECT 1;", "-- runbook: no-transaction").message
    assert message == "003_x.sql:2: a directive below the first statement: -- runbook: no-transaction"
