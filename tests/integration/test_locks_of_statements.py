"""The locks that the plan announces are the locks that the server takes: each statement is asked of pg_locks."""

from __future__ import annotations

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._effects import LOCKS, effects
from pglast import parse_sql

SETUP = """
CREATE TABLE parent (id int PRIMARY KEY);
CREATE TABLE child (id int PRIMARY KEY, parent_id int, note varchar(10), body text);
CREATE INDEX child_note ON child (note);
CREATE TABLE parted (id int NOT NULL) PARTITION BY RANGE (id);
CREATE TABLE part_1 PARTITION OF parted FOR VALUES FROM (0) TO (10);
CREATE TABLE loose (id int NOT NULL);
CREATE TABLE "Odd name" (id int);
CREATE VIEW child_view AS SELECT id FROM child;
CREATE MATERIALIZED VIEW child_sums AS SELECT parent_id, count(*) AS n FROM child GROUP BY 1;
CREATE UNIQUE INDEX ON child_sums (parent_id);
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER touches BEFORE UPDATE ON child FOR EACH ROW EXECUTE FUNCTION touch();
CREATE POLICY mine ON child USING (true);
CREATE SEQUENCE counted;
CREATE SCHEMA elsewhere;
ALTER TABLE child ADD CONSTRAINT later CHECK (id > 0) NOT VALID;
"""

STATEMENTS = [
    "SELECT * FROM child JOIN parent ON parent.id = parent_id",
    "SELECT * FROM child FOR UPDATE",
    "WITH child AS (SELECT 1 AS id) SELECT id FROM child",
    "WITH gone AS (DELETE FROM child RETURNING id) SELECT count(*) FROM gone, parent",
    "INSERT INTO child (id) SELECT id FROM parent",
    "UPDATE child SET note = 'x' FROM parent WHERE parent.id = parent_id",
    "DELETE FROM child USING parent WHERE parent.id = parent_id",
    "CREATE INDEX ON child (body)",
    "CREATE UNIQUE INDEX IF NOT EXISTS child_body ON child (body)",
    "DROP TABLE loose",
    "DROP INDEX child_note",
    "DROP VIEW child_view",
    "DROP MATERIALIZED VIEW child_sums",
    "DROP TRIGGER touches ON child",
    "DROP POLICY mine ON child",
    "TRUNCATE child, parent",
    "LOCK TABLE child IN SHARE ROW EXCLUSIVE MODE",
    "LOCK child, parent",
    "ANALYZE child",
    "CLUSTER child USING child_pkey",
    "REINDEX TABLE child",
    "REFRESH MATERIALIZED VIEW child_sums",
    "REFRESH MATERIALIZED VIEW CONCURRENTLY child_sums",
    "CREATE TRIGGER again BEFORE INSERT ON child FOR EACH ROW EXECUTE FUNCTION touch()",
    "CREATE POLICY other ON child USING (true)",
    "ALTER POLICY mine ON child USING (false)",
    "CREATE RULE nothing AS ON DELETE TO child DO INSTEAD NOTHING",
    "CREATE STATISTICS related ON id, parent_id FROM child",
    "COMMENT ON TABLE child IS 'x'",
    "COMMENT ON COLUMN child.note IS 'x'",
    "CREATE TABLE made (id int REFERENCES parent)",
    "CREATE TABLE made (LIKE child)",
    "CREATE TABLE made () INHERITS (loose)",
    "CREATE TABLE part_2 PARTITION OF parted FOR VALUES FROM (10) TO (20)",
    "CREATE TABLE made AS SELECT * FROM child",
    "SELECT * INTO made FROM child",
    "CREATE VIEW made AS SELECT * FROM child",
    "CREATE OR REPLACE VIEW child_view AS SELECT id FROM child",
    "ALTER SEQUENCE counted RESTART",
    "ALTER TABLE child RENAME TO renamed",
    "ALTER TABLE child RENAME note TO remark",
    "ALTER INDEX child_note RENAME TO renamed",
    "ALTER TABLE child SET SCHEMA elsewhere",
    "ALTER TABLE child ADD COLUMN more int",
    "ALTER TABLE child ADD COLUMN more int REFERENCES parent",
    "ALTER TABLE child DROP COLUMN body",
    "ALTER TABLE child ALTER note TYPE text",
    "ALTER TABLE child ALTER note SET DEFAULT 'x'",
    "ALTER TABLE child ALTER note SET NOT NULL",
    "ALTER TABLE child ALTER note SET STATISTICS 500",
    "ALTER TABLE child ALTER note SET (n_distinct = 5)",
    "ALTER TABLE child ALTER note SET STORAGE plain",
    "ALTER TABLE child SET (fillfactor = 80)",
    "ALTER TABLE child SET (fillfactor = 80, user_catalog_table = true)",
    "ALTER TABLE child RESET (fillfactor)",
    "ALTER TABLE child ADD CHECK (id > 0)",
    "ALTER TABLE child ADD CONSTRAINT fk FOREIGN KEY (parent_id) REFERENCES parent NOT VALID",
    "ALTER TABLE child VALIDATE CONSTRAINT later",
    "ALTER TABLE child DROP CONSTRAINT later",
    "ALTER TABLE child ADD UNIQUE (note)",
    "ALTER TABLE child DISABLE TRIGGER touches",
    "ALTER TABLE child ENABLE ALWAYS TRIGGER touches",
    "ALTER TABLE child DISABLE TRIGGER USER",
    "ALTER TABLE child ENABLE ROW LEVEL SECURITY",
    "ALTER TABLE child CLUSTER ON child_pkey",
    "ALTER TABLE child SET WITHOUT CLUSTER",
    "ALTER TABLE child SET UNLOGGED",
    "ALTER TABLE child REPLICA IDENTITY FULL",
    "ALTER TABLE child OWNER TO CURRENT_USER",
    "ALTER TABLE child INHERIT loose",
    "ALTER TABLE parted ATTACH PARTITION loose FOR VALUES FROM (20) TO (30)",
    "ALTER TABLE parted DETACH PARTITION part_1",
    'ALTER TABLE "Odd name" ADD COLUMN "An other" int',
    'ALTER TABLE public."Odd name" RENAME TO plain',
]

HELD = """
SELECT mode FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'relation' AND relation = %s::oid AND granted
"""


@pytest.mark.every_major
def test_the_server_takes_the_locks_that_the_plan_announces(new_database, connect):
    database = connect(new_database())
    database.execute(SETUP)
    wrong = []
    for statement in STATEMENTS:
        announced = [effect for effect in effects(parse_sql(statement)[0].stmt) if effect.lock]
        names = [one.relation for one in announced]
        found = dict(database.execute("SELECT n, to_regclass(n)::oid FROM unnest(%s::text[]) n", [names]).fetchall())
        with database.transaction(force_rollback=True):
            database.execute(statement)
            for effect in announced:
                modes = [row[0] for row in database.execute(HELD, [found[effect.relation]])]
                held = max((_spelt(mode) for mode in modes), key=LOCKS.index, default="nothing")
                if held != effect.lock:
                    wrong.append(f"{statement}: {effect.relation}: announced {effect.lock}, the server took {held}")
    assert not wrong, "\n".join(wrong)


def _spelt(mode: str) -> str:
    """Return a mode of pg_locks as the manual writes it: AccessShareLock is ACCESS SHARE."""
    return "".join(f" {letter}" if letter.isupper() else letter.upper() for letter in mode.removesuffix("Lock")).strip()
