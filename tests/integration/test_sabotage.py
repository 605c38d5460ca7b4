"""Verification proves: each single sabotage of a good Settler database is caught and named, a good one is let pass."""

from __future__ import annotations

import json

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect as engine_connect
from ansible_collections.settler.runbook.plugins.module_utils._isolation import prove
from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger
from ansible_collections.settler.runbook.plugins.module_utils._probe_rows import Settings
from ansible_collections.settler.runbook.plugins.module_utils._verify import orphans, sequences

from tests.support import PROJECT, as_migrator, call_module, login, run_module
from tests.verification import EXPECTED, NAMES, bad_checks, line, problems

PROTECTED = sorted(name for name, table in EXPECTED["tables"].items() if table.get("row_security", "off") != "off")

#: What is done, and what the report must name.
SABOTAGES = {
    "drop a table": ("DROP TABLE webhook_deliveries CASCADE", "public.webhook_deliveries"),
    "drop a column": ("ALTER TABLE jobs DROP COLUMN schedule CASCADE", "schedule"),
    "drop an index": ("DROP INDEX idx_api_keys_tenant_prefix", "idx_api_keys_tenant_prefix"),
    "drop a unique index": ("DROP INDEX blocked_ips_active_key", "blocked_ips_active_key"),
    "drop a primary key": ("ALTER TABLE matches DROP CONSTRAINT matches_pkey", "matches_pkey"),
    "drop a materialized view": ("DROP MATERIALIZED VIEW private.mv_job_performance CASCADE", "mv_job_performance"),
    "drop a policy": ("DROP POLICY tenant_isolation_jobs ON jobs", "tenant_isolation_jobs"),
    "drop an extension": ("DROP EXTENSION pgcrypto CASCADE", "pgcrypto"),
    "a wider policy": ("ALTER POLICY tenant_isolation_jobs ON jobs USING (true)", "tenant_isolation_jobs"),
    "a policy that lets everything in": (
        "ALTER POLICY tenant_isolation_jobs ON jobs WITH CHECK (true)", "tenant_isolation_jobs"),
    "a second policy": ("CREATE POLICY everybody ON jobs USING (true)", "everybody"),
    "a policy for another role": ("ALTER POLICY tenant_isolation_jobs ON jobs TO settler_app", "tenant_isolation_jobs"),
    "another type": ("ALTER TABLE saga_state ALTER saga_type TYPE text", "saga_type"),
    "a shorter type": ("ALTER TABLE blocked_ips ALTER ip TYPE varchar(40)", "ip"),
    "another default": ("ALTER TABLE users ALTER role SET DEFAULT 'owner'", "role"),
    "no default": ("ALTER TABLE users ALTER role DROP DEFAULT", "role"),
    "nullable": ("ALTER TABLE users ALTER email DROP NOT NULL", "email"),
    "not nullable": ("ALTER TABLE jobs ALTER version SET NOT NULL", "version"),
    "another owner of a table": ("ALTER TABLE users OWNER TO settler_app", "public.users"),
    "a view of another": ("ALTER MATERIALIZED VIEW private.mv_job_performance OWNER TO settler_app", "mv_job_perf"),
    "another owner of a schema": ("ALTER SCHEMA public OWNER TO postgres", "public"),
    "a grant to everybody": ("GRANT SELECT ON users TO PUBLIC", "public.users"),
    "a grant on a column": ("GRANT UPDATE (email) ON users TO PUBLIC", "email"),
    "a grant on the schema": ("GRANT CREATE ON SCHEMA public TO settler_app", "public"),
    "no grant": ("REVOKE INSERT ON jobs FROM settler_app", "public.jobs"),
    "a grant on a sequence": ("GRANT ALL ON SEQUENCE event_store_id_seq TO PUBLIC", "event_store_id_seq"),
    "other default privileges": (
        "ALTER DEFAULT PRIVILEGES FOR ROLE settler_owner IN SCHEMA public GRANT SELECT ON TABLES TO PUBLIC", "owner"),
    "a trigger that rests": ("ALTER TABLE jobs DISABLE TRIGGER ALL", "public.jobs"),
    "a stray table": ("CREATE TABLE stray (id int)", "public.stray"),
    "a stray column": ("ALTER TABLE jobs ADD COLUMN stray int", "stray"),
    "a stray index": ("CREATE INDEX stray ON jobs (name)", "stray"),
    "a stray view": ("CREATE VIEW stray AS SELECT 1", "public.stray"),
    "a stray function": ("CREATE FUNCTION stray() RETURNS int LANGUAGE sql AS 'SELECT 1'", "stray"),
    "a stray function with its owner's rights": (
        "CREATE FUNCTION stray() RETURNS SETOF jobs LANGUAGE sql SECURITY DEFINER AS 'SELECT * FROM jobs'", "stray"),
    "a stray view that everybody reads": (
        "CREATE VIEW stray AS SELECT * FROM users; GRANT SELECT ON stray TO PUBLIC", "public.stray"),
    "a right to empty a table": ("GRANT TRUNCATE ON jobs TO PUBLIC", "public.jobs"),
    "a stray type": ("CREATE TYPE stray AS ENUM ('a')", "public.stray"),
    "a stray schema": ("CREATE SCHEMA stray", "stray"),
    "a stray constraint": ("ALTER TABLE jobs ADD CONSTRAINT stray CHECK (version > -5)", "stray"),
    "a stray trigger": (
        "CREATE TRIGGER stray BEFORE INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "stray"),
    "a constraint that was never validated": (
        "ALTER TABLE jobs ADD CONSTRAINT later CHECK (version > 0) NOT VALID", "later"),
    "an unlogged table": ("ALTER TABLE idempotency_keys SET UNLOGGED", "public.idempotency_keys"),
    "an index that is invalid": (
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_api_keys_tenant_prefix'::regclass",
        "idx_api_keys_tenant_prefix"),
    "an index that is not ready": (
        "UPDATE pg_index SET indisready = false WHERE indexrelid = 'idx_api_keys_tenant_prefix'::regclass",
        "idx_api_keys_tenant_prefix"),
    "a sequence that is behind": (
        ("SELECT setval('event_store_id_seq', 7000); INSERT INTO event_store SELECT (jsonb_populate_record(e, "
        "jsonb_build_object('id', 9000, 'event_id', gen_random_uuid(), 'event_version', 4711))).* "
        "FROM event_store e LIMIT 1"),
        "event_store_id_seq"),
    "a sequence that was reset": (
        "ALTER SEQUENCE event_store_id_seq RESTART", "event_store_id_seq"),
    "a sequence that a default uses without owning it is behind": (
        ("CREATE SEQUENCE loose; ALTER TABLE jobs ALTER version SET DEFAULT nextval('loose'); "
        "UPDATE jobs SET version = 50"), "sequence ahead loose"),
    "a policy without its check": (
        ("DROP POLICY tenant_isolation_audit_logs ON audit_logs; "
        "CREATE POLICY tenant_isolation_audit_logs ON audit_logs "
        "USING (tenant_id = (SELECT current_tenant_id()))"), "tenant_isolation_audit_logs"),
    "a policy that is permissive no more": (
        ("DROP POLICY tenant_isolation_jobs ON jobs; CREATE POLICY tenant_isolation_jobs ON jobs AS RESTRICTIVE "
        "USING (tenant_id = (SELECT current_tenant_id()))"), "tenant_isolation_jobs"),
    "a policy for one command": (
        ("DROP POLICY tenant_isolation_jobs ON jobs; CREATE POLICY tenant_isolation_jobs ON jobs FOR SELECT "
        "USING (tenant_id = (SELECT current_tenant_id()))"), "tenant_isolation_jobs"),
    "a view of another table": (
        ("CREATE TABLE mv_job_performance AS SELECT * FROM private.mv_job_performance; CREATE OR REPLACE VIEW "
        "job_performance WITH (security_barrier) AS SELECT * FROM public.mv_job_performance "
        "WHERE tenant_id = (SELECT current_tenant_id())"), "view definition public.job_performance"),
    "a view of another column": (
        ("CREATE OR REPLACE VIEW job_performance WITH (security_barrier) AS SELECT tenant_id, job_id, runs, failed AS "
        "completed, completed AS failed, success_rate, average_duration_ms, longest_duration_ms "
        "FROM private.mv_job_performance WHERE tenant_id = (SELECT current_tenant_id())"),
        "view definition public.job_performance"),
    "a view without its barrier": ("ALTER VIEW job_performance RESET (security_barrier)", "public.job_performance"),
    "a view that can be written": ("GRANT TRUNCATE ON job_performance TO PUBLIC", "public.job_performance"),
    "a materialized view that the application reads": (
        "GRANT SELECT ON private.mv_job_performance TO settler_app", "private.mv_job_performance"),
    "a schema that is open": ("GRANT USAGE ON SCHEMA private TO settler_app", "private: $app"),
    "a stray materialized view": ("CREATE MATERIALIZED VIEW stray AS SELECT * FROM users", "public.stray"),
    "a materialized view that is empty": (
        "REFRESH MATERIALIZED VIEW private.mv_job_performance WITH NO DATA", "mv_job_performance"),
    "a rule": ("CREATE RULE swallow AS ON DELETE TO audit_logs DO INSTEAD NOTHING", "public.audit_logs: swallow"),
    "a statistics object": ("CREATE STATISTICS stray ON status, version FROM jobs", "public.jobs: stray"),
    "a leftover of a rebuild": ("CREATE INDEX idx_ccnew ON jobs (name)", "idx_ccnew: none"),
    "an older leftover of a rebuild": ("CREATE INDEX idx_ccold1 ON jobs (name)", "idx_ccold1: none"),
    "a partition that is half detached": (
        ("CREATE TABLE whole (i int) PARTITION BY LIST (i); CREATE TABLE part PARTITION OF whole FOR VALUES IN (1); "
        "UPDATE pg_inherits SET inhdetachpending = true WHERE inhrelid = 'part'::regclass"), "partition attached part"),
    "a collation of another version": (
        ("CREATE COLLATION old (PROVIDER = icu, LOCALE = 'de'); "
        "UPDATE pg_collation SET collversion = '1' WHERE collname = 'old'"), "collation version public.old"),
    "a constraint that became deferrable": (
        "ALTER TABLE executions ALTER CONSTRAINT executions_job_id_fkey DEFERRABLE", "executions_job_id_fkey"),
    "a constraint with another action": (
        ("ALTER TABLE executions DROP CONSTRAINT executions_job_id_fkey, ADD CONSTRAINT executions_job_id_fkey "
        "FOREIGN KEY (job_id) REFERENCES jobs ON DELETE RESTRICT"), "executions_job_id_fkey"),
    "a column that is generated": (
        "ALTER TABLE jobs DROP COLUMN version, ADD version int GENERATED ALWAYS AS (1) STORED", "version"),
    "a column that is stored otherwise": ("ALTER TABLE jobs ALTER rules SET STORAGE EXTERNAL", "rules"),
    "a column with other statistics": ("ALTER TABLE jobs ALTER status SET STATISTICS 0", "status"),
    "a table without replica identity": ("ALTER TABLE jobs REPLICA IDENTITY NOTHING", "public.jobs"),
    "a child of a table": ("CREATE TABLE stray () INHERITS (jobs)", "public.stray"),
    "a column grant to the application": (
        "GRANT UPDATE (id) ON tenants TO settler_app WITH GRANT OPTION", "tenants: id"),
    "a grant with its option": ("GRANT SELECT ON jobs TO settler_app WITH GRANT OPTION", "public.jobs: $app"),
    "default privileges in all schemas": (
        "ALTER DEFAULT PRIVILEGES FOR ROLE settler_owner GRANT EXECUTE ON FUNCTIONS TO settler_app", "all schemas"),
    "default privileges with grant option": (
        ("ALTER DEFAULT PRIVILEGES FOR ROLE settler_owner IN SCHEMA public GRANT SELECT ON TABLES TO settler_app "
        "WITH GRANT OPTION"), "$owner in public on tables"),
    "a function that is asked before the policies": (
        "ALTER FUNCTION current_tenant_id() LEAKPROOF", "leakproof public.current_tenant_id"),
    "a function with another default": (
        ("DO $$ BEGIN "
        "EXECUTE replace(pg_get_functiondef('check_tenant_quota'::regproc), 'DEFAULT 1', 'DEFAULT 0'); END $$"),
        "arguments public.check_tenant_quota"),
    "a function that is cheap to the planner": ("ALTER FUNCTION current_tenant_id() COST 1", "current_tenant_id"),
    "a function that is parallel": ("ALTER FUNCTION propagate_tenant_id_to_jobs() PARALLEL SAFE", "tenant_id_to_jobs"),
    "a sequence that skips": ("ALTER SEQUENCE event_store_id_seq CACHE 100", "range public.event_store_id_seq"),
    "a sequence with an end": ("ALTER SEQUENCE event_store_id_seq MAXVALUE 100000", "range public.event_store_id_seq"),
    "a sequence that nobody owns": ("ALTER SEQUENCE event_store_id_seq OWNED BY NONE", "event_store_id_seq"),
    "a publication": ("CREATE PUBLICATION stray FOR TABLE users", "publication stray"),
    "an event trigger": (
        ("CREATE FUNCTION watch() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'; "
        "CREATE EVENT TRIGGER stray ON ddl_command_end EXECUTE FUNCTION watch()"), "event trigger stray"),
    "a collation": ("CREATE COLLATION stray FROM \"C\"", "collation public.stray"),
    "an operator": ("CREATE OPERATOR === (FUNCTION = int4eq, LEFTARG = int, RIGHTARG = int)", "operator public.==="),
    "a cast": ("CREATE CAST (text AS uuid) WITH INOUT AS IMPLICIT", "object cast ("),
    "a foreign server": (
        "CREATE FOREIGN DATA WRAPPER stray; CREATE SERVER away FOREIGN DATA WRAPPER stray", "server away"),
    "a user mapping": (
        ("CREATE FOREIGN DATA WRAPPER stray; CREATE SERVER away FOREIGN DATA WRAPPER stray; "
        "CREATE USER MAPPING FOR settler_app SERVER away OPTIONS (password 'hidden')"),
        "user mapping of \"$app\" on away"),
    "a text search configuration": ("CREATE TEXT SEARCH CONFIGURATION stray (COPY = simple)", "public.stray"),
    "a domain": ("CREATE DOMAIN stray AS text", "public.stray"),
    "a range type": ("CREATE TYPE stray AS RANGE (SUBTYPE = int)", "public.stray"),
    "an aggregate": ("CREATE AGGREGATE stray (int) (SFUNC = int4pl, STYPE = int)", "public.stray"),
    "a composite orphan of a key that was never validated": (
        ("ALTER TABLE users ADD UNIQUE (id, tenant_id); SET LOCAL session_replication_role = replica; "
        "UPDATE jobs SET user_id = gen_random_uuid() WHERE id = (SELECT id FROM jobs LIMIT 1); "
        "ALTER TABLE jobs ADD CONSTRAINT both_columns FOREIGN KEY (user_id, tenant_id) "
        "REFERENCES users (id, tenant_id) NOT VALID"), "no orphans jobs.both_columns"),
    "an orphan in a partition": (
        ("CREATE TABLE parted (id int, job_id uuid REFERENCES jobs) PARTITION BY LIST (id); "
        "CREATE TABLE parted_1 PARTITION OF parted FOR VALUES IN (1); SET LOCAL session_replication_role = replica; "
        "INSERT INTO parted VALUES (1, gen_random_uuid())"), "no orphans parted.parted_job_id_fkey"),
    "an orphan": (
        ("SET LOCAL session_replication_role = replica; "
        "UPDATE executions SET job_id = gen_random_uuid() WHERE id = (SELECT id FROM executions LIMIT 1)"),
        "executions_job_id_fkey"),
}  # fmt: skip

#: What only stands beside what is there: whether that ends red is for verify_unexpected to say.
STAND_ALONE = {
    "a stray table", "a stray column", "a stray index", "a stray view", "a stray function", "a stray type",
    "a stray schema", "a stray constraint", "a stray materialized view", "a statistics object", "a publication",
    "a collation", "an operator", "a foreign server", "a user mapping", "a text search configuration", "a domain",
    "an aggregate", "a range type", "a cast",
}  # fmt: skip


def _functions(session):
    """Return the functions of the schema as SQL names them."""
    rows = session.execute(
        "SELECT p.oid::regprocedure::text, p.prosecdef, p.prorettype = 'trigger'::regtype FROM pg_proc p "
        "WHERE pronamespace = 'public'::regnamespace AND NOT EXISTS "
        "(SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e') ORDER BY 1"
    )
    return rows.fetchall()


def test_a_good_database_raises_no_alarm(session):
    assert problems(session) == []
    assert len(orphans(session, 1 << 30)[0]) > 10
    assert len(sequences(session)[0]) >= 1


@pytest.mark.parametrize("name", SABOTAGES)
def test_each_sabotage_is_caught_and_named_and_fails_unless_it_only_stands_there(session, name):
    sabotage, named = SABOTAGES[name]
    session.execute(sabotage)
    found = bad_checks(session)
    assert any(named in line(row) for row in found), found
    assert any(row.status == "failed" for row in found) is (name not in STAND_ALONE), found


UNSET = "current_setting('app.current_tenant_id', true) IS NULL"
GARBAGE = "current_setting('app.current_tenant_id', true) !~ '^[0-9a-f-]*$'"
#: What opens a table, and the attempts that must find it.
HOLES = {
    "GRANT TRUNCATE ON jobs TO PUBLIC": ("jobs: no right to empty a table",),
    f"CREATE POLICY hole ON webhook_payloads FOR INSERT WITH CHECK ({UNSET})": (
        "webhook_payloads: tenant isolation: insert with no context",),
    f"CREATE POLICY hole ON webhook_payloads FOR INSERT WITH CHECK ({GARBAGE})": (
        "webhook_payloads: tenant isolation: insert with malformed context",),
    f"CREATE POLICY hole ON webhook_payloads FOR DELETE USING ({UNSET})": (
        "webhook_payloads: tenant isolation: delete with no context",),
    "CREATE POLICY hole ON feature_flags FOR INSERT WITH CHECK (tenant_id IS NULL)": (
        "feature_flags: tenant isolation: insert nobody's row",),
    "CREATE POLICY hole ON feature_flags FOR UPDATE USING (tenant_id IS NULL)": (
        "feature_flags: tenant isolation: update nobody's row",),
    "CREATE POLICY hole ON blocked_ips FOR DELETE USING (tenant_id IS NULL)": (
        "blocked_ips: tenant isolation: delete nobody's row",),
    "CREATE POLICY hole ON security_events FOR DELETE USING (tenant_id IS NULL)": (
        "security_events: tenant isolation: delete nobody's row",),
    "CREATE POLICY hole ON audit_logs FOR SELECT USING (tenant_id IS NULL)": (
        "audit_logs: tenant isolation: select nobody's row",
        "audit_logs: tenant isolation: select nobody's row with no context"),
}  # fmt: skip


def test_isolation_is_tried_in_each_context_and_with_rows_of_nobody(
    good, new_database, cluster, roles, connect, subtests
):
    name = new_database(template=good)
    admin = connect(name)
    for hole, named in HOLES.items():
        with subtests.test(hole), engine_connect(as_migrator(cluster, roles, name)) as session:
            session.execute("SET ROLE settler_owner")
            admin.execute(hole)
            rows = prove(session, Settings("settler_app")).rows
            table = named[0].partition(":")[0]
            admin.execute(f"DROP POLICY IF EXISTS hole ON {table}; REVOKE TRUNCATE ON jobs FROM PUBLIC".encode())
            assert {f"{row.object}: {row.check}" for row in rows if row.status == "failed"} >= set(named)


@pytest.mark.parametrize("table", PROTECTED)
@pytest.mark.parametrize(
    "change", ["DISABLE ROW LEVEL SECURITY", "NO FORCE ROW LEVEL SECURITY", "FORCE ROW LEVEL SECURITY"]
)
def test_row_security_that_is_changed_is_named_on_each_table(session, table, change):
    forced = EXPECTED["tables"][table]["row_security"] == "forced"
    if change == ("FORCE ROW LEVEL SECURITY" if forced else "NO FORCE ROW LEVEL SECURITY"):
        session.execute(f"ALTER TABLE {table} {change}".encode())
        assert problems(session) == []  # it is so already
        return
    session.execute(f"ALTER TABLE {table} {change}".encode())
    assert any(line.startswith("table " + table) or table in line for line in problems(session))


def test_every_function_is_watched_in_body_security_and_search_path(session, subtests):
    for name, definer, _is_trigger in _functions(session):
        for change in (
            f"ALTER FUNCTION {name} SECURITY {'INVOKER' if definer else 'DEFINER'}",
            f"ALTER FUNCTION {name} SET search_path = pg_temp",
            f"GRANT EXECUTE ON FUNCTION {name} TO pg_monitor",
            f"ALTER FUNCTION {name} OWNER TO settler_app",
            f"DROP FUNCTION {name} CASCADE",
        ):
            with subtests.test(change), session.transaction(force_rollback=True):
                session.execute(change.encode())
                assert any(name.partition("(")[0] in line for line in problems(session, rows_too=False))


def test_a_changed_body_is_named(session):
    (name, *_rest), *_others = _functions(session)
    text = session.execute("SELECT pg_get_functiondef(%s::regprocedure)", [name]).fetchone()[0]
    body = session.execute("SELECT prosrc FROM pg_proc WHERE oid = %s::regprocedure", [name]).fetchone()[0]
    session.execute(text.replace(body, body.rstrip() + "\n-- not what was reviewed\n").encode())
    assert any(name.partition("(")[0] in line for line in problems(session))


def test_every_trigger_is_watched(session, subtests):
    rows = session.execute(
        "SELECT tgname, tgrelid::regclass::text FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1, 2"
    ).fetchall()
    assert rows
    for trigger, table in rows:
        for change in (f"ALTER TABLE {table} DISABLE TRIGGER {trigger}", f"DROP TRIGGER {trigger} ON {table}"):
            with subtests.test(change), session.transaction(force_rollback=True):
                session.execute(change.encode())
                assert any(trigger in line for line in problems(session, rows_too=False))


def test_a_role_that_policies_bind_is_not_taken_for_one_that_sees_all(session):
    session.execute("SET LOCAL ROLE settler_app")
    assert sequences(session) == ([], ["event_store_id_seq", "snapshots_id_seq"])
    rows, unread = orphans(session, 1 << 30)
    assert rows == []
    assert "executions.executions_job_id_fkey" in unread


@pytest.mark.parametrize("made_with", ["actual", "1"])
def test_a_database_of_another_collation_version_is_named_whatever_its_provider(session, made_with):
    if session.info.server_version < 150000:
        pytest.skip("14 does not note it")
    locale = "daticulocale" if session.info.server_version < 170000 else "datlocale"
    version = "pg_database_collation_actual_version(oid)" if made_with == "actual" else f"'{made_with}'"
    for column, value in (("datlocprovider", "'i'"), (locale, "'de'"), ("datcollversion", version)):
        change = f"UPDATE pg_database SET {column} = {value} WHERE datname = current_database()"  # noqa: S608
        session.execute(change.encode())
    found = [line for line in problems(session) if line.startswith("collation version of the database")]
    assert len(found) == (made_with != "actual")


def test_a_constraint_that_is_not_enforced_is_named(session):
    if session.info.server_version < 180000:
        version = "ALTER TABLE jobs ADD CONSTRAINT lax CHECK (version > -9) NOT VALID"
    else:
        version = "ALTER TABLE jobs ADD CONSTRAINT lax CHECK (version > -9) NOT ENFORCED"
    session.execute(version)
    assert any("lax" in line for line in problems(session))


def test_the_module_writes_all_checks_as_json_and_records_the_digest_in_the_ledger(
    new_database, good, cluster, roles, tmp_path, connect
):
    database = new_database(template=good)
    arguments = {
        **as_migrator(cluster, roles, database), "expected": str(PROJECT / "sql/verify/expected.yml"),
        "role_names": NAMES, "set_role": "settler_owner", "run_id": "run-7", "record": True,
        "isolation": {"role": "settler_app"}, "json": str(tmp_path / "verify.json"),
    }  # fmt: skip
    checked = run_module("verify", arguments, check=True)
    assert (checked["changed"], checked["recorded"], checked["counts"]["failed"]) == (False, False, 0)
    assert checked["isolated_tables"] > 20
    assert not (tmp_path / "verify.json").exists()
    none_yet = run_module("verify", {**arguments, "record": True})
    assert (none_yet["changed"], none_yet["recorded"]) == (False, False)  # there is no ledger
    owner = connect(database, role="settler_owner")
    Ledger(owner, "runbook").create()
    result = run_module("verify", arguments)
    assert (result["changed"], result["recorded"], result["checks"]) == (True, True, [])
    assert result["digest"] == result["expected_digest"] == none_yet["digest"]
    assert (result["sequences_drawn"], result["unproved"]) == ([], [])
    written = json.loads((tmp_path / "verify.json").read_text())
    assert len(written["checks"]) == sum(result["counts"].values())
    assert {"check", "object", "expected", "actual", "status", "hint"} == set(written["checks"][0])
    assert (written["digest"], written["run_id"]) == (result["digest"], "run-7")
    assert (tmp_path / "verify.json").stat().st_mode & 0o777 == 0o600
    (event,) = Ledger(owner, "runbook").events(5)
    assert (event["event"], event["run_id"]) == ("verified", "run-7")
    assert event["detail"]["digest"] == result["digest"]
    assert event["detail"]["counts"] == result["counts"]


def test_the_module_works_where_nothing_can_be_written_and_tells_what_it_could_not_prove(
    new_database, good, cluster, roles, connect
):
    name = new_database(template=good)
    owner = connect(name, role="settler_owner")
    Ledger(owner, "runbook").create()
    connect(name).execute(f"ALTER ROLE {roles.migrator} IN DATABASE {name} SET default_transaction_read_only = on")
    arguments = {
        **as_migrator(cluster, roles, name), "expected": str(PROJECT / "sql/verify/expected.yml"), "role_names": NAMES,
        "set_role": "settler_owner", "record": True, "isolation": {"role": "settler_app"}, "unexpected": "fail",
    }  # fmt: skip
    result = run_module("verify", arguments)
    assert (result.get("failed"), result["checks"], result["changed"], result["recorded"]) == (None, [], False, False)
    assert result["isolated_tables"] > 20
    assert any("nothing can be written here" in text for text in result["unproved"])
    assert Ledger(owner, "runbook").events(5) == []
    connect(name).execute("ALTER POLICY tenant_isolation_jobs ON jobs USING (true)")
    assert "tenant isolation: select  jobs" in run_module("verify", arguments)["msg"]


def test_a_role_with_no_right_to_become_the_owner_may_look_in_check_mode(new_database, good, cluster, roles):
    arguments = {
        **login(cluster, new_database(template=good), roles.app, roles.app_password),
        "expected": str(PROJECT / "sql/verify/expected.yml"), "role_names": NAMES, "set_role": "settler_owner",
        "isolation": {"role": "settler_app"}, "unexpected": "fail",
    }  # fmt: skip
    looked = run_module("verify", arguments, check=True)
    assert (looked.get("failed"), looked["checks"], looked["isolated_tables"]) == (None, [], 0)
    assert looked["counts"]["ok"] > 800
    isolation, sequences_ahead = looked["unproved"]
    assert isolation == "tenant isolation: settler_app may not become settler_owner"
    assert "event_store_id_seq" in sequences_ahead
    assert any("executions_job_id_fkey" in name for name in looked["orphans_unread"])
    assert "cannot become role settler_owner" in run_module("verify", arguments)["msg"]


def test_a_ledger_of_an_older_version_is_completed_for_the_event(new_database, connect):
    owner = connect(new_database(), role="settler_owner")
    ledger = Ledger(owner, "runbook")
    ledger.create()
    assert ledger.is_current()
    owner.execute(
        "ALTER TABLE runbook.events DROP CONSTRAINT events_event_check; "
        "ALTER TABLE runbook.events ADD CONSTRAINT events_event_check CHECK (event IN ('applied', 'failed'));"
        "DROP FUNCTION runbook.keep_events CASCADE"
    )
    assert not ledger.is_current()
    ledger.create()
    assert ledger.is_current()
    ledger.record_event("proven", run_id="r")


def test_the_module_tells_of_tables_that_it_did_not_read_and_writes_junit_for_its_owner(good, cluster, roles, tmp_path):
    arguments = {
        **as_migrator(cluster, roles, good), "expected": None, "role_names": {}, "exclude_schemas": ["runbook"],
        "unexpected": "warn", "set_role": "settler_owner", "orphans_max_bytes": 0, "isolation": None, "run_id": "",
        "allow": [{"check": "*", "object": "public.x", "reason": "gone soon", "until": "2999-01-01"}],
        "junit": str(tmp_path / "verify.xml"), "json": None, "record": False, "ledger_schema": "runbook",
        "before": None, "changes": [], "jobs": 1,
    }  # fmt: skip
    result = call_module("verify", arguments)
    assert result["counts"]["failed"] == 0
    assert any("executions_job_id_fkey" in name for name in result["orphans_unread"])
    written = tmp_path / "verify.xml"
    assert written.stat().st_mode & 0o777 == 0o600
    told = written.read_text()
    unread = len(result["orphans_unread"]) + len(result["unproved"])
    assert told.count("<testcase ") == sum(result["counts"].values()) + unread
    assert told.count('<skipped message="the table is too large to look"') == len(result["orphans_unread"])
    assert all(f'<skipped message="{text}"' in told for text in result["unproved"])


def test_what_is_no_sequence_is_not_asked_for_a_sequence_s_rights(session):
    session.execute("SET LOCAL enable_nestloop = off; SET LOCAL enable_mergejoin = off")
    assert [row.object for row in sequences(session)[0]] == ["event_store_id_seq", "snapshots_id_seq"]
