"""ansible.cfg: what it names is there, and AWX can take it."""

from __future__ import annotations

import configparser

import pytest

from tests.support import PROJECT


@pytest.fixture(scope="module")
def defaults():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(PROJECT / "ansible.cfg", encoding="utf-8")
    return parser["defaults"]


@pytest.mark.parametrize("name", ["collections_path", "roles_path", "inventory"])
def test_paths_are_one_each_relative_and_there(defaults, name):
    assert ":" not in defaults[name]
    assert "," not in defaults[name]
    assert defaults[name].startswith("./")
    assert (PROJECT / defaults[name]).is_dir()


def test_the_collection_and_its_callback_lie_where_they_are_looked_for(defaults):
    namespace, collection, callback = defaults["stdout_callback"].split(".")
    folder = PROJECT / defaults["collections_path"] / "ansible_collections" / namespace / collection
    assert (folder / "galaxy.yml").is_file()
    assert (folder / "plugins/callback" / f"{callback}.py").is_file()


def test_nothing_reaches_beyond_the_project(defaults):
    assert not {"log_path", "fact_caching", "vault_password_file", "remote_user", "private_key_file"} & set(defaults)


def test_facts_are_not_gathered_and_not_injected(defaults):
    assert defaults["gathering"] == "explicit"
    assert defaults.getboolean("inject_facts_as_vars") is False
