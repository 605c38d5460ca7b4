"""The linters and the tests, in one place for people, pre-commit and CI."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from tools import child, console, majors
from tools.project import COLLECTION, ROOT, VENV_PYTHON, environment

if TYPE_CHECKING:
    from collections.abc import Mapping

_REPORT = ROOT / ".cache" / "pytest.xml"
# A file's tests on one major stay together, in the order of tests/conftest.py: each worker makes a cluster at a time.
_IN_PARALLEL = ["--dist=loadgroup", "--no-loadscope-reorder"]
_WORKERS = max(2, len(os.sched_getaffinity(0)))  # tests wait for servers and children: two are never too many
_NO_TESTS = 5  # pytest's exit status where it found none


@dataclass(frozen=True)
class Outcome:
    """How something went, in pytest's terms, and its exit status."""

    status: int = 0
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.status or other.status,
            self.passed + other.passed,
            self.failed + other.failed,
            self.skipped + other.skipped,
        )

    def __str__(self) -> str:
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return f"{self.passed} passed, {self.failed} failed{skipped}"


def test_everything() -> int:
    """Run the linters, pytest and Molecule, all of them in any case, and close with the total of the three."""
    outcome = lint()
    majors.ensure_all()
    console.heading("pytest")
    total = outcome + pytest([f"--numprocesses={_WORKERS}", *_IN_PARALLEL]) + _molecule()
    print(f"\n{total}")
    return total.status


def lint() -> Outcome:
    """Run every linter, two at a time, and print a line for each; the output only of those that found something."""
    console.heading("Lint")
    env = environment()
    outcome = Outcome()
    with ThreadPoolExecutor(max_workers=2) as pool:
        for future in as_completed([pool.submit(_lint_one, name, command, env) for name, command in _linters()]):
            name, seconds, result = future.result()
            if result.returncode == 0:
                console.good(name, seconds)
                outcome += Outcome(passed=1)
            else:
                console.bad(name, seconds)
                print(result.stdout.rstrip())
                outcome += Outcome(status=1, failed=1)
    return outcome


def format_code() -> int:
    """Let ruff repair what it can."""
    return max(child.run(["ruff", *command, "."]) for command in (["check", "--fix-only", "--quiet"], ["format"]))


def tool(name: str, arguments: list[str], variables: Mapping[str, str] | None = None) -> int:
    """Run one of our own tools that needs the virtual environment, with these variables besides."""
    command = [str(VENV_PYTHON), "-m", f"tools.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment() | dict(variables or {}), check=False).returncode


def pytest(arguments: list[str]) -> Outcome:
    """Run pytest with its own output, and count from its report."""
    _REPORT.unlink(missing_ok=True)
    command = [str(VENV_PYTHON), "-m", "pytest", *arguments, f"--junit-xml={_REPORT}"]
    status = child.run(command, stdin=None)
    if not _REPORT.exists():
        if status:
            console.bad(f"pytest ended with status {status} before it could report")
        return Outcome(status=status, failed=int(status != 0))
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ET.parse(_REPORT).getroot().iter("testsuite"):  # noqa: S314 - pytest wrote it a moment ago
        for name in counts:
            counts[name] += int(suite.get(name, "0"))
    failed = counts["failures"] + counts["errors"]
    return Outcome(
        status=status,
        passed=counts["tests"] - failed - counts["skipped"],
        failed=failed or int(status not in (0, _NO_TESTS)),
        skipped=counts["skipped"],
    )


def _molecule() -> Outcome:
    """Run the Molecule scenarios, passing their lines on, and count from the closing one."""
    console.heading("Molecule")
    passed, failed = 0, 0
    command = [str(VENV_PYTHON), "-m", "tools.molecule_run"]
    with child.attended(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if match := re.match(r"(\d+) passed, (\d+) failed\b", line):
                passed, failed = int(match[1]), int(match[2])
    return Outcome(process.returncode, passed, failed or int(process.returncode != 0))


def _linters() -> list[tuple[str, list[str]]]:
    """Return the linters, the slowest first."""
    collection = str(COLLECTION.relative_to(ROOT))
    return [
        ("ansible-lint", ["ansible-lint", "-q", "--offline", "--strict", "--nocolor"]),
        ("antsibull-docs", ["antsibull-docs", "lint-collection-docs", "--plugin-docs", collection]),
        ("mypy", ["mypy"]),
        ("yamllint", ["yamllint", "--strict", "."]),
        ("ruff check", ["ruff", "check", "."]),
        ("ruff format", ["ruff", "format", "--check", "--diff", "."]),
        ("shellcheck", ["shellcheck", ".ci/run", *_shell_scripts()]),
    ]


def _shell_scripts() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("[!.]*/**/*.sh"))


def _lint_one(
    name: str, command: list[str], env: dict[str, str]
) -> tuple[str, float, subprocess.CompletedProcess[str]]:
    watch = console.Stopwatch()
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    return name, watch.seconds, result
