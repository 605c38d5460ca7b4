"""The PostgreSQL image for Molecule: the official one, or where no registry can be reached, a stand-in.

The stand-in has the official image's interface and is built from Debian packages with mmdebstrap, through the
mirror that this machine's apt uses. It carries the digest of its recipe: a second run builds nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools import apt, console
from tools.binaries import find_binaries
from tools.engine import last_line
from tools.project import LOCAL, ROOT, ToolError

if TYPE_CHECKING:
    from tools.engine import Engine

_DEFAULT_MAJOR = 17

_CONTEXT = ROOT / "molecule" / "image"
_ENTRYPOINT = _CONTEXT / "docker-entrypoint.sh"
_CUSTOMIZE = _CONTEXT / "customize.sh"
_SUITES = {15: "bookworm", 17: "trixie", 18: "sid"}
_LABEL = "settler.runbook.recipe"
# Documentation, languages, and the JIT compiler with the libraries that only it needs.
_LEFT_OUT = (
    *("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/lintian/*"),
    *("/usr/share/locale/*", "/usr/share/i18n/*", "/usr/lib/*/gconv/*"),
    *("/usr/lib/postgresql/*/lib/llvmjit*", "/usr/lib/postgresql/*/lib/bitcode/*"),
    *("/usr/lib/*/libLLVM*", "/usr/lib/llvm*", "/usr/lib/*/libz3*"),
)

_REGISTRY_SECONDS = 8
_PULL_SECONDS = 600


class NoImageError(ToolError):
    """No PostgreSQL image can be had here; the message says why."""


@dataclass(frozen=True)
class Image:
    """A PostgreSQL image that the engine has."""

    name: str
    digest: str

    def __str__(self) -> str:
        algorithm, _, digest = self.digest.partition(":")
        return f"{self.name} ({algorithm}:{digest[:12]})"


def ensure(engine: Engine) -> Image:
    """Return MOLECULE_POSTGRES_IMAGE or else the official image, pulled if need be, or a stand-in for it.

    The default follows this machine's pg_dump, which refuses to dump from a server newer than itself.
    """
    wanted = os.environ.get("MOLECULE_POSTGRES_IMAGE")
    programs = find_binaries()
    default_major = min(_DEFAULT_MAJOR, programs.major if programs else _DEFAULT_MAJOR)
    name = wanted or f"postgres:{default_major}"
    found = _find(engine, name)
    if found is not None:
        return found
    reason = _pull(engine, name)
    if reason is None:
        return _get(engine, name)
    console.note(f"{name} cannot be pulled: {reason}")
    # Who asks for a major gets that or nothing; who does not care may get an older one.
    majors = [
        major
        for major in sorted(_SUITES, reverse=True)
        if (wanted == f"postgres:{major}" if wanted else major <= default_major)
    ]
    if not majors:
        raise NoImageError(f"{name} cannot be pulled ({reason}), and no Debian suite has a stand-in for it")
    return _stand_in(engine, majors)


def _find(engine: Engine, name: str, recipe: str | None = None) -> Image | None:
    """Return the image if the engine has it and, where a recipe is given, it was made by that recipe."""
    details = engine.docker("image", "inspect", name)
    if details.returncode != 0:
        return None
    facts = json.loads(details.stdout)[0]
    if recipe is not None and (facts["Config"].get("Labels") or {}).get(_LABEL) != recipe:
        return None
    published = [digest.partition("@")[2] for digest in facts.get("RepoDigests") or []]
    return Image(name, published[0] if published else facts["Id"])


def _get(engine: Engine, name: str) -> Image:
    found = _find(engine, name)
    if found is None:
        raise NoImageError(f"the engine has lost {name}, which it had a moment ago")
    return found


def _pull(engine: Engine, name: str) -> str | None:
    """Pull the image; return why it failed, if it did.

    A registry has to show signs of life at once: an unreachable one must not cost minutes.
    """
    with subprocess.Popen(
        ["docker", "--host", engine.host, "pull", name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            if not _says_something(process, _REGISTRY_SECONDS):
                return f"no registry answered in {_REGISTRY_SECONDS} s"
            output, _ = process.communicate(timeout=_PULL_SECONDS)
        except subprocess.TimeoutExpired:
            return f"pulling took more than {_PULL_SECONDS} s"
        finally:
            process.kill()
    return None if process.returncode == 0 else last_line(output)


def _says_something(process: subprocess.Popen[str], seconds: float) -> bool:
    return process.stdout is not None and bool(select.select([process.stdout], [], [], seconds)[0])


def _stand_in(engine: Engine, majors: list[int]) -> Image:
    """Return the first of these majors that the engine has or that can be built."""
    names = {major: f"settler-runbook/postgres:{major}-debian" for major in majors}
    for major, name in names.items():
        found = _find(engine, name, _recipe_digest(major))
        if found is not None:
            return found
    mirror = _mirror()
    _require_mmdebstrap()
    failures = []
    for major, name in names.items():
        try:
            _build(engine, major, name, mirror)
        except NoImageError as failure:
            failures.append(str(failure))
        else:
            return _get(engine, name)
    raise NoImageError("; ".join(failures))


def _build(engine: Engine, major: int, name: str, mirror: str) -> None:
    """Stream a Debian root file system into the engine; name it only when both ends say that it is whole."""
    console.note(f"building {name} from Debian {_SUITES[major]} packages: about a minute, once")
    log_path = LOCAL / "docker" / f"mmdebstrap-{major}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    changes = [word for change in _changes(major) for word in ("--change", change)]
    with (
        log_path.open("wb") as log,
        subprocess.Popen(
            ["mmdebstrap", *_recipe(major), *_apt_settings(), _SUITES[major], "-", mirror],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
        ) as system,
    ):
        try:
            imported = subprocess.run(
                ["docker", "--host", engine.host, "import", *changes, "-"],
                stdin=system.stdout,
                capture_output=True,
                encoding="utf-8",
                check=False,
            )
        except BaseException:
            system.terminate()  # an interrupted run must not wait for what nobody reads any more
            raise
    if system.returncode == 0 and imported.returncode == 0:
        engine.docker("tag", imported.stdout.strip(), name)
    # Ours without a name: what a failed or killed build left, and what the tag was taken from.
    engine.docker("image", "prune", "--force", "--filter", f"label={_LABEL}")
    if system.returncode != 0:
        raise NoImageError(f"mmdebstrap failed ({log_path}): {last_line(log_path.read_text(errors='replace'))}")
    if imported.returncode != 0:
        raise NoImageError(f"docker import failed: {last_line(imported.stderr)}")


def _require_mmdebstrap() -> None:
    if shutil.which("mmdebstrap"):
        return
    if not apt.usable():
        raise NoImageError("no registry answers, and without mmdebstrap no image can be built")
    console.note("installing mmdebstrap with apt-get")
    try:
        apt.install("mmdebstrap")
    except ToolError as failure:
        raise NoImageError(str(failure)) from failure


def _recipe(major: int) -> list[str]:
    """Return what mmdebstrap is told, but for what is this machine's own: the same words, the same image."""
    return [
        *("--mode=auto", "--variant=essential", "--format=tar", "--components=main"),
        f"--include=postgresql-{major}",
        '--aptopt=APT::Install-Recommends "false"',
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT),
        f"--essential-hook={_CUSTOMIZE}",
        f"--customize-hook=upload {shlex.quote(str(_ENTRYPOINT))} /usr/local/bin/docker-entrypoint.sh",
        f"--customize-hook={_CUSTOMIZE}",
    ]


def _changes(major: int) -> list[str]:
    """Return what makes the file system an image with the official one's interface."""
    path = f"/usr/lib/postgresql/{major}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return [
        f"ENV PATH={path} LANG=C.UTF-8 PG_MAJOR={major} PGDATA=/var/lib/postgresql/data",
        "VOLUME /var/lib/postgresql/data",
        "EXPOSE 5432",
        'ENTRYPOINT ["docker-entrypoint.sh"]',
        'CMD ["postgres"]',
        f"LABEL {_LABEL}={_recipe_digest(major)}",
    ]


def _recipe_digest(major: int) -> str:
    words = [_SUITES[major], *_recipe(major), _ENTRYPOINT.read_text("utf-8"), _CUSTOMIZE.read_text("utf-8")]
    return hashlib.sha256("\0".join(words).replace(str(ROOT), "").encode()).hexdigest()


def _mirror() -> str:
    """Return the Debian mirror that this machine's apt uses."""
    if shutil.which("apt-get"):
        listing = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(ORIGIN) $(LABEL) $(COMPONENT) $(REPO_URI)"],
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        for line in listing.stdout.splitlines():
            if line.startswith("Debian Debian main "):
                return line.rpartition(" ")[2]
    raise NoImageError("no registry answers, and apt here knows no Debian mirror to build an image from")


def _apt_settings() -> list[str]:
    """Return this machine's way to the mirror: proxies, certificates, and its trust in old indexes."""
    listing = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, encoding="utf-8", check=False)
    ours = ("Acquire::http::", "Acquire::https::", "Acquire::Check-", "Acquire::Retries")
    return [f"--aptopt={line}" for line in listing.stdout.splitlines() if line.startswith(ours)]
