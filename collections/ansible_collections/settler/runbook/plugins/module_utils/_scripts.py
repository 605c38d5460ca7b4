# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Scripts as plain data: a host without the parser hands its files to the controller and gets them back parsed.

The module asks by raising C(Unparsed), which becomes its result; the action plugin parses and runs the module again
with a file of scripts. A script is found by its file's name and checksums, so that one of a file that
was changed meanwhile is none.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import platform
import sys
import types
import typing as t
import zlib
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError, Unparsed
from ansible_collections.settler.runbook.plugins.module_utils._statements import (
    PGLAST_IMPORT_ERROR,
    Parser,
    Script,
    parse,
    parse_all,
)

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._files import MigrationFile

T = t.TypeVar("T")


def parser_for(scripts_file: str | None) -> Parser:
    """Return what makes scripts of files: pglast where it is, otherwise what the controller has parsed."""
    if not PGLAST_IMPORT_ERROR:
        return parse_all
    known = json.loads(Path(scripts_file).read_text(encoding="utf-8")) if scripts_file else {}
    return functools.partial(_look_up, known)


def _look_up(known: t.Mapping[str, t.Any], files: t.Sequence[MigrationFile]) -> list[Script]:
    """Return the scripts of files.

    Raises:
        Unparsed: the controller has not seen one of them, or not as it is now.
        RunbookError: the controller refused one of them, or has no parser either.
    """
    unknown = [file for file in files if key_of(file) not in known]
    if unknown:
        # packed, because Ansible blots out every text of a result that looks like a password
        raise Unparsed(f"pglast is missing on {platform.node()} ({sys.executable})", unparsed=pack(to_data(unknown)))
    return [_script(file, known[key_of(file)]) for file in files]


def _script(file: MigrationFile, data: t.Mapping[str, t.Any]) -> Script:
    if "refused" in data:
        message, hint = data["refused"]
        raise RunbookError(message, hint=hint)
    return dataclasses.replace(from_data(Script, data), file=file)


def key_of(file: MigrationFile) -> str:
    """Return what a script is found by: a file's name, and what is in it and in its C(.verify.sql)."""
    return " ".join([file.file, file.checksum, file.verify.checksum if file.verify else "-"])


def parsed(files: t.Sequence[MigrationFile], unable: str = "") -> dict[str, t.Any]:
    """Return the scripts of files as plain data, by their keys, or why a file is refused.

    Args:
        files: what a host has asked for.
        unable: why nothing can be parsed here either.
    """
    return {key_of(file): _parsed(file, unable) for file in files}


def _parsed(file: MigrationFile, unable: str) -> dict[str, t.Any]:
    if unable:
        return {"refused": [unable, "Install pglast on one of the two; the controller's serves all hosts."]}
    try:
        script = parse(file)
    except RunbookError as error:
        return {"refused": [error.message, error.hint]}
    # the text is on the host
    return t.cast(
        "dict[str, t.Any]", to_data(dataclasses.replace(script, file=dataclasses.replace(file, text="", verify=None)))
    )


def pack(data: t.Any) -> str:
    """Return plain data as one word."""
    return base64.b64encode(zlib.compress(json.dumps(data).encode())).decode()


def unpack(word: str) -> t.Any:
    """Return what was packed."""
    return json.loads(zlib.decompress(base64.b64decode(word)))


def to_data(value: t.Any) -> t.Any:
    """Return dataclasses as what JSON knows; a field that has its default is left out."""
    if dataclasses.is_dataclass(value):
        fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: to_data(inner) for field, inner in fields if inner != field.default}
    if isinstance(value, list | tuple):
        return [to_data(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def from_data(kind: type[T], data: t.Any) -> T:
    """Return what C(to_data) was given, by its type."""
    return t.cast("T", _read(kind, data))


def _read(kind: t.Any, data: t.Any) -> t.Any:
    """Read plain data as a type: a dataclass, a tuple, a path, one of these or None, or what JSON knows itself."""
    inner = t.get_args(kind)
    if data is None:
        return None
    if isinstance(kind, types.UnionType):
        return _read(next(one for one in inner if one is not types.NoneType), data)
    if t.get_origin(kind) is list:
        return [_read(inner[0], one) for one in data]
    if t.get_origin(kind) is tuple:
        members = [inner[0]] * len(data) if inner[-1] is ... else inner
        return tuple(_read(member, one) for member, one in zip(members, data, strict=True))
    if dataclasses.is_dataclass(kind):
        hints = _hints(t.cast("type", kind))
        return t.cast("type", kind)(**{name: _read(hints[name], one) for name, one in data.items()})
    return Path(data) if kind is Path else data


_hints = functools.cache(t.get_type_hints)
