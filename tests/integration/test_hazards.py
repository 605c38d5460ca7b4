"""Hazards: what a file means in a database that has rows, and that nothing is one where there are none."""

from __future__ import annotations

import re

import pytest
from ansible_collections.settler.runbook.plugins.module_utils import _hazards
from ansible_collections.settler.runbook.plugins.module_utils._effects import quoted
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._hazards import assess, refuse_hazards
from ansible_collections.settler.runbook.plugins.module_utils._run import Options
from ansible_collections.settler.runbook.plugins.module_utils._statements import parse

from tests.support import migration

SETUP = """
CREATE TABLE parent (id int PRIMARY KEY);
CREATE TABLE child (id int PRIMARY KEY, parent_id int, note varchar(10), amount numeric(10, 2), sum int NOT NULL,
                    seen timestamp, body text, proved int, CHECK (proved IS NOT NULL));
CREATE INDEX child_there ON child (note);
ALTER TABLE child ADD CONSTRAINT later CHECK (id > 0) NOT VALID;
INSERT INTO parent SELECT g FROM generate_series(1, 1000) g;
INSERT INTO child SELECT g, g, 'x', 1, 1, now(), 'b', 1 FROM generate_series(1, 1000) g;
CREATE TABLE empty (LIKE child INCLUDING ALL);
CREATE TABLE parted (id int NOT NULL) PARTITION BY RANGE (id);
CREATE TABLE part_1 PARTITION OF parted FOR VALUES FROM (0) TO (5000);
INSERT INTO parted SELECT g FROM generate_series(1, 1000) g;
CREATE TABLE loose (id int NOT NULL, v int);
INSERT INTO loose SELECT g FROM generate_series(6000, 7000) g;
ALTER TABLE loose ADD CONSTRAINT of_key CHECK (id >= 6000 AND id < 8000) NOT VALID;
ALTER TABLE loose ADD CONSTRAINT of_v CHECK (v > 0) NOT VALID;
CREATE TABLE hidden (id int); ALTER TABLE hidden ENABLE ROW LEVEL SECURITY; ALTER TABLE hidden FORCE ROW LEVEL SECURITY;
INSERT INTO hidden SELECT 1 WHERE false;
CREATE MATERIALIZED VIEW sums AS SELECT parent_id, count(*) AS n FROM child GROUP BY 1;
CREATE SCHEMA extra; CREATE TABLE extra.kept AS SELECT 1 AS id;
CREATE TABLE "Odd name" AS SELECT 1 AS id;
CREATE TYPE mood AS ENUM ('sad'); CREATE TYPE pair AS (m mood[]);
CREATE DOMAIN positive AS int CHECK (VALUE > 0); CREATE DOMAIN tiny AS positive; CREATE DOMAIN loosely AS int;
CREATE TABLE typed AS SELECT g AS id, 'sad'::mood AS m, ROW(ARRAY['sad'::mood])::pair AS p, 5::tiny AS d
    FROM generate_series(1, 1000) g;
CREATE TABLE fits (id int NOT NULL, CHECK (id >= 9000 AND id < 9500));
INSERT INTO fits SELECT g FROM generate_series(9000, 9100) g;
CREATE TABLE unfit (id int NOT NULL, CHECK (id >= 0)); INSERT INTO unfit SELECT g FROM generate_series(9600, 9700) g;
CREATE TABLE rest (id int NOT NULL, at int NOT NULL) PARTITION BY RANGE (at);
CREATE TABLE rest_all PARTITION OF rest DEFAULT;
INSERT INTO rest SELECT g, g FROM generate_series(1, 1000) g;
CREATE TABLE next (id int NOT NULL, at int NOT NULL);
ALTER TABLE child CLUSTER ON child_pkey;
ANALYZE;
"""

#: A statement and the hazard that it is, with the relation; an empty name is none.
CASES = [
    ("ALTER TABLE child ADD COLUMN more int", ""),
    ("ALTER TABLE child ADD COLUMN more int DEFAULT 5 NOT NULL", ""),
    ("ALTER TABLE child ADD COLUMN more timestamptz DEFAULT now()", ""),
    ("ALTER TABLE child ADD COLUMN more uuid DEFAULT gen_random_uuid()", "table-rewrite child.more"),
    ("ALTER TABLE child ADD COLUMN more timestamptz DEFAULT clock_timestamp()", "table-rewrite child.more"),
    ("ALTER TABLE child ADD COLUMN more serial", "table-rewrite child.more"),
    ("ALTER TABLE child ADD COLUMN more int GENERATED ALWAYS AS IDENTITY", "table-rewrite child.more"),
    ("ALTER TABLE child ADD COLUMN more int GENERATED ALWAYS AS (id * 2) STORED", "table-rewrite child.more"),
    ("ALTER TABLE child ADD COLUMN IF NOT EXISTS note uuid DEFAULT gen_random_uuid()", ""),
    ("ALTER TABLE child ALTER note TYPE varchar(20)", ""),
    ("ALTER TABLE child ALTER note TYPE text", ""),
    ("ALTER TABLE child ALTER note TYPE varchar(5)", "type-change child.note"),
    ("ALTER TABLE child ALTER body TYPE varchar", ""),
    ("ALTER TABLE child ALTER amount TYPE numeric(12, 2)", ""),
    ("ALTER TABLE child ALTER amount TYPE numeric", ""),
    ("ALTER TABLE child ALTER amount TYPE numeric(12, 3)", "type-change child.amount"),
    ("ALTER TABLE child ALTER sum TYPE bigint", "type-change child.sum"),
    ("ALTER TABLE child ALTER note TYPE int USING 1", "type-change child.note"),
    ("ALTER TABLE empty ALTER sum TYPE bigint", ""),
    ("ALTER TABLE child ALTER note SET NOT NULL", "not-null-without-check child.note"),
    ("ALTER TABLE child ALTER sum SET NOT NULL", ""),
    ("ALTER TABLE child ALTER proved SET NOT NULL", ""),
    ("ALTER TABLE child ADD CHECK (sum > 0)", "check-without-not-valid child"),
    ("ALTER TABLE child ADD CHECK (sum > 0) NOT VALID", ""),
    ("ALTER TABLE child ADD FOREIGN KEY (parent_id) REFERENCES parent", "foreign-key-without-not-valid child"),
    ("ALTER TABLE child ADD FOREIGN KEY (parent_id) REFERENCES parent NOT VALID", ""),
    ("ALTER TABLE empty ADD FOREIGN KEY (parent_id) REFERENCES parent", ""),
    ("ALTER TABLE child ADD UNIQUE (note)", "index-without-concurrently child"),
    ("ALTER TABLE child VALIDATE CONSTRAINT later", ""),
    ("ALTER TABLE child ALTER note SET DEFAULT 'y'; ALTER TABLE child VALIDATE CONSTRAINT later",
     "validate-under-lock child"),
    ("CREATE INDEX ON child (body)", "index-without-concurrently child"),
    ("CREATE INDEX ON parted (id)", "index-without-concurrently parted"),
    ("CREATE INDEX IF NOT EXISTS child_there ON child (note)", ""),
    ("CREATE INDEX ON empty (body)", ""),
    ("REINDEX TABLE child", "index-without-concurrently child"),
    ("CLUSTER child USING child_pkey", "table-rewrite child"),
    ("REFRESH MATERIALIZED VIEW sums", "refresh-without-concurrently sums"),
    ("ALTER TABLE parted ATTACH PARTITION loose FOR VALUES FROM (6000) TO (8000)", "attach-without-check loose"),
    ("UPDATE child SET note = 'z'", "change-without-where child"),
    ("UPDATE child SET note = 'z' WHERE id = 1", ""),
    ("DELETE FROM child", "change-without-where child"),
    ("ALTER TABLE child DROP COLUMN note", "drop-column child.note"),
    ("ALTER TABLE child DROP COLUMN IF EXISTS never", ""),
    ("ALTER TABLE empty DROP COLUMN note", ""),
    ("DROP TABLE child", "drop-table child"),
    ("DROP TABLE empty", ""),
    ('DROP TABLE "Odd name"', 'drop-table "Odd name"'),
    ("DROP SCHEMA extra CASCADE", "drop-table extra.kept"),
    ("TRUNCATE child, empty", "truncate child"),
    ("DROP TABLE public.child", "drop-table public.child"),
    ("ALTER TABLE child RENAME TO other; DROP TABLE public.other", "rename child, drop-table child"),
    ("CREATE TABLE made (id int); DROP TABLE public.made", ""),
    ("DROP TABLE empty; CREATE TABLE public.empty (id int); CREATE INDEX ON empty (id)", ""),
    ("ALTER TABLE child SET SCHEMA extra; DROP TABLE extra.child", "drop-table child"),
    ("ALTER TABLE child SET SCHEMA extra; DROP SCHEMA extra CASCADE", "drop-table extra.kept, drop-table child"),
    ("DROP TYPE mood CASCADE", "drop-column public.typed.m"),
    ("DROP TYPE mood", ""),
    ("DROP DOMAIN positive CASCADE", "drop-column public.typed.d"),
    ("DROP OWNED BY settler_app CASCADE", ""),
    ("ALTER DOMAIN positive ADD CHECK (VALUE > 1)", "check-without-not-valid public.typed.d"),
    ("ALTER DOMAIN positive ADD CHECK (VALUE > 1) NOT VALID", ""),
    ("ALTER DOMAIN tiny SET NOT NULL", "check-without-not-valid public.typed.d"),
    ("ALTER TABLE child ADD COLUMN more tiny", "table-rewrite child.more"),
    ("ALTER TABLE child ADD COLUMN more public.positive", "table-rewrite child.more"),
    ("ALTER TABLE child ADD COLUMN more loosely", ""),
    ("ALTER TABLE child ADD COLUMN more mood", ""),
    ("ALTER TABLE parted ATTACH PARTITION fits FOR VALUES FROM (9000) TO (9500)", ""),
    ("ALTER TABLE parted ATTACH PARTITION unfit FOR VALUES FROM (9500) TO (9800)", "attach-without-check unfit"),
    ("ALTER TABLE rest ATTACH PARTITION next FOR VALUES FROM (5000) TO (6000)", "attach-without-check public.rest_all"),
    ("CREATE TABLE new PARTITION OF rest FOR VALUES FROM (5000) TO (6000)", "attach-without-check public.rest_all"),
    ("REINDEX INDEX child_there", "index-without-concurrently child_there"),
    ("ALTER TABLE child RENAME TO other", "rename child"),
    ("ALTER TABLE child RENAME note TO other", "rename child.note"),
    ("ALTER TABLE child RENAME TO other; CREATE INDEX ON other (body)",
     "rename child, index-without-concurrently child"),
    ("CREATE TABLE made (id int); CREATE INDEX ON made (id); DROP TABLE made", ""),
    ("CREATE TABLE made (id int); ALTER TABLE made RENAME TO again; DROP TABLE again", ""),
    ("UPDATE hidden SET id = 1 WHERE id = 2", "row-security-hides-rows hidden"),
    ("INSERT INTO parent SELECT id FROM hidden", "row-security-hides-rows hidden"),
    ("INSERT INTO hidden VALUES (1)", ""),
]  # fmt: skip


@pytest.fixture
def look(new_database, connect, roles):
    """Return what tells the hazards of files, as the owner sees them in a database of SETUP."""
    session = connect(new_database(), role=roles.owner)
    session.execute(SETUP)

    def told(*files, **changes):
        options = Options(**{"run_id": "run-1", "role": roles.owner, "hazard_min_bytes": 0, **changes})
        return assess(session, [parse(file) for file in files], options)

    return told


def _named(plans):
    return ", ".join(f"{one.hazard} {one.relation}" for plan in plans for one in plan.hazards)


@pytest.mark.every_major
def test_each_statement_is_the_hazard_that_it_is_here(look):
    wrong = []
    for text, wanted in CASES:
        found = _named(look(migration(f"{text};\n")))
        if found != wanted:
            wrong.append(f"{text}: {found or 'nothing'}, not {wanted or 'nothing'}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.every_major
def test_what_is_no_type_change_writes_no_table_anew(new_database, connect):
    database = connect(new_database())
    database.execute(SETUP)
    wrong = []
    for text, wanted in CASES:
        if not re.match(r"ALTER TABLE child (ADD COLUMN|ALTER \w+ TYPE)", text):
            continue
        with database.transaction(force_rollback=True):
            before = database.execute("SELECT pg_relation_filenode('child')").fetchone()
            database.execute(text.replace("varchar(5)", "varchar(5) USING note::varchar(5)"))
            rewritten = database.execute("SELECT pg_relation_filenode('child')").fetchone() != before
        if rewritten != bool(wanted):
            wrong.append(f"{text}: the server {'wrote' if rewritten else 'did not write'} the table anew")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("SET search_path = extra, public;\nDROP TABLE kept;", "drop-table kept"),
        ("SET LOCAL search_path TO extra;\nALTER TABLE kept DROP COLUMN id;", "drop-column kept.id"),
        ("SET SCHEMA 'extra';\nDROP TABLE kept;", "drop-table kept"),
        ("SELECT pg_catalog.set_config('search_path', 'extra', false);\nDROP TABLE kept;", "drop-table kept"),
        ("SET search_path = extra;\nDROP TABLE child;", ""),
        (
            "SET search_path = extra, public;\nCREATE TABLE child (i int);\nDROP TABLE public.child;",
            "drop-table public.child",
        ),
        (
            "SET search_path = extra;\nDROP TABLE public.child;\nDROP TABLE extra.kept;",
            "drop-table public.child, drop-table extra.kept",
        ),
        ("SET search_path = extra;\nRESET search_path;\nDROP TABLE kept;", ""),
        ("CREATE TABLE kept (i int);\nSET search_path = extra;\nDROP TABLE kept;", "drop-table kept"),
    ],
)
def test_names_are_looked_for_under_the_search_path_of_the_file(look, text, wanted):
    first, then = look(migration(text), migration("DROP TABLE kept;", "002_after.sql"))
    assert _named([first]) == wanted
    assert _named([then]) == ""  # each file begins with the runbook's own path


def test_a_small_table_is_no_hazard_but_a_loss_is(look):
    file = migration("CREATE INDEX ON child (body);\nALTER TABLE child DROP COLUMN note;\n")
    assert _named(look(file, hazard_min_bytes=10 * 1024 * 1024)) == "drop-column child.note"


def test_not_null_after_a_check_of_the_same_run_is_none(look):
    files = (
        migration("ALTER TABLE child ADD CONSTRAINT n CHECK (note IS NOT NULL) NOT VALID;\n", "001_a.sql"),
        migration("ALTER TABLE child VALIDATE CONSTRAINT n;\n", "002_b.sql"),
        migration("ALTER TABLE child ALTER note SET NOT NULL;\n", "003_c.sql"),
    )
    assert _named(look(*files)) == ""
    assert _named(look(*files[1:])) == "not-null-without-check child.note"


def test_a_hazard_that_nobody_allows_names_file_line_table_and_the_way_out(look):
    file = migration("SELECT 1;\n\nDROP TABLE child;\n")
    with pytest.raises(RunbookError) as caught:
        refuse_hazards(look(file))
    assert f"{file.path}:3: drop-table: child (" in caught.value.message
    assert "about 1,000 rows" in caught.value.message
    assert "allow=drop-table" in caught.value.hint
    assert "migrate_hazards_allowed" in caught.value.hint
    assert caught.value.facts["hazards"][0]["relation"] == "child"


def test_a_file_or_a_run_may_allow_it(look):
    text = "DROP TABLE child;\n"
    allowed = look(migration('-- runbook: allow=drop-table reason="moved to the archive"\n' + text))
    refuse_hazards(allowed)
    assert allowed[0].hazards[0].allowed == "moved to the archive"
    refuse_hazards(look(migration(text), hazards_allowed=("drop-table",)))
    refuse_hazards(look(migration(text), hazards_allowed=("all",)))
    with pytest.raises(RunbookError, match="drop-table"):
        refuse_hazards(look(migration(text), hazards_allowed=("truncate",)))


def test_an_unknown_hazard_is_an_error_that_says_where_it_stands(look):
    file = migration('-- runbook: allow=everything reason="x"\nSELECT 1;\n')
    with pytest.raises(RunbookError, match=f"{file.path}:1: unknown hazard everything"):
        look(file)
    with pytest.raises(RunbookError, match="migrate_hazards_allowed: unknown hazard everything"):
        look(migration("SELECT 1;\n"), hazards_allowed=("everything",))


def test_the_plan_names_the_strongest_lock_with_size_and_rows(look):
    text = (
        "CREATE TABLE made (id int);\nSELECT * FROM parent;\nALTER TABLE child ADD COLUMN x int;\nDO $$ BEGIN END $$;\n"
    )
    (plan,) = look(migration("-- runbook: irreversible\n" + text))
    assert (plan.lock, plan.on.name, plan.on.rows, plan.code) == ("ACCESS EXCLUSIVE", "child", 1000, (5,))
    assert plan.as_dict()["lock"] == {
        "mode": "ACCESS EXCLUSIVE",
        "relation": "child",
        "bytes": plan.on.bytes,
        "rows": 1000,
    }
    line = plan.lines()[0]
    assert line.startswith("one transaction, 4 statements; ACCESS EXCLUSIVE on child (")
    assert "code that a plan cannot look into at line 5; irreversible" in line


def test_what_a_role_owns_an_extension_brought_and_the_locks_along_with_a_lock_are_told(look, new_database, connect):
    (owned,) = look(migration("DROP OWNED BY CURRENT_USER;\n"))
    assert {"drop-table public.child", "drop-table extra.kept"} <= set(_named([owned]).split(", "))
    session = connect(new_database())
    session.execute("CREATE EXTENSION hstore; CREATE TABLE a AS SELECT 'a=>1'::hstore AS h, ARRAY['a=>1'::hstore] AS i")
    (plan,) = assess(session, [parse(migration("DROP EXTENSION hstore CASCADE;\n"))], Options(run_id="r"))
    assert _named([plan]) == "drop-column public.a.h, drop-column public.a.i"

    session.execute("CREATE TABLE b (id int PRIMARY KEY); CREATE TABLE c (b int REFERENCES b); CREATE INDEX ON c (b)")
    session.execute("INSERT INTO b SELECT generate_series(1, 1000)")
    options = Options(run_id="r")
    (dropped,) = assess(session, [parse(migration("DROP TABLE c;\n"))], options)
    assert (dropped.lock, dropped.on.name) == ("ACCESS EXCLUSIVE", "b")
    session.execute("INSERT INTO c SELECT generate_series(1, 1000)")
    (dropped,) = assess(session, [parse(migration("DROP INDEX c_b_idx;\n"))], options)
    assert (dropped.lock, dropped.on.name) == ("ACCESS EXCLUSIVE", "c")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("REINDEX SCHEMA extra", "index-without-concurrently extra.kept"),
        ("REINDEX INDEX CONCURRENTLY child_there", ""),
        ("CLUSTER", "table-rewrite public.child"),
        ("VACUUM (FULL) child", "table-rewrite child"),
        ("DROP INDEX CONCURRENTLY child_there", ""),
    ],
)
def test_what_needs_no_transaction_is_looked_at_as_well(look, text, wanted):
    (plan,) = look(migration(f"-- runbook: no-transaction\n{text};\n"))
    assert _named([plan]) == wanted
    if "DROP INDEX" in text:
        assert (plan.lock, plan.on.name) == ("SHARE UPDATE EXCLUSIVE", "child")


def test_a_statement_without_a_table_means_all_of_them(look):
    (plan,) = look(migration("-- runbook: no-transaction\nVACUUM FULL;\n"))
    assert {"table-rewrite public.child", "table-rewrite extra.kept"} <= set(_named([plan]).split(", "))


def test_a_partition_that_the_run_has_given_a_validated_check_is_no_hazard(look):
    files = (
        migration("ALTER TABLE loose ADD CONSTRAINT n CHECK (id >= 6000 AND id < 8000) NOT VALID;\n", "001_a.sql"),
        migration("ALTER TABLE loose VALIDATE CONSTRAINT n;\n", "002_b.sql"),
        migration("ALTER TABLE parted ATTACH PARTITION loose FOR VALUES FROM (6000) TO (8000);\n", "003_c.sql"),
    )
    assert _named(look(*files)) == ""
    assert _named(look(files[0], files[2])) == "attach-without-check loose"
    validated = migration("ALTER TABLE loose VALIDATE CONSTRAINT of_key;\n", "002_b.sql")
    assert _named(look(validated, files[2])) == ""
    another = migration("ALTER TABLE loose VALIDATE CONSTRAINT of_v;\n", "002_b.sql")
    assert _named(look(another, files[2])) == "attach-without-check loose"


def test_what_is_not_there_is_looked_for_once(look, monkeypatch):
    asked = []
    real = _hazards._relations
    monkeypatch.setattr(
        _hazards, "_relations", lambda session, names, path: asked.append(path) or real(session, names, path)
    )
    text = "SET search_path = extra;\nCREATE TABLE made_{0} (i int);\nCREATE INDEX ON made_{0} (i);\n"
    look(*(migration(text.format(number), f"{number:03}_x.sql") for number in range(1, 6)))
    assert len(asked) == 2  # under the run's own path, and under that of the files


def test_without_a_database_nothing_is_a_hazard():
    (plan,) = assess(None, [parse(migration("DROP TABLE child;\n"))], Options(run_id="r"))
    assert (plan.hazards, plan.on) == ((), None)


def test_a_run_refuses_a_hazard_before_anything_is_applied(new_database, connect, apply, ask, roles):
    name = new_database()
    connect(name, role=roles.owner).execute("CREATE TABLE child AS SELECT 1 AS id")
    files = [migration("CREATE TABLE made (id int);\n", "001_a.sql"), migration("DROP TABLE child;\n", "002_b.sql")]
    with pytest.raises(RunbookError, match="drop-table"):
        apply(name, files, hazards_allowed=())
    assert ask(name, "SELECT to_regclass('made')") is None
    apply(name, files, hazards_allowed=("drop-table",))
    assert ask(name, "SELECT to_regclass('child')") is None


def test_sizes_do_not_wait_for_a_lock_that_another_session_holds(new_database, connect, roles):
    name = new_database()
    session = connect(name, role=roles.owner)
    session.execute("CREATE TABLE child AS SELECT g AS id FROM generate_series(1, 1000) g; ANALYZE child")
    other = connect(name)
    other.execute("BEGIN; LOCK TABLE child IN ACCESS EXCLUSIVE MODE")
    (plan,) = assess(session, [parse(migration("DROP TABLE child;\n"))], Options(run_id="r", role=roles.owner))
    assert (plan.on.name, plan.on.rows) == ("child", 1000)
    assert plan.on.bytes > 0


@pytest.mark.parametrize(
    ("parts", "name"), [(("a", "b"), "a.b"), (("", "b"), "b"), (("A", 'b"c'), '"A"."b""c"'), (("a b",), '"a b"')]
)
def test_names_are_quoted_where_they_need_it(parts, name):
    assert quoted(*parts) == name
