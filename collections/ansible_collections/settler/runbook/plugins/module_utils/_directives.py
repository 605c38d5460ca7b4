# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Directives: what a migration says of itself, in comments C(-- runbook: name=value …) at the head of its file."""

from __future__ import annotations

import re
import shlex
import typing as t
from dataclasses import dataclass, replace

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError

_LINE = re.compile(r"^[ \t]*--[ \t]*runbook:(.*)$")
#: What was meant as a directive, and would be a comment.
_NEARLY = re.compile(
    r"^[ \t]*(--+|/\*)[ \t]*runbook([ \t]*:|[ \t]+(?=no-transaction|irreversible|[a-z-]+=))", re.IGNORECASE
)
_COMMENT_OR_BLANK = re.compile(r"^[ \t]*(--.*)?$")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|min|h)")
_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}
_PHASES = ("expand", "contract")


@dataclass(frozen=True)
class Directives:
    """What a file asks for. Times are in seconds, None is what the run says.

    C(allows) has pairs of a hazard and the reason why it is no danger here; C(requires) has versions or files that
    must be applied before; C(changes) has tables, and columns as C(table.column), whose data it changes on purpose;
    the C(batch_) ones belong to C(NNN_name.batch.sql).
    """

    transaction: bool = True
    lock_timeout: float | None = None
    statement_timeout: float | None = None
    role: str | None = None
    requires: tuple[str, ...] = ()
    phase: str = ""
    irreversible: bool = False
    allows: tuple[tuple[str, str], ...] = ()
    changes: tuple[str, ...] = ()
    batch_table: str = ""
    batch_key: str = ""
    batch_size: int = 1000
    batch_target: float = 0.5


def read_directives(text: str, where: object) -> Directives:
    """Return the directives of a file.

    Args:
        text: the file, with LF line ends.
        where: its path, for messages.

    Raises:
        RunbookError: an unknown directive, one that is spelled as a comment, a value that makes no sense, or a
            directive below the first statement.
    """
    found = Directives()
    head = True
    for number, line in enumerate(text.split("\n"), 1):
        match = _LINE.match(line)
        if match and not head:
            raise RunbookError(
                f"{where}:{number}: a directive below the first statement: {line.strip()}",
                hint="Directives stand in comments at the head of the file.",
            )
        if match:
            found = _read_line(found, match[1], f"{where}:{number}")
        elif head and _NEARLY.match(line):
            raise RunbookError(
                f"{where}:{number}: not written as a directive: {line.strip()}",
                hint="Write -- runbook: and the directive.",
            )
        head = head and bool(_COMMENT_OR_BLANK.match(line))
        if not head and "runbook:" not in text:
            break
    return found


def _read_line(found: Directives, line: str, where: str) -> Directives:
    """Add the directives of one line."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise RunbookError(f"{where}: {error} in the directive", hint='Write reason="…" with both quotes.') from error
    if not words:
        raise RunbookError(f"{where}: a directive without a name", hint=_known())
    for position, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "reason" and position and words[position - 1].startswith("allow="):
            continue
        if name == "allow":
            found = replace(found, allows=(*found.allows, _allowance(value, words[position + 1 :], where)))
        elif name in _FLAGS and not equals:
            found = replace(found, **_FLAGS[name])
        elif name in _VALUES and value:
            try:
                found = replace(found, **_VALUES[name](value, found))
            except ValueError as error:
                raise RunbookError(f"{where}: {word}: {error}") from error
        else:
            needs = "takes no value" if name in _FLAGS else "needs a value"
            what = f"directive {name} {needs}" if name in _FLAGS or name in _VALUES else "unknown directive"
            raise RunbookError(f"{where}: {what}: {word}", hint=_known())
    return found


def _allowance(hazard: str, words: list[str], where: str) -> tuple[str, str]:
    """Return a hazard that is allowed, and the reason that must stand behind it."""
    reason = words[0].removeprefix("reason=") if words and words[0].startswith("reason=") else ""
    if not hazard or not reason:
        raise RunbookError(
            f"{where}: allow={hazard} says no reason",
            hint=f'Write: -- runbook: allow={hazard or "<hazard>"} reason="why it is no danger here"',
        )
    return hazard, reason


def _known() -> str:
    return "Known are: " + ", ".join(sorted([*_FLAGS, *(f"{name}=…" for name in _VALUES), 'allow=… reason="…"'])) + "."


def _duration(value: str) -> float:
    match = _DURATION.fullmatch(value)
    if not match:
        raise ValueError("not a time such as 500ms, 2s, 5min or 1h")
    return float(match[1]) * _UNITS[match[2]]


def _phase(value: str) -> str:
    if value not in _PHASES:
        raise ValueError(f"phase is {' or '.join(_PHASES)}")
    return value


def _object(value: str) -> str:
    if not re.fullmatch(r"[^.\s]+(\.[^.\s]+){0,2}", value):
        raise ValueError("not a table such as jobs or public.jobs, or a column such as jobs.tenant_id")
    return value


def _count(value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise ValueError("not a number of rows")
    return int(value)


_FLAGS: dict[str, dict[str, t.Any]] = {
    "no-transaction": {"transaction": False},
    "irreversible": {"irreversible": True},
}
_VALUES: dict[str, t.Callable[[str, Directives], dict[str, t.Any]]] = {
    "lock-timeout": lambda value, _found: {"lock_timeout": _duration(value)},
    "statement-timeout": lambda value, _found: {"statement_timeout": _duration(value)},
    "role": lambda value, _found: {"role": value},
    "requires": lambda value, found: {"requires": (*found.requires, *value.split(","))},
    "changes": lambda value, found: {"changes": (*found.changes, *map(_object, value.split(",")))},
    "phase": lambda value, _found: {"phase": _phase(value)},
    "batch-table": lambda value, _found: {"batch_table": value},
    "batch-key": lambda value, _found: {"batch_key": value},
    "batch-size": lambda value, _found: {"batch_size": _count(value)},
    "batch-target": lambda value, _found: {"batch_target": _duration(value)},
}
