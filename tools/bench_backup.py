"""Compares backup and rollback with the runbook's own commands: the same data, one run, whole processes; ratios count.

    ./runbook bench-backup [--size 1.3] [--major 18] [--repeat 3] [--json PATH]

Beside the seconds stand those of the processors, server included: they say the same on a machine that others use, too.
The base of the first table is ``pg_dump > file.sql``, that of the second ``dropdb; createdb; psql < file.sql``. What is
ours is the module as Ansible runs it, proof and flushing to the disk included; the runbook's commands flush nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from tools import child, console, majors
from tools.bench import CACHE, COLLECTIONS, show
from tools.bench import median as _median
from tools.cluster import Cluster
from tools.project import ToolError, environment

sys.path.insert(0, str(COLLECTIONS))
from ansible_collections.settler.runbook.plugins.module_utils._manifest import file_digests, sync

if TYPE_CHECKING:
    from collections.abc import Callable

_DATABASE = "bench"
_USERS_PER_GB = 660_000
_COMPRESSIONS = {18: ("none", "lz4", "zstd:1", "zstd:3", "gzip:1", "gzip:6"), 15: ("none", "gzip:1", "gzip:6")}
_LIMITS = {"ours, auto": 1.2, "ours, none": 0.8, "ours, restored": 0.7, "by snapshot, of a failed run": 0.1}

_TABLES = """
CREATE TABLE tenants (id uuid PRIMARY KEY, name text NOT NULL, plan text NOT NULL, created_at timestamptz NOT NULL);
CREATE TABLE users (id uuid PRIMARY KEY, tenant_id uuid NOT NULL, email text NOT NULL, password_hash text NOT NULL,
    name text, settings jsonb NOT NULL, last_login timestamptz, UNIQUE (tenant_id, email));
CREATE TABLE invoices (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant_id uuid NOT NULL, user_id uuid,
    number text NOT NULL, amount numeric(12, 2) NOT NULL, currency char(3) NOT NULL, status text NOT NULL,
    due date NOT NULL, lines jsonb NOT NULL);
CREATE TABLE events (id bigint PRIMARY KEY, tenant_id uuid NOT NULL, kind text NOT NULL, at timestamptz NOT NULL,
    payload jsonb NOT NULL, note text);
SELECT setseed(0.5), set_config('bench.users', '{users}', false);
INSERT INTO tenants SELECT md5('t' || n)::uuid, 'Tenant ' || n, (ARRAY['free', 'team', 'business'])[1 + n % 3],
    '2024-01-01'::timestamptz + n * interval '1 hour' FROM generate_series(0, 999) n;
INSERT INTO users SELECT md5('u' || n)::uuid, md5('t' || n % 1000)::uuid, 'user' || n || '@example.org',
    '$2b$12$' || md5(n::text) || md5((n * 7)::text), 'Given' || n % 977 || ' Family' || n % 3571,
    jsonb_build_object('theme', (ARRAY['dark', 'light'])[1 + n % 2], 'locale', (ARRAY['en', 'de'])[1 + n % 2],
        'n', n % 999),
    '2025-01-01'::timestamptz + (n::bigint * 37 % 31536000) * interval '1 second'
    FROM generate_series(1, current_setting('bench.users')::int) n;
INSERT INTO invoices (tenant_id, user_id, number, amount, currency, status, due, lines)
    SELECT md5('t' || n % 1000)::uuid, md5('u' || n % 1000 + 1)::uuid, 'INV-' || n, (random() * 10000)::numeric(12, 2),
    (ARRAY['EUR', 'USD', 'CHF'])[1 + n % 3], (ARRAY['open', 'paid', 'void', 'draft'])[1 + n % 4],
    date '2024-01-01' + n % 900, jsonb_build_array(
        jsonb_build_object('sku', 'SKU-' || n % 5000, 'quantity', n % 9, 'price', (random() * 100)::numeric(8, 2),
            'text', 'Position ' || n % 100 || ' of the delivery'),
        jsonb_build_object('sku', 'SKU-' || n % 333, 'quantity', 1, 'price', (random() * 50)::numeric(8, 2)))
    FROM generate_series(1, current_setting('bench.users')::int * 3 / 2) n;
INSERT INTO events SELECT n, md5('t' || n % 1000)::uuid,
    (ARRAY['login', 'invoice.paid', 'invoice.sent', 'export', 'settings.changed'])[1 + n % 5],
    '2025-01-01'::timestamptz + n * interval '3 seconds', jsonb_build_object('request', md5(random()::text),
        'ip', '10.' || n % 256 || '.' || n % 199 || '.' || n % 251,
        'agent', 'Mozilla/5.0 (X11; Linux x86_64) Chrome/' || 100 + n % 30, 'ms', (random() * 1000)::int),
    CASE WHEN n % 7 = 0 THEN repeat('The customer called about invoice ' || n || '. ', 1 + n % 4) END
    FROM generate_series(1, current_setting('bench.users')::int * 2) n;
CREATE INDEX ON users (email);
CREATE INDEX ON invoices (tenant_id, due);
CREATE INDEX ON events (tenant_id, at);
ALTER TABLE users ADD FOREIGN KEY (tenant_id) REFERENCES tenants;
ALTER TABLE invoices ADD FOREIGN KEY (tenant_id) REFERENCES tenants;
ALTER TABLE events ADD FOREIGN KEY (tenant_id) REFERENCES tenants;
"""


class Bench:
    """One run: a cluster with a database, a folder, and what was measured."""

    def __init__(self, cluster: Cluster, folder: Path, repeat: int) -> None:
        self._cluster, self._folder, self._repeat = cluster, folder, repeat
        self._runs = 0
        state = cluster.state
        self._client = {"client_bin": state.bin}
        self._env = environment() | {
            "PGHOST": state.host,
            "PGPORT": str(state.port),
            "PGUSER": state.user,
            "PGPASSWORD": state.password,
        }
        self.result: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "postgresql": state.major,
            "load_before": os.getloadavg()[0],
        }

    def fill(self, gigabytes: float) -> None:
        """Make the database."""
        self._sql(f"CREATE DATABASE {_DATABASE} TEMPLATE template0", "postgres")
        with self._session(_DATABASE) as session:
            session.execute(_TABLES.replace("{users}", str(int(gigabytes * _USERS_PER_GB))))
            session.execute("VACUUM ANALYZE")
            session.execute("CHECKPOINT")
            row = session.execute("SELECT pg_database_size(current_database())").fetchone()
        assert row
        self.result["database_bytes"] = row[0]

    def backups(self) -> list[str]:
        """Measure ways to back up, in turns; the size is what lies on the disk afterwards."""
        ours = {f"ours, {name}": (lambda name=name: self._ours(name)) for name in ("auto", "none")}
        dumps = {
            f"pg_dump -Fd -j2 {name}": (
                lambda name=name: self._pg_dump("-Fd", "-j2", f"--compress={self._level(name)}")
            )
            for name in _COMPRESSIONS[18 if self._cluster.state.major >= 16 else 15]
        }
        ways: dict[str, Callable[[], object]] = {
            "pg_dump > file.sql": self._pg_dump,
            **ours,
            **dumps,
            "raw copy of the data directory": self._raw_copy,
        }
        rows = self._measure(ways)
        self.result["backup"] = rows
        lines = _table("backup", rows, "pg_dump > file.sql")
        dump, ours = rows["pg_dump -Fd -j2 " + self.result["auto"]], rows["ours, auto"]
        cost = {what: round(ours[what] / dump[what] - 1, 3) for what in ("seconds", "processor")}
        self.result["proof_cost"] = cost
        told = f"{cost['seconds']:+.0%} (limit +25%), of the processors {cost['processor']:+.0%}"
        return [*lines, f"  the proof (fingerprints, catalogue, checksums, flushing) on top of the dump: {told}"]

    def restores(self) -> list[str]:
        """Measure ways back, in turns."""
        self._pg_dump(to="plain")
        backup = self._ours("auto", "for-restore")
        ways: dict[str, Callable[[], object]] = {
            "dropdb; createdb; psql < file.sql": self._by_psql,
            "ours, restored": lambda: self._restore(Path(backup["path"])),
            "by snapshot, of a failed run": self._by_snapshot,
            "by snapshot, every row compared": lambda: self._by_snapshot(of_run=False),
        }
        rows = self._measure(ways)
        rows["the swap alone"] = {"seconds": _median(self._swaps), "processor": 0.0, "bytes": None}
        self.result["restore"] = rows
        return _table("way back", rows, "dropdb; createdb; psql < file.sql")

    def checksums(self) -> list[str]:
        """Measure checksums and flushing of a dump alone."""
        self._pg_dump("-Fd", "-j2", f"--compress={self._level(self.result['auto'])}", to="sums")
        folder = self._folder / "sums"
        begin = time.perf_counter()
        for path in folder.iterdir():
            sync(path)
        flushed = time.perf_counter()
        file_digests(folder)
        self.result["flush_s"], self.result["sha256_s"] = (
            round(flushed - begin, 3),
            round(time.perf_counter() - flushed, 3),
        )
        shutil.rmtree(folder)
        return [
            f"  of it flushing {self.result['flush_s']:.2f} s, SHA-256 of all files {self.result['sha256_s']:.2f} s"
        ]

    def _measure(self, ways: dict[str, Callable[[], object]]) -> dict[str, dict[str, Any]]:
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        work: dict[str, list[float]] = {name: [] for name in ways}
        sizes: dict[str, int | None] = {}
        time.sleep(0.5)  # what has filled the database is over
        for _turn in range(self._repeat):
            for name, way in ways.items():
                before, begin = self._work(), time.perf_counter()
                made = way()
                seconds[name].append(round(time.perf_counter() - begin, 3))
                time.sleep(0.3)  # the server's processes end after their clients
                work[name].append(round(self._work() - before, 2))
                sizes[name] = _size(made) if isinstance(made, Path) else None
                if isinstance(made, Path):
                    shutil.rmtree(made) if made.is_dir() else made.unlink()
        return {
            name: {
                "seconds": _median(seconds[name]),
                "processor": _median(work[name]),
                "bytes": sizes[name],
                "all": seconds[name],
            }
            for name in ways
        }

    def _work(self) -> float:
        """Return the processor's seconds of all processes of ours and of the server that are over."""
        ours = resource.getrusage(resource.RUSAGE_CHILDREN)
        pid = (self._cluster.data / "postmaster.pid").read_text(encoding="ascii").split("\n", 1)[0]
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return ours.ru_utime + ours.ru_stime + (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")

    def _level(self, name: str) -> str:
        method, _colon, level = name.partition(":")
        return name if self._cluster.state.major >= 16 else ("0" if method == "none" else level)

    def _pg_dump(self, *options: str, to: str = "dump") -> Path:
        path = self._folder / to
        self._run("pg_dump", *options, f"--file={path}", _DATABASE)
        return path

    def _raw_copy(self) -> Path:
        path = self._folder / "raw"
        subprocess.run(["cp", "-r", self._cluster.data / "base", path], check=True)
        return path

    def _ours(self, compression: str, run: str = "") -> Any:
        self._runs += 1
        run = run or f"b{self._runs}"
        made = self._module(
            "backup",
            directory=str(self._folder / "backups"),
            run_id=run,
            compression=compression,
            keep=0,
            **self._client,
        )
        if compression == "auto":
            self.result["auto"] = made["compression"]
        return made if run == "for-restore" else Path(made["path"])

    def _restore(self, source: Path) -> None:
        self._roll_back(src=str(source))

    def _roll_back(self, **way: Any) -> float:
        """Go a way back, drop what stood in its place; return the seconds of the swap."""
        self._runs += 1
        run = f"x{self._runs}"
        made = self._module("restore", run_id=run, confirm=_DATABASE, accept_data_loss=True, **self._client, **way)
        self._sql(f"DROP DATABASE {made['failed_database']}", "postgres")
        return float(made["swap_s"])

    def _by_psql(self) -> None:
        self._sql(f"DROP DATABASE {_DATABASE}", "postgres")
        self._sql(f"CREATE DATABASE {_DATABASE} TEMPLATE template0", "postgres")
        self._run("psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", str(self._folder / "plain"), _DATABASE)

    _swaps: list[float] = []  # noqa: RUF012 - one run

    def _by_snapshot(self, *, of_run: bool = True) -> None:
        """Make a copy, change the database by a run, and swap the copy in: after a failed run, or at any later time."""
        self._runs += 1
        run = f"s{self._runs}"
        self._module("snapshot", run_id=run)
        folder = self._folder / "migrations"
        folder.mkdir(exist_ok=True)
        (folder / "001_change.sql").write_text("ALTER TABLE users ADD COLUMN nick text;\n", encoding="utf-8")
        self._module("migrate", run_id=run, directory=str(folder))
        swap = self._roll_back(method="snapshot", only_run=run if of_run else "")
        self._swaps += [swap] * of_run

    def _module(self, name: str, **options: Any) -> dict[str, Any]:
        state = self._cluster.state
        arguments = {
            "login_host": state.host,
            "login_port": state.port,
            "login_user": state.user,
            "login_password": state.password,
            "login_db": _DATABASE,
            **({} if name == "migrate" else {"environment": "bench"}),
            **options,
        }
        done = subprocess.run(
            [sys.executable, COLLECTIONS / f"ansible_collections/settler/runbook/plugins/modules/{name}.py"],
            input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
            env=environment() | {"PYTHONPATH": str(COLLECTIONS)},
            capture_output=True,
            text=True,
            check=False,
        )
        result: dict[str, Any] = json.loads(done.stdout or "{}")
        if done.returncode:
            raise ToolError(f"{name}: {result.get('msg', done.stderr[-2000:])}")
        return result

    def _run(self, program: str, *arguments: str) -> None:
        command = [f"{self._cluster.state.bin}/{program}", *arguments]
        done = subprocess.run(command, env=self._env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ToolError(f"{program} ended {done.returncode}: {done.stderr[-2000:]}")

    def _session(self, database: str) -> psycopg.Connection[Any]:
        return psycopg.connect(self._cluster.conninfo(database), autocommit=True)

    def _sql(self, statement: str, database: str) -> None:
        with self._session(database) as session:
            session.execute(statement)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def _table(title: str, rows: dict[str, dict[str, Any]], base: str) -> list[str]:
    """Return lines: name, seconds, megabytes, each with its ratio to the base, and the limit that it should keep."""
    lines, zero = [title], rows[base]
    for name, row in rows.items():
        line = f"  {name:<34} {row['seconds']:7.2f} s {row['seconds'] / zero['seconds']:5.2f} ×"
        line += f" {row['processor']:8.2f} s {row['processor'] / zero['processor']:5.2f} ×"
        if row["bytes"] is not None and zero["bytes"]:
            line += f" {row['bytes'] / 1e6:8.0f} MB {row['bytes'] / zero['bytes']:5.2f} ×"
        if name in _LIMITS:
            line += f"   (limit {_LIMITS[name]} ×)"
        lines.append(line)
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(prog="./runbook bench-backup", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=float, default=1.3, help="gigabytes of the database (default %(default)s)")
    parser.add_argument("--major", type=int, default=18, help="PostgreSQL's major version (default %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="how often each is measured (default %(default)s)")
    parser.add_argument("--only", choices=("backup", "restore"), help="measure only one of the two")
    parser.add_argument("--json", type=Path, default=CACHE / "backup.json", help="where to write (default %(default)s)")
    options = parser.parse_args(arguments)
    child.stop_on_sigterm()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="settler-bench-", dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o711)
        cluster = Cluster(folder / "cluster", binaries=majors.ensure(options.major))
        try:
            cluster.up()
            bench = Bench(cluster, folder, options.repeat)
            bench.fill(options.size)
            if options.only != "restore":
                show([*bench.backups(), *bench.checksums()])
            if options.only != "backup":
                show(bench.restores())
        finally:
            cluster.down()
    bench.result["load_after"] = os.getloadavg()[0]
    options.json.write_text(json.dumps(bench.result, indent=2) + "\n", encoding="utf-8")
    console.good(f"written to {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
