"""Writes an inventory for a database that is made on the spot: for the reference database, and for tests."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from tools.cluster import Cluster


def write(folder: Path, cluster: Cluster, database: str, **variables: Any) -> Path:
    """Write an inventory of one deployment on a cluster of our own, readable for nobody else; return its folder.

    ``variables`` are further host variables; they win over the ones that are made here.
    """
    login = {"login_host": cluster.state.host, "login_port": cluster.port, "ssl_mode": "disable"}
    host = {
        "ansible_connection": "local",
        "ansible_python_interpreter": "{{ ansible_playbook_python }}",
        "runbook_environment": "test",
        "runbook_database": database,
        "runbook_connection": {
            **login,
            "login_user": "{{ runbook_migrator_role }}",
            "login_password": "{{ runbook_migrator_password }}",
        },
        "runbook_admin_connection": {
            **login,
            "login_user": cluster.state.user,
            "login_password": cluster.state.password,
        },
        "runbook_migrator_password": f"migrator of {database}",
        "runbook_app_password": f"application of {database}",
        "runbook_backup_directory": str(folder / "backups"),
        "runbook_report_directory": str(folder / "reports"),
        "runbook_client_bin": cluster.state.bin,
        **variables,
    }
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "hosts.json"
    path.touch(mode=0o600)
    path.write_text(
        json.dumps({"settler_database": {"hosts": {"test-" + re.sub(r"\W+", "-", database): host}}}), encoding="utf-8"
    )
    return path
