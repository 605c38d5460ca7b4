"""Roles: defaults, argument specification and README say the same."""

from __future__ import annotations

import pytest
import yaml

from tests.support import PROJECT

ROLES = sorted(path for path in (PROJECT / "roles").iterdir() if path.is_dir())
TYPES = {"str", "int", "float", "bool", "list", "dict", "path", "raw"}
each_role = pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def options_of(role):
    return read(role / "meta/argument_specs.yml")["argument_specs"]["main"]["options"]


def test_all_roles_are_here():
    assert {role.name for role in ROLES} >= {"preflight", "create_database", "backup", "migrate", "verify", "rollback"}


@each_role
def test_defaults_are_those_of_the_specification(role):
    specified = {name: option["default"] for name, option in options_of(role).items() if "default" in option}
    assert read(role / "defaults/main.yml") == specified


@each_role
def test_option_without_a_default_is_required(role):
    open_ends = [name for name, option in options_of(role).items() if "default" not in option]
    assert [name for name in open_ends if options_of(role)[name].get("required") is not True] == []


@each_role
def test_every_option_has_a_type_and_a_sentence(role):
    for name, option in options_of(role).items():
        assert option.get("type") in TYPES, name
        assert option["description"].rstrip().endswith("."), name
        if option["type"] == "list":
            assert option.get("elements") in TYPES, name


@each_role
def test_variables_carry_the_roles_name(role):
    assert [name for name in read(role / "defaults/main.yml") if not name.startswith(f"{role.name}_")] == []


@each_role
def test_secrets_are_not_logged(role):
    for name, option in options_of(role).items():
        if name.endswith("password"):
            assert option.get("no_log") is True, name


@each_role
def test_other_entry_points_have_tasks(role):
    for entry in read(role / "meta/argument_specs.yml")["argument_specs"]:
        assert (role / "tasks" / f"{entry}.yml").is_file(), entry


@each_role
def test_readme_has_every_variable(role):
    text = (role / "README.md").read_text(encoding="utf-8")
    assert [name for name in options_of(role) if name not in text] == []
