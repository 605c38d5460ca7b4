"""Scripts as plain data: what the controller has parsed is on the host what the host would have parsed itself."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
from ansible_collections.settler.runbook.plugins.module_utils import _scripts
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError, Unparsed
from ansible_collections.settler.runbook.plugins.module_utils._files import MigrationFile, read_migrations
from ansible_collections.settler.runbook.plugins.module_utils._statements import parse, parse_all
from hypothesis import given
from hypothesis import strategies as st

from tests.support import PROJECT, migration, write_migrations
from tests.unit.test_statements import WHOLE

#: Statements with each kind of probe, effect, risk and mark that the parser leaves.
STATEMENTS = [
    *WHOLE.values(),
    "ALTER TABLE a.t ADD COLUMN c int NOT NULL DEFAULT random(), ALTER COLUMN d TYPE bigint",
    "ALTER TABLE t ADD CONSTRAINT k CHECK (c IS NOT NULL) NOT VALID; ALTER TABLE t VALIDATE CONSTRAINT k",
    "ALTER TABLE t RENAME TO u; DROP TABLE IF EXISTS x, y.z CASCADE",
    "CREATE INDEX i ON t (lower(c)); DROP SCHEMA s CASCADE",
    "ALTER TABLE t ADD COLUMN m mood; ALTER TABLE p ATTACH PARTITION p1 FOR VALUES IN (1)",
    "UPDATE t SET a = 1 WHERE b > 2; DELETE FROM t",
    "REFRESH MATERIALIZED VIEW v",
    "SET LOCAL lock_timeout = '1s'",
    "SET search_path = s",
    "DO $$ BEGIN PERFORM 1; END $$; CALL p()",
    "CREATE TABLE n (id int, FOREIGN KEY (id) REFERENCES t (id)); GRANT SELECT ON ALL TABLES IN SCHEMA public TO r",
    "SELECT 1 NEWER THAN THE GRAMMAR",
]
OUTSIDE = [
    "CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS i ON s.t (c)",
    "DROP INDEX CONCURRENTLY i",
    "ALTER TABLE p DETACH PARTITION p1 CONCURRENTLY",
    "REINDEX TABLE CONCURRENTLY t; VACUUM t",
    "ALTER TYPE e ADD VALUE 'v'",
]
BATCH = "-- runbook: batch-table=t batch-key=id\nUPDATE t SET a = 1 WHERE id BETWEEN :from AND :to"


def _fits_outside(text):
    """Tell whether a file without a transaction may have a statement: nothing is kept in the session there."""
    with contextlib.suppress(RunbookError):
        return bool(parse(migration("-- runbook: no-transaction\n" + text, "001_a.sql")))
    return False


OUTSIDE += filter(_fits_outside, STATEMENTS)


@st.composite
def _files(draw):
    outside = draw(st.booleans())
    pool = OUTSIDE if outside else STATEMENTS
    text = ";\n-- a comment\n".join(draw(st.lists(st.sampled_from(pool), max_size=6)))
    head = "-- runbook: no-transaction\n" if outside else "-- runbook: irreversible lock-timeout=3s\n"
    verify = draw(st.sampled_from(["", "SELECT 1 WHERE false;\nSELECT 2 WHERE false"]))
    name = draw(st.sampled_from(["001_a.sql", "R__a.sql"]))
    return draw(st.sampled_from([migration(head + text, name, verify), migration(BATCH, "002_b.batch.sql", verify)]))


@given(st.lists(_files(), max_size=3, unique_by=_scripts.key_of))
def test_scripts_come_back_from_json_as_they_were(files):
    sent = _scripts.unpack(_scripts.pack(_scripts.to_data(files)))
    assert _scripts.from_data(list[MigrationFile], sent) == files
    answer = json.loads(json.dumps(_scripts.parsed(files)))
    assert _scripts._look_up(answer, files) == parse_all(files)


def test_the_project_s_own_migrations_come_back_as_they_were():
    files = read_migrations(PROJECT / "sql/migrations")
    assert _scripts._look_up(_scripts.parsed(files), files) == parse_all(files)


def test_every_field_of_a_statement_is_tried():
    """A field that no statement above fills would make the property say nothing about it."""
    scripts = [parse(migration("-- runbook: no-transaction\n" + text, "001_a.sql")) for text in OUTSIDE]
    made = [part for script in scripts for one in script.statements for part in (one, *one.effects, *one.risks)]
    made += [one.probe for script in scripts for one in script.statements if one.probe]
    for kind in {type(part) for part in made}:
        for field in dataclasses.fields(kind):
            values = {getattr(part, field.name) for part in made if type(part) is kind}
            assert values != {field.default}, f"{kind.__name__}.{field.name}"


@pytest.mark.parametrize("changed", ["text", "verify"])
def test_script_of_a_file_that_was_changed_is_not_taken(tmp_path, monkeypatch, changed):
    write_migrations(tmp_path / "m", {"001_a.sql": "SELECT 1"})
    (tmp_path / "m/001_a.verify.sql").write_text("SELECT 1 WHERE false")
    scripts = tmp_path / "scripts.json"
    scripts.write_text(json.dumps(_scripts.parsed(read_migrations(tmp_path / "m"))))
    monkeypatch.setattr(_scripts, "PGLAST_IMPORT_ERROR", "missing")
    parser = _scripts.parser_for(str(scripts))
    assert [script.file.file for script in parser(read_migrations(tmp_path / "m"))] == ["001_a.sql"]

    (tmp_path / "m" / ("001_a.sql" if changed == "text" else "001_a.verify.sql")).write_text("SELECT 2 WHERE false")
    with pytest.raises(Unparsed) as question:
        parser(read_migrations(tmp_path / "m"))
    (asked,) = _scripts.unpack(question.value.facts["unparsed"])
    assert asked["path"].endswith("001_a.sql")
    assert "pglast is missing on " in question.value.as_result()["msg"]
