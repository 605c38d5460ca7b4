"""Values that hurt, as fields of a line of COPY text."""

from __future__ import annotations

import json

NULL = r"\N"


def copy_text(value: str) -> str:
    """Escape a value for a line of COPY text."""
    return value.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def copy_json(value: object) -> str:
    """Write a value as jsonb in a line of COPY text."""
    return copy_text(json.dumps(value, ensure_ascii=False))


def copy_array(values: list[str | None]) -> str:
    """Write strings as a text[] in a line of COPY text."""
    return copy_text("{" + ",".join("NULL" if value is None else _quoted(value) for value in values) + "}")


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


#: What breaks escaping, comparing, cutting and printing; each short enough for a varchar with a number behind it.
NASTY = [
    "", " ", "plain", "NULL", r"\N", r"\.", "O'Brien", 'say "hi"', r"C:\temp\new", "tab\there", "two\nlines\r\n",
    "100%s %(x)s {0} {{", "$$; drop table jobs; --", "{NULL,\"a\"}", "\x01\x1f\x7f\b\v\f", "trailing \\",
    "naïve café", "e\u0301 z\u200bero", "Z\u0351\u036b\u0343a\u0321\u0353lg\u030ao\u0315", "日本語", "\u202eleft",
    "שלום עולם", "مرحبا بالعالم", "🧾💶", "👩‍👩‍👧‍👦 🇨🇭", "İıſß", "\ufeffmark", "\ufffd \ufffe \uffff", "\U0010ffff",
    "𝛺" * 60,
]  # fmt: skip
TEXTS = [copy_text(value) for value in NASTY]
TEXTS_OR_NULL = [*TEXTS, NULL]
#: As long as a varchar(255) can be, in characters, and four times that in bytes.
LONGEST_NAME = "𐍈" * 255

JSONS = [
    "{}",
    "[]",
    "null",
    copy_json({"count": 0, "ratio": 0.1, "big": 10**30, "nested": {"list": [1, None, True, {"deep": []}]}}),
    '{"huge": 1e400, "tiny": -1e-400, "zeros": 1.000, "same": 1, "same": 2}',
    "[" * 200 + "]" * 200,
    *(copy_json({"text": value, value or "empty": [value]}) for value in NASTY),
]
JSONS_OR_NULL = [*JSONS, NULL]
MEGABYTE = copy_json({"padding": ["0123456789abcdef" * 64] * 1024})

ARRAYS = [
    copy_array([]),
    copy_array(["jobs:read", "jobs:write"]),
    copy_array([None]),
    copy_array([None, "NULL", "null", '"', "\\", "{}", ",", ""]),
    copy_array([*NASTY]),
]
ARRAYS_OR_NULL = [*ARRAYS, NULL]

AMOUNTS = ["0.00", "-0.01", "99999999.99", "-99999999.99", "NaN"]
INTEGERS = ["0", "-1", "2147483647", "-2147483648"]
BIGINTS = ["0", "-1", "9223372036854775807", "-9223372036854775808"]
UUIDS = ["00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff", NULL]
BOOLEANS = ["t", "t", "f", NULL]

#: Times that no clock shows, from the first that PostgreSQL knows to the last.
TIMES = [
    "-infinity",
    "4713-01-01 00:00:00 BC",
    "0001-01-01 00:00:00",
    "1582-10-10 12:00:00",
    "1900-02-28 23:59:59.999999",
    "1969-07-20 20:17:40",
    "1969-12-31 23:59:59.5",
    "1970-01-01 00:00:00",
    "2000-02-29 00:00:00.000001",
    "2016-12-31 23:59:60",
    "2038-01-19 03:14:08",
    "9999-12-31 23:59:59.999999",
    "10000-01-01 00:00:00",
    "294276-12-31 23:59:59.999999",
    "infinity",
]
