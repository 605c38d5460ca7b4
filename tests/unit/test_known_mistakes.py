"""The eighteen mistakes of the field that were reproduced: which test would fail if one of them came to us."""

from __future__ import annotations

import re

import pytest

from tests.support import PROJECT

#: What went wrong elsewhere, and the tests that stand against it.
MISTAKES = {
    "01 UNIQUE (…) WHERE … in a table and NOW() in an index predicate: the table is missing, psql ends 0": (
        "integration/test_schema.py::test_tables_are_what_the_facts_say",
        "integration/test_schema.py::test_an_ip_is_blocked_again_after_the_block_was_lifted",
        "unit/test_psql_calls.py::test_every_call_of_psql_stops_at_the_first_error_and_reads_no_settings_of_the_user",
    ),
    "02 CREATE POLICY IF NOT EXISTS: a second run fails on policies and triggers": (
        "integration/test_schema.py::test_a_second_run_changes_nothing_and_its_repeatable_files_lock_no_table",
    ),
    "03 ADD COLUMN IF NOT EXISTS alone: indexes and policies on columns that an old table lacks": (
        "integration/test_schema.py::test_every_old_shape_becomes_the_same_schema_and_keeps_every_row",
    ),
    "04 RESET leaves '', which is no uuid: every query of the pool fails": (
        "integration/test_schema.py::test_a_session_without_a_tenant_sees_and_writes_nothing",
    ),
    "05 isolation checked as a superuser or as the owner": (
        "integration/test_verify_module.py::test_application_role_that_no_policy_binds_is_caught",
        "integration/test_preflight.py::test_application_that_is_not_bound_by_policies_fails",
    ),
    "06 GRANT ALL ON DATABASE gives the application no row": (
        "ansible/test_playbooks.py::test_setup_lets_the_application_work_and_keeps_public_out",
    ),
    "07 tables without a policy": (
        "integration/test_schema.py::test_every_table_has_its_policies_and_every_policy_both_sides",
        "integration/test_schema.py::test_a_tenant_sees_its_own_rows_and_no_others",
    ),
    "08 UNIQUE lets NULL in twice": (
        "integration/test_schema.py::test_duplicates_are_refused_with_null_too",
        "integration/test_schema.py::test_old_rows_against_a_rule_are_kept_and_named_and_the_next_run_goes_on",
    ),
    "09 get_events_after_snapshot fails at its first call": (
        "integration/test_schema.py::test_events_and_snapshots_of_an_aggregate",
    ),
    "10 quotas lose the first increment, answer NULL, count no month, refuse every domain": (
        "integration/test_schema.py::test_quotas_count_from_the_first_increment",
        "integration/test_schema.py::test_reconciliations_are_counted_by_the_month",
        "integration/test_schema.py::test_quotas_without_counter_and_unknown_ones",
    ),
    "11 information_schema lists functions of extensions, triggers twice, and nothing to a role without rights": (
        "integration/test_verify_module.py::test_ledger_and_extensions_are_nobodys_business",
        "ansible/test_expectation.py::test_the_expectations_are_what_the_migrations_make",
    ),
    "12 a dump by a role that does not see all rows": (
        "integration/test_backup_restore.py::test_role_that_is_blind_through_forced_row_security_is_refused",
        "integration/test_backup_restore.py::test_application_role_cannot_make_a_partial_backup",
    ),
    "13 a dump restored over a database that is not empty, or a truncated one, ends 0": (
        "integration/test_backup_restore.py::test_any_damage_of_any_file_is_refused_before_anything_is_touched",
        "integration/test_backup_restore.py::test_restore_that_does_not_match_its_manifest_never_takes_the_place",
    ),
    "14 the restored database has lost its grants and settings": (
        "integration/test_backup_restore.py::test_restore_brings_back_everything_and_keeps_the_failed_database",
    ),
    "15 dropdb before the backup is known to restore": (
        "integration/test_backup_restore.py::test_half_restore_is_dropped_by_the_next_and_nothing_else",
        "integration/test_backup_restore.py::test_sessions_of_the_application_are_ended_for_the_swap",
    ),
    "16 two runs at once on a fresh database": (
        "integration/test_migrate.py::test_two_runs_at_once_on_a_fresh_database_apply_everything_once",
    ),
    "17 DDL behind an open transaction blocks every later reader": (
        "integration/test_migrate.py::test_readers_wait_no_longer_than_the_lock_timeout",
        "integration/test_schema.py::test_writers_go_on_while_indexes_are_built_and_rules_are_proved",
        "integration/test_schema.py::test_what_takes_time_takes_no_lock_that_a_writer_waits_for",
    ),
    "18 REFRESH … CONCURRENTLY of a view that is not there, or never filled": (
        "integration/test_schema.py::test_statistics_are_right_and_refreshed_while_they_are_read",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_has_tests_against_it(mistake: str) -> None:
    for name in MISTAKES[mistake]:
        path, _colons, test = name.partition("::")
        text = (PROJECT / "tests" / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {test}\(", text, re.MULTILINE), f"{name} is gone"


def test_each_mistake_that_leaves_something_is_made_again_for_verification_to_name() -> None:
    """15 and 17 leave nothing in a database: a copy is gone, and readers have waited."""
    text = (PROJECT / "tests/integration/test_known_mistakes.py").read_text(encoding="utf-8")
    made = set(re.findall(r'^    "(\d\d) [^"]+": \($|^def test_(\d\d)_', text, re.MULTILINE))
    assert {one or other for one, other in made} == {mistake[:2] for mistake in MISTAKES} - {"15", "17"}


def test_all_eighteen_are_there() -> None:
    assert [mistake[:2] for mistake in MISTAKES] == [f"{number:02}" for number in range(1, 19)]
