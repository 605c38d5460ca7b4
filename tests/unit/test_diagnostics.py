"""What is kept of a failed run: no secrets, and everything else as it was."""

from __future__ import annotations

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._diagnostics import since_then, without_secrets


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("ALTER ROLE a PASSWORD 'it''s secret' LOGIN", "ALTER ROLE a PASSWORD *** LOGIN"),
        ("postgresql://u:hidden@h/d", "postgresql://u:***@h/d"),
        ("ALTER DATABASE d SET app.jwt_secret = 'hidden'", "ALTER DATABASE d SET app.jwt_secret = ***"),
        ('["app.jwt_secret=hidden", "work_mem=5MB"]', '["app.jwt_secret=***", "work_mem=5MB"]'),
        ("SELECT api_token FROM tokens", "SELECT api_token FROM tokens"),
        ("004_secret_rules.sql:12: no such table", "004_secret_rules.sql:12: no such table"),
        ("of my-own-password here", "of *** here"),
    ],
)
def test_only_values_of_secrets_are_taken_out(text, kept):
    assert without_secrets(text, ["my-own-password"]) == kept
    assert without_secrets({"rows": [text]}, ["my-own-password"]) == {"rows": [kept]}


def test_what_is_called_a_secret_is_none_in_data():
    assert without_secrets({"password": "x", "token": "", "name": "x"}, []) == {
        "password": "***",
        "token": "",
        "name": "x",
    }


@pytest.mark.parametrize(
    "line",
    [
        "{} UTC [42] ERROR:  x",
        "[42] {}.123 UTC db=a,user=b ERROR:  x",
        "<2026-11-01 00:00:00 UTC of the session> {} ERROR:  x",
        '{{"timestamp":"{}.000 UTC","message":"x"}}',
        '{}.123 UTC,"a","b",42,"[local]",x',
    ],
)
def test_log_is_cut_at_the_run_whatever_its_format(line):
    old, new = line.format("2026-11-28 06:59:59"), line.format("2026-11-28 07:00:00")
    more = "\tVALUES ('2026-01-01 00:00:00')"
    began = ("2026-11-28 07:00:00", 1795849200.5)
    assert since_then([more, old, more, new, more, new], *began) == ([new, more, new], False)
    assert since_then([new, more], *began) == ([new, more], True)
    assert since_then([old, more], *began) == ([], False)


def test_log_with_the_time_as_seconds_is_cut_at_the_run():
    lines = ["[42] 1795849199.900 LOG:  old", "[42] 1795849200.100 LOG:  new"]
    assert since_then(lines, "2026-11-28 07:00:00", 1795849200.5) == (lines[1:], False)
