"""The committed expectations are what sql/ comes to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools import expect

if TYPE_CHECKING:
    from pathlib import Path

    from tools.cluster import Cluster


def test_the_expectations_are_what_the_migrations_make(cluster: Cluster, tmp_path: Path) -> None:
    for path, text in expect.expectations(cluster, tmp_path).items():
        committed = path.read_text(encoding="utf-8").splitlines()
        assert text.splitlines() == committed, "run ./runbook expect, and read the difference before you commit it"
