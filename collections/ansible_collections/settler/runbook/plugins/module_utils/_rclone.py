# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""rclone: places off the host, reached with the secrets of its configuration file and no others."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
import typing as t
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError

_REMOTE = re.compile(r"[\w.+@][\w.+@ -]*:[^\0\n]*")
_NOT_FOUND = 3  # rclone's exit code for a folder that does not exist
#: A host that is not there is an error soon, not after rclone's own ten minutes.
_PATIENCE = ("--contimeout=10s", "--timeout=60s", "--retries=2", "--low-level-retries=3", "--use-json-log=false")


@dataclass(frozen=True)
class Place:
    """A folder that rclone reaches: C(remote:path), or an absolute path of this host."""

    root: str
    config: Path | None

    @classmethod
    def of(cls, root: str, config: Path | None) -> Place:
        """Return a place after a look at its name and at the configuration.

        Raises:
            RunbookError: it is no place, might have a secret in its name, or its secrets are open to others.
        """
        if shutil.which("rclone") is None:
            raise RunbookError("rclone is not installed on this host", hint="apt-get install rclone")
        if root.startswith("/"):
            if not Path(root).is_dir():
                raise RunbookError(f"{root}: no such folder", hint="Mount it or make it: the runbook does not.")
            return cls(root.rstrip("/") or "/", config)
        if not _REMOTE.fullmatch(root):
            shown = root.partition(":")[0][:20] if "=" not in root.partition(":")[0] else ""
            raise RunbookError(
                f"{shown or 'this'}…: no place for copies",
                hint="Write remote:path, with a remote of rclone's configuration, or the absolute path of a folder; "
                "what a remote needs stands in the configuration, never in its name.",
            )
        if config is None:
            raise RunbookError(
                f"{root}: a remote, but no configuration of rclone",
                hint="Set backup_rclone_config to its path on the host where the runbook works.",
            )
        _check_config(config)
        return cls(root.rstrip("/"), config)

    @property
    def is_local(self) -> bool:
        """Tell whether this is a folder of this host."""
        return self.root.startswith("/")

    def at(self, *parts: str) -> str:
        """Return the name of something below."""
        below = "/".join(parts)
        return f"{self.root}{below}" if self.root.endswith((":", "/")) else f"{self.root}/{below}"

    def listing(self, *parts: str) -> dict[str, int]:
        """Return the sizes of all files below a folder, by relative name; of one that is not there, none."""
        done = self._run("lsjson", "--recursive", "--files-only", "--no-modtime", "--no-mimetype", self.at(*parts))
        if done.returncode == _NOT_FOUND:
            return {}
        self._check(done)
        return {row["Path"]: row["Size"] for row in json.loads(done.stdout)}

    def read(self, *parts: str) -> bytes:
        """Return what is in a file; of one that is not there, nothing."""
        return self._check(self._run("cat", self.at(*parts))).stdout

    def write(self, content: bytes, *parts: str) -> None:
        """Write a small file."""
        self._check(self._run("rcat", self.at(*parts), given=content))

    def send(self, folder: Path, names: t.Sequence[str], *parts: str) -> None:
        """Copy files of a folder to a folder here; what is there with the same checksum is not sent again."""
        self._with_list("copy", names, "--checksum", "--no-traverse", str(folder), self.at(*parts))

    def receive(self, names: t.Sequence[str], folder: Path, *parts: str) -> None:
        """Copy files of a folder here to a folder of this host."""
        self._with_list("copy", names, self.at(*parts), str(folder))

    def compare(self, folder: Path, names: t.Sequence[str], *parts: str, download: bool) -> str:
        """Compare files here with those of a folder; return how, V(checksum) or V(download).

        Where the place knows no checksum that this host can make, all is read back.

        Raises:
            RunbookError: something is missing or differs.
        """
        how = ["--download"] if download else []
        done = self._with_list("check", names, "--one-way", *how, str(folder), self.at(*parts))
        if not download and b"hashes could not be checked" in done.stderr:
            return self.compare(folder, names, *parts, download=True)
        return "download" if download else "checksum"

    def remove(self, names: t.Sequence[str], *parts: str) -> None:
        """Remove files of a folder here, and the folders that are empty then; nothing else."""
        self._with_list("delete", names, self.at(*parts))

    def remove_empty(self, *parts: str) -> None:
        """Remove a folder here if it is empty. Object stores have no folders, so it may not be there."""
        self._run("rmdirs", self.at(*parts))

    def _with_list(self, command: str, names: t.Sequence[str], *arguments: str) -> subprocess.CompletedProcess[bytes]:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="settler-runbook-") as file:
            file.write("".join(f"{name}\n" for name in names))
            file.flush()
            return self._check(self._run(command, f"--files-from-raw={file.name}", *arguments))

    def _run(self, command: str, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run rclone with its configuration and with no setting or secret of the environment."""
        known = {name: value for name, value in os.environ.items() if not name.startswith(("RCLONE_", "AWS_"))}
        options = [argument for argument in arguments if argument.startswith("--")]
        words = [argument for argument in arguments if not argument.startswith("--")]
        return subprocess.run(
            ["rclone", command, f"--config={self.config or ''}", *_PATIENCE, *options, "--", *words],
            env=known,
            input=given,
            capture_output=True,
            umask=0o077,
            start_new_session=True,
            check=False,
        )

    def _check(self, done: subprocess.CompletedProcess[bytes]) -> subprocess.CompletedProcess[bytes]:
        if done.returncode:
            told = [re.sub(r"^[\d/]+ [\d:]+ ", "", line) for line in done.stderr.decode(errors="replace").splitlines()]
            lines = [line for line in told if line.startswith(("ERROR", "Failed", "CRITICAL"))] or told
            raise RunbookError(f"rclone {done.args[1]} {self.root}:\n" + "\n".join(f"  {line}" for line in lines[-4:]))
        return done


def _check_config(config: Path) -> None:
    """Refuse a configuration, which has secrets, that is not there or that others can read."""
    try:
        status = config.stat()
    except OSError as error:
        raise RunbookError(
            f"{config}: {error.strerror}", hint="backup_rclone_config is the path of rclone's configuration."
        ) from None
    if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077 or status.st_uid not in (0, os.geteuid()):
        raise RunbookError(
            f"{config}: rclone's configuration, which has secrets, can be read by other accounts",
            hint=f"chmod 0600 {config}, as the account that the runbook works as.",
        )
