"""The manifest: it proves its own bytes and those of every file of a backup."""

from __future__ import annotations

import json
import shutil
import stat

import pytest
from ansible_collections.settler.runbook.plugins.module_utils import _manifest
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from hypothesis import given, settings
from hypothesis import strategies as st

CONTENT = {"format": 1, "run_id": "r1", "environment": "ü", "database": 'a"b', "rows": 3, "finished_at": "2026"}


@pytest.fixture
def backup(tmp_path):
    """A folder as a backup is: some files, and the manifest that names them."""
    (tmp_path / "dump").mkdir()
    (tmp_path / "dump" / "toc.dat").write_bytes(bytes(range(256)))
    (tmp_path / "dump" / "4242.dat.gz").write_bytes(b"rows")
    (tmp_path / "catalogue.json").write_text("{}", encoding="utf-8")
    return seal(tmp_path)


def seal(folder, **changes):
    content = {**CONTENT, "files": _manifest.file_digests(folder), **changes}
    (folder / _manifest.NAME).write_text(_manifest.seal(content), encoding="utf-8")
    return folder


def refused(folder):
    with pytest.raises(RunbookError) as caught:
        _manifest.check_files(folder, _manifest.read_manifest(folder))
    return caught.value.facts["problems"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text().filter(lambda key: key not in ("manifest_sha256", "format")), json_values))
def test_what_was_sealed_is_what_is_read(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("backup")
    (folder / _manifest.NAME).write_bytes(_manifest.seal({**content, "format": 1}).encode("utf-8", "surrogatepass"))
    assert _manifest.read_manifest(folder) == {**content, "format": 1}


def test_whole_backup_passes(backup):
    manifest = _manifest.read_manifest(backup)
    assert sorted(manifest["files"]) == ["catalogue.json", "dump/4242.dat.gz", "dump/toc.dat"]
    _manifest.check_files(backup, manifest)


def test_no_bit_of_the_manifest_can_change_what_it_says(backup):
    path = backup / _manifest.NAME
    whole, said, told = path.read_bytes(), _manifest.read_manifest(backup), set()
    for position in range(len(whole)):
        for bit in (1, 4, 32):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
            try:
                assert _manifest.read_manifest(backup) == said
            except RunbookError as error:
                told.add(error.message.partition(": ")[0])
    assert told == {str(path)}


@pytest.mark.parametrize("kept", [0, 1, 100, -2])
def test_truncated_manifest_is_damaged(backup, kept):
    path = backup / _manifest.NAME
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(RunbookError, match="damaged"):
        _manifest.read_manifest(backup)


@pytest.mark.parametrize("text", ["[]", "1", "null", '"x"', "{}", "\xff"])
def test_manifest_of_another_shape_is_damaged(tmp_path, text):
    (tmp_path / _manifest.NAME).write_text(text, encoding="latin-1")
    with pytest.raises(RunbookError, match="damaged"):
        _manifest.read_manifest(tmp_path)


def test_missing_manifest_is_said_so(tmp_path):
    with pytest.raises(RunbookError, match=r"no backup: manifest\.json is missing"):
        _manifest.read_manifest(tmp_path)


def test_other_format_is_refused(tmp_path):
    seal(tmp_path, format=3)
    with pytest.raises(RunbookError, match="format 3, this version reads 1 and 2"):
        _manifest.read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["dump/toc.dat", "dump/4242.dat.gz", "catalogue.json"])
def test_each_damage_of_each_file_is_named(backup, name):
    path = backup / name
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert refused(backup) == [f"{name}: checksum does not fit"]
    path.write_bytes(content[:-1])
    assert refused(backup) == [f"{name}: {len(content) - 1} bytes, the manifest says {len(content)}"]
    path.write_bytes(content + b"\n")
    assert refused(backup) == [f"{name}: {len(content) + 1} bytes, the manifest says {len(content)}"]
    path.unlink()
    assert refused(backup) == [f"{name}: missing"]
    path.write_bytes(content)
    _manifest.check_files(backup, _manifest.read_manifest(backup))


def test_all_problems_are_named_at_once(backup):
    (backup / "dump" / "toc.dat").unlink()
    (backup / "catalogue.json").write_text("[]", encoding="utf-8")
    (backup / "dump" / "extra").touch()
    assert sorted(refused(backup)) == [
        "catalogue.json: checksum does not fit", "dump/extra: not in the manifest", "dump/toc.dat: missing",
    ]  # fmt: skip


def test_lost_folder_names_its_files(backup):
    for path in (backup / "dump").iterdir():
        path.unlink()
    (backup / "dump").rmdir()
    assert refused(backup) == ["dump/4242.dat.gz: missing", "dump/toc.dat: missing"]


def test_backups_are_listed_newest_first_and_damaged_ones_last(tmp_path):
    home = tmp_path / "settler"
    for run, finished in (("r1", "2026-01-01"), ("r3", "2026-03-01"), ("r2", "2026-02-01")):
        (home / run).mkdir(parents=True)
        seal(home / run, run_id=run, finished_at=finished)
    (home / "broken").mkdir()
    (home / "broken" / _manifest.NAME).write_text(json.dumps(CONTENT), encoding="utf-8")
    (home / ".r4.partial").mkdir()
    (home / ".lock").touch()
    rows = _manifest.list_backups(tmp_path, "settler")
    assert [row["run_id"] for row in rows] == ["r3", "r2", "r1", "broken"]
    assert [bool(row["error"]) for row in rows] == [False, False, False, True]
    assert [row["proof"] for row in rows] == [None] * 4
    assert rows[0]["path"] == str(home / "r3")
    assert _manifest.list_backups(tmp_path, "other") == []


@pytest.mark.parametrize("name", ["a/b", "../up", "..", ".hidden"])
def test_no_name_of_a_database_leads_out_of_the_backup_folder(tmp_path, name):
    home = _manifest.home_of(tmp_path, name)
    assert home.parent == tmp_path
    assert not home.name.startswith(".")
    assert _manifest.home_of(tmp_path, "settler") == tmp_path / "settler"


def test_a_backup_lists_as_damaged_by_its_sizes_and_on_demand_by_its_checksums(tmp_path, backup):
    place = tmp_path / "home" / "settler" / "r1"
    place.parent.mkdir(parents=True)
    shutil.copytree(backup, place, ignore=shutil.ignore_patterns("home"))
    path = place / "dump" / "toc.dat"
    content = path.read_bytes()

    def errors(**options):
        return [row["error"] for row in _manifest.list_backups(tmp_path / "home", "settler", **options)]

    assert errors(checksums=True) == [""]
    path.write_bytes(b"\xff" + content[1:])
    assert errors() == [""]
    assert "dump/toc.dat: checksum does not fit" in errors(checksums=True)[0]
    path.write_bytes(content[1:])
    assert "dump/toc.dat: 255 bytes, the manifest says 256" in errors()[0]


# The proof of a drill


def test_proof_is_read_as_it_was_written_and_is_no_part_of_the_manifest(backup):
    assert _manifest.read_proof(backup) is None
    wrote = _manifest.write_proof(backup, {"counts_match": True, "minutes": 1.5, "to": "ü"})
    assert _manifest.read_proof(backup) == wrote
    assert (wrote["minutes"], wrote["to"], wrote["at"][:2]) == (1.5, "ü", "20")
    assert stat.S_IMODE((backup / _manifest.PROOF).stat().st_mode) == 0o600
    _manifest.check_files(backup, _manifest.read_manifest(backup))
    again = _manifest.write_proof(backup, {"counts_match": True, "minutes": 2})
    assert _manifest.read_proof(backup) == again
    assert not list(backup.glob(".*"))


def test_no_bit_of_a_proof_can_change_what_it_says(backup):
    said = _manifest.write_proof(backup, {"counts_match": True})
    path = backup / _manifest.PROOF
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert _manifest.read_proof(backup) in (said, None)
    path.write_bytes(whole[: len(whole) // 2])
    assert _manifest.read_proof(backup) is None


@pytest.mark.parametrize("facts", [{}, {"counts_match": False}, {"counts_match": 1}])
def test_proof_that_does_not_say_that_the_counts_matched_proves_nothing(backup, facts):
    _manifest.write_proof(backup, facts)
    assert _manifest.read_proof(backup) is None


def test_proof_of_another_backup_proves_nothing(backup):
    _manifest.write_proof(backup, {"counts_match": True})
    seal(backup, run_id="other")
    assert _manifest.read_proof(backup) is None


def test_damaged_backup_cannot_be_proven(backup):
    (backup / _manifest.NAME).write_text("{", encoding="utf-8")
    for call in (lambda: _manifest.write_proof(backup, {"counts_match": True}), lambda: _manifest.read_proof(backup)):
        with pytest.raises(RunbookError, match="damaged"):
            call()
    assert not (backup / _manifest.PROOF).exists()


def test_what_a_killed_drill_left_is_no_damage(backup):
    (backup / f".{_manifest.PROOF}.partial").write_text("{", encoding="utf-8")
    _manifest.check_files(backup, _manifest.read_manifest(backup))
    _manifest.write_proof(backup, {"counts_match": True})
    assert not list(backup.glob(".*"))
