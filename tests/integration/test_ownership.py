"""Ownership on a real server: a database that was made by hand goes to its owner, strangers' objects never unasked."""

from __future__ import annotations

import pytest
from psycopg import sql

from tests.support import call_module, login

OBJECTS = """
CREATE SCHEMA extra;
CREATE TYPE mood AS ENUM ('ok');
CREATE TYPE pair AS (a int);
CREATE TYPE span AS RANGE (SUBTYPE = int);
CREATE DOMAIN email AS text;
CREATE TABLE "Odd ""name %s" (id serial PRIMARY KEY, number int GENERATED ALWAYS AS IDENTITY, how mood);
CREATE TABLE parts (i int) PARTITION BY LIST (i);
CREATE TABLE part PARTITION OF parts DEFAULT;
CREATE INDEX ON parts (i);
CREATE VIEW v AS SELECT 1 AS one;
CREATE MATERIALIZED VIEW m AS SELECT 1 AS one;
CREATE SEQUENCE extra.s;
CREATE FUNCTION f(int, text DEFAULT 'x') RETURNS int LANGUAGE sql AS 'SELECT 1';
CREATE PROCEDURE p() LANGUAGE sql AS 'SELECT 1';
CREATE AGGREGATE total (int) (SFUNC = int4pl, STYPE = int);
"""
LEFT = """
SELECT array_agg(name ORDER BY name) FROM (
    SELECT relname::text AS name, relowner AS owner, relnamespace AS schema, oid FROM pg_class
    UNION ALL SELECT proname, proowner, pronamespace, oid FROM pg_proc
    UNION ALL SELECT typname, typowner, typnamespace, oid FROM pg_type
    UNION ALL SELECT nspname, nspowner, oid, oid FROM pg_namespace WHERE nspname = 'extra') o
WHERE schema IN (to_regnamespace('public'), to_regnamespace('extra')) AND name !~ 'multirange'
  AND owner <> 'settler_owner'::regrole
  AND oid NOT IN (SELECT objid FROM pg_depend WHERE deptype = 'e')
"""


@pytest.fixture
def database(new_database, connect):
    """A database whose objects the superuser has made."""
    name = new_database()
    connect(name).execute(OBJECTS)
    return name


@pytest.fixture
def adopt(cluster, roles):
    def run(database, *adopt_from, check=False):
        return call_module(
            "ownership", {**login(cluster, database), "owner": roles.owner, "adopt_from": list(adopt_from)}, check=check
        )

    return run


def test_everything_goes_to_the_owner_and_once(database, connect, adopt):
    assert len(connect(database).execute(LEFT).fetchone()[0]) > 20
    result = adopt(database, "postgres")
    assert not result.get("failed"), result["msg"]
    assert result["changed"]
    assert connect(database).execute(LEFT).fetchone() == (None,)
    assert {"SCHEMA extra", "PROCEDURE p()", "DOMAIN email", "SEQUENCE extra.s", "VIEW public.v"} <= set(
        result["adopted"]
    )
    assert "FUNCTION f(integer,text): postgres" in result["diff"]["before"]
    assert "FUNCTION f(integer,text): settler_owner" in result["diff"]["after"]
    again = adopt(database, "postgres")
    assert (again["changed"], again["adopted"]) == (False, [])


@pytest.mark.parametrize("name", ["a{b}", "{}", "a%(b)s", "a'b"])
def test_no_name_is_taken_for_a_template(new_database, connect, adopt, name):
    database = new_database()
    connect(database).execute(sql.SQL("CREATE TABLE {} (i int)").format(sql.Identifier(name)))
    assert adopt(database, "postgres")["adopted"] == [f'TABLE public."{name}"']
    assert connect(database).execute(LEFT).fetchone() == (None,)


def test_objects_of_extensions_stay_with_them(database, connect, adopt):
    query = "SELECT array_agg(DISTINCT proowner::regrole::text) FROM pg_proc WHERE proname = 'crypt'"
    before = connect(database).execute(query).fetchone()
    adopt(database, "postgres")
    assert connect(database).execute(query).fetchone() == before


def test_strangers_objects_are_refused_by_name_and_nothing_is_changed(database, connect, adopt):
    connect(database).execute("CREATE TABLE mine (i int); ALTER TABLE mine OWNER TO settler_app")
    before = connect(database).execute(LEFT).fetchone()
    result = adopt(database, "postgres")
    assert result["failed"]
    assert "1 objects of" in result["msg"]
    assert "TABLE public.mine of settler_app" in result["msg"]
    assert "create_database_adopt_from" in result["msg"]
    assert connect(database).execute(LEFT).fetchone() == before
    assert not adopt(database, "postgres", "settler_app").get("failed")
    assert connect(database).execute(LEFT).fetchone() == (None,)


def test_nothing_is_taken_that_nobody_named(database, connect, adopt):
    before = connect(database).execute(LEFT).fetchone()
    assert adopt(database)["failed"]
    assert connect(database).execute(LEFT).fetchone() == before


def test_check_mode_tells_what_it_would_take(database, connect, adopt):
    before = connect(database).execute(LEFT).fetchone()
    result = adopt(database, "postgres", check=True)
    assert result["changed"]
    assert "SCHEMA extra" in result["adopted"]
    assert connect(database).execute(LEFT).fetchone() == before


def test_all_or_nothing(database, connect, adopt):
    connect(database).execute("""
        CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not the view'; END $$;
        CREATE EVENT TRIGGER refuse ON ddl_command_end WHEN TAG IN ('ALTER VIEW') EXECUTE FUNCTION refuse()""")
    before = connect(database).execute(LEFT).fetchone()
    result = adopt(database, "postgres")
    assert result["failed"]
    assert "not the view" in result["msg"]
    assert connect(database).execute(LEFT).fetchone() == before


def test_good_database_is_left_alone(new_database, adopt):
    result = adopt(new_database(), "postgres")
    assert (result["changed"], result["adopted"]) == (False, [])


def test_check_mode_knows_no_database_that_is_yet_to_be_made(adopt):
    assert adopt("not_there_yet", check=True)["changed"] is False
