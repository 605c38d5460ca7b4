"""Names of a swap: PostgreSQL cuts after 63 bytes in silence, so that a name must never reach the knife."""

from __future__ import annotations

import re

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._swap import is_beside, names_for
from hypothesis import given
from hypothesis import strategies as st

names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: len(name.encode()) <= 63
)
runs = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyz0123456789-"), min_size=1, max_size=40)


def test_short_names_are_kept_whole():
    made = names_for("settler", "20261123t031500-4f2a")
    assert made.real == "settler"
    assert made.restored == "settler_restore_20261123t031500_4f2a"
    assert made.failed == "settler_failed_20261123t031500_4f2a"


@given(names, runs)
def test_names_fit_and_keep_the_run(database, run_id):
    made = names_for(database, run_id)
    assert made.real == database
    for name in (made.restored, made.failed):
        assert len(name.encode()) <= 63
        assert name.endswith("_" + re.sub("-+", "_", run_id))
    assert len({made.real, made.restored, made.failed}) == 3


@given(names, runs)
def test_what_is_left_of_the_database_is_its_beginning(database, run_id):
    made = names_for(database, run_id)
    start = made.failed[: made.failed.rindex("_failed_")]
    assert database.startswith(start)
    assert "\ufffd" not in made.failed


@pytest.mark.parametrize("letter", ["ü", "漢", "😀"])
def test_no_letter_is_cut_in_half(letter):
    database = letter * (63 // len(letter.encode()))
    for name in (names_for(database, "run-1").failed, names_for(database, "run-22").failed):
        assert len(name.encode()) <= 63
        assert set(name[: name.index("_failed_")]) == {letter}


def test_the_run_is_whole_at_the_end_of_a_long_name():
    assert names_for("d" * 63, "20261123t031500-4f2a").restored.endswith("d_restore_20261123t031500_4f2a")


@given(names, runs)
def test_a_name_beside_a_database_is_known_again_also_where_it_was_cut(database, run_id):
    made = names_for(database, run_id)
    assert is_beside(made.restored, database, "restore")
    assert is_beside(made.failed, database, "failed")
    assert not is_beside(made.failed + "Ä", database, "failed")
    assert not is_beside("_" + made.restored, database, "restore")


def test_name_of_a_database_may_look_like_one_beside_it():
    assert is_beside("a_restore_restore_b", "a_restore", "restore")
    assert is_beside("a_restore_restore_b", "a", "restore")
    assert not is_beside("a_restore_restore_b", "b", "restore")


def test_signs_of_a_run_become_harmless():
    assert names_for("d", "Job #42: Ä").failed == "d_failed_job_42_"


@pytest.mark.parametrize("length", [46, 60, 100])
def test_even_a_very_long_run_leaves_names_that_fit(length):
    made = names_for("settler", "r" * length)
    assert max(len(name.encode()) for name in (made.restored, made.failed)) <= 63
    assert len({made.real, made.restored, made.failed}) == 3
