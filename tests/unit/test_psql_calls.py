"""psql reports success on failure unless it is told not to: each call of it is told."""

from __future__ import annotations

import re

from tests.support import PROJECT

#: The operator's own psql: interactive, with the operator's own settings.
INTERACTIVE = 'os.execve(f"{state.bin}/psql"'
_CALL = re.compile(r"""["'/ ]psql["'][,\]]|\bpsql +-""")


def test_every_call_of_psql_stops_at_the_first_error_and_reads_no_settings_of_the_user():
    wrong, calls = [], 0
    for folder in ("collections", "roles", "playbooks", "tools", "molecule"):
        for path in [*(PROJECT / folder).rglob("*.py"), *(PROJECT / folder).rglob("*.yml")]:
            text = path.read_text(encoding="utf-8")
            for match in _CALL.finditer(text):
                around = text[max(0, match.start() - 40) : match.end() + 160]
                if INTERACTIVE in around or _is_list_of_names(around):
                    continue
                calls += 1
                if "-X" not in around or "ON_ERROR_STOP" not in around:
                    wrong.append(f"{path.relative_to(PROJECT)}: {match[0]}")
    assert not wrong, "\n".join(wrong)
    assert calls, "the pattern finds nothing any more"


def _is_list_of_names(text: str) -> bool:
    """Tell whether psql is named among other programs, not called."""
    return '"pg_dump"' in text or '"initdb"' in text or '"postgres"' in text
