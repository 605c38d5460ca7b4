"""Verification on a real server: each sabotage is named, an unchanged database raises no alarm."""

from __future__ import annotations

import threading

import psycopg
import pytest
import yaml
from ansible_collections.settler.runbook.plugins.module_utils import _trespass
from ansible_collections.settler.runbook.plugins.module_utils._catalog import digest, snapshot
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect as engine_connect
from ansible_collections.settler.runbook.plugins.module_utils._database import row_counts
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._isolation import prove
from ansible_collections.settler.runbook.plugins.module_utils._probe_rows import Settings
from ansible_collections.settler.runbook.plugins.module_utils._verify import (
    compare,
    database,
    health,
    table_of,
)
from ansible_collections.settler.runbook.plugins.modules.verify import read_expectation
from psycopg import sql

from tests.support import Background, as_migrator, run_module, wait_until

SCHEMA = """
CREATE SCHEMA extra;
CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE DOMAIN email AS text CHECK (VALUE LIKE '%@%');
CREATE TYPE pair AS (a int, b text);
CREATE FUNCTION current_tenant() RETURNS uuid LANGUAGE plpgsql STABLE AS $$
BEGIN
  RETURN nullif(current_setting('app.current_tenant_id', true), '')::uuid;
EXCEPTION WHEN invalid_text_representation THEN
  RETURN NULL;
END $$;
CREATE TABLE tenants (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), name text NOT NULL);
CREATE TABLE jobs (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(), tenant_id uuid NOT NULL REFERENCES tenants,
    name varchar(100) NOT NULL DEFAULT 'x', size integer, how mood, CONSTRAINT jobs_size CHECK (size > 0));
CREATE TABLE runs (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant_id uuid NOT NULL REFERENCES tenants,
    job_id uuid NOT NULL REFERENCES jobs, code text NOT NULL UNIQUE, started timestamptz NOT NULL, data jsonb NOT NULL,
    tags text[] NOT NULL, amount numeric(9, 2) NOT NULL, done boolean NOT NULL);
CREATE INDEX jobs_name ON jobs (name);
CREATE VIEW names AS SELECT id, name FROM jobs WHERE name <> '';
CREATE MATERIALIZED VIEW sizes AS SELECT sum(size) AS size FROM jobs;
REVOKE ALL ON names, sizes FROM settler_app;
CREATE SEQUENCE numbers;
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;
CREATE TRIGGER touch BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION touch();
ALTER TABLE jobs ENABLE ROW LEVEL SECURITY;
ALTER TABLE runs ENABLE ROW LEVEL SECURITY;
ALTER TABLE tenants ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON tenants USING (id = current_tenant()) WITH CHECK (id = current_tenant());
CREATE POLICY own ON jobs TO settler_app USING (tenant_id = current_tenant()) WITH CHECK (tenant_id = current_tenant());
CREATE POLICY own ON runs USING (tenant_id = current_tenant()) WITH CHECK (tenant_id = current_tenant());
"""
POLICY = "CREATE POLICY own ON jobs TO settler_app USING (tenant_id = current_tenant())"
ISOLATION = Settings("settler_app")


@pytest.fixture
def make(new_database, cluster, roles):
    """Make a database with the schema, and whatever else is wanted; as the owner."""

    def database(*more):
        name = new_database()
        with engine_connect(as_migrator(cluster, roles, name)) as session:
            session.execute("SET ROLE settler_owner")
            for text in (SCHEMA, *more):
                session.execute(text)
        return name

    return database


@pytest.fixture
def owner(make, cluster, roles):
    """A session of the owner, in a database with the schema and, for sabotage, in a transaction."""
    with engine_connect(as_migrator(cluster, roles, make())) as session:
        session.execute("SET ROLE settler_owner")
        yield session


def problems(before, session):
    return [row for row in (*compare(before, snapshot(session)), *health(session)) if row.status != "ok"]


def test_unchanged_database_raises_no_alarm(owner):
    before = snapshot(owner)
    owner.execute(
        "ANALYZE; INSERT INTO tenants (name) VALUES ('x'); SELECT nextval('numbers'); REFRESH MATERIALIZED VIEW sizes"
    )
    owner.execute("REINDEX TABLE jobs; SET search_path = pg_catalog")
    owner.execute("RESET search_path; SET search_path = public")
    assert problems(before, owner) == []
    assert digest(before) == digest(snapshot(owner))


def test_two_databases_with_one_schema_are_equal(make, cluster, roles):
    one, two = (
        make("CREATE TABLE gone (i int); DROP TABLE gone"),
        make("ALTER TABLE jobs ADD more int; ALTER TABLE jobs DROP more"),
    )
    found = []
    for name in (one, two):
        with engine_connect(as_migrator(cluster, roles, name)) as session:
            found.append(snapshot(session))
    assert [row for row in compare(*found) if row.status != "ok"] == []
    assert digest(found[0]) == digest(found[1])


SABOTAGE = {
    "DROP TABLE runs": ("table", "public.runs"),
    "DROP VIEW names": ("view", "public.names"),
    "DROP MATERIALIZED VIEW sizes": ("materialized view", "public.sizes"),
    "DROP SEQUENCE numbers": ("sequence", "public.numbers"),
    "DROP TYPE pair": ("type", "public.pair"),
    "DROP EXTENSION pgcrypto": ("extension", "pgcrypto"),
    "DROP SCHEMA extra": ("schema", "extra"),
    "ALTER TABLE runs DROP COLUMN amount": ("column", "public.runs: amount"),
    "ALTER TABLE jobs ALTER name SET DEFAULT 'y'": ("column", "public.jobs: name"),
    "ALTER TABLE jobs ALTER size SET DEFAULT 1": ("column", "public.jobs: size"),
    "ALTER TABLE jobs ALTER name DROP NOT NULL": ("column", "public.jobs: name"),
    "ALTER TABLE runs ALTER amount TYPE numeric(10, 2)": ("column", "public.runs: amount"),
    "ALTER TABLE runs ALTER id DROP IDENTITY": ("column", "public.runs: id"),
    "ALTER TABLE jobs ADD stray int": ("column", "public.jobs: stray"),
    "ALTER TABLE jobs RENAME size TO sise": ("column", "public.jobs: size"),
    "DROP INDEX jobs_name": ("index", "public.jobs: jobs_name"),
    "DROP INDEX jobs_name; CREATE INDEX jobs_name ON jobs (name DESC)": ("index", "public.jobs: jobs_name"),
    "ALTER TABLE jobs DROP CONSTRAINT jobs_size": ("constraint", "public.jobs: jobs_size"),
    "ALTER TABLE runs DROP CONSTRAINT runs_code_key": ("constraint", "public.runs: runs_code_key"),
    "ALTER TABLE jobs DROP CONSTRAINT jobs_size, ADD CONSTRAINT jobs_size CHECK (size > 0) NOT VALID": (
        "constraint validated", "jobs.jobs_size"),
    "DROP POLICY own ON jobs": ("policy", "public.jobs: own"),
    f"DROP POLICY own ON jobs; {POLICY}": ("policy", "public.jobs: own"),
    f"DROP POLICY own ON jobs; {POLICY} WITH CHECK (true)": ("policy", "public.jobs: own"),
    "ALTER POLICY own ON jobs USING (true)": ("policy", "public.jobs: own"),
    "ALTER POLICY own ON jobs TO settler_owner": ("policy", "public.jobs: own"),
    "CREATE POLICY wide ON jobs USING (true)": ("policy", "public.jobs: wide"),
    "ALTER TABLE jobs DISABLE ROW LEVEL SECURITY": ("table row security", "public.jobs"),
    "ALTER TABLE jobs FORCE ROW LEVEL SECURITY": ("table row security", "public.jobs"),
    "DROP TRIGGER touch ON jobs": ("trigger", "public.jobs: touch"),
    "ALTER TABLE jobs DISABLE TRIGGER touch": ("trigger enabled", "jobs.touch"),
    "ALTER TABLE jobs ENABLE REPLICA TRIGGER touch": ("trigger", "public.jobs: touch"),
    "DROP FUNCTION touch CASCADE": ("function", "public.touch()"),
    "CREATE OR REPLACE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN OLD; END $$": (
        "function body", "public.touch()"),
    "ALTER FUNCTION touch() SECURITY DEFINER": ("function security", "public.touch()"),
    "ALTER FUNCTION touch() SET search_path = public": ("function settings", "public.touch()"),
    "ALTER FUNCTION current_tenant() VOLATILE": ("function volatility", "public.current_tenant()"),
    "ALTER FUNCTION current_tenant() STRICT": ("function", "public.current_tenant()"),
    "CREATE OR REPLACE VIEW names AS SELECT id, name FROM jobs": ("view", "public.names"),
    "ALTER VIEW names SET (security_invoker = true)": ("view options", "public.names"),
    "ALTER TYPE mood ADD VALUE 'glad'": ("type definition", "public.mood"),
    "ALTER DOMAIN email DROP CONSTRAINT email_check": ("type definition", "public.email"),
    "ALTER TYPE pair ALTER ATTRIBUTE a TYPE bigint": ("type", "public.pair"),
    "ALTER SEQUENCE numbers INCREMENT 2": ("sequence increment", "public.numbers"),
    "ALTER TABLE jobs SET (fillfactor = 70)": ("table options", "public.jobs"),
    "CREATE TABLE stray (i int)": ("table", "public.stray"),
    "CREATE FUNCTION stray() RETURNS int LANGUAGE sql AS 'SELECT 1'": ("function", "public.stray()"),
    "REVOKE INSERT ON jobs FROM settler_app": ("grant", "public.jobs: settler_app"),
    "REVOKE ALL ON jobs FROM settler_app": ("grant", "public.jobs: settler_app"),
    "GRANT SELECT ON jobs TO PUBLIC": ("grant", "public.jobs: PUBLIC"),
    "GRANT SELECT (name) ON jobs TO PUBLIC": ("", "public.jobs"),
    "REVOKE USAGE ON SCHEMA public FROM settler_app": ("grant", "public: settler_app"),
    "REVOKE EXECUTE ON FUNCTION touch() FROM PUBLIC": ("grant", "public.touch(): PUBLIC"),
    "ALTER DEFAULT PRIVILEGES IN SCHEMA public REVOKE DELETE ON TABLES FROM settler_app": (
        "default privileges", "settler_owner in public on tables"),
}  # fmt: skip


def test_each_sabotage_is_named(owner, subtests):
    before = snapshot(owner)
    for command, (check, name) in SABOTAGE.items():
        with subtests.test(command):
            owner.execute("BEGIN")
            try:
                owner.execute(command)
                found = problems(before, owner)
            finally:
                owner.execute("ROLLBACK")
            assert [row for row in found if row.object.startswith(name) and row.check.startswith(check)], found
            assert name in table_of(found, limit=100)
    assert problems(before, owner) == []


def test_changed_owner_is_named(owner, connect):
    before = snapshot(owner)
    connect(owner.info.dbname).execute("ALTER TABLE jobs OWNER TO postgres")
    assert ("table owner", "public.jobs", "postgres") in [
        (row.check, row.object, row.actual) for row in problems(before, owner)
    ]


def test_broken_index_is_named_though_its_definition_is_right(owner, connect):
    before = snapshot(owner)
    admin = connect(owner.info.dbname)
    for flag in ("indisvalid", "indisready"):
        admin.execute(
            sql.SQL("UPDATE pg_index SET {} = false WHERE indexrelid = 'jobs_name'::regclass").format(
                sql.Identifier(flag)
            )
        )
        (row,) = problems(before, owner)
        assert (row.check, row.object) == ("index valid", "jobs_name")
        assert "REINDEX" in row.hint
        admin.execute(
            "UPDATE pg_index SET indisvalid = true, indisready = true WHERE indexrelid = 'jobs_name'::regclass"
        )
    assert problems(before, owner) == []


def test_disabled_foreign_key_trigger_is_named(owner, connect):
    before = snapshot(owner)
    connect(owner.info.dbname).execute("ALTER TABLE runs DISABLE TRIGGER ALL")
    found = problems(before, owner)
    assert {row.check for row in found} == {"trigger enabled"}
    assert all(row.object.startswith("runs.") for row in found)


def test_ledger_and_extensions_are_nobodys_business(owner):
    before = snapshot(owner, exclude=["runbook"])
    owner.execute("CREATE SCHEMA runbook; CREATE TABLE runbook.migrations (i int)")
    assert compare(before, snapshot(owner, exclude=["runbook"])) != []
    assert [row for row in compare(before, snapshot(owner, exclude=["runbook"])) if row.status != "ok"] == []
    assert not [name for name in before["functions"] if "digest" in name]


def test_roles_have_other_names_elsewhere(owner):
    """In staging the roles may be called differently; the expectation says $owner and $app wherever a role stands."""
    names = {"settler_owner": "$owner", "settler_app": "$app", "settler_migrator": "$migrator"}
    text = yaml.safe_dump(snapshot(owner, role_names=names))
    assert "$owner" in text
    assert "settler_" not in text


# The database itself


@pytest.mark.parametrize(
    ("change", "caught"),
    [
        ("ALTER DATABASE {} OWNER TO postgres", ("database owner", "failed", "postgres")),
        ("GRANT CONNECT, TEMPORARY ON DATABASE {} TO PUBLIC",
         ("database rights of PUBLIC", "unexpected", "CONNECT, TEMPORARY")),
        ("REVOKE CONNECT ON DATABASE {} FROM settler_app", ("application may connect", "failed", "may not connect")),
    ],
)  # fmt: skip
def test_rights_that_no_dump_carries_are_looked_at(make, connect, change, caught):
    name = make()
    session = connect(name)
    assert {row.status for row in database(session, "settler_owner", "settler_app")} == {"ok"}
    session.execute(sql.SQL(change).format(sql.Identifier(name)))
    rows = [row for row in database(session, "settler_owner", "settler_app") if row.status != "ok"]
    assert [(row.check, row.status, row.actual) for row in rows] == [caught]
    assert all(row.hint for row in rows)


@pytest.mark.parametrize(
    ("change", "caught"),
    [
        ("GRANT CREATE ON DATABASE {} TO settler_app", ("database grant", "failed", "CONNECT, CREATE")),
        ("GRANT TEMPORARY ON DATABASE {} TO settler_app WITH GRANT OPTION",
         ("database grant", "failed", "CONNECT, TEMPORARY")),
        ("GRANT CREATE ON DATABASE {} TO pg_monitor", ("database grant", "failed", "CREATE")),
        ("ALTER DATABASE {} SET session_replication_role = replica",
         ("setting", "failed", "session_replication_role=replica")),
        ("ALTER DATABASE {} SET row_security = off", ("setting", "failed", "row_security=off")),
        ("ALTER ROLE settler_app IN DATABASE {} SET session_replication_role = replica",
         ("setting", "failed", "session_replication_role=replica")),
        ("ALTER ROLE settler_migrator IN DATABASE {} SET row_security = no", ("setting", "failed", "row_security=no")),
        ("ALTER DATABASE {} CONNECTION LIMIT 0", ("application may connect", "failed", "CONNECTION LIMIT 0")),
        ("ALTER ROLE settler_app NOLOGIN", ("application may connect", "failed", "NOLOGIN")),
        ("ALTER ROLE settler_owner SUPERUSER", ("role", "failed", "SUPERUSER")),
        ("ALTER ROLE settler_migrator SUPERUSER", ("role", "failed", "SUPERUSER")),
    ],
)  # fmt: skip
def test_what_roles_may_and_have_set_is_looked_at(make, connect, change, caught):
    name = make()
    session = connect(name)
    with session.transaction(force_rollback=True):  # roles are those of the other tests, too
        session.execute(sql.SQL(change).format(sql.Identifier(name)))
        rows = database(session, "settler_owner", "settler_app", roles=["settler_migrator"])
    assert [(row.check, row.status, row.actual) for row in rows if row.status != "ok"] == [caught]
    assert all(row.hint for row in rows if row.status != "ok")


def test_an_application_that_a_window_keeps_out_is_no_alarm(make, cluster, roles, connect):
    name = make()
    connect(name).execute(sql.SQL("REVOKE CONNECT ON DATABASE {} FROM settler_app").format(sql.Identifier(name)))
    options = {**as_migrator(cluster, roles, name), "set_role": roles.owner, "isolation": {"role": roles.app}}
    assert "application may connect" in run_module("verify", options)["msg"]
    inside = run_module("verify", {**options, "kept_out": True})
    assert (inside.get("failed"), inside["checks"]) == (None, []), inside


# Tenant isolation


def isolation(cluster, roles, name, settings=ISOLATION):
    with engine_connect(as_migrator(cluster, roles, name)) as session:
        session.execute("SET ROLE settler_owner")
        before = row_counts(session)
        rows = prove(session, settings).rows
        assert row_counts(session) == before
        assert session.info.transaction_status.name == "IDLE"
    return rows


def failed(rows):
    return {f"{row.object}: {row.check.removeprefix('tenant isolation: ')}" for row in rows if row.status != "ok"}


def test_isolated_tables_pass_and_no_row_is_left(make, cluster, roles):
    rows = isolation(cluster, roles, make("INSERT INTO tenants (name) VALUES ('kept')"))
    assert failed(rows) == set()
    assert {row.object for row in rows if row.check == "tenant isolation: select"} == {"jobs", "runs", "tenants"}
    assert {row.check.removeprefix("tenant isolation: ") for row in rows if row.object == "runs"} >= {
        "select", "select with no context", "select with empty context", "select with malformed context", "insert",
        "update", "hand over", "take over", "delete", "own row", "select with a context after RESET",
    }  # fmt: skip


BLIND = {
    "select with no context", "select with empty context", "select with a context after RESET",
    "select with malformed context",
}  # fmt: skip
CONTEXTS = ("", *(name.removeprefix("select") for name in BLIND))
INSERT, DELETE = ({f"{what}{context}" for context in CONTEXTS} for what in ("insert", "delete"))
UPDATE = {f"update{context}" for context in CONTEXTS}


@pytest.mark.parametrize(
    ("sabotage", "caught"),
    [
        ("ALTER TABLE jobs DISABLE ROW LEVEL SECURITY",
         {"select", *BLIND, *INSERT, *UPDATE, "hand over", "take over", *DELETE}),
        ("ALTER POLICY own ON jobs USING (true)", {"select", *BLIND, "take over", *DELETE}),
        ("CREATE POLICY wide ON jobs FOR SELECT USING (current_tenant() IS NULL)", BLIND),
        ("ALTER POLICY own ON jobs WITH CHECK (true)", {*INSERT, "hand over"}),
        ("CREATE POLICY wide ON jobs FOR INSERT WITH CHECK (true)", INSERT),
        # PostgreSQL checks an UPDATE or DELETE that reads no column against no policy for SELECT
        ("CREATE POLICY wide ON jobs FOR DELETE USING (true)", DELETE),
        ("CREATE POLICY wide ON jobs FOR UPDATE USING (true) WITH CHECK (tenant_id = current_tenant())", {"take over"}),
        ("CREATE POLICY wide ON jobs FOR UPDATE USING (tenant_id = current_tenant()) WITH CHECK (true)", {"hand over"}),
    ],
)  # fmt: skip
def test_each_hole_is_caught(make, cluster, roles, sabotage, caught):
    assert failed(isolation(cluster, roles, make(sabotage))) == {f"jobs: {what}" for what in caught}


def test_table_without_a_policy_at_all_shows_no_tenant_its_own_row(make, cluster, roles):
    assert failed(isolation(cluster, roles, make("DROP POLICY own ON jobs"))) == {"jobs: own row"}


def test_hole_is_seen_although_a_unique_key_stands_behind_it(make, cluster, roles):
    assert failed(isolation(cluster, roles, make("ALTER POLICY own ON runs WITH CHECK (true)"))) == {
        f"runs: {what}" for what in (*INSERT, "hand over")
    }  # fmt: skip


def test_hole_is_seen_although_a_foreign_key_stands_behind_it(make, cluster, roles):
    """Keys are checked after policies: a key that refuses says that the policy has not."""
    key = """ALTER TABLE jobs ADD UNIQUE (tenant_id, id);
        ALTER TABLE runs ADD FOREIGN KEY (tenant_id, job_id) REFERENCES jobs (tenant_id, id)"""
    assert failed(isolation(cluster, roles, make(key))) == set()
    holes = failed(isolation(cluster, roles, make(key, "ALTER POLICY own ON runs WITH CHECK (true)")))
    assert holes == {f"runs: {what}" for what in (*INSERT, "hand over")}


def test_policy_that_fails_without_a_context_still_shows_nothing_of_others(make, cluster, roles):
    strict = "tenant_id = current_setting('app.current_tenant_id')::uuid"
    rows = isolation(cluster, roles, make(f"ALTER POLICY own ON jobs USING ({strict}) WITH CHECK ({strict})"))
    assert not failed(rows) & {"jobs: select", "jobs: insert", "jobs: update", "jobs: hand over", "jobs: delete"}


def test_table_that_the_application_may_not_touch_is_isolated(make, cluster, roles):
    rows = isolation(
        cluster, roles, make("REVOKE ALL ON jobs FROM settler_app; ALTER TABLE jobs DISABLE ROW LEVEL SECURITY")
    )
    assert failed(rows) == set()
    tried = [row for row in rows if row.object == "jobs" and row.check.startswith("tenant isolation")]
    assert {row.actual for row in tried} <= {"no access", "refused"}


def test_tables_with_names_that_need_quotes_are_proved_too(make, cluster, roles):
    odd = 'CREATE TABLE "Odd ""name" (tenant_id uuid NOT NULL REFERENCES tenants)'
    rows = isolation(cluster, roles, make(odd))
    assert 'Odd "name: select' in failed(rows)
    assert not [row for row in rows if row.check == "tenant isolation"]


def test_excluded_tables_are_not_looked_at(make, cluster, roles):
    settings = Settings("settler_app", exclude=("jobs",))
    rows = isolation(
        cluster, roles, make("ALTER TABLE jobs DISABLE ROW LEVEL SECURITY; ALTER TABLE runs DROP job_id"), settings
    )
    assert failed(rows) == set()


def test_values_help_where_a_types_own_value_breaks_a_rule(make, cluster, roles):
    database = make("ALTER TABLE runs ADD CHECK (amount > 10)")
    (problem,) = [row for row in isolation(cluster, roles, database) if row.status != "ok"]
    assert (problem.check, problem.expected) == ("tenant isolation", "provable")
    assert "no probe row for runs" in problem.actual
    assert failed(isolation(cluster, roles, database, Settings("settler_app", values={"runs.amount": 11}))) == set()


def test_foreign_keys_in_a_circle_are_no_silent_pass(make, cluster, roles):
    circle = "ALTER TABLE jobs ADD run_id bigint REFERENCES runs"
    (problem,) = [row for row in isolation(cluster, roles, make(circle)) if row.status != "ok"]
    assert "foreign keys in a circle: jobs, runs" in problem.actual


def test_schema_without_a_tenant_column_is_no_silent_pass(make, cluster, roles):
    rows = isolation(cluster, roles, make("DROP TABLE runs, jobs CASCADE"))
    assert [row.actual for row in rows if row.status != "ok"] == ["no table of public has a column tenant_id"]


@pytest.mark.parametrize(
    ("change", "undo", "told"),
    [
        ("ALTER ROLE settler_app SUPERUSER", "ALTER ROLE settler_app NOSUPERUSER", "superuser"),
        ("ALTER ROLE settler_app BYPASSRLS", "ALTER ROLE settler_app NOBYPASSRLS", "BYPASSRLS"),
        ("GRANT settler_owner TO settler_app", "REVOKE settler_owner FROM settler_app", "owner of the tables"),
        ("GRANT postgres TO settler_app", "REVOKE postgres FROM settler_app", "member of a superuser"),
        ("ALTER ROLE settler_app CREATEROLE", "ALTER ROLE settler_app NOCREATEROLE", "CREATEROLE"),
        ("ALTER ROLE settler_app REPLICATION", "ALTER ROLE settler_app NOREPLICATION", "REPLICATION"),
        ("GRANT pg_read_server_files TO settler_app", "REVOKE pg_read_server_files FROM settler_app", "past policies"),
        (
            "CREATE ROLE between BYPASSRLS; CREATE ROLE way NOINHERIT IN ROLE between; GRANT way TO settler_app",
            "DROP ROLE way; DROP ROLE between",
            "member of a superuser",
        ),
        (
            "ALTER ROLE settler_app SET app.current_tenant_id = '6ba7b810-9dad-11d1-80b4-00c04fd430c8'",
            "ALTER ROLE settler_app RESET app.current_tenant_id",
            "given a tenant",
        ),
    ],
)
def test_application_role_that_no_policy_binds_is_caught(make, cluster, roles, connect, change, undo, told):
    database = make()
    admin = connect(database)
    if "settler_owner TO" in change:  # a circle of memberships is refused
        admin.execute("REVOKE settler_app FROM settler_migrator")
    admin.execute(change)
    try:
        rows = isolation(cluster, roles, database)
    finally:
        admin.execute(undo)
        admin.execute("GRANT settler_app TO settler_migrator")
    assert [row for row in rows if row.status == "failed" and told in row.actual]
    assert not [row for row in rows if row.check.startswith("tenant isolation")]


def test_missing_application_role_is_said_so(make, cluster, roles):
    (row,) = isolation(cluster, roles, make(), Settings("nobody"))
    assert (row.object, row.status, row.actual) == ("nobody", "failed", "missing")


CHILD = """CREATE TABLE steps (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), job_id uuid NOT NULL REFERENCES jobs);
    ALTER TABLE steps ENABLE ROW LEVEL SECURITY;
    CREATE POLICY own ON steps USING (EXISTS (SELECT FROM jobs WHERE jobs.id = job_id))"""


@pytest.mark.parametrize(
    ("change", "caught"),
    [
        ("", set()),
        ("ALTER TABLE steps DISABLE ROW LEVEL SECURITY",
         {"select", *BLIND, *INSERT, *UPDATE, "hand over", "take over", *DELETE}),
        ("CREATE POLICY wide ON steps FOR INSERT WITH CHECK (true)", INSERT),
        ("CREATE POLICY wide ON steps FOR DELETE USING (true)", DELETE),
    ],
)  # fmt: skip
def test_table_without_the_tenant_column_is_isolated_through_its_parent(make, cluster, roles, change, caught):
    rows = isolation(cluster, roles, make(CHILD, change))
    assert failed(rows) == {f"steps: {what}" for what in caught}
    assert "steps" in {row.object for row in rows if row.check == "tenant isolation: select"}


ASIDE = """CREATE SCHEMA aside;
    CREATE TABLE aside.keys (id uuid PRIMARY KEY, tenant_id uuid NOT NULL REFERENCES tenants);
    CREATE TABLE notes (id int PRIMARY KEY, key uuid NOT NULL REFERENCES aside.keys);
    CREATE TABLE details (note int NOT NULL REFERENCES notes)"""
OPEN = "GRANT USAGE ON SCHEMA aside TO settler_app; GRANT SELECT (id) ON aside.keys TO settler_app"


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize(
    ("change", "exclude", "named"),
    [
        ("", (), {"notes": "only through aside.keys", "details": "only through notes"}),
        (OPEN, ("notes", "details"), {"aside.keys": "not in schema public"}),
        ("REVOKE ALL ON notes, details FROM settler_app", (), {}),
    ],
)
def test_table_of_tenants_that_nothing_tries_is_named_where_the_application_may_use_it(
    make, cluster, roles, change, exclude, named, mode
):
    with engine_connect(as_migrator(cluster, roles, make(ASIDE, change))) as session:
        session.execute("SET ROLE settler_owner")
        session.execute(f"SET default_transaction_read_only = {mode}")
        proof = prove(session, Settings("settler_app", exclude=exclude))
    wrong = {row.object: row.actual for row in proof.rows if row.status != "ok"}
    assert {*wrong} == {*named}
    assert all(text in wrong[name] for name, text in named.items()), wrong


def test_table_of_the_tenants_is_isolated_too(make, cluster, roles):
    holes = failed(isolation(cluster, roles, make("ALTER TABLE tenants DISABLE ROW LEVEL SECURITY")))
    assert {"tenants: select", "tenants: hand over", "tenants: delete", "tenants: insert"} <= holes
    assert {hole.partition(":")[0] for hole in holes} == {"tenants"}


VIEW = "read through a view"
SAME = "view shows the same beside another's rows"


@pytest.mark.parametrize(
    ("change", "caught"),
    [
        ("GRANT SELECT ON names TO settler_app", {f"names: {SAME}", f"names: {VIEW} with no context"}),
        ("CREATE VIEW seen AS SELECT tenant_id, name FROM jobs; REVOKE INSERT, UPDATE, DELETE ON seen FROM settler_app",
         {f"seen: {what}" for what in (VIEW, SAME, f"{VIEW} with no context", *BLIND)}),
        # an aggregate has no tenant column, and yet tells of others
        ("CREATE VIEW seen AS SELECT count(*) FROM jobs; REVOKE INSERT, UPDATE, DELETE ON seen FROM settler_app",
         {f"seen: {SAME}", f"seen: {VIEW} with no context"}),
        ("CREATE VIEW own_jobs WITH (security_invoker = true) AS SELECT tenant_id, name FROM jobs", set()),
        (("CREATE VIEW own_jobs WITH (security_barrier = true) AS SELECT tenant_id, name FROM jobs "
         "WHERE tenant_id = current_tenant(); REVOKE INSERT, UPDATE, DELETE ON own_jobs FROM settler_app"), set()),
        (("CREATE VIEW own_jobs WITH (security_barrier = true) AS SELECT tenant_id, name FROM jobs "
         "WHERE tenant_id = current_tenant()"), {"own_jobs: view does not write past policies"}),
        ("GRANT SELECT ON sizes TO settler_app", {"sizes: materialized view closed"}),
        ("GRANT SELECT (size) ON sizes TO settler_app", {"sizes: materialized view closed"}),
        # what the materialized view has already is others', whatever the tenant of the session
        (("INSERT INTO tenants (name) VALUES ('x'); INSERT INTO jobs (tenant_id) SELECT id FROM tenants; "
         "CREATE MATERIALIZED VIEW all_jobs AS SELECT tenant_id FROM jobs; REVOKE ALL ON all_jobs FROM settler_app; "
         "CREATE VIEW seen AS SELECT tenant_id FROM all_jobs"),
         {f"seen: {what}" for what in (VIEW, *BLIND)}),
    ],
)  # fmt: skip
def test_views_are_read_in_each_context(make, cluster, roles, change, caught):
    assert failed(isolation(cluster, roles, make(change))) == caught


PARTED = """CREATE TABLE parted (tenant_id uuid NOT NULL REFERENCES tenants, at date NOT NULL DEFAULT '2000-01-01')
        PARTITION BY RANGE (at);
    CREATE TABLE parted_old PARTITION OF parted FOR VALUES FROM ('1990-01-01') TO ('2005-01-01');
    CREATE TABLE parted_new PARTITION OF parted FOR VALUES FROM ('2005-01-01') TO ('2030-01-01');
    ALTER TABLE parted ENABLE ROW LEVEL SECURITY;
    CREATE POLICY own ON parted USING (tenant_id = current_tenant())"""


def test_partitions_are_named_themselves_past_the_policies_of_the_whole(make, cluster, roles):
    holes = failed(isolation(cluster, roles, make(PARTED)))
    assert {"parted_old: row security of a partition", "parted_new: row security of a partition"} <= holes
    assert {f"parted_old: {what}" for what in ("select", *BLIND, *INSERT, *DELETE, "take over", "hand over")} <= holes
    assert not [hole for hole in holes if hole.startswith("parted:")]
    closed = isolation(cluster, roles, make(PARTED, "REVOKE ALL ON parted_old, parted_new FROM settler_app"))
    assert failed(closed) == set()
    assert {"parted", "jobs"} <= {row.object for row in closed if row.check == "tenant isolation: delete"}


def test_proof_takes_weak_locks_and_lets_writers_work(make, cluster, roles, connect, monkeypatch):
    """The locks are looked at when all attempts were made, before anything is rolled back."""
    database = make(PARTED, CHILD, "INSERT INTO tenants (name) VALUES ('busy')")
    seen = []

    def look(session, view, *_contexts):
        pid = session.connection.info.backend_pid
        seen.extend(
            connect(database).execute(
                "SELECT DISTINCT relation::regclass::text, mode FROM pg_locks WHERE pid = %s AND relation >= 16384",
                [pid],
            )
        )
        return original(session, view, *_contexts)

    original = _trespass.try_view
    monkeypatch.setattr(_trespass, "try_view", look)
    stop = threading.Event()

    def write():
        with psycopg.connect(cluster.conninfo(database), autocommit=True) as writer:
            (tenant,) = writer.execute("SELECT id FROM tenants").fetchone()
            number = 0
            while not stop.is_set() or not number:
                writer.execute("INSERT INTO jobs (tenant_id) VALUES (%s)", [tenant])
                writer.execute("UPDATE jobs SET size = 2 WHERE tenant_id = %s", [tenant])
                writer.execute("DELETE FROM jobs")
                number += 1
        return number

    writer = Background(write)
    try:
        with engine_connect(as_migrator(cluster, roles, make_view(connect, database))) as session:
            session.execute("SET ROLE settler_owner")
            proof = prove(session, Settings("settler_app", exclude=("parted_old", "parted_new")))
    finally:
        stop.set()
    assert writer.value() > 0
    assert not [row for row in proof.rows if row.status != "ok" and not row.object.startswith("parted_")]
    assert {name for name, _mode in seen} >= {"jobs", "runs", "tenants", "parted", "steps"}
    assert {mode for _name, mode in seen} == {"AccessShareLock", "RowShareLock", "RowExclusiveLock"}
    assert proof.seconds > 0


def make_view(connect, database):
    """Add a view that the application can read."""
    connect(database, role="settler_owner").execute(
        "CREATE VIEW own_jobs WITH (security_invoker = true) AS SELECT tenant_id FROM jobs"
    )
    return database


def test_proof_gives_way_to_a_lock_and_says_so(make, cluster, roles, connect):
    database = make()
    blocker = connect(database)
    with blocker.transaction():
        blocker.execute("LOCK TABLE runs IN ACCESS EXCLUSIVE MODE")
        (row,) = [row for row in isolation_of(cluster, roles, database).rows if row.status != "ok"]
        assert "lock timeout" in row.actual
        assert "Try again" in row.hint
    assert failed(isolation(cluster, roles, database)) == set()


def test_proof_tries_again_when_a_lock_is_gone(make, cluster, roles, connect):
    database = make()
    blocker = connect(database)
    with blocker.transaction():
        blocker.execute("LOCK TABLE runs IN ACCESS EXCLUSIVE MODE")
        proof = Background(lambda: isolation_of(cluster, roles, database))
        wait_until(lambda: blocker.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()[0])
    assert failed(proof.value().rows) == set()


def isolation_of(cluster, roles, database):
    with engine_connect(as_migrator(cluster, roles, database)) as session:
        session.execute("SET ROLE settler_owner")
        return prove(session, ISOLATION)


def test_sequences_that_were_drawn_from_are_told(make, cluster, roles):
    database = make("CREATE FUNCTION number() RETURNS bigint LANGUAGE sql AS $$ SELECT nextval('numbers') $$",
                    "ALTER TABLE jobs ADD number bigint DEFAULT number()")  # fmt: skip
    assert isolation_of(cluster, roles, database).drawn == ["numbers"]
    assert isolation_of(cluster, roles, make()).drawn == []


@pytest.mark.parametrize(
    ("hole", "caught"),
    [
        ("", set()),
        ("ALTER TABLE jobs DISABLE ROW LEVEL SECURITY", {f"jobs: {what}" for what in ("select", *BLIND)}),
        ("ALTER POLICY own ON jobs USING (true)", {f"jobs: {what}" for what in ("select", *BLIND)}),
        ("GRANT SELECT ON sizes TO settler_app", {"sizes: materialized view closed"}),
    ],
)
def test_where_nothing_can_be_written_reading_is_proved_with_the_rows_that_are_there(
    make, cluster, roles, hole, caught
):
    rows = "INSERT INTO tenants (name) VALUES ('x'); INSERT INTO jobs (tenant_id) SELECT id FROM tenants"
    with engine_connect(as_migrator(cluster, roles, make(CHILD, rows, hole))) as session:
        session.execute("SET ROLE settler_owner; SET default_transaction_read_only = on")
        proof = prove(session, ISOLATION)
    assert failed(proof.rows) == caught
    assert {row.object for row in proof.rows if row.check == "tenant isolation: select"} == {"jobs", "runs", "tenants"}
    written, indirect = proof.unproved
    assert "nothing can be written here" in written
    assert indirect.startswith("steps:")


# The module


def test_expectation_of_one_database_is_met_by_another_and_broken_by_sabotage(make, cluster, roles, tmp_path):
    names = {roles.owner: "$owner", roles.app: "$app", roles.migrator: "$migrator"}
    isolated = {"role": roles.app}
    options = {"role_names": names, "set_role": roles.owner, "isolation": isolated, "run_id": "r"}
    read = run_module("verify", {**as_migrator(cluster, roles, make()), **options})
    path = tmp_path / "expected.yml"
    path.write_text(yaml.safe_dump(read["catalogue"], allow_unicode=True), encoding="utf-8")
    options["expected"] = str(path)
    other = run_module("verify", {**as_migrator(cluster, roles, make()), **options})
    assert not other.get("failed"), other["msg"]
    assert (other["changed"], other["checks"], other["isolated_tables"]) == (False, [], 3)
    assert other["digest"] == read["digest"]
    assert other["counts"]["ok"] > 60
    assert "catalogue" not in other
    broken = run_module(
        "verify", {**as_migrator(cluster, roles, make("DROP INDEX jobs_name; CREATE TABLE stray (i int)")), **options}
    )
    assert broken["failed"]
    assert "index  public.jobs: jobs_name: missing" in broken["msg"]
    assert "table  public.stray: present" in broken["msg"]
    assert (broken["counts"]["failed"], broken["counts"]["unexpected"]) == (1, 1)


def test_what_to_do_about_strays_is_the_operators_choice(make, cluster, roles, tmp_path):
    path = tmp_path / "expected.yml"
    options = as_migrator(cluster, roles, make())
    catalogue = run_module("verify", options)["catalogue"]
    path.write_text(yaml.safe_dump({**catalogue, "sequences": {}}), encoding="utf-8")
    options |= {"expected": str(path)}
    warned, failing, ignored = (
        run_module("verify", {**options, "unexpected": how}) for how in ("warn", "fail", "ignore")
    )
    assert (bool(warned.get("failed")), "public.numbers" in str(warned["warnings"])) == (False, True)
    assert (bool(failing.get("failed")), "public.numbers" in failing["msg"]) == (True, True)
    assert (bool(ignored.get("failed")), ignored["checks"], ignored.get("warnings")) == (False, [], None)


@pytest.mark.parametrize(("how", "outcome"), [("warn", "skipped"), ("fail", "failure")])
def test_junit_is_as_red_as_the_run(make, cluster, roles, tmp_path, how, outcome):
    expected, junit = tmp_path / "expected.yml", tmp_path / "verify.xml"
    options = as_migrator(cluster, roles, make())
    catalogue = run_module("verify", options)["catalogue"]
    expected.write_text(yaml.safe_dump({**catalogue, "sequences": {}}), encoding="utf-8")
    run_module("verify", {**options, "expected": str(expected), "junit": str(junit), "unexpected": how})
    assert junit.read_text().count(f"<{outcome} ") == len(catalogue["sequences"])
    assert f'failures="{len(catalogue["sequences"]) if how == "fail" else 0}"' in junit.read_text()


@pytest.mark.parametrize("broken", [{"login_port": 1}, {"expected": "/nowhere.yml"}])
def test_no_file_of_an_earlier_run_is_left_where_the_verification_fails_early(cluster, roles, make, tmp_path, broken):
    files = {"junit": tmp_path / "verify.xml", "json": tmp_path / "verify.json"}
    for path in files.values():
        path.write_text("green", encoding="utf-8")
    options = {**as_migrator(cluster, roles, make()), **{name: str(path) for name, path in files.items()}, **broken}
    assert run_module("verify", options, check=True)["failed"]
    assert all(path.exists() for path in files.values())
    assert run_module("verify", options)["failed"]
    assert not any(path.exists() for path in files.values())


@pytest.mark.parametrize("kinds", [[], ["functions"], ["tables", "others"]])
def test_expectation_that_lacks_a_kind_is_refused(make, cluster, roles, tmp_path, kinds):
    path = tmp_path / "expected.yml"
    catalogue = run_module("verify", as_migrator(cluster, roles, make()))["catalogue"]
    left = {kind: objects for kind, objects in catalogue.items() if kind not in kinds} if kinds else {}
    path.write_text(yaml.safe_dump(left), encoding="utf-8")
    with pytest.raises(RunbookError, match=f"says nothing of {', '.join(kinds)}"):
        read_expectation(str(path))


@pytest.mark.parametrize("text", ["- a list", "a: [", "", None])
def test_expectation_that_is_none_is_refused_by_name(tmp_path, text):
    path = tmp_path / "expected.yml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(RunbookError, match=str(path)):
        read_expectation(str(path))
