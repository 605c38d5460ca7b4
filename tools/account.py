"""Who runs the private server: ourselves, or an ordinary account where we are root, which PostgreSQL refuses to be."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tools.project import ToolError, environment

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Account:
    """An account of this machine."""

    name: str
    uid: int
    gid: int

    @classmethod
    def for_server(cls) -> Account:
        """Return the account to run a server as."""
        if os.geteuid() != 0:
            return cls(f"uid {os.geteuid()}", os.geteuid(), os.getegid())
        for name in ("postgres", "nobody"):
            with contextlib.suppress(KeyError):
                entry = pwd.getpwnam(name)
                return cls(name, entry.pw_uid, entry.pw_gid)
        raise ToolError("PostgreSQL does not run as root, and there is no account «postgres» or «nobody» to run it as")

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a program as this account, away from our terminal; all its output is in ``stdout``."""
        switch: dict[str, Any] = {}
        if os.geteuid() != self.uid:
            switch = {"user": self.uid, "group": self.gid, "extra_groups": []}
        return subprocess.run(
            command,
            cwd="/",
            env=environment() | {"HOME": "/"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            check=False,
            **switch,
        )

    def reaches(self, path: Path) -> bool:
        """Tell whether the account may enter a folder, or run a program: asked of the kernel, so ACLs count too."""
        return self.run(["test", "-x", str(path)]).returncode == 0

    def own(self, path: Path) -> None:
        """Make the account the owner, where we are somebody else."""
        if os.geteuid() != self.uid:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)
