"""Debian packages, where we may install them."""

from __future__ import annotations

import os
import shutil
import subprocess

from tools.project import ToolError


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
