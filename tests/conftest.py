"""What all tests stand on: a throw-away PostgreSQL cluster, Settler's three roles, and databases by the dozen.

``connect`` gives connections, ``new_database`` gives databases as the runbook's create_database role leaves them, and
nothing here ever reaches a server of yours: the cluster has a port, a password and a folder of its own.

Tests marked ``every_major`` run once on each major version, all others on the machine's own PostgreSQL. There is one
cluster at a time: the machine's own first, then the oldest and the newest major, then those between them. With ``-n 2``
each worker has one. ``SETTLER_MINUTES=40`` leaves those between out after so many minutes, and the summary tells.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import hypothesis
import psycopg
import pytest
from psycopg import sql

from tests.support import CLUSTERS, throw_away_cluster
from tools import majors
from tools.child import stop_on_sigterm
from tools.cluster import Cluster
from tools.project import ToolError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg.rows import TupleRow

_TEMPLATE = "settler_test_template"
_numbers = itertools.count(1)
_WANTED = pytest.StashKey[tuple[int, ...]]()
_TESTED = pytest.StashKey[set[int]]()
_MINUTES = "SETTLER_MINUTES"
_UNTIL = pytest.StashKey[float]()
_BETWEEN = majors.MAJORS[1:-1]


@dataclass(frozen=True)
class Roles:
    """Settler's roles: the owner of everything, who migrates, and who works with the data."""

    owner: str = "settler_owner"
    migrator: str = "settler_migrator"
    app: str = "settler_app"
    migrator_password: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    app_password: str = field(default_factory=lambda: secrets.token_urlsafe(16))

    def password_of(self, user: str) -> str:
        """Return the password of a role that may log in."""
        return {self.migrator: self.migrator_password, self.app: self.app_password}[user]


class NewDatabase(Protocol):
    """Make a database, empty but for its roles' rights and the extensions, or a copy of another one."""

    def __call__(self, template: str | None = None) -> str:
        """Return the name of the new database; the test's end drops it."""
        ...


class Connect(Protocol):
    """Connect to a database."""

    def __call__(self, dbname: str, role: str | None = None, user: str | None = None) -> psycopg.Connection[TupleRow]:
        """Return a connection in autocommit mode, as the superuser or ``user``, after SET ROLE ``role`` if given."""
        ...


def pytest_configure(config: pytest.Config) -> None:
    """Keep the developer's own libpq settings out of all connections, and destroy the cluster on SIGTERM, too."""
    stop_on_sigterm()
    hypothesis.settings.register_profile("project", deadline=None)  # the machines are noisy
    hypothesis.settings.load_profile("project")
    for name in [name for name in os.environ if name.startswith("PG") and not name.startswith("PG_")]:
        del os.environ[name]
    try:
        config.stash[_WANTED] = majors.wanted()
    except ToolError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[_TESTED] = set()
    try:
        config.stash[_UNTIL] = time.monotonic() + 60 * float(os.environ.get(_MINUTES) or "inf")
    except ValueError as error:
        raise pytest.UsageError(f"{_MINUTES}: {error}") from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Have a test that is marked run once for each major."""
    if "cluster" in metafunc.fixturenames and metafunc.definition.get_closest_marker("every_major"):
        wanted = metafunc.config.stash[_WANTED]
        ids = [f"pg{major}" for major in wanted]
        metafunc.parametrize("cluster", wanted, ids=ids, indirect=True, scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of one cluster next to each other: pytest alone would make the machine's own one twice.

    Of these, a file's tests go to one worker, so that what the file makes once is made once.
    """
    items.sort(key=lambda item: (_major(item) in _BETWEEN, _major(item)))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(f"{_major(item)}-{item.path.stem}"))


def _major(item: pytest.Item) -> int:
    """Return the major that a test was made for, or 0 where it runs on the machine's own."""
    parameters = getattr(item, "callspec", None)
    return parameters.params.get("cluster", 0) if parameters else 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out, where time is short, what runs on the oldest and the newest major as well."""
    if _major(item) in _BETWEEN and time.monotonic() > item.config.stash[_UNTIL]:
        pytest.skip(f"left out after {os.environ[_MINUTES]} minutes ({_MINUTES}): the oldest and newest major have it")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Have a worker say on which majors it has run tests."""
    if hasattr(session.config, "workeroutput"):
        tested: set[int] = session.config.stash[_TESTED]
        session.config.workeroutput["tested"] = sorted(tested)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect what the workers say."""
    node.config.stash[_TESTED].update(getattr(node, "workeroutput", {}).get("tested", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say on which majors the marked tests ran, and on which they did not."""
    tested = config.stash[_TESTED]
    missing = sorted(set(majors.MAJORS) - tested)
    narrowed = os.environ.get(majors.NARROWED_BY)
    if tested or narrowed:
        names = ", ".join(map(str, sorted(tested))) or "none"
        terminalreporter.write_line(f"every_major: tested on PostgreSQL {names}", bold=True)
    if missing and (tested or narrowed):
        why = f" ({majors.NARROWED_BY}={narrowed})" if narrowed else ""
        terminalreporter.write_line(f"every_major: NOT tested on {', '.join(map(str, missing))}{why}", yellow=True)


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Yield a running cluster of this session's own, with fsync off; it is destroyed after its last test."""
    major: int | None = getattr(request, "param", None)
    try:
        binaries = None if major is None else majors.ensure(major)
    except ToolError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    _remove_abandoned()
    # ports below those that the system gives to connections: a server that starts again finds its own one free
    with throw_away_cluster(fsync=False, port=25001, binaries=binaries) as made:
        if major is not None:
            assert made.state.major == major
            request.config.stash[_TESTED].add(major)
        yield made


@pytest.fixture(scope="session")
def roles(cluster: Cluster) -> Roles:
    """Make Settler's three roles."""
    made = Roles()
    with _superuser(cluster, "postgres") as server:
        for statement in (
            sql.SQL("CREATE ROLE {owner} NOLOGIN"),
            sql.SQL("CREATE ROLE {app} LOGIN PASSWORD {app_password}"),
            sql.SQL("CREATE ROLE {migrator} LOGIN CREATEDB PASSWORD {migrator_password} IN ROLE {owner}, {app}"),
        ):
            server.execute(
                statement.format(
                    owner=sql.Identifier(made.owner),
                    app=sql.Identifier(made.app),
                    migrator=sql.Identifier(made.migrator),
                    app_password=sql.Literal(made.app_password),
                    migrator_password=sql.Literal(made.migrator_password),
                )
            )
    return made


@pytest.fixture
def new_database(cluster: Cluster, roles: Roles, _template: str) -> Iterator[NewDatabase]:
    """Yield a factory of databases, which are dropped after the test even if something is connected."""
    made: list[str] = []

    def create(template: str | None = None) -> str:
        name = f"settler_test_{next(_numbers)}"
        made.append(name)
        with _superuser(cluster, "postgres") as server:
            _create(server, name, template or _template, roles)
        return name

    yield create
    with _superuser(cluster, "postgres") as server:
        for name in made:
            server.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def connect(cluster: Cluster, roles: Roles) -> Iterator[Connect]:
    """Yield a factory of connections, which are closed after the test."""
    with contextlib.ExitStack() as opened:

        def open_connection(
            dbname: str, role: str | None = None, user: str | None = None
        ) -> psycopg.Connection[TupleRow]:
            password = None if user is None else roles.password_of(user)
            connection = psycopg.connect(cluster.conninfo(dbname, user, password), autocommit=True)
            opened.callback(connection.close)
            if role is not None:
                connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
            return connection

        yield open_connection


@pytest.fixture(scope="session")
def _template(cluster: Cluster, roles: Roles) -> str:
    """Make the database that all others are copied from: a copy brings the schema's rights and the extensions."""
    owner, app = sql.Identifier(roles.owner), sql.Identifier(roles.app)
    with _superuser(cluster, "postgres") as server:
        _create(server, _TEMPLATE, "template0", roles)
    with _superuser(cluster, _TEMPLATE) as database:
        for statement in (
            sql.SQL("ALTER SCHEMA public OWNER TO {owner}"),
            sql.SQL("REVOKE ALL ON SCHEMA public FROM PUBLIC"),
            sql.SQL("GRANT USAGE ON SCHEMA public TO {app}"),
            sql.SQL("SET ROLE {owner}"),
            sql.SQL('CREATE EXTENSION "uuid-ossp"'),
            sql.SQL("CREATE EXTENSION pgcrypto"),
            sql.SQL(
                "ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {app}"
            ),
            sql.SQL("ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT USAGE, SELECT ON SEQUENCES TO {app}"),
        ):
            database.execute(statement.format(owner=owner, app=app))
    return _TEMPLATE


def _create(server: psycopg.Connection[TupleRow], name: str, template: str, roles: Roles) -> None:
    """Create a database with its database-level rights, which no template brings along."""
    for statement in (
        sql.SQL("CREATE DATABASE {name} OWNER {owner} ENCODING 'UTF8' TEMPLATE {template}"),
        sql.SQL("REVOKE ALL ON DATABASE {name} FROM PUBLIC"),
        sql.SQL("GRANT CONNECT ON DATABASE {name} TO {migrator}, {app}"),
    ):
        server.execute(
            statement.format(
                name=sql.Identifier(name),
                template=sql.Identifier(template),
                owner=sql.Identifier(roles.owner),
                migrator=sql.Identifier(roles.migrator),
                app=sql.Identifier(roles.app),
            )
        )


def _superuser(cluster: Cluster, dbname: str) -> psycopg.Connection[TupleRow]:
    return psycopg.connect(cluster.conninfo(dbname), autocommit=True)


def _remove_abandoned() -> None:
    """Remove clusters of sessions that were killed before they could do it themselves."""
    for folder in Path("/tmp").glob(f"{CLUSTERS}*"):
        owner = re.match(rf"{CLUSTERS}(\d+)-", folder.name)
        with contextlib.suppress(FileNotFoundError):  # the workers start at the same time, and another one removes it
            if owner and folder.lstat().st_uid == os.geteuid() and not _alive(int(owner.group(1))):
                Cluster(folder / "cluster").down()
                shutil.rmtree(folder)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True
