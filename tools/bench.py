"""Compares the engine with its peers: the same files, the same server, whole processes, in one run; ratios count.

    ./runbook bench [--files 10,200,1000] [--repeat 3] [--databases 1000] [--linear 10,100,1000,10000]
                    [--playbook 3] [--tools dbmate,yoyo] [--json PATH]

Each measurement is a process from its start to its end; the tools take turns, and the table has the medians, with the
processor time of the client beside them: it depends less on what else the machine does. A tool that cannot be had is
listed with the reason.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from tools import apt, console, inventory, majors
from tools.cluster import Cluster
from tools.project import ROOT, VENV, ToolError, environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

CACHE = ROOT / ".cache" / "bench"
COLLECTIONS = ROOT / "collections"
_DBMATE = (
    "https://registry.npmjs.org/@dbmate/linux-x64/-/linux-x64-2.28.0.tgz",
    "S4pV5HstfN/uLtrMcouxhn0zcErUGco98LWfzjY4Ylcv2pnc6rfzS6bBO6q0dHFbSPPZWOlsTY6Dw7WU4Uqcaw==",
)
_NODE_PG_MIGRATE = ("node-pg-migrate@8.0.3", "pg@8.16.3")
_GRAPHILE_MIGRATE = ("graphile-migrate@1.4.1",)
_YOYO = ("yoyo-migrations==9.0.0", "psycopg2-binary==2.9.11", "setuptools<81")
_ALEMBIC = ("alembic==1.17.1", "sqlalchemy==2.0.44", "psycopg2-binary==2.9.11")
_LOCK_TIMEOUT = 0.5
_ALLOWANCE_MS = 50
_PLAYBOOK_SECONDS = 6


@dataclass(frozen=True)
class Target:
    """Where a tool works: a database of the cluster, and a folder with as many files as it is given."""

    cluster: Cluster
    database: str
    folder: Path

    @property
    def url(self) -> str:
        """The database as a URL."""
        state = self.cluster.state
        return f"postgres://{state.user}:{state.password}@{state.host}:{state.port}/{self.database}"

    @property
    def env(self) -> dict[str, str]:
        """The environment of a libpq program."""
        state = self.cluster.state
        return environment() | {
            "PGHOST": state.host,
            "PGPORT": str(state.port),
            "PGUSER": state.user,
            "PGPASSWORD": state.password,
            "PGDATABASE": self.database,
        }


@dataclass(frozen=True)
class Tool:
    """A tool: how to get it, how to write files for it, how to run it, and whether a second run is a no-op.

    ``limit`` is how many files it is measured with at most.
    """

    name: str
    write: Callable[[Path, int], None]
    run: Callable[[Target], None]
    install: Callable[[], None] = field(default=lambda: None)
    knows_what_is_done: bool = True
    limit: int | None = None


def statements(number: int) -> tuple[str, str]:
    """Return what file NUMBER does: a table and an index, as migrations mostly are."""
    return f"CREATE TABLE t{number} (id int PRIMARY KEY, v text)", f"CREATE INDEX t{number}_v ON t{number} (v)"


def write_plain(folder: Path, count: int) -> None:
    """Write the files as the engine and psql take them."""
    for number in range(1, count + 1):
        (folder / f"{number:05d}_m.sql").write_text(";\n".join(statements(number)) + ";\n")


def _write_dbmate(folder: Path, count: int) -> None:
    for number in range(1, count + 1):
        text = "-- migrate:up\n" + ";\n".join(statements(number)) + ";\n-- migrate:down\n"
        (folder / f"{20200101000000 + number}_m.sql").write_text(text)


def _write_node_pg_migrate(folder: Path, count: int) -> None:
    for number in range(1, count + 1):
        (folder / f"{1600000000000 + number}_m.sql").write_text(";\n".join(statements(number)) + ";\n")


def _write_alembic(folder: Path, count: int) -> None:
    (folder / "versions").mkdir()
    (folder / "env.py").write_text(
        "import os\nfrom alembic import context\nfrom sqlalchemy import create_engine\n"
        "with create_engine(os.environ['BENCH_URL']).connect() as connection:\n"
        "    context.configure(connection=connection, transaction_per_migration=True)\n"
        "    with context.begin_transaction():\n        context.run_migrations()\n"
    )
    (folder / "alembic.ini").write_text("[alembic]\nscript_location = %(here)s\n")
    for number in range(1, count + 1):
        body = "".join(f"    op.execute({one!r})\n" for one in statements(number))
        down = repr(f"r{number - 1}") if number > 1 else None
        (folder / "versions" / f"r{number}.py").write_text(
            f"from alembic import op\nrevision = 'r{number}'\ndown_revision = {down}\n"
            f"def upgrade():\n{body}def downgrade():\n    pass\n"
        )


def _write_graphile_migrate(folder: Path, count: int) -> None:
    committed = folder / "migrations" / "committed"
    committed.mkdir(parents=True)
    (folder / ".gmrc").write_text("{}\n")
    previous = ""
    for number in range(1, count + 1):
        body = ";\n".join(statements(number)) + ";\n"
        digest = "sha1:" + hashlib.sha1(f"{previous}\n{body}".lstrip().encode()).hexdigest()  # noqa: S324 - theirs
        (committed / f"{number:06d}.sql").write_text(f"--! Previous: {previous or '-'}\n--! Hash: {digest}\n\n{body}")
        previous = digest


def _write_sqitch(folder: Path, count: int) -> None:
    (folder / "deploy").mkdir()
    (folder / "sqitch.conf").write_text("[core]\n\tengine = pg\n[user]\n\tname = bench\n\temail = bench@localhost\n")
    plan = "%syntax-version=1.0.0\n%project=bench\n\n"
    for number in range(1, count + 1):
        plan += f"m{number} 2020-01-01T00:00:00Z bench <bench@localhost> # {number}\n"
        text = "BEGIN;\n" + ";\n".join(statements(number)) + ";\nCOMMIT;\n"
        (folder / "deploy" / f"m{number}.sql").write_text(text)
    (folder / "sqitch.plan").write_text(plan)


def _run(command: Sequence[str | Path], target: Target, **extra: str) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=target.folder,
        env=target.env | extra,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ToolError(f"{command[0]} ended {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def module_arguments(target: Target, **changes: Any) -> dict[str, Any]:
    """Return the options of the module migrate."""
    state = target.cluster.state
    return {
        "login_host": state.host,
        "login_port": state.port,
        "login_user": state.user,
        "login_password": state.password,
        "login_db": target.database,
        "directory": str(target.folder),
        "run_id": "bench",
        "analyze": False,
        "refresh": False,
        "lock_timeout": _LOCK_TIMEOUT,
        **changes,
    }


def run_ours(target: Target, **changes: Any) -> dict[str, Any]:
    """Run the module as Ansible does: a process, its options on standard input, its result on standard output."""
    done = subprocess.run(
        [sys.executable, COLLECTIONS / "ansible_collections/settler/runbook/plugins/modules/migrate.py"],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": module_arguments(target, **changes)}),
        env=environment() | {"PYTHONPATH": str(COLLECTIONS)},
        capture_output=True,
        text=True,
        check=False,
    )
    result: dict[str, Any] = json.loads(done.stdout or "{}")
    if done.returncode or result.get("failed"):
        raise ToolError(f"the engine: {result.get('msg', done.stderr[-2000:])}")
    return result


def _psql_session(target: Target) -> None:
    script = "CREATE TABLE IF NOT EXISTS ledger (file text PRIMARY KEY, at timestamptz DEFAULT now());\n"
    for file in sorted(target.folder.glob("*_m.sql")):
        script += f"BEGIN;\n\\i {file.name}\nINSERT INTO ledger (file) VALUES ('{file.name}');\nCOMMIT;\n"
    (target.folder / "all.psql").write_text(script)
    _run(["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", "all.psql"], target)


def _psql_each(target: Target) -> None:
    for file in sorted(target.folder.glob("*_m.sql")):
        _run(["psql", "-X", "-q", "-1", "-v", "ON_ERROR_STOP=1", "-f", file.name], target)


def _run_dbmate(target: Target) -> None:
    _run([CACHE / "dbmate/bin/dbmate", "--no-dump-schema", "-d", ".", "up"], target,
         DATABASE_URL=f"{target.url}?sslmode=disable")  # fmt: skip


def _install_dbmate() -> None:
    place = CACHE / "dbmate"
    if not (place / "bin/dbmate").exists():
        with urllib.request.urlopen(_DBMATE[0], timeout=60) as answer:  # noqa: S310 - the URL is ours
            archive = majors.verified(answer.read(), _DBMATE[1])
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as package:
            program = package.extractfile("package/bin/dbmate")
            assert program
            (place / "bin").mkdir(parents=True, exist_ok=True)
            (place / "bin/dbmate").write_bytes(program.read())
        (place / "bin/dbmate").chmod(0o755)


def _install_sqitch() -> None:
    if not shutil.which("sqitch"):
        if not apt.usable():
            raise ToolError("sqitch is not installed: it is a Debian package")
        apt.install("sqitch", "libdbd-pg-perl")


def _install_npm(folder: str, packages: Sequence[str]) -> None:
    if (CACHE / folder / "node_modules").exists():
        return
    npm = shutil.which("npm")
    if not npm:
        raise ToolError("npm is not installed")
    _quietly([npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(CACHE / folder), *packages])


def _install_pip(folder: str, packages: Sequence[str]) -> None:
    place = CACHE / folder
    if (place / "ready").exists():
        return
    _quietly([sys.executable, "-m", "venv", str(place)])
    _quietly([str(place / "bin/python"), "-m", "pip", "install", "--quiet", *packages])
    (place / "ready").touch()


def _quietly(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolError((done.stderr or done.stdout).strip().splitlines()[-1])


TOOLS = (
    Tool("runbook", write_plain, lambda target: void(run_ours(target))),
    Tool("dbmate", _write_dbmate, _run_dbmate, _install_dbmate),
    Tool("psql session", write_plain, _psql_session, knows_what_is_done=False),
    Tool("psql per file", write_plain, _psql_each, knows_what_is_done=False, limit=200),
    Tool(
        "node-pg-migrate",
        _write_node_pg_migrate,
        lambda target: _run(
            [CACHE / "npm/node_modules/.bin/node-pg-migrate", "up", "-m", ".", "--no-single-transaction"],
            target,
            DATABASE_URL=target.url,
        ),
        lambda: _install_npm("npm", _NODE_PG_MIGRATE),
    ),
    Tool(
        "graphile-migrate",
        _write_graphile_migrate,
        lambda target: _run(
            [CACHE / "graphile/node_modules/.bin/graphile-migrate", "migrate"], target, DATABASE_URL=target.url
        ),
        lambda: _install_npm("graphile", _GRAPHILE_MIGRATE),
    ),
    Tool(
        "sqitch",
        _write_sqitch,
        lambda target: _run(
            ["sqitch", "--quiet", "deploy", "--no-verify", target.url.replace("postgres:", "db:pg:", 1)], target
        ),
        _install_sqitch,
        limit=200,
    ),
    Tool(
        "Alembic",
        _write_alembic,
        lambda target: _run(
            [CACHE / "alembic/bin/alembic", "upgrade", "head"],
            target,
            BENCH_URL=target.url.replace("postgres:", "postgresql:", 1),
        ),
        lambda: _install_pip("alembic", _ALEMBIC),
    ),
    Tool(
        "yoyo",
        write_plain,
        lambda target: _run(
            [CACHE / "yoyo/bin/yoyo", "apply", "--batch", "--no-config-file", "-d",
             target.url.replace("postgres:", "postgresql:", 1), "."],
            target,
        ),
        lambda: _install_pip("yoyo", _YOYO),
    ),
)  # fmt: skip


def void(_result: object) -> None:
    """Forget a result."""


def table(title: str, rows: Sequence[tuple[str, float | None, str]], base: str) -> list[str]:
    """Return lines of a table: name, seconds, and the ratio to the row BASE; or a note where there is no figure."""
    seconds = {name: value for name, value, _note in rows}
    ours = seconds[base]
    lines = [title]
    for name, value, note in rows:
        if value is None:
            lines.append(f"  {name:<24} {'–':>9}          {note}")
        else:
            ratio = f"{value / ours:6.2f} ×" if ours else ""
            lines.append(f"  {name:<24} {value:9.3f} s  {ratio}  {note}".rstrip())
    return lines


class Bench:
    """One run: a cluster, a folder, and what was measured."""

    def __init__(self, cluster: Cluster, folder: Path, repeat: int, tools: Sequence[Tool] = TOOLS) -> None:
        self._cluster, self._folder, self._repeat = cluster, folder, repeat
        self._number = 0
        self.result: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "postgresql": cluster.state.major,
            "left_out": {},
        }
        self.tools = list(self._installed(tools))

    def _installed(self, tools: Sequence[Tool]) -> Iterator[Tool]:
        for tool in tools:
            try:
                tool.install()
            except (ToolError, OSError) as error:
                self.result["left_out"][tool.name] = str(error)
            else:
                yield tool

    def _target(self, tool: Tool, count: int) -> Target:
        """Return a fresh database and a folder with files."""
        self._number += 1
        name = f"bench_{self._number}"
        with psycopg.connect(self._cluster.conninfo("postgres"), autocommit=True) as server:
            server.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
        folder = self._folder / name
        folder.mkdir()
        tool.write(folder, count)
        return Target(self._cluster, name, folder)

    def _drop(self, target: Target) -> None:
        with psycopg.connect(self._cluster.conninfo("postgres"), autocommit=True) as server:
            server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(target.database)))
        shutil.rmtree(target.folder)

    def files(self, count: int) -> list[str]:
        """Measure fresh and no-op runs over so many files, the tools in turns."""
        lines: list[str] = []
        tools = [tool for tool in self.tools if tool.limit is None or count <= tool.limit]
        for kind, times in self._measured(tools, count).items():
            rows = [
                (
                    tool.name,
                    median([wall for wall, _cpu in times[tool.name]]),
                    f"client {median([cpu for _wall, cpu in times[tool.name]]):6.3f} s"
                    if times[tool.name]
                    else "keeps no ledger",
                )
                for tool in tools
            ]
            self.result[f"{count} files, {kind}"] = {name: value for name, value, _note in rows}
            self.result[f"{count} files, {kind}, client"] = {
                name: median([cpu for _wall, cpu in found]) for name, found in times.items()
            }
            lines += table(f"{count} files, {kind}", rows, "runbook")
        left = [f"{tool.name} (more than {tool.limit} files take minutes)" for tool in self.tools if tool not in tools]
        return lines + [f"  not measured: {', '.join(left)}"] * bool(left)

    def _measured(self, tools: Sequence[Tool], count: int) -> dict[str, dict[str, list[tuple[float, float]]]]:
        """Return seconds, and seconds of the client's processor, by kind of run and tool; the tools take turns."""
        times: dict[str, dict[str, list[tuple[float, float]]]] = {
            kind: {tool.name: [] for tool in tools} for kind in ("fresh", "no-op")
        }
        for _ in range(self._repeat):
            for tool in tools:
                target = self._target(tool, count)
                for kind in ("fresh", "no-op") if tool.knows_what_is_done else ("fresh",):
                    times[kind][tool.name].append(timed_client(tool.run, target))
                self._drop(target)
        return times

    def linear(self, counts: Sequence[int]) -> list[str]:
        """Measure what a file costs as their number grows, fresh and with nothing to do."""
        lines = ["the engine, cost of a file"]
        for count in counts:
            found = self._measured(self.tools[:1], count)
            row: dict[str, float] = {}
            for kind, times in found.items():
                wall, cpu = min(times["runbook"])
                row |= {kind: wall, f"{kind}, client": cpu}
            self.result[f"linear, {count} files"] = row
            lines.append(
                f"  {count:>6} files"
                + "".join(
                    f"   {kind} {row[kind]:8.3f} s = {row[kind] / count * 1000:7.3f} ms a file "
                    f"(client {row[f'{kind}, client'] / count * 1000:.3f})"
                    for kind in found
                )
            )
        return lines

    def playbook(self, times: int) -> list[str]:
        """Measure playbooks/migrate.yml with nothing pending, and each of its tasks."""
        place = inventory.write(self._folder / "inventory", self._cluster, "bench_playbook")
        _ansible("setup", place, self._folder)
        walls: list[float] = []
        tasks: dict[str, list[float]] = {}
        for _ in range(times):
            log = self._folder / "ansible.log"
            log.unlink(missing_ok=True)
            walls.append(timed(lambda where: _ansible("migrate", where, self._folder), place))
            for name, seconds in task_seconds(log.read_text(encoding="utf-8")):
                tasks.setdefault(name, []).append(seconds)
        wall = statistics.median(walls)
        costs = {name: statistics.median(found) for name, found in tasks.items()}
        self.result["migrate.yml, nothing pending"] = {"seconds": wall, "tasks": costs}
        return [
            f"playbooks/migrate.yml, nothing pending: {wall:.2f} s, allowed {_PLAYBOOK_SECONDS:.0f} s",
            *(f"  {name:<76} {seconds:6.2f} s" for name, seconds in costs.items()),
            f"  {'start and end of ansible-playbook':<76} {wall - sum(costs.values()):6.2f} s",
        ]

    def databases(self, count: int) -> list[str]:
        """Measure many databases with nothing pending: one call of the module, and a loop over dbmate."""
        dbmate = next((tool for tool in self.tools if tool.name == "dbmate"), None)
        seconds: dict[str, float] = {}
        for tool in [self.tools[0], *([dbmate] if dbmate else [])]:
            target = self._target(tool, 10)
            tool.run(target)
            names = [f"{target.database}_{number}" for number in range(count)]
            with psycopg.connect(self._cluster.conninfo("postgres"), autocommit=True) as server:
                for name in names:
                    server.execute(
                        sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                            sql.Identifier(name), sql.Identifier(target.database)
                        )
                    )
            begin = time.perf_counter()
            if tool is dbmate:
                for name in names:
                    tool.run(Target(self._cluster, name, target.folder))
            else:
                postgres = Target(self._cluster, "postgres", target.folder)
                run_ours(postgres, databases=[f"{target.database}_*"], accept_copy=True)
            seconds[tool.name] = time.perf_counter() - begin
            with psycopg.connect(self._cluster.conninfo("postgres"), autocommit=True) as server:
                for name in names:
                    server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
            self._drop(target)
        self.result[f"{count} databases, no-op"] = seconds
        return table(f"{count} databases, nothing pending", [(*item, "") for item in seconds.items()], "runbook")

    def stall(self) -> list[str]:
        """Measure the longest stall of a reader while an ALTER waits behind a transaction of five seconds."""
        target = self._target(self.tools[0], 1)
        run_ours(target)
        (target.folder / "00002_alter.sql").write_text("ALTER TABLE t1 ADD COLUMN more int;\n")
        stalls: list[float] = []
        over = threading.Event()

        def read() -> None:
            with psycopg.connect(self._cluster.conninfo(target.database), autocommit=True) as session:
                while not over.is_set():
                    stalls.append(timed(lambda one: one.execute("SELECT count(*) FROM t1"), session))
                    time.sleep(0.01)

        def block() -> None:
            with psycopg.connect(self._cluster.conninfo(target.database)) as session:
                session.execute("SELECT count(*) FROM t1")
                time.sleep(5)

        blocker, reader = threading.Thread(target=block), threading.Thread(target=read)
        blocker.start()
        time.sleep(0.3)
        reader.start()
        landed = timed(lambda place: run_ours(place, lock_attempts=50), target)
        over.set()
        blocker.join()
        reader.join()
        self._drop(target)
        worst, allowed = max(stalls) * 1000, _LOCK_TIMEOUT * 1000 + _ALLOWANCE_MS
        self.result["stall"] = {"longest_ms": round(worst), "allowed_ms": allowed, "landed_after_s": round(landed, 2)}
        return [
            "a reader beside an ALTER that waits behind a transaction of 5 s",
            f"  longest stall {worst:.0f} ms, allowed {allowed:.0f} ms; the ALTER landed after {landed:.1f} s",
        ]


def _ansible(playbook: str, place: Path, folder: Path) -> None:
    """Run a playbook with Ansible's own output, which goes to a log with the time of each line."""
    done = subprocess.run(
        [str(VENV / "bin/ansible-playbook"), f"playbooks/{playbook}.yml", "-i", str(place)],
        cwd=ROOT,
        env=environment()
        | {"ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.default", "ANSIBLE_LOG_PATH": str(folder / "ansible.log")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ToolError(
            f"playbooks/{playbook}.yml ended {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-2000:]}"
        )


_LOGGED = re.compile(r"^(\S+ \S+) p=\d+ .*?\| (?:TASK \[(.*)\]|(PLAY RECAP)) \**$", re.MULTILINE)


def task_seconds(log: str) -> list[tuple[str, float]]:
    """Return the tasks of a run and what each took, from the beginning of one to that of the next."""
    found = [
        (datetime.strptime(at, "%Y-%m-%d %H:%M:%S,%f").replace(tzinfo=UTC), name)
        for at, name, _ in _LOGGED.findall(log)
    ]
    return [(name, (after - at).total_seconds()) for (at, name), (after, _) in itertools.pairwise(found)]


def timed_client(call: Callable[[Any], object], argument: Any) -> tuple[float, float]:
    """Return the seconds that a call takes, and those that the processes which it ran have used the processor for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = timed(call, argument)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def timed(call: Callable[[Any], object], argument: Any) -> float:
    """Return the seconds that a call takes."""
    begin = time.perf_counter()
    call(argument)
    return time.perf_counter() - begin


def show(lines: Sequence[str]) -> None:
    """Print what was measured, as soon as it was."""
    print("\n".join(lines), end="\n\n", flush=True)


def median(values: Sequence[float]) -> float | None:
    """Return the median, or None of nothing."""
    return statistics.median(values) if values else None


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="./runbook bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--files", default="10,200,1000", help="how many files, with commas between (default %(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=3, help="how often each is measured (default %(default)s)")
    parser.add_argument(
        "--databases", type=int, default=1000, help="how many databases; 0 for none (default %(default)s)"
    )
    parser.add_argument(
        "--linear",
        default="",
        help="also what a file costs with so many files, with commas between, as 10,100,1000,10000",
    )
    parser.add_argument(
        "--playbook", type=int, default=3, help="how often migrate.yml is run; 0 for never (default %(default)s)"
    )
    parser.add_argument("--tools", default="", help="only these beside the engine, with commas between")
    parser.add_argument("--json", type=Path, default=CACHE / "result.json", help="where to write (default %(default)s)")
    options = parser.parse_args(arguments)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="settler-bench-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        cluster = Cluster(folder / "cluster")
        try:
            cluster.up()
            wanted = {tool.strip() for tool in options.tools.split(",")}
            tools = [tool for tool in TOOLS if tool is TOOLS[0] or tool.name in wanted or not options.tools]
            bench = Bench(cluster, folder, options.repeat, tools)
            for count in filter(None, options.files.split(",")):
                show(bench.files(int(count)))
            if options.linear:
                show(bench.linear([int(count) for count in options.linear.split(",")]))
            if options.playbook:
                show(bench.playbook(options.playbook))
            if options.databases:
                show(bench.databases(options.databases))
            show(bench.stall())
        finally:
            cluster.down()
    for tool, reason in bench.result["left_out"].items():
        console.note(f"not measured: {tool}: {reason}")
    options.json.write_text(json.dumps(bench.result, indent=2) + "\n", encoding="utf-8")
    console.good(f"written to {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
