"""PostgreSQL's programs: where they are, and how Debian's packages bring them without a system cluster."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools import apt, console
from tools.account import Account
from tools.project import ToolError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

PROGRAMS = ("initdb", "pg_ctl", "postgres", "psql", "pg_dump", "pg_restore")
OLDEST_MAJOR = 14

_DEBIAN = Path("/usr/lib/postgresql")
_HOMEBREW = (Path("/opt/homebrew/opt"), Path("/usr/local/opt"), Path("/home/linuxbrew/.linuxbrew/opt"))


@dataclass(frozen=True)
class Binaries:
    """A folder that holds every program that we need, and the major version of what is in it.

    A folder may hold a server alone: then ``clients`` has psql and the others, which may be of another major.
    """

    folder: Path
    major: int
    clients: Path | None = None

    @property
    def client_folder(self) -> Path:
        """Return the folder of psql, pg_dump and pg_restore."""
        return self.clients or self.folder

    def __getitem__(self, program: str) -> str:
        return str(self.folder / program)


def ensure_binaries() -> Binaries:
    """Return PostgreSQL's programs, installing Debian's packages where there are none and we may."""
    found = find_binaries()
    if found is None and apt.usable():
        console.note("installing postgresql with apt-get (no system cluster is made or started)")
        _install_debian_packages()
        found = find_binaries()
    if found is None:
        raise ToolError(
            f"no PostgreSQL {OLDEST_MAJOR} or newer was found (looked in PATH, {_DEBIAN}, Homebrew's places). "
            "Install it (Debian, Ubuntu: apt-get install postgresql; macOS: brew install postgresql), "
            f"or set PG_BIN to the folder that holds {', '.join(PROGRAMS)}."
        )
    return found


def find_binaries(env: Mapping[str, str] | None = None) -> Binaries | None:
    """Return the first usable folder of PG_BIN, PATH, Debian's and Homebrew's places. A wrong PG_BIN is an error."""
    env = os.environ if env is None else env
    if wanted := env.get("PG_BIN"):
        return _from_pg_bin(Path(wanted).expanduser())
    for folder in _candidates(env.get("PATH", os.defpath)):
        if not _missing(folder) and (major := _major(folder)) >= OLDEST_MAJOR and _runnable(folder):
            return Binaries(folder, major)
    return None


def _from_pg_bin(named: Path) -> Binaries:
    folder = named.resolve()
    if missing := _missing(folder):
        raise ToolError(f"PG_BIN={named} {'lacks ' + ', '.join(missing) if folder.is_dir() else 'is no folder'}")
    if not _runnable(folder):
        raise ToolError(
            f"PG_BIN={named} cannot be reached by the account that runs the server: {Account.for_server().name}"
        )
    if (major := _major(folder)) < OLDEST_MAJOR:
        raise ToolError(
            f"PG_BIN={named} holds PostgreSQL {major or 'of an unknown version'}; {OLDEST_MAJOR} is the oldest"
        )
    return Binaries(folder, major)


def _candidates(path: str) -> Iterator[Path]:
    """Yield folders to look in. A program on PATH may be a link into the folder that holds them all."""
    for entry in filter(None, path.split(os.pathsep)):
        yield Path(entry)
        for program in ("postgres", "initdb", "pg_ctl"):
            if (link := Path(entry, program)).is_symlink():
                yield link.resolve().parent
    yield from _newest_first(_DEBIAN.glob("*/bin"))
    for place in _HOMEBREW:
        yield from _newest_first(place.glob("postgresql*/bin"))


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    return sorted(folders, key=lambda folder: [int(n) for n in re.findall(r"\d+", folder.parent.name)], reverse=True)


def _missing(folder: Path) -> list[str]:
    return [name for name in PROGRAMS if not os.access(folder / name, os.X_OK)]


def _runnable(folder: Path) -> bool:
    return Account.for_server().reaches(folder / "postgres")


def _major(folder: Path) -> int:
    command = [str(folder / "postgres"), "--version"]
    version = subprocess.run(command, capture_output=True, encoding="utf-8", check=False).stdout
    match = re.search(r"\(PostgreSQL\) (\d+)", version)
    return int(match.group(1)) if match else 0


def _install_debian_packages() -> None:
    """Install the server without the cluster that its package makes and starts unless told otherwise."""
    with apt.no_services():
        apt.install("postgresql-common")
        settings = Path("/etc/postgresql-common/createcluster.conf")
        before = settings.read_bytes()
        try:
            settings.write_text("create_main_cluster = false\n", encoding="ascii")
            apt.install("postgresql")
        finally:
            settings.write_bytes(before)
