"""What the modules load: a run with nothing to do must not pay for what it does not need."""

from __future__ import annotations

import subprocess
import sys

from tools.bench import COLLECTIONS
from tools.project import environment

_LOADED = """
import sys
import ansible_collections.settler.runbook.plugins.modules.migrate
print(*(name for name in sys.modules if name.startswith("pglast") or name.endswith(("._migrate", "._verify"))))
"""


def test_migrate_loads_neither_the_parser_nor_the_engine_before_something_is_pending():
    done = subprocess.run(
        [sys.executable, "-c", _LOADED],
        env=environment() | {"PYTHONPATH": str(COLLECTIONS)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []
