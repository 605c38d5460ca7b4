"""Writes the variables of each role into its README, from meta/argument_specs.yml, so that they are said once.

What stands between the two marks is replaced; the rest of a README is written by hand.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import yaml

from tools.project import ROOT

if TYPE_CHECKING:
    from pathlib import Path

BEGIN, END = "<!-- variables: written by ./runbook readmes -->", "<!-- end of variables -->"


def table(role: Path) -> str:
    """Return the variables of a role's main entry point as a Markdown table."""
    specification = yaml.safe_load((role / "meta" / "argument_specs.yml").read_text(encoding="utf-8"))
    options: dict[str, dict[str, Any]] = specification["argument_specs"]["main"].get("options", {})
    rows = [
        f"| `{name}` | {_kind(option)} | {_default(option)} | {_plain(option['description'])} |"
        for name, option in options.items()
    ]
    return "\n".join(["| variable | type | default | what it is |", "| --- | --- | --- | --- |", *rows])


def _kind(option: dict[str, Any]) -> str:
    choices = option.get("choices")
    return f"{option['type']}: {', '.join(choices)}" if choices else str(option["type"])


def _default(option: dict[str, Any]) -> str:
    if option.get("required"):
        return "*required*"
    default = option.get("default")
    text = str(default).lower() if isinstance(default, bool) else str(default)
    return f"`{text}`" if text else "empty"


def _plain(text: str) -> str:
    """Return a description with Markdown for Ansible's markup."""
    return re.sub(r"[CMOV]\(([^)]*)\)", r"`\1`", text)


def written(role: Path) -> str:
    """Return a role's README as it should be."""
    text = (role / "README.md").read_text(encoding="utf-8")
    head, _begin, rest = text.partition(BEGIN)
    _old, _end, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table(role)}\n{END}{tail}"


def roles() -> list[Path]:
    """Return the folders of all roles."""
    return sorted(path.parent.parent for path in ROOT.glob("roles/*/meta/argument_specs.yml"))


def main() -> int:
    """Write all READMEs."""
    for role in roles():
        (role / "README.md").write_text(written(role), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
