"""A good database raises no alarm and has the digest of the expectation: new, of any shape, restored, on any major."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._catalog import digest, plain_view, snapshot
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect as engine_connect
from ansible_collections.settler.runbook.plugins.module_utils._files import read_migrations
from ansible_collections.settler.runbook.plugins.module_utils._isolation import prove
from ansible_collections.settler.runbook.plugins.module_utils._probe_rows import Settings
from ansible_collections.settler.runbook.plugins.module_utils._verify import compare, health, orphans, sequences
from ansible_collections.settler.runbook.plugins.modules.verify import read_expectation

from tests.support import PROJECT, as_migrator
from tools import generate, legacy
from tools.binaries import find_binaries

EXPECTED = read_expectation(str(PROJECT / "sql/verify/expected.yml"))
NAMES = {"settler_owner": "$owner", "settler_migrator": "$migrator", "settler_app": "$app"}
MIGRATIONS = read_migrations(PROJECT / "sql/migrations")


def catalogue_of(session):
    return snapshot(session, exclude=["runbook"], role_names=NAMES)


@pytest.fixture
def assert_good(cluster, roles, connect):
    """Assert that nothing is wrong with a database, and that its catalogue has the digest of the expectation."""

    def look(database):
        with connect(database) as admin:  # Settler's roles have this right from create_database
            admin.execute("GRANT USAGE ON SCHEMA public TO PUBLIC")
        with engine_connect(as_migrator(cluster, roles, database)) as session:
            session.execute("SET ROLE settler_owner")
            catalogue = catalogue_of(session)
            rows = compare(EXPECTED, catalogue) + health(session) + sequences(session)[0]
            proof = prove(session, Settings("settler_app"))
            rows += orphans(session, 1 << 30)[0] + proof.rows
        assert (proof.unproved, proof.drawn) == ([], [])
        assert [row for row in rows if row.status != "ok"] == []
        assert len(rows) > 1000
        assert digest(catalogue) == digest(EXPECTED)

    return look


@pytest.fixture
def build(new_database, connect, apply):
    """Make a database of a shape with rows, and migrate it; C(None) is a new one."""

    def make(shape):
        database = new_database()
        if shape:
            with connect(database, role="settler_owner") as session:
                legacy.create(session, shape)
                generate.fill(session, shape=shape, rows=300, seed=7)
        apply(database, MIGRATIONS)
        if not shape:
            with connect(database) as session:
                generate.fill(session, shape=legacy.CURRENT, rows=300, seed=7)
        return database

    return make


@pytest.mark.every_major
@pytest.mark.parametrize("shape", [None, *legacy.SHAPES])
def test_a_migrated_database_is_good(shape, build, assert_good):
    assert_good(build(shape))


@pytest.mark.every_major
def test_a_copy_is_good_and_so_is_what_is_restored_where_this_machine_has_clients(
    cluster, build, new_database, assert_good
):
    database = build(None)
    assert_good(new_database(template=database))
    clients = find_binaries()
    if clients is None or cluster.state.major > 15:
        return  # Debian's pg_dump of 15 reads no newer server
    state, copy = cluster.state, new_database()
    login = ["-h", state.host, "-p", str(state.port), "-U", state.user]
    environment = {**os.environ, "PGPASSWORD": state.password}
    dump = subprocess.run(
        [Path(clients["pg_dump"]), *login, "-Fc", database], env=environment, check=True, stdout=subprocess.PIPE
    ).stdout
    subprocess.run(
        [Path(clients["pg_restore"]), *login, "--clean", "--if-exists", "-d", copy], env=environment, check=True,
        input=dump,
    )  # fmt: skip
    assert_good(copy)


@pytest.mark.every_major
def test_views_and_functions_of_any_form_have_one_digest_on_all_majors(new_database, connect, request):
    database = new_database()
    with connect(database, role="settler_owner") as session:
        session.execute(FORMS)
        found = {kind: catalogue_of(session)[kind] for kind in ("tables", "views", "functions", "types", "sequences")}
    first = request.config.stash.setdefault(FOUND, found)
    assert found == first
    assert "o.id" in found["views"]["public.joined"]["definition"]
    assert found["functions"]["public.atomic(i integer)"]["body"]


FOUND = pytest.StashKey[dict]()
FORMS = """
CREATE TABLE one (id bigserial PRIMARY KEY, "Odd name" text NOT NULL DEFAULT 'FROM x, y', n int CHECK (n > 0));
CREATE TABLE other (id int PRIMARY KEY, one bigint REFERENCES one, g int GENERATED ALWAYS AS (id * 2) STORED);
CREATE VIEW single AS SELECT id, "Odd name", n + 1 AS more FROM one WHERE n > 1 ORDER BY n;
CREATE VIEW aliased AS SELECT a.id FROM one a WHERE a.n IN (SELECT o.id FROM other o WHERE o.one = a.id);
CREATE VIEW joined AS SELECT one.id, o.id AS other FROM one JOIN other o ON o.one = one.id;
CREATE VIEW listed AS SELECT one.id, other.g FROM one, other WHERE one.id = other.one;
CREATE VIEW both_of_them AS SELECT id FROM one UNION ALL SELECT id FROM other;
CREATE VIEW grouped AS SELECT n, count(*) FROM one GROUP BY n HAVING count(*) > 1;
CREATE VIEW nested AS SELECT x.n FROM (SELECT n, "Odd name" FROM one WHERE n = 1) x WHERE x.n IS DISTINCT FROM 2;
CREATE VIEW of_a_function AS SELECT s.s FROM generate_series(1, 3) s(s);
CREATE VIEW with_cte AS WITH w AS (SELECT id FROM one) SELECT id FROM w;
CREATE VIEW quoted AS SELECT "Q w".id FROM one "Q w" WHERE "Q w".n > 1;
CREATE VIEW parts AS SELECT extract(year FROM now()) AS y, id FROM one;
CREATE FUNCTION atomic(i int) RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT count(*) FROM one WHERE n > i; END;
CREATE DOMAIN narrow AS text NOT NULL DEFAULT 'x' CHECK (VALUE <> '');
CREATE TYPE span AS RANGE (SUBTYPE = int);
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SELECT a.id, a.n FROM s.one a WHERE (a.n > 1);", "SELECT id, n FROM s.one a WHERE (n > 1);"),
        ("SELECT one.id FROM s.one;", "SELECT id FROM s.one;"),
        ("SELECT x.n FROM ( SELECT y.n FROM one y, two) x;", "SELECT n FROM ( SELECT y.n FROM one y, two) x;"),
        ("SELECT one.id, two.id FROM one, two;", None),
        ("SELECT one.id FROM (one JOIN two ON ((one.id = two.id)));", None),
        ("SELECT one.id FROM one UNION SELECT two.id FROM two;", None),
        ("SELECT 'FROM a, b' AS t, c.i FROM c;", "SELECT 'FROM a, b' AS t, i FROM c;"),
        ("SELECT ax.id FROM ax WHERE (other.a.id = 1);", "SELECT id FROM ax WHERE (other.a.id = 1);"),
    ],
)
def test_a_column_loses_its_table_only_where_there_is_no_other(old, new):
    assert plain_view(old) == (new or old)
