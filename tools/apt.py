"""Debian packages, where we may install them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tools.project import ToolError

if TYPE_CHECKING:
    from collections.abc import Iterator

_POLICY = Path("/usr/sbin/policy-rc.d")
_POLICY_TEXT = "#!/bin/sh\n# settler-runbook: no package may start a service while we install it\nexit 101\n"


def usable() -> bool:
    """Tell whether packages can be installed: apt-get is here and we are root."""
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def install(*packages: str) -> None:
    """Install packages without their recommendations; refresh the lists only if that is what is missing."""
    result = _apt_get("install", "--no-install-recommends", *packages)
    if result.returncode != 0:
        _apt_get("update")
        result = _apt_get("install", "--no-install-recommends", *packages)
    if result.returncode != 0:
        raise ToolError(f"apt-get could not install {' '.join(packages)}:\n{result.stdout.strip()}")


@contextlib.contextmanager
def no_services() -> Iterator[None]:
    """Keep packages from starting services. A policy that was there comes back, also after a killed run."""
    saved = _POLICY.with_name("policy-rc.d.settler-runbook")
    if os.path.lexists(_POLICY) and not _is_ours():
        _POLICY.replace(saved)
    _POLICY.write_text(_POLICY_TEXT, encoding="ascii")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        if os.path.lexists(saved):
            saved.replace(_POLICY)
        else:
            _POLICY.unlink()


def _is_ours() -> bool:
    return _POLICY.is_file() and _POLICY.read_text(errors="replace") == _POLICY_TEXT


def _apt_get(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["apt-get", command, "--yes", "--quiet=2", "-o", "DPkg::Lock::Timeout=600", *arguments],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
