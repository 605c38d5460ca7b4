"""Molecule's container engine and PostgreSQL image, by hand."""

from __future__ import annotations

import argparse
import inspect
import sys

from tools import console, postgres_image
from tools.engine import OWN_HOST, ask, configured_host, engine, keep, stop, stop_cleanly_on_signals
from tools.project import ToolError


def up() -> None:
    """Have an engine and the image; an engine of ours stays up until `down`."""
    with engine() as found:
        if found.ours:
            keep()
        console.good(f"Docker {found.version} at {found.host}")
        image = postgres_image.ensure(found)
        console.good(str(image))
        console.note("for molecule by hand:")
        print(f"export DOCKER_HOST={found.host} MOLECULE_POSTGRES_IMAGE={image.name}")


def only_image() -> None:
    """Have the image; an engine that has to be started for it is stopped again."""
    with engine() as found:
        console.good(str(postgres_image.ensure(found)))


def down() -> None:
    """Stop our engine. Its images stay for the next time."""
    console.good("our engine is stopped" if stop() else "no engine of ours was running")


def status() -> None:
    """Say what answers, and start nothing."""
    for host, whose in ((configured_host(), "yours"), (OWN_HOST, "ours")):
        version, reason = ask(host)
        if version:
            console.good(f"Docker {version} at {host} ({whose})")
        else:
            console.bad(f"{host} ({whose}): {reason}")


_COMMANDS = {"up": up, "image": only_image, "down": down, "status": status}


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m tools.container", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in _COMMANDS.items():
        commands.add_parser(name, help=inspect.getdoc(run))
    arguments = parser.parse_args()
    console.prepare()
    stop_cleanly_on_signals()
    try:
        _COMMANDS[arguments.command]()
    except ToolError as failure:
        console.error(str(failure))
        return 1
    except KeyboardInterrupt:
        console.error("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
