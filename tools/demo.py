"""The main job on real input, from nothing: a legacy database of the oldest shape is taken over and migrated."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools import bootstrap, child, console
from tools.cluster import demo_cluster, demo_secrets
from tools.project import LOCAL, VENV, VENV_PYTHON, environment, write_private

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.cluster import State

DATABASE = "settler"
_ROWS = 40_000
_SEED = 7
_STEPS = 6

# Everything in the private cluster that an earlier demo may have left under our names, the failed ones included.
_CLEAR = r"""
SELECT format('DROP DATABASE %I WITH (FORCE)', datname) FROM pg_database
WHERE datname = :'database' OR starts_with(datname, :'database' || '_') \gexec
CREATE DATABASE :"database" ENCODING 'UTF8' TEMPLATE template0;
"""


class StepError(Exception):
    """A child of the demo failed and has said why; only its exit status is left to pass on."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


def run() -> int:
    """Run the demo and return the exit status: that of the first step that fails."""
    whole = console.Stopwatch()
    try:
        _run_steps()
    except StepError as error:
        console.bad(f"the demo stops here: the command above ended with status {error.status}", whole.seconds)
        return error.status
    _show_next_steps(whole.seconds)
    return 0


def _run_steps() -> None:
    with _step(1, "Python environment"):
        made = bootstrap.ensure()
        console.good(f"{VENV.name} {'is made from' if made else 'agrees with'} {bootstrap.LOCK.name}")
    with _step(2, "Private PostgreSQL cluster"):
        state = demo_cluster().up()
        demo_secrets()
        console.good(f"PostgreSQL {state.major} on {state.host}:{state.port}; no other server is touched")
    with _step(3, f"A legacy database: the oldest shape, {_ROWS:,} rows"):
        _load_legacy(state)
    with _step(4, "Roles, ownership and grants (playbooks/create_database.yml)"):
        _playbook("create_database", "-e", f"create_database_adopt_from={state.user}")
    with _step(5, "Back up, migrate, verify (playbooks/migrate.yml)"):
        _playbook("migrate")
    with _step(6, "The same again: nothing to do"):
        _playbook("migrate")


@contextmanager
def _step(number: int, title: str) -> Iterator[None]:
    console.heading(f"{number}/{_STEPS}  {title}")
    watch = console.Stopwatch()
    yield
    console.note(console.duration(watch.seconds))


def _load_legacy(state: State) -> None:
    """Fill a new database. The password reaches the children in a file that only we can read."""
    address = f"host={state.host} port={state.port} user={state.user} connect_timeout=10"
    with tempfile.TemporaryDirectory(dir=LOCAL) as folder:
        passwords, clear = Path(folder, "pgpass"), Path(folder, "clear.sql")
        write_private(passwords, f"{state.host}:{state.port}:*:{state.user}:{state.password}\n")
        clear.write_text(_CLEAR, encoding="utf-8")
        env = environment() | {"PGPASSFILE": str(passwords)}
        psql = [f"{state.bin}/psql", "-X", "-q", "-w", "-v", "ON_ERROR_STOP=1", "-v", f"database={DATABASE}"]
        _run([*psql, "-d", f"{address} dbname=postgres", "-f", str(clear)], env=env)
        generate = [str(VENV_PYTHON), "-m", "tools.generate", "--dbname", f"{address} dbname={DATABASE}"]
        _run([*generate, "--shape", "oldest", "--rows", str(_ROWS), "--seed", str(_SEED)], env=env)


def _playbook(name: str, *options: str) -> None:
    command = [str(VENV / "bin" / "ansible-playbook"), f"playbooks/{name}.yml", "-i", "inventories/local", *options]
    _run(command)


def _run(command: list[str], **options: Any) -> None:
    if status := child.run(command, **options):
        raise StepError(status)


def _show_next_steps(seconds: float) -> None:
    print(f"\n{console.style(f'Done in {console.duration(seconds)}.', 'bold', 'green')} What to look at next:\n")
    playbook = ".venv/bin/ansible-playbook playbooks"
    for purpose, command in (
        ("its state", f"{playbook}/status.yml"),
        ("prove it again", f"{playbook}/verify.yml"),
        ("the way back", f"{playbook}/rollback.yml -e rollback_confirm={DATABASE}"),
        ("look inside", "./runbook psql"),
        ("remove it all", "./runbook demo-down"),
    ):
        print(f"  {console.style(purpose.ljust(16), 'dim')}{command}")
