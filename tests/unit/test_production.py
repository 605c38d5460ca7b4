"""Which environments are production, by their name: no other environment's data ever replaces theirs."""

from __future__ import annotations

import pytest
import yaml
from ansible_collections.settler.runbook.plugins.module_utils._rollback import PRODUCTION, is_production
from ansible_collections.settler.runbook.plugins.modules import restore

from tests.support import PROJECT


@pytest.mark.parametrize(
    "name",
    [
        "prod",
        "production",
        "PROD",
        "prod-eu",
        "eu-prod",
        "customer_production",
        "prd",
        "prd2",
        "live",
        "eu.live",
        "main",
    ],
)
def test_production_is_known_anywhere_in_the_name(name):
    assert is_production(name, PRODUCTION)


@pytest.mark.parametrize("name", ["local", "staging", "test", "preprod", "olive", "maintenance", "domain", "reproduce"])
def test_what_only_has_the_letters_is_not(name):
    assert not is_production(name, PRODUCTION)


def test_it_is_said_alike_wherever_it_is_said():
    everywhere = yaml.safe_load((PROJECT / "playbooks/group_vars/all.yml").read_text(encoding="utf-8"))
    assert everywhere["runbook_production"] == PRODUCTION
    assert yaml.safe_load(restore.DOCUMENTATION)["options"]["production"]["default"] == PRODUCTION
