# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Encryption at rest: all of a backup but the manifest is for the holders of a private key.

The manifest stays readable, so that a backup can be listed, pruned, copied and checked for damage without a key: its
checksums are those of the encrypted files. What could tell a value is taken out of it and encrypted, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import typing as t
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils import _manifest
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._keys import check_identity, in_parallel, opened_tool
from ansible_collections.settler.runbook.plugins.module_utils._private import private_folder, remove_abandoned

METHODS = ("none", "age", "gpg")

#: What is taken out of an encrypted backup's manifest: settings of the database may hold a
#: secret. The fingerprints stay: verification compares with them after a migration, where no key need be.
PRIVATE = ("properties",)

_PRIVATE_FILE = "private.json"
_PLAIN = ".runbook-*.plain"
_TRIAL = ".settler-runbook-*.trial"


@dataclass(frozen=True)
class Encryption:
    """How to encrypt a backup, and for whom."""

    method: str = "none"
    recipients: tuple[str, ...] = ()


UNENCRYPTED = Encryption()


def prove(encryption: Encryption, identity: Path | None, *, must_open: bool) -> str:
    """Encrypt a word, and decrypt it if there is an identity; return what was found.

    Args:
        encryption: how, and for whom.
        identity: file of the private key.
        must_open: whether the run may have to restore its own backup.

    Raises:
        RunbookError: a backup could not be encrypted, or its own run could not read it again.
    """
    _check_recipients(encryption)
    if must_open and identity is None:
        raise RunbookError(
            f"backups are encrypted by {encryption.method}, and an automatic rollback could not read its own: "
            "neither rollback_identity nor backup_snapshot is set",
            hint="Set rollback_identity to the file of the private key, or backup_snapshot: true.",
        )
    with (
        private_folder(Path(tempfile.gettempdir()), _TRIAL) as folder,
        opened_tool(encryption.method, encryption.recipients, identity) as tool,
    ):
        plain, closed, again = (folder / part for part in ("plain", "closed", "again"))
        plain.write_text("settler", encoding="ascii")
        tool.encrypt(plain, closed)
        if identity is not None:
            try:
                tool.decrypt(closed, again)
            except RunbookError as error:
                raise RunbookError(
                    f"{identity} cannot decrypt what is encrypted for backup_recipients\n{error.message}",
                    hint="Set rollback_identity to the private key of one of them, without a passphrase.",
                ) from None
        told = ", read again with the identity" if identity is not None else ""
        return f"{encryption.method} for {len(tool.keys)} public keys{told}"


def encrypt(folder: Path, content: t.Mapping[str, t.Any], encryption: Encryption, jobs: int) -> dict[str, t.Any]:
    """Encrypt the files of a backup that is being written; return what of the manifest's content may be read."""
    content = dict(content)
    if encryption.method == "none":
        return {**content, "encryption": {"method": "none"}}
    _check_recipients(encryption)
    private = {key: content.pop(key) for key in PRIVATE if key in content}
    path = folder / _PRIVATE_FILE
    path.touch(mode=0o600)
    path.write_text(json.dumps(private, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    with opened_tool(encryption.method, encryption.recipients) as tool:

        def replace(plain: Path) -> None:
            tool.encrypt(plain, plain.with_name(plain.name + tool.suffix))
            plain.unlink()

        in_parallel(replace, [path for path in sorted(folder.rglob("*")) if path.is_file()], jobs)
        names = [key.name for key in tool.keys]
    return {**content, "encryption": {"method": encryption.method, "recipients": names}}


def method_of(manifest: t.Mapping[str, t.Any]) -> str:
    """Return how a backup is encrypted; V(none) if it is not."""
    return str((manifest.get("encryption") or {}).get("method", "none"))


def check_openable(source: Path, identity: Path | None) -> bool:
    """Tell whether a backup is encrypted; refuse one that is, where there is no private key, and one without a dump."""
    manifest = _manifest.read_manifest(source)
    if manifest.get("method") == _manifest.PGBACKREST:
        raise RunbookError(
            f"{source}: backup {manifest['label']} of pgBackRest, which has no dump; nothing was touched",
            hint=f"With the server stopped, on its host: {manifest['restore_command']}",
        )
    if method_of(manifest) == "none":
        return False
    if identity is None:
        raise RunbookError(
            f"{source}: encrypted by {method_of(manifest)}, and no private key is given; nothing was touched",
            hint=f"-e rollback_identity=<file, mode 0600>: the private key of {_readers(manifest)}.",
        )
    check_identity(identity)
    return True


def _readers(manifest: t.Mapping[str, t.Any]) -> str:
    return ", ".join(manifest["encryption"]["recipients"])


@contextlib.contextmanager
def opened(source: Path, identity: Path | None, jobs: int) -> t.Iterator[Path]:
    """Yield a backup that can be read: itself, or a decrypted copy that is gone afterwards, whatever happens.

    The copy is whole, with a manifest of its own, so that what restores it needs to know nothing of encryption. It
    lies beside the backup, because there is space for it, or in the system's folder for temporary files.

    Raises:
        RunbookError: the backup is damaged, there is no identity, or it is not the right one. Nothing was touched.
    """
    if not check_openable(source, identity):
        yield source
        return
    manifest = _manifest.read_manifest(source)
    method, readers = method_of(manifest), _readers(manifest)
    _manifest.check_files(source, manifest)
    place = source.parent if os.access(source.parent, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    with (
        opened_tool(method, (), identity) as tool,
        private_folder(place, _PLAIN, f"{source.name}-") as folder,
        _ended_by_signals(),
    ):
        need, free = sum(file["size"] for file in manifest["files"].values()), shutil.disk_usage(folder).free
        if free < need:
            raise RunbookError(
                f"{place}: {free // 2**20} MB free, the decrypted backup has {need // 2**20} MB; nothing was touched",
                hint="Free space there.",
            )

        def decrypt(closed: Path) -> None:
            target = folder / closed.relative_to(source)
            tool.decrypt(closed, target.with_name(target.name.removesuffix(tool.suffix)))

        closed = [source / name for name in manifest["files"]]
        for parent in {path.parent for path in closed} - {source}:
            (folder / parent.relative_to(source)).mkdir(mode=0o700, parents=True, exist_ok=True)
        # The smallest alone: it tells at once whether the key fits, and gpg-agent writes an imported key anew at its
        # first use, where a second use at the same time reads half of it and fails.
        first, *others = sorted(closed, key=lambda path: path.stat().st_size)
        try:
            decrypt(first)
            in_parallel(decrypt, others, jobs)
        except RunbookError as error:
            raise RunbookError(
                f"{source}: {identity} does not decrypt it; nothing was touched\n{error.message}",
                hint=f"It is encrypted for {readers}: give the private key of one of them, without a passphrase.",
            ) from None
        _write_plain_manifest(folder, manifest, source)
        yield folder


def _write_plain_manifest(folder: Path, manifest: t.Mapping[str, t.Any], source: Path) -> None:
    private = folder / _PRIVATE_FILE
    content = {**manifest, **json.loads(private.read_text(encoding="utf-8"))}
    private.unlink()
    content.update(encryption={"method": "none"}, files=_manifest.file_digests(folder), opened_from=str(source))
    (folder / _manifest.NAME).write_text(_manifest.seal(content), encoding="utf-8")


def _check_recipients(encryption: Encryption) -> None:
    if not encryption.recipients:
        raise RunbookError(
            f"backup_encryption is {encryption.method}, but backup_recipients is empty",
            hint="Set backup_recipients to the public keys of those who may read the backups.",
        )


def remove_plain(place: Path) -> None:
    """Remove decrypted copies that killed restores have left: those that nobody holds."""
    remove_abandoned(place, _PLAIN)


@contextlib.contextmanager
def _ended_by_signals() -> t.Iterator[None]:
    """Let a signal that ends the process run what stands in C(finally), too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, lambda caught, _frame: sys.exit(128 + caught))
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
