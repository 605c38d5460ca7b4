"""Versions that are said in several places are the same in all of them."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import ansible_collections
import yaml

from tools.project import ROOT

BUNDLE = [Path(path) for path in ansible_collections.__path__ if "site-packages" in str(path)]


def bundled_version(collection: str) -> str:
    """Return the version of a collection in PyPI's ansible distribution."""
    manifest = BUNDLE[0].joinpath(*collection.split("."), "MANIFEST.json")
    return json.loads(manifest.read_text())["collection_info"]["version"]


def test_collections_for_galaxy_are_those_of_the_bundle() -> None:
    wanted = yaml.safe_load((ROOT / "collections" / "requirements.yml").read_text())["collections"]
    assert {row["name"]: row["version"] for row in wanted} == {
        row["name"]: bundled_version(row["name"]) for row in wanted
    }


def test_every_collection_that_is_used_is_required() -> None:
    wanted = yaml.safe_load((ROOT / "collections" / "requirements.yml").read_text())["collections"]
    files = [path for folder in ("roles", "playbooks", "molecule") for path in (ROOT / folder).rglob("*.yml")]
    used = {match for path in files for match in re.findall(r"\b(community\.\w+)\.\w+", path.read_text())}
    assert used == {row["name"] for row in wanted}


def test_the_execution_environment_has_the_pins_of_the_control_node() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    image = yaml.safe_load((ROOT / "execution-environment.yml").read_text())["dependencies"]
    pinned = {*image["python"], image["ansible_runner"]["package_pip"]}
    assert pinned == {pin for pin in project if not pin.startswith("ansible==")}


def test_the_lock_pins_what_is_installed() -> None:
    lock = dict(
        re.findall(r"^([a-z0-9.-]+)(?:\[[^]]*\])?==([^ \\;]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    )
    for name in ("ansible", "ansible-runner", "psycopg", "pglast", "molecule", "ansible-lint"):
        assert lock[name] == importlib.metadata.version(name)


def test_no_registry_is_named_in_the_lock() -> None:
    assert "://" not in (ROOT / "requirements.lock").read_text()
