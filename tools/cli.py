"""The commands of ./runbook."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tools import bootstrap, child, console, demo, quality
from tools.binaries import ensure_binaries
from tools.cluster import SECRETS_FILE, demo_cluster, demo_secrets
from tools.project import ROOT, ToolError, environment, libpq_variables, remove

if TYPE_CHECKING:
    from collections.abc import Callable

_HELP = """\
Settler's database runbook, run from one place.

  ./runbook demo              a legacy database in a private PostgreSQL: back up, migrate, verify
  ./runbook demo-down         stop that PostgreSQL and remove all of it
  ./runbook psql [ARG…]       look into it (database settler unless named)

  ./runbook test              all there is: linters, pytest, Molecule
  ./runbook test ARG…         only pytest, with these arguments
  ./runbook lint              the linters         ./runbook format   repair what they can repair
  ./runbook setup             make .venv and nothing else
  ./runbook cluster up|down|status                the demo's PostgreSQL alone
  ./runbook bench [ARG…]      compare the engine with its peers (--help tells how)
  ./runbook generate [ARG…]   fill a database with rows that hurt, in any shape (--help tells how)
  ./runbook bench-backup [ARG…]  compare backup and rollback with pg_dump and psql
  ./runbook expect            write sql/verify/expected.yml from sql/migrations
  ./runbook readmes           write the variables of the roles into their READMEs
  ./runbook lock [ARG…]       compile requirements.lock from pyproject.toml (--upgrade for newer versions)

Needs Python 3.11 or newer. PG_BIN names PostgreSQL's programs if they are in no usual place.
"""


def main(arguments: list[str]) -> int:
    """Run one command and return the exit status."""
    console.prepare()
    child.stop_on_sigterm()
    os.chdir(ROOT)
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0
    if name not in _COMMANDS:
        console.error(f"there is no command {name!r}; ./runbook --help names them all")
        return 2
    try:
        return _COMMANDS[name](rest)
    except KeyboardInterrupt:
        console.error("interrupted")
        return 130
    except (ToolError, OSError) as error:
        console.error(str(error))
        return 1


def _demo(arguments: list[str]) -> int:
    _refuse(arguments)
    return demo.run()


def _demo_down(arguments: list[str]) -> int:
    _refuse(arguments)
    existed = demo_cluster().down()
    remove(SECRETS_FILE)
    console.good("the private cluster is stopped and removed" if existed else "there is no private cluster")
    return 0


def _psql(arguments: list[str]) -> int:
    state = demo_cluster().state
    env = environment() | {
        "PGHOST": state.host,
        "PGPORT": str(state.port),
        "PGUSER": state.user,
        "PGPASSWORD": state.password,
        "PGDATABASE": demo.DATABASE,
    }
    os.execve(f"{state.bin}/psql", ["psql", *arguments], env)  # noqa: S606 - psql takes our place, terminal and all


def _setup(arguments: list[str]) -> int:
    _refuse(arguments)
    watch = console.Stopwatch()
    console.good(".venv is made" if bootstrap.ensure() else ".venv is up to date", watch.seconds)
    return 0


def _cluster(arguments: list[str]) -> int:
    actions: dict[str, Callable[[list[str]], int]] = {"up": _cluster_up, "down": _demo_down, "status": _cluster_status}
    if len(arguments) != 1 or arguments[0] not in actions:
        raise ToolError("usage: ./runbook cluster up|down|status")
    return actions[arguments[0]]([])


def _cluster_up(_: list[str]) -> int:
    watch = console.Stopwatch()
    state = demo_cluster().up()
    demo_secrets()
    console.good(f"PostgreSQL {state.major} on {state.host}:{state.port}", watch.seconds)
    return 0


def _cluster_status(_: list[str]) -> int:
    cluster = demo_cluster()
    if not cluster.is_running():
        console.bad("the private cluster is not running")
        return 1
    state = cluster.state
    console.good(f"PostgreSQL {state.major} on {state.host}:{state.port}, socket in {state.socket}")
    console.note(f"data {state.data}, log {cluster.log_file}")
    return 0


def _lint(arguments: list[str]) -> int:
    _refuse(arguments)
    bootstrap.ensure()
    return quality.lint().status


def _format(arguments: list[str]) -> int:
    _refuse(arguments)
    bootstrap.ensure()
    return quality.format_code()


def _test(arguments: list[str]) -> int:
    bootstrap.ensure()
    ensure_binaries()
    return quality.pytest(arguments).status if arguments else quality.test_everything()


def _expect(arguments: list[str]) -> int:
    bootstrap.ensure()
    ensure_binaries()
    return quality.tool("expect", arguments)


def _bench(arguments: list[str]) -> int:
    bootstrap.ensure()
    ensure_binaries()
    return quality.tool("bench", arguments)


def _generate(arguments: list[str]) -> int:
    bootstrap.ensure()
    return quality.tool("generate", arguments, libpq_variables())


def _bench_backup(arguments: list[str]) -> int:
    bootstrap.ensure()
    ensure_binaries()
    return quality.tool("bench_backup", arguments)


def _readmes(arguments: list[str]) -> int:
    bootstrap.ensure()
    return quality.tool("readmes", arguments)


def _lock(arguments: list[str]) -> int:
    bootstrap.ensure()
    return bootstrap.compile_lock(arguments)


def _refuse(arguments: list[str]) -> None:
    if arguments:
        raise ToolError(f"unexpected argument {arguments[0]!r}; see ./runbook --help")


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": _demo,
    "demo-down": _demo_down,
    "psql": _psql,
    "setup": _setup,
    "cluster": _cluster,
    "lint": _lint,
    "format": _format,
    "test": _test,
    "bench": _bench,
    "bench-backup": _bench_backup,
    "expect": _expect,
    "generate": _generate,
    "readmes": _readmes,
    "lock": _lock,
}
