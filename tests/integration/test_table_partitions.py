"""sql/optional/table_partitions on a real server: no row is lost, every rule holds, months come and go."""

# ruff: noqa: S608 - the names in the queries are this file's own

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect as engine_connect
from ansible_collections.settler.runbook.plugins.module_utils._isolation import prove
from ansible_collections.settler.runbook.plugins.module_utils._probe_rows import Settings
from psycopg import errors

from tests.support import as_migrator
from tools import generate, legacy
from tools.schema import build, files_of

if TYPE_CHECKING:
    from collections.abc import Iterator

FILES = files_of("table_partitions")
PARTITIONS = [file for file in FILES if file.folder]
KEYS = {"executions": "started_at", "matches": "matched_at", "unmatched": "created_at", "audit_logs": "timestamp"}
#: Rows of each table whose month is unknown, long gone, far off, or beyond all.
DATES = ("null", "'0001-01-01'", "'9999-12-31'", "'infinity'", "'-infinity'", "now()", "now() + interval '2 months'")


def insert_at(table: str, date: str) -> str:
    """Return an INSERT of a row with a date, with parents of the first tenant that has any."""
    key = f'"{KEYS[table]}"'
    source = "(select * from executions where tenant_id is not null order by id limit 1) as e"
    return {
        "executions": f"insert into executions (job_id, {key}) select job_id, ({date})::timestamp from {source}",
        "matches": f"insert into matches (execution_id, job_id, source_id, target_id, {key}) "
        f"select id, job_id, 's', 't', ({date})::timestamp from {source}",
        "unmatched": f"insert into unmatched (execution_id, job_id, {key}) "
        f"select id, job_id, ({date})::timestamp from {source}",
        "audit_logs": f"insert into audit_logs (event, tenant_id, {key}) "
        f"select 'x', tenant_id, ({date})::timestamp from {source}",
    }[table]


def rows_of(connection: psycopg.Connection[Any]) -> dict[str, tuple[Any, ...]]:
    """Return the number of rows of each table, and a sum that changes with any of their values."""
    names = connection.execute(
        "select relname from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'p')"
    ).fetchall()
    query = "select count(*), sum(hashtextextended(to_jsonb(t)::text, 0)) from {} as t"
    return {name: connection.execute(query.format(name).encode()).fetchone() or () for (name,) in names}


def ask(connection: psycopg.Connection[Any], query: str, *values: object) -> Any:
    row = connection.execute(query.encode(), values or None).fetchone()
    return row[0] if row else None


@pytest.fixture(scope="module")
def parted(cluster, roles, _template) -> Iterator[tuple[str, Any, Any]]:
    """Make a database with rows, partition it, and return its name with what the tables held before and after."""
    name = "settler_test_parted"
    with psycopg.connect(cluster.conninfo("postgres"), autocommit=True) as server:
        server.execute(f"create database {name} owner settler_owner template {_template}".encode())
        with psycopg.connect(cluster.conninfo(name), autocommit=True) as connection:
            connection.execute("set role settler_owner")
            build(connection)
            generate.fill(connection, shape=legacy.CURRENT, rows=3000, seed=7)
            for table in KEYS:
                for date in DATES:
                    connection.execute(insert_at(table, date).encode())
            connection.execute("select refresh_all_materialized_views()")
            before = rows_of(connection)
            build(connection, PARTITIONS)
            yield name, before, rows_of(connection)
        server.execute(f"drop database {name} with (force)".encode())


@pytest.fixture
def owner(parted, connect) -> Iterator[psycopg.Connection[Any]]:
    """Be the owner, in a transaction that is rolled back."""
    connection = connect(parted[0], role="settler_owner")
    with connection.transaction(force_rollback=True):
        yield connection


@pytest.mark.every_major
def test_no_row_is_lost_and_none_is_changed(parted) -> None:
    _name, before, after = parted
    assert after == before


def test_a_second_run_changes_nothing(parted, connect) -> None:
    connection = connect(parted[0], role="settler_owner")
    catalogue = "select array_agg(oid order by oid) from pg_class where relkind in ('r', 'p', 'i', 'I', 'm', 'v')"
    before = ask(connection, catalogue)
    build(connection, PARTITIONS)
    assert ask(connection, catalogue) == before


@pytest.mark.every_major
def test_a_row_of_any_date_lands(owner) -> None:
    for table in KEYS:
        for date in DATES:
            owner.execute(insert_at(table, date).encode())
    for table, key in KEYS.items():
        stray = f"select count(*) from partitions.{table}_default where \"{key}\" < date_trunc('month', now())"
        assert ask(owner, stray) == 0


@pytest.mark.every_major
def test_keys_hold_in_both_directions(owner) -> None:
    execution = ask(owner, "select execution_id from matches limit 1")
    other = ask(owner, "select tenant_id from executions where tenant_id <> (select tenant_id from executions "
                       "where id = %s) limit 1", execution)  # fmt: skip
    for refused, error in (
        ("update matches set execution_id = gen_random_uuid()", errors.CheckViolation),
        ("update executions set job_id = gen_random_uuid()", errors.CheckViolation),
        (f"update executions set tenant_id = '{other}' where id = '{execution}'", errors.CheckViolation),
        (f"insert into executions (id, job_id) select id, job_id from executions where id = '{execution}'",
         errors.UniqueViolation),
        (f"update executions set id = gen_random_uuid() where id = '{execution}'", errors.ForeignKeyViolation),
        ("truncate executions", errors.FeatureNotSupported),
    ):  # fmt: skip
        with pytest.raises(error), owner.transaction():
            owner.execute(refused.encode())
    for table in ("matches", "unmatched", "executions"):  # past the triggers, the keys themselves
        owner.execute(f"alter table {table} disable trigger user".encode())
        column = "job_id" if table == "executions" else "execution_id"
        with pytest.raises(errors.ForeignKeyViolation), owner.transaction():
            owner.execute(f"update {table} set {column} = gen_random_uuid()".encode())
        owner.execute(f"alter table {table} enable trigger user".encode())

    matches = "select count(*) from matches where execution_id = %s"
    kept = ask(owner, matches, execution)
    owner.execute("update executions set started_at = now() + interval '1 month' where id = %s", [execution])
    assert ask(owner, "select tableoid::regclass::text ~ '_y' from executions where id = %s", execution)
    assert ask(owner, matches, execution) == kept > 0
    owner.execute("delete from executions where id = %s", [execution])
    assert ask(owner, matches, execution) == 0
    assert ask(owner, "select count(*) from private.execution_ids where id = %s", execution) == 0
    assert ask(owner, "select count(*) from private.execution_ids") == ask(owner, "select count(*) from executions")


@pytest.mark.every_major
def test_a_tenant_sees_its_rows_through_the_table_and_none_through_a_partition(owner) -> None:
    tenant = ask(owner, "select tenant_id from executions group by 1 order by count(*) desc limit 1")
    own = {table: ask(owner, f"select count(*) from {table} where tenant_id = %s", tenant) for table in KEYS}
    query = "select inhrelid::regclass::text from pg_inherits join pg_class on oid = inhparent where relkind = 'p'"
    partitions = [name for (name,) in owner.execute(query)]
    assert len(partitions) == 4 * 5
    owner.execute("reset role; set local session authorization settler_app")
    owner.execute("select set_config('app.current_tenant_id', %s, true)", [str(tenant)])
    for table in KEYS:
        assert ask(owner, f"select count(*) from {table}") == own[table] > 0
        assert ask(owner, f"select count(*) from {table} where tenant_id <> %s", tenant) == 0
    for name in partitions:
        with pytest.raises(errors.InsufficientPrivilege), owner.transaction():
            owner.execute(f"select from {name}".encode())
    owner.execute(insert_at("executions", "now()").encode())
    owner.execute(insert_at("matches", "'1950-01-01'").encode())
    owner.execute("reset session authorization")
    owner.execute("grant usage on schema partitions to settler_app")
    for name in partitions:
        owner.execute(f"grant select on {name} to settler_app".encode())
    owner.execute("set local session authorization settler_app")
    for name in partitions:
        assert ask(owner, f"select count(*) from {name}") == 0, "no policy, no row, whatever is granted by mistake"


@pytest.fixture
def isolation(parted, cluster, roles, connect):
    """Prove the isolation of tenants as role verify does, after a change that is taken back."""
    undo: list[str] = []

    def look(change: str = "", back: str = ""):
        if change:
            undo.append(back)
            connect(parted[0], role="settler_owner").execute(change.encode())
        with engine_connect(as_migrator(cluster, roles, parted[0])) as session:
            session.execute("SET ROLE settler_owner")
            return prove(session, Settings("settler_app"))

    yield look
    for back in undo:
        connect(parted[0], role="settler_owner").execute(back.encode())


@pytest.mark.every_major
def test_isolation_is_proved_of_what_refers_to_executions_and_of_each_partition(isolation) -> None:
    proof = isolation()
    assert [row for row in proof.rows if row.status != "ok"] == []
    assert (proof.unproved, proof.drawn) == ([], [])
    for table in ("matches", "unmatched", "reports"):
        tried = {row.check for row in proof.rows if row.object == table}
        assert {f"tenant isolation: {what}" for what in ("select", "insert", "take over", "delete", "own row")} <= tried
    closed = {row.object for row in proof.rows if row.actual == "no access"}
    assert {f"{table}_{part}" for table in KEYS for part in ("history", "default")} <= closed


@pytest.mark.every_major
@pytest.mark.parametrize("table", ["matches", "unmatched", "reports"])
def test_a_policy_that_is_too_wide_on_what_refers_to_executions_is_caught(isolation, table) -> None:
    proof = isolation(
        f"create policy leak on {table} for select to settler_app using (true)", f"drop policy leak on {table}"
    )
    wrong = {row.check for row in proof.rows if row.status == "failed" and row.object == table}
    assert "tenant isolation: select" in wrong


@pytest.mark.every_major
def test_a_partition_that_is_granted_and_shows_its_rows_is_caught(isolation) -> None:
    part = "partitions.matches_history"
    revoke = f"revoke select on {part} from settler_app; revoke usage on schema partitions from settler_app"
    proof = isolation(
        f"grant usage on schema partitions to settler_app; grant select on {part} to settler_app; "
        f"alter table {part} disable row level security",
        f"alter table {part} enable row level security; {revoke}",
    )
    wrong = {(row.check, row.object) for row in proof.rows if row.status == "failed"}
    assert ("row security of a partition", part) in wrong
    assert ("tenant isolation: select", "matches_history") in wrong


@pytest.mark.every_major
@pytest.mark.parametrize("part", ["partitions.matches_history", "partitions.matches_default"])
def test_a_partition_that_is_granted_without_a_policy_is_caught(isolation, part) -> None:
    """It shows no row yet; the next policy, or row security switched off, would show them all."""
    proof = isolation(
        f"grant usage on schema partitions to settler_app; grant select on {part} to settler_app",
        f"revoke select on {part} from settler_app; revoke usage on schema partitions from settler_app",
    )
    wrong = {(row.check, row.object, row.actual) for row in proof.rows if row.status == "failed"}
    assert wrong == {("row security of a partition", part, "no policy, and the application may name it")}


def test_statistics_go_on(owner) -> None:
    assert ask(owner, "select bool_and(ispopulated) from pg_matviews")
    before = ask(owner, "select sum(runs) from private.mv_job_performance")
    owner.execute(insert_at("executions", "now()").encode())
    owner.execute("select refresh_all_materialized_views()")
    assert ask(owner, "select sum(runs) from private.mv_job_performance") == before + 1


@pytest.mark.every_major
def test_future_partitions_are_made_and_take_their_rows_from_the_default(owner) -> None:
    assert owner.execute("select create_table_partitions(3)").fetchall() == []
    for table in KEYS:
        owner.execute(insert_at(table, "date_trunc('month', now()) + interval '5 months'").encode())
    owner.execute(
        "insert into matches (execution_id, job_id, source_id, target_id) "
        "select id, job_id, 'of', 'it' from executions order by started_at desc limit 1"
    )
    before = {table: ask(owner, f"select count(*) from {table}") for table in KEYS}
    made = [name for (name,) in owner.execute("select create_table_partitions(5)")]
    assert len(made) == 4 * 2
    assert {table: ask(owner, f"select count(*) from {table}") for table in KEYS} == before
    for table in KEYS:
        (last,) = [name for name in made if name.startswith(f"partitions.{table}_y")][1:]
        assert ask(owner, f"select count(*) from {last}") == 1
    assert ask(owner, "select bool_and(tgenabled = 'O') from pg_trigger")
    with pytest.raises(errors.InvalidParameterValue), owner.transaction():
        owner.execute("select create_table_partitions(121)")


@pytest.mark.every_major
def test_old_partitions_are_dropped_only_when_asked_and_told(owner) -> None:
    for refused in (
        "'matches', '2 months'",
        "'matches', null",
        "'matches', '-1 year'",
        "'jobs', '1 year'",
        "null, '1 year'",
    ):
        with pytest.raises(errors.InvalidParameterValue), owner.transaction():
            owner.execute(f"select * from drop_table_partitions({refused})".encode())
    assert owner.execute("select * from drop_table_partitions('executions', '3 months')").fetchall() == []

    # as if the history ended a year ago
    owner.execute("alter table executions detach partition partitions.executions_history")
    owner.execute(
        """
        create table partitions.young as table partitions.executions_history with no data;
        insert into partitions.young
          select * from partitions.executions_history
            where started_at >= date_trunc('month', now()) - interval '1 year';
        alter table partitions.executions_history disable trigger user;
        delete from partitions.executions_history where id in (select id from partitions.young);
        alter table partitions.executions_history enable trigger user
        """
    )
    end = ask(owner, "select (date_trunc('month', now()) - interval '1 year')::timestamp::text")
    owner.execute(
        f"alter table executions attach partition partitions.executions_history for values from (minvalue) to ('{end}')"
        .encode()
    )  # fmt: skip
    old = ask(owner, "select count(*) from partitions.executions_history")
    of_old = ask(
        owner, "select count(*) from matches where execution_id in (select id from partitions.executions_history)"
    )
    matches = ask(owner, "select count(*) from matches")
    assert old > 0 < of_old
    dropped = owner.execute(
        "select partition, up_to::text, row_count from drop_table_partitions('executions', '6 months')"
    )
    assert dropped.fetchall() == [("partitions.executions_history", end, old)]
    assert ask(owner, "select count(*) from matches") == matches - of_old
    assert ask(owner, "select count(*) from matches m where not exists (select from private.execution_ids i "
                      "where i.id = m.execution_id)") == 0  # fmt: skip
    owner.execute("reset role; set local session authorization settler_app")
    for call in ("select * from drop_table_partitions('executions', '3 months')", "select create_table_partitions(9)"):
        with pytest.raises(errors.InsufficientPrivilege), owner.transaction():
            owner.execute(call.encode())


@pytest.mark.every_major
def test_the_engine_takes_an_old_database_there_in_one_run_and_a_fresh_one_comes_to_the_same(
    new_database, connect, apply
) -> None:
    names = []
    for shape in ("", "multi_tenancy"):
        name = new_database()
        connection = connect(name, role="settler_owner")
        if shape:
            legacy.create(connection, shape)
            generate.fill(connection, shape=shape, rows=800, seed=7)
        apply(name, FILES)
        assert apply(name, FILES).applied == []
        names.append(connection.execute(
            """
            select 'index', indexrelid::regclass::text from pg_index where indisvalid and indexrelid > 16384
              and indrelid::regclass::text !~ '^(runbook|pg_toast)' and indexrelid::regclass::text !~ '^partitions'
            union all select 'rule', conrelid::regclass || ' ' || conname from pg_constraint
              where convalidated and contype <> 'n' and connamespace::regnamespace::text in ('public', 'private')
            union all select 'policy', tablename || policyname || coalesce(qual, '') || coalesce(with_check, '')
              from pg_policies
            union all select 'trigger', tgrelid::regclass || tgname from pg_trigger
              where not tgisinternal and tgrelid::regclass::text !~ '^partitions'
            union all select relkind::text, oid::regclass::text from pg_class
              where relkind in ('r', 'p', 'v', 'm') and relnamespace::regnamespace::text in ('public', 'private')
            order by 1, 2
            """
        ).fetchall())  # fmt: skip
    assert names[0] == names[1]
