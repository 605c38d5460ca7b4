"""Migration files: which names count, in which order, and which bytes are refused."""

from __future__ import annotations

import hashlib

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._files import line_at, read_migration, read_migrations

from tests.support import write_migrations


def test_order_is_by_number_and_not_by_name(tmp_path):
    names = ["010_c.sql", "009_b.sql", "1000_e.sql", "0099_d.sql", "001_a.sql"]
    write_migrations(tmp_path, dict.fromkeys(names, "SELECT 1;"))
    assert [file.file for file in read_migrations(tmp_path)] == [
        "001_a.sql", "009_b.sql", "010_c.sql", "0099_d.sql", "1000_e.sql",
    ]  # fmt: skip


def test_version_keeps_its_zeros(tmp_path):
    (file,) = write_migrations(tmp_path, {"0042_add_index_2.sql": "SELECT 1;"})
    assert (file.version, file.order, file.name, file.file) == ("0042", 42, "add_index_2", "0042_add_index_2.sql")


@pytest.mark.parametrize("second", ["007_other.sql", "0007_other.sql"])
def test_one_number_twice_is_refused_by_both_names(tmp_path, second):
    write_migrations(tmp_path, {"007_mine.sql": "SELECT 1;", second: "SELECT 2;"})
    with pytest.raises(RunbookError) as refused:
        read_migrations(tmp_path)
    assert "007_mine.sql" in refused.value.message
    assert second in refused.value.message


@pytest.mark.parametrize(
    "name",
    [
        "1_a.sql", "12_a.sql", "001-a.sql", "001_.sql", "001_A.sql", "001_a b.sql", "001_ä.sql", "001.sql", "a.sql",
        "001_a.down.sql", "V001__a.sql", ".001_a.sql", "\u0660\u0660\u0661_a.sql", "001_a\n.sql",
    ],
)  # fmt: skip
def test_wrong_name_stops_the_run_instead_of_being_skipped(tmp_path, name):
    (tmp_path / name).write_text("SELECT 1;", encoding="utf-8")
    with pytest.raises(RunbookError, match="not a migration's name") as refused:
        read_migrations(tmp_path)
    assert name in refused.value.message
    assert "NNN_name.sql" in refused.value.hint


def test_sql_in_capitals_is_not_skipped_in_silence(tmp_path):
    write_migrations(tmp_path, {"001_a.sql": "SELECT 1;"})
    (tmp_path / "002_b.SQL").write_text("SELECT 1;", encoding="utf-8")
    with pytest.raises(RunbookError, match=r"002_b\.SQL"):
        read_migrations(tmp_path)


def test_other_files_do_not_count(tmp_path):
    for name in ("README.md", "001_a.sql.bak", "001_a.sql~", ".gitkeep"):
        (tmp_path / name).write_text("no SQL", encoding="utf-8")
    assert read_migrations(tmp_path) == []


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(RunbookError, match="no such folder") as refused:
        read_migrations(tmp_path / "none")
    assert str(tmp_path / "none") in refused.value.message


def test_nul_byte_is_refused_with_its_line(tmp_path):
    path = tmp_path / "001_a.sql"
    path.write_bytes(b"SELECT 1;\r\nSELECT 'b\0';\nSELECT 3;\n")
    with pytest.raises(RunbookError) as refused:
        read_migration(path)
    assert refused.value.message == f"{path}:2: NUL byte"


@pytest.mark.parametrize("broken", [b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xc0\xaf", "ü".encode("latin-1")])
def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path, broken):
    path = tmp_path / "001_a.sql"
    path.write_bytes("-- ü\n-- 漢\n--".encode() + broken + b"\n")
    with pytest.raises(RunbookError) as refused:
        read_migration(path)
    assert refused.value.message.startswith(f"{path}:3: not UTF-8")


def test_utf16_is_refused(tmp_path):
    path = tmp_path / "001_a.sql"
    path.write_bytes("SELECT 1;".encode("utf-16"))
    with pytest.raises(RunbookError, match=f"{path}:1: "):
        read_migration(path)


def test_one_byte_order_mark_is_stripped_and_only_one(tmp_path):
    once, twice = write_migrations(
        tmp_path, {"001_a.sql": b"\xef\xbb\xbfSELECT 1;", "002_b.sql": b"\xef\xbb\xbf\xef\xbb\xbfSELECT 1;"}
    )
    assert once.text == "SELECT 1;"
    assert twice.text == "\ufeffSELECT 1;"


def test_checksum_does_not_depend_on_line_ends_or_mark(tmp_path):
    text = "SELECT 1;\n\n-- ü\nSELECT 2;\n"
    forms = [
        text.encode(), text.replace("\n", "\r\n").encode(), text.replace("\n", "\r").encode(),
        "\ufeff".encode() + text.encode(),
    ]  # fmt: skip
    files = write_migrations(tmp_path, {f"00{number}_a.sql": form for number, form in enumerate(forms)})
    assert {file.text for file in files} == {text}
    assert {file.checksum for file in files} == {hashlib.sha256(text.encode()).hexdigest()}


@pytest.mark.parametrize("other", ["SELECT 1; ", "SELECT 1", "SELECT 1;\n", "select 1;", "\nSELECT 1;"])
def test_checksum_notices_every_other_change(tmp_path, other):
    files = write_migrations(tmp_path, {"001_a.sql": "SELECT 1;", "002_b.sql": other})
    assert files[0].checksum != files[1].checksum


def test_line_at_counts_from_one():
    assert [line_at("a\nb\n", offset) for offset in range(5)] == [1, 1, 2, 2, 3]
    assert line_at(b"a\nb", 2) == 2
