"""Children that share our terminal, and that do not outlive us."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from typing import TYPE_CHECKING, Any

from tools.project import ROOT, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATIENCE = 30.0  # seconds to clean up in, after each request to stop


@contextlib.contextmanager
def attended(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a program in the project's folder and environment. If we are interrupted meanwhile, it ends first."""
    defaults: dict[str, Any] = {"cwd": ROOT, "env": environment(), "stdin": subprocess.DEVNULL, "encoding": "utf-8"}
    with subprocess.Popen(command, **(defaults | {"errors": "replace"} | options)) as process:
        try:
            yield process
        except BaseException:
            _see_off(process)
            raise


def run(command: list[str], **options: Any) -> int:
    """Run a program to its end and return its exit status, as a shell would number it."""
    with attended(command, **options) as process:
        status = process.wait()
    return status if status >= 0 else 128 - status


def stop_on_sigterm() -> None:
    """Make SIGTERM a Ctrl-C, once: what cleans up then is not disturbed by a second one."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_number: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _see_off(process: subprocess.Popen[str]) -> None:
    """Let a child clean up. A Ctrl-C has reached it too; whatever else ends us may not have."""
    for stop in (process.terminate, process.kill):
        stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
            return
