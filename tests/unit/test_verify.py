"""Verification without a server: the comparison of two snapshots and the table that an operator reads."""

from __future__ import annotations

import copy
import datetime as dt
from xml.etree import ElementTree as ET

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._verify import (
    Check,
    allow,
    compare,
    junit_of,
    read_allowances,
    table_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

SNAPSHOT = {
    "extensions": {"pgcrypto": "1.3"},
    "schemas": {"public": {"owner": "$owner", "grants": {"$app": "USAGE"}}},
    "types": {"public.mood": {"owner": "$owner", "definition": "enum 'sad', 'ok'"}},
    "tables": {
        "public.jobs": {
            "owner": "$owner",
            "grants": {"$app": "DELETE, INSERT, SELECT, UPDATE"},
            "row_security": "enabled",
            "columns": {"id": "uuid not null", "name": "text default 'x'::text"},
            "constraints": {"jobs_pkey": "PRIMARY KEY (id)"},
            "indexes": {"jobs_name": "CREATE INDEX jobs_name ON public.jobs USING btree (name)"},
            "policies": {"own": "permissive for all to public using (true) with check (true)"},
            "triggers": {"touch": "CREATE TRIGGER touch BEFORE UPDATE ON public.jobs"},
        }
    },
    "sequences": {"public.seq": {"owner": "$owner", "type": "bigint"}},
    "functions": {"public.f(integer)": {"owner": "$owner", "returns": "integer", "body": "0f"}},
    "views": {"public.v": {"owner": "$owner", "columns": {"id": "uuid"}}},
    "materialized_views": {"public.m": {"owner": "$owner", "columns": {"id": "uuid"}}},
    "default_privileges": {"$owner in public on tables": {"$app": "SELECT"}},
}
JOBS = ("tables", "public.jobs")


def changed(path, value):
    """Return the snapshot with one value replaced, or removed where it is None."""
    made = copy.deepcopy(SNAPSHOT)
    *folders, last = path
    place = made
    for folder in folders:
        place = place[folder]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return made


def bad(expected, actual):
    return [row for row in compare(expected, actual) if row.status != "ok"]


def test_equal_snapshots_differ_in_nothing_and_every_property_is_looked_at():
    rows = compare(SNAPSHOT, copy.deepcopy(SNAPSHOT))
    assert {row.status for row in rows} == {"ok"}
    assert len(rows) == 24
    assert table_of(rows) == ""


@pytest.mark.parametrize(
    ("path", "check", "name"),
    [
        (("extensions", "pgcrypto"), "extension", "pgcrypto"),
        (("schemas", "public"), "schema", "public"),
        (("types", "public.mood"), "type", "public.mood"),
        (JOBS, "table", "public.jobs"),
        (("sequences", "public.seq"), "sequence", "public.seq"),
        (("functions", "public.f(integer)"), "function", "public.f(integer)"),
        (("views", "public.v"), "view", "public.v"),
        (("materialized_views", "public.m"), "materialized view", "public.m"),
        (("default_privileges", "$owner in public on tables"), "default privileges", "$owner in public on tables"),
        ((*JOBS, "columns", "name"), "column", "public.jobs: name"),
        ((*JOBS, "constraints", "jobs_pkey"), "constraint", "public.jobs: jobs_pkey"),
        ((*JOBS, "indexes", "jobs_name"), "index", "public.jobs: jobs_name"),
        ((*JOBS, "policies", "own"), "policy", "public.jobs: own"),
        ((*JOBS, "triggers", "touch"), "trigger", "public.jobs: touch"),
        ((*JOBS, "grants", "$app"), "grant", "public.jobs: $app"),
        (("schemas", "public", "grants"), "grant", "public: $app"),
    ],
)
def test_what_is_gone_fails_and_what_is_new_is_unexpected_or_fails_if_it_opens_what_is_there(path, check, name):
    without = changed(path, None)
    (gone,) = bad(SNAPSHOT, without)
    assert (gone.check, gone.object, gone.status, gone.actual) == (check, name, "failed", "missing")
    (new,) = bad(without, SNAPSHOT)
    opens = check in {"policy", "trigger", "grant", "default privileges"}
    assert (new.check, new.object, new.expected) == (check, name, "absent")
    assert new.status == ("failed" if opens else "unexpected")


@pytest.mark.parametrize(
    ("kind", "name", "have", "status"),
    [
        ("functions", "public.g()", {"security": "definer"}, "failed"),
        ("functions", "public.g()", {"returns": "integer"}, "unexpected"),
        ("views", "public.w", {"grants": {"PUBLIC": "SELECT"}}, "failed"),
        ("views", "public.w", {"grants": {"$app": "SELECT"}}, "unexpected"),
        ("views", "public.w", {"grants": {"PUBLIC": "SELECT"}, "options": "security_invoker=true"}, "unexpected"),
        ("views", "public.w", {"owner": "$owner"}, "unexpected"),
        ("materialized_views", "public.n", {"grants": {"reporting": "SELECT"}}, "failed"),
        ("tables", "public.u", {"grants": {"$app": "SELECT"}}, "unexpected"),
        ("tables", "public.u", {"inherits": "jobs"}, "failed"),
        ("tables", "public.u", {"inherits": "extra.t, jobs"}, "failed"),
        ("tables", "public.u", {"inherits": "extra.t"}, "unexpected"),
        ("others", "event trigger e", {"owner": "$owner"}, "failed"),
        ("others", "collation public.c", {"owner": "$owner"}, "unexpected"),
    ],
)
def test_a_new_object_fails_if_it_opens_or_changes_what_is_there(kind, name, have, status):
    expected = {"others": {}, **SNAPSHOT}
    (row,) = bad(expected, {**expected, kind: {**expected[kind], name: have}})
    assert (row.object, row.status, bool(row.hint)) == (name, status, status == "failed")


@pytest.mark.parametrize(
    ("path", "check", "name"),
    [
        ((*JOBS, "owner"), "table owner", "public.jobs"),
        ((*JOBS, "row_security"), "table row security", "public.jobs"),
        ((*JOBS, "columns", "name"), "column", "public.jobs: name"),
        ((*JOBS, "constraints", "jobs_pkey"), "constraint", "public.jobs: jobs_pkey"),
        ((*JOBS, "indexes", "jobs_name"), "index", "public.jobs: jobs_name"),
        ((*JOBS, "policies", "own"), "policy", "public.jobs: own"),
        ((*JOBS, "triggers", "touch"), "trigger", "public.jobs: touch"),
        ((*JOBS, "grants", "$app"), "grant", "public.jobs: $app"),
        (("types", "public.mood", "definition"), "type definition", "public.mood"),
        (("functions", "public.f(integer)", "body"), "function body", "public.f(integer)"),
        (("functions", "public.f(integer)", "returns"), "function returns", "public.f(integer)"),
        (("sequences", "public.seq", "type"), "sequence type", "public.seq"),
    ],
)
def test_what_is_different_fails_with_both_values(path, check, name):
    (row,) = bad(SNAPSHOT, changed(path, "something else"))
    assert (row.check, row.object, row.status, row.actual) == (check, name, "failed", "something else")
    assert row.expected


def test_row_security_that_is_off_is_told_as_none():
    (row,) = bad(SNAPSHOT, changed((*JOBS, "row_security"), None))
    assert (row.check, row.expected, row.actual) == ("table row security", "enabled", "none")


def test_property_that_only_the_database_has_fails():
    (row,) = bad(SNAPSHOT, changed((*JOBS, "options"), "fillfactor=70"))
    assert (row.check, row.status, row.expected, row.actual) == ("table options", "failed", "none", "fillfactor=70")


@pytest.mark.parametrize("absent", [None, {}])
def test_empty_parts_may_be_left_out_or_written(absent):
    with_empty = changed((*JOBS, "triggers"), absent)
    without = changed((*JOBS, "triggers"), None)
    assert bad(with_empty, without) == bad(without, with_empty) == []


def test_kind_that_the_expectation_does_not_have_is_not_compared():
    assert compare({"extensions": {}}, {**SNAPSHOT, "extensions": {}}) == []


def test_kind_that_is_written_empty_has_nothing_expected():
    rows = compare({"views": None}, SNAPSHOT)
    assert [(row.object, row.status) for row in rows] == [("public.v", "unexpected")]


@pytest.mark.parametrize(
    ("want", "have", "status"),
    [
        ("1.9", "1.10", "ok"),
        ("1.10", "1.9", "failed"),
        ("1.3", "1.3", "ok"),
        ("1.3", "1.3.1", "ok"),
        ("1.3.1", "1.3", "failed"),
        ("2.0", "10.0", "ok"),
        (1.3, "1.3", "ok"),  # YAML reads a number
    ],
)
def test_extension_has_a_minimum_version(want, have, status):
    (row,) = compare({"extensions": {"x": want}}, {"extensions": {"x": have}})
    assert (row.check, row.status) == ("extension version", status)


values = st.recursive(
    st.text(max_size=5) | st.integers() | st.booleans(),
    lambda inner: st.dictionaries(st.sampled_from(["owner", "columns", "a", "b"]), inner, max_size=3),
)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["tables", "functions", "types"]), st.dictionaries(st.text(max_size=3), values, max_size=3)
    )
)
def test_nothing_differs_from_itself(snapshot):
    for parts in snapshot.values():  # a part is always a mapping
        for value in parts.values():
            if isinstance(value, dict) and not isinstance(value.get("columns", {}), dict):
                del value["columns"]
    assert bad(snapshot, copy.deepcopy(snapshot)) == []


# table_of


def test_table_has_failures_first_and_all_that_is_needed():
    text = table_of(
        [
            Check("table", "public.stray", "unexpected", "absent", "present"),
            Check("index", "public.jobs: fine"),
            Check("column", "public.jobs: id", "failed", "uuid", "text", "Look."),
            Check("policy", "public.jobs: own", "failed", "for all", "missing"),
            Check("grant", "public.jobs: x", "unexpected", "absent", "SELECT"),
        ]
    )
    assert text.splitlines() == [
        "  failed      column  public.jobs: id",
        "              expected  uuid",
        "              actual    text",
        "              hint      Look.",
        "  failed      policy  public.jobs: own: missing",
        "  unexpected  table  public.stray: present",
        "  unexpected  grant  public.jobs: x: SELECT",
    ]


def test_table_says_how_many_it_leaves_out():
    text = table_of([Check("table", f"t{number}", "failed", "present", "missing") for number in range(7)], limit=5)
    assert len(text.splitlines()) == 6
    assert text.endswith("… and 2 more")


@pytest.mark.parametrize("prefix", [10, 130, 400])
@pytest.mark.parametrize("suffix", [0, 300, 900])
def test_long_values_are_cut_to_where_they_differ(prefix, suffix):
    want, have = (f"{'ab ' * (prefix // 3)}{middle}{' yz' * (suffix // 3)}" for middle in ("MINE", "OTHER"))
    _head, expected, actual = table_of([Check("policy", "p", "failed", want, have)]).splitlines()
    assert "MINE" in expected
    assert "OTHER" in actual
    assert max(len(expected), len(actual)) < 140


ROWS = [
    Check("table", "public.a", "failed", "there", "missing"),
    Check("index", "public.b", "unexpected", "", "\x01 there"),
    Check("column", "public.c"),
]
TODAY = dt.date(2026, 11, 24)


def allowance(**changes):
    return {"check": "*", "object": "public.a", "reason": "goes next week", "until": "2026-11-24", **changes}


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "allowed"),
        ({"object": "public.*"}, "allowed"),
        ({"check": "table"}, "allowed"),
        ({"check": "index"}, "failed"),
        ({"object": "public"}, "failed"),
        ({"until": "2026-11-23"}, "failed"),
    ],
)
def test_an_exception_covers_what_it_names_until_its_day(changes, status):
    first, _second, third = allow(ROWS, read_allowances([allowance(**changes)]), TODAY)
    assert (first.status, third.status) == (status, "ok")
    if changes.get("until"):
        assert "ended on 2026-11-23: goes next week" in first.hint


@pytest.mark.parametrize(("changes", "told"), [({"until": "soon"}, "no day such as"), ({"reason": " "}, "no reason")])
def test_an_exception_without_a_day_or_a_reason_is_refused(changes, told):
    with pytest.raises(RunbookError, match=f"verify_allow, entry 1: .*{told}"):
        read_allowances([allowance(**changes)])


def test_junit_has_a_case_for_each_check_and_is_xml_whatever_the_objects_are_called():
    rows = allow(ROWS, read_allowances([allowance()]), TODAY)
    suite = ET.fromstring(junit_of(rows, suite="verify x", seconds=1.5))[0]  # noqa: S314 - our own
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "0", "2")
    assert [case.get("name") for case in suite] == ["public.a", "public.b", "public.c"]
    assert "goes next week" in suite[0][0].get("message")
    failing = ET.fromstring(junit_of(ROWS, suite="x", seconds=0))[0]  # noqa: S314 - our own
    assert failing[0][0].tag == "failure"
    assert failing.get("failures") == "1"
    strict = ET.fromstring(junit_of(ROWS, suite="x", seconds=0, unexpected_fails=True))[0]  # noqa: S314 - our own
    assert (strict.get("failures"), strict.get("skipped"), strict[1][0].tag) == ("2", "0", "failure")
