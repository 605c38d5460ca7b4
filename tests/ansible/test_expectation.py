"""The committed expectation is what sql/ comes to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools import expect

if TYPE_CHECKING:
    from pathlib import Path

    from tools.cluster import Cluster


def test_expected_yml_is_what_the_migrations_make(cluster: Cluster, tmp_path: Path) -> None:
    made = expect.expectation(cluster, tmp_path).splitlines()
    committed = expect.TARGET.read_text(encoding="utf-8").splitlines()
    assert made == committed, "run ./runbook expect, and read the difference before you commit it"
