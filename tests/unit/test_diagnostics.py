"""What is kept of a failed run: no secrets, and everything else as it was."""

from __future__ import annotations

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._diagnostics import without_secrets


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
