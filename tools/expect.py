"""Writes sql/verify/expected.yml: the catalogue of a reference database that playbooks/setup.yml makes from sql/.

For each folder of sql/optional there is a file of its name beside it: the same database with that folder applied. The
files are committed, so that a change of the schema is read in review twice: as SQL and as what it comes to. A test
makes them anew and fails if they differ.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import psycopg
import yaml

from tools import inventory, project
from tools.cluster import Cluster
from tools.schema import OPTIONAL, build, files_of

sys.path.insert(0, str(project.ROOT / "collections"))
from ansible_collections.settler.runbook.plugins.module_utils._catalog import snapshot

FOLDER = project.ROOT / "sql" / "verify"
DATABASE = "settler_reference"
HEADER = """\
---
# What a Settler database must have. Written by ./runbook expect from a reference database; do not edit by hand.
# $owner, $migrator and $app stand for the roles of an environment; extensions are compared by minimum version.
"""


def expectations(cluster: Cluster, folder: Path) -> dict[Path, str]:
    """Return the files' texts, from a database that is set up on a cluster; the folder is for what the run leaves.

    Database and roles are left on the cluster, which is thrown away.
    """
    hosts = inventory.write(folder / "inventory", cluster, DATABASE, verify_expected="")
    run = subprocess.run(
        [str(Path(sys.executable).with_name("ansible-playbook")), "playbooks/setup.yml", "-i", str(hosts)],
        cwd=project.ROOT,
        env=project.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise project.ToolError(f"the reference database could not be made:\n{run.stdout}{run.stderr}")
    texts = {FOLDER / "expected.yml": _text(cluster, DATABASE)}
    for name in OPTIONAL:
        copy = f"{DATABASE}_{name}"
        with psycopg.connect(cluster.conninfo("postgres"), autocommit=True) as server:
            server.execute(f"CREATE DATABASE {copy} TEMPLATE {DATABASE} OWNER {DATABASE}_owner".encode())
        with psycopg.connect(cluster.conninfo(copy), autocommit=True) as connection:
            connection.execute(f"SET ROLE {DATABASE}_owner".encode())
            build(connection, [file for file in files_of(name) if file.folder])
        texts[FOLDER / f"{name}.yml"] = _text(cluster, copy)
    return texts


def _text(cluster: Cluster, database: str) -> str:
    names = {f"{DATABASE}_{role}": f"${role}" for role in ("owner", "migrator", "app")}
    with psycopg.connect(cluster.conninfo(database), autocommit=True) as connection:
        connection.execute("SET search_path = public")
        catalogue = snapshot(connection, exclude=["runbook", "partitions"], role_names=names)
    return HEADER + yaml.safe_dump(_by_name(catalogue), sort_keys=False, allow_unicode=True, width=118)


def _by_name(catalogue: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """Sort objects and all of their parts but columns by name, so that the file changes only where the schema does."""
    return {kind: {name: _parts(objects[name]) for name in sorted(objects)} for kind, objects in catalogue.items()}


def _parts(properties: object) -> object:
    if not isinstance(properties, dict):
        return properties
    return {
        key: dict(sorted(value.items())) if isinstance(value, dict) and key != "columns" else value
        for key, value in properties.items()
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or with ``--check`` compare them."""
    parser = argparse.ArgumentParser(prog="./runbook expect", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a committed file differs")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="settler-expect-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        cluster = Cluster(folder / "cluster", fsync=False)
        try:
            cluster.up()
            texts = expectations(cluster, folder)
        finally:
            cluster.down()
    if options.check:
        return int(any(text != path.read_text(encoding="utf-8") for path, text in texts.items()))
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
