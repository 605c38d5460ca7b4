# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""age and GnuPG: files encrypted for public keys, and decrypted with a private one that stays in its file."""

from __future__ import annotations

import concurrent.futures
import contextlib
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
from ansible_collections.settler.runbook.plugins.module_utils._private import private_folder

_AGE_KEY = re.compile(r"age1[0-9a-z]{50,}|ssh-(?:ed25519|rsa) [A-Za-z0-9+/=]+(?: .*)?")
_PGP_KEY = re.compile(r"-----BEGIN PGP PUBLIC KEY BLOCK-----.*?-----END PGP PUBLIC KEY BLOCK-----", re.DOTALL)
_HOME = ".settler-runbook-*.gpg"
_PRIVATE = re.compile(r"AGE-SECRET-KEY-1|PRIVATE KEY(?: BLOCK)?-----", re.IGNORECASE)


@dataclass(frozen=True)
class Key:
    """A public key: how it is named in a manifest, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Tool:
    """A program of encryption with what belongs to one use of it; made by M(age) and M(gpg)."""

    suffix: str
    keys: tuple[Key, ...]
    encrypting: t.Callable[[Path, Path], list[str]]
    decrypting: t.Callable[[Path, Path], list[str]]

    def encrypt(self, source: Path, target: Path) -> None:
        """Encrypt a file for all keys."""
        _run(self.encrypting(source, target))

    def decrypt(self, source: Path, target: Path) -> None:
        """Decrypt a file with the identity."""
        _run(self.decrypting(source, target))


@contextlib.contextmanager
def opened_tool(method: str, recipients: t.Sequence[str] = (), identity: Path | None = None) -> t.Iterator[Tool]:
    """Yield the tool of a method, ready for its keys; nothing of them is left afterwards.

    Args:
        method: V(age) or V(gpg).
        recipients: public keys, or absolute paths of files that have them.
        identity: file of the private key.

    Raises:
        RunbookError: the program is missing, a recipient is no public key, or the identity is open to others.
    """
    if identity is not None:
        check_identity(identity)
    if method == "age":
        _need("age", "age")
        yield _age(_texts(recipients), identity)
    elif method == "gpg":
        _need("gpg", "gpg and gpg-agent")
        with _gpg_home() as home:
            yield _gpg(home, _texts(recipients), identity)
    else:
        raise RunbookError(f"encryption {method} is not known", hint="backup_encryption is age, gpg or none.")


def in_parallel(work: t.Callable[[Path], None], paths: t.Sequence[Path], jobs: int) -> None:
    """Do the work for every path, some at a time; the first failure ends it once those under way have ended."""
    with concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool:
        futures = [pool.submit(work, path) for path in paths]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def check_identity(path: Path) -> None:
    """Refuse a private key that is not there or that others can read."""
    try:
        status = path.stat()
    except OSError as error:
        raise RunbookError(
            f"{path}: {error.strerror}; nothing was touched", hint="rollback_identity is the file of the private key."
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise RunbookError(f"{path}: no file; nothing was touched", hint="rollback_identity is a file.")
    if status.st_mode & 0o077 or status.st_uid not in (0, os.geteuid()):
        raise RunbookError(
            f"{path}: a private key that other accounts can read or own; nothing was touched",
            hint=f"chmod 0600 {path}, as the account that the runbook works as.",
        )


def _texts(recipients: t.Sequence[str]) -> list[str]:
    """Return what stands in the recipients, and never let a private key be one."""
    texts = []
    for recipient in recipients:
        text = recipient
        if recipient.startswith("/"):
            try:
                text = Path(recipient).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise RunbookError(f"backup_recipients: {recipient} cannot be read as text: {error}") from None
        if _PRIVATE.search(text):
            raise RunbookError(
                "backup_recipients has a private key",
                hint="Only public keys may be there. Take it out, and make a new pair: this one has been shown.",
            )
        texts.append(text)
    return texts


def _age(texts: t.Sequence[str], identity: Path | None) -> Tool:
    lines = [line.strip() for text in texts for line in text.splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    for name in names:
        if not _AGE_KEY.fullmatch(name):
            raise RunbookError(
                f"backup_recipients: {name[:80]!r} is no public key of age",
                hint="age1… as age-keygen prints it, ssh-ed25519 …, or the absolute path of a file with such lines.",
            )
    chosen = [part for name in names for part in ("--recipient", name)]
    opening = ["--identity", str(identity)]
    return Tool(
        ".age",
        tuple(Key(name, name) for name in names),
        lambda source, target: ["age", "--encrypt", *chosen, "--output", str(target), str(source)],
        lambda source, target: ["age", "--decrypt", *opening, "--output", str(target), str(source)],
    )


def _gpg(home: Path, texts: t.Sequence[str], identity: Path | None) -> Tool:
    """Return GnuPG in a home of its own: the account's keyring, options and trust have no say."""
    base = ["gpg", "--batch", "--no-tty", "--quiet", "--no-options", "--homedir", str(home), "--trust-model", "always"]
    keys: list[Key] = []
    for text in texts:
        blocks = _PGP_KEY.findall(text)
        if not blocks:
            raise RunbookError(
                f"backup_recipients: {text[:80]!r} has no public key of GnuPG",
                hint="The text of gpg --armor --export, or the absolute path of a file with it.",
            )
        for block in blocks:
            path = home / f"recipient{len(keys)}.asc"
            path.write_text(block + "\n", encoding="ascii", errors="replace")
            told = _run([*base, "--with-colons", "--show-keys", str(path)])
            fingerprint = next(line.split(":")[9] for line in told.splitlines() if line.startswith("fpr:"))
            keys.append(Key(fingerprint, block))
    chosen = [part for path in sorted(home.glob("recipient*.asc")) for part in ("--recipient-file", str(path))]
    if identity is not None:
        _run([*base, "--import", str(identity)])
    locked = ["--pinentry-mode", "error"]  # a passphrase cannot be asked for here: that is an error, not a wait
    how = ["--no-autostart", "--compress-algo", "none", *chosen]  # the dump is compressed already
    return Tool(
        ".gpg",
        tuple(keys),
        lambda source, target: [*base, *how, "--output", str(target), "--encrypt", str(source)],
        lambda source, target: [*base, *locked, "--output", str(target), "--decrypt", str(source)],
    )


@contextlib.contextmanager
def _gpg_home() -> t.Iterator[Path]:
    """Yield a private home of GnuPG, in memory where that can be, and end its agent afterwards."""
    memory = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it
    place = memory if os.access(memory, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    with private_folder(place, _HOME) as home:
        try:
            yield home
        finally:
            with contextlib.suppress(OSError):
                subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], capture_output=True, check=False)


def _need(program: str, packages: str) -> None:
    if shutil.which(program) is None:
        raise RunbookError(f"{program} is not installed on this host", hint=f"apt-get install {packages}")


def _run(command: t.Sequence[str]) -> str:
    """Run a tool without a terminal, so that it cannot ask for a passphrase, and return what it says."""
    done = subprocess.run(
        command,
        env={name: value for name, value in os.environ.items() if name != "GNUPGHOME"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        umask=0o077,
        start_new_session=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line and "filippo.io/age/report" not in line][-4:]
        raise RunbookError(f"{command[0]} failed:\n" + "\n".join(f"  {line}" for line in lines))
    return done.stdout
