"""The bench: its table, its medians, and the files that it writes for each tool."""

from __future__ import annotations

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._files import read_migrations
from ansible_collections.settler.runbook.plugins.module_utils._statements import parse

from tools import bench, bench_backup


def test_ratios_are_to_the_base_and_a_row_without_a_figure_has_its_note():
    lines = bench.table("t", [("a", 2.0, ""), ("b", 1.0, ""), ("c", None, "keeps no ledger")], "a")
    assert [line.split() for line in lines] == [
        ["t"], ["a", "2.000", "s", "1.00", "×"], ["b", "1.000", "s", "0.50", "×"], ["c", "–", "keeps", "no", "ledger"]
    ]  # fmt: skip


def test_the_median_of_nothing_is_no_figure():
    assert (bench.median([3, 1, 2]), bench.median([])) == (2, None)


@pytest.mark.parametrize("tool", bench.TOOLS, ids=lambda tool: tool.name)
def test_each_tool_gets_as_many_files_with_the_same_statements(tool, tmp_path):
    tool.write(tmp_path, 3)
    texts = [file.read_text() for file in sorted(tmp_path.rglob("*")) if file.is_file()]
    for number in range(1, 4):
        for statement in bench.statements(number):
            assert sum(statement in text for text in texts) == 1


def test_graphile_migrate_gets_hashes_that_chain(tmp_path):
    next(tool for tool in bench.TOOLS if tool.name == "graphile-migrate").write(tmp_path, 2)
    texts = [file.read_text().split("\n") for file in sorted((tmp_path / "migrations/committed").iterdir())]
    assert texts[0][0] == "--! Previous: -"
    assert texts[1][0].removeprefix("--! Previous: ") == texts[0][1].removeprefix("--! Hash: ")


def test_tasks_cost_what_lies_between_their_lines():
    log = """\
2026-01-01 10:00:00,000 p=1 u=x n=ansible INFO| PLAY [Migrate] ****
2026-01-01 10:00:01,500 p=1 u=x n=ansible INFO| TASK [migrate : Plan | Compare] ****
2026-01-01 10:00:02,000 p=1 u=x n=ansible INFO| ok: [db]
2026-01-01 10:00:03,000 p=1 u=x n=ansible INFO| TASK [Report] ****
2026-01-01 10:00:03,250 p=1 u=x n=ansible INFO| PLAY RECAP *****
"""
    assert bench.task_seconds(log) == [("migrate : Plan | Compare", 1.5), ("Report", 0.25)]


def test_the_engine_takes_the_plain_files(tmp_path):
    bench.write_plain(tmp_path, 2)
    assert [len(parse(file).statements) for file in read_migrations(str(tmp_path))] == [2, 2]


def test_the_backup_table_has_ratios_to_its_base_and_the_limit_to_keep():
    rows = {
        "pg_dump > file.sql": {"seconds": 2.0, "processor": 4.0, "bytes": 8_000_000},
        "ours, auto": {"seconds": 1.0, "processor": 5.0, "bytes": 2_000_000},
        "the swap alone": {"seconds": 0.02, "processor": 0.0, "bytes": None},
    }
    lines = bench_backup._table("backup", rows, "pg_dump > file.sql")
    assert " ".join(lines[2].split()) == "ours, auto 1.00 s 0.50 × 5.00 s 1.25 × 2 MB 0.25 × (limit 1.2 ×)"
    assert lines[3].split()[-4:] == ["0.00", "s", "0.00", "×"]
