"""The generator's rows: the same everywhere, shared out by skew, and every tenant its own."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise

import pytest

from tools import generate, legacy
from tools.project import ToolError
from tools.values import NULL


def digest(**changes) -> str:
    options = {"shape": "materialized_views", "rows": 3000, "tenants": 5, "seed": 7, "skew": 1.0} | changes
    found = hashlib.sha256()
    for name, columns, pieces in generate.stream(**options):
        found.update(f"{name} {columns}\n".encode())
        for piece in pieces:
            found.update(piece)
    return found.hexdigest()


def table(name: str, **options) -> list[dict[str, str]]:
    """Return the rows of one table of the present schema."""
    found = []
    for other, columns, pieces in generate.stream(shape=legacy.CURRENT, **options):
        for piece in pieces:
            if other == name:
                found += [dict(zip(columns, line.split("\t"), strict=True)) for line in piece.decode().split("\n")[:-1]]
    return found


def test_the_same_seed_makes_the_same_rows_on_every_machine_and_python() -> None:
    # Of this generator: a change of what it makes changes the digest, and nothing else may.
    assert digest() == "f69475dc3dbfcf975f2bdfa4595d9147209ca88deb89fd17533d7869982e970b"


@pytest.mark.parametrize("change", [{"seed": 8}, {"tenants": 6}, {"skew": 0.5}, {"rows": 3100}, {"shape": "current"}])
def test_whatever_is_asked_for_otherwise_makes_other_rows(change) -> None:
    assert digest(**change) != digest()


@pytest.mark.parametrize("skew", [0, 1, 1.7])
def test_a_tenants_share_is_what_the_skew_says(skew) -> None:
    rows = table("matches", rows=30_000, tenants=8, skew=skew)
    ranks = [row["id"] for row in table("tenants", rows=30_000, tenants=8, skew=skew)]
    found = Counter(row["tenant_id"] for row in rows)
    weights = [1 / k**skew for k in range(1, 9)]
    for rank, weight in zip(ranks, weights, strict=True):
        expected = len(rows) * weight / sum(weights)
        assert abs(found[rank] - expected) < 5 * expected**0.5
    if skew:
        assert all(found[larger] > found[smaller] for larger, smaller in pairwise(ranks))


def test_every_tenant_has_rows_of_its_own_whatever_the_skew() -> None:
    for name in ("users", "jobs", "executions", "matches", "webhook_payloads", "idempotency_keys"):
        assert len({row["tenant_id"] for row in table(name, rows=20_000, tenants=100, skew=3)}) == 100, name


def test_tenants_make_a_deep_tree_and_its_roots_are_few() -> None:
    parents = {row["id"]: row["parent_tenant_id"] for row in table("tenants", rows=0, tenants=200)}

    def depth(tenant: str) -> int:
        return 0 if tenant == NULL else 1 + depth(parents[tenant])

    assert sum(parent == NULL for parent in parents.values()) == 4
    assert max(map(depth, parents)) > 20


@pytest.mark.parametrize("change", [{"tenants": 0}, {"rows": -1}, {"skew": -1}, {"skew": float("nan")}])
def test_what_makes_no_sense_is_refused(change) -> None:
    with pytest.raises(ToolError, match="one tenant at least"):
        digest(**change)
