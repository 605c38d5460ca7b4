"""The project is found from its root, from elsewhere with ANSIBLE_CONFIG, and as AWX sets paths."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import project

AWX = "/runner/requirements_collections:./collections:~/.ansible/collections:/usr/share/ansible/collections"


@pytest.mark.parametrize(
    ("folder", "variables"),
    [
        pytest.param(project.ROOT, {}, id="from the project's root"),
        pytest.param(Path("/tmp"), {"ANSIBLE_CONFIG": str(project.ROOT / "ansible.cfg")}, id="from elsewhere"),
        pytest.param(project.ROOT, {"ANSIBLE_COLLECTIONS_PATH": AWX}, id="as AWX sets the paths"),
    ],
)
def test_playbooks_find_collection_and_roles(folder: Path, variables: dict[str, str]) -> None:
    environment = {name: value for name, value in project.environment().items() if name != "ANSIBLE_CONFIG"}
    run = subprocess.run(
        [
            str(Path(sys.executable).with_name("ansible-playbook")),
            *("-i", str(project.ROOT / "inventories" / "prod")),
            "--syntax-check",
            *(str(path) for path in sorted(project.ROOT.glob("playbooks/*.yml"))),
        ],
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "WARNING" not in run.stderr
