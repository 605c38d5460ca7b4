# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Progress of a module while it works: it appends lines to a file on its host, which is read beside it."""

from __future__ import annotations

import contextlib
import copy
import shlex
import threading
import typing as t
import uuid

from ansible.utils.display import Display

if t.TYPE_CHECKING:
    from ansible.plugins.action import ActionBase

_LOOK_SECONDS = 2.0
#: Lines that one look shows at most: a fleet may have many to tell.
_LINES = 200
#: How long the end of the task waits for a look that hangs.
_PATIENCE_SECONDS = 10.0


@contextlib.contextmanager
def progress_shown(action: ActionBase, prefix: str) -> t.Iterator[str]:
    """Yield the path of a file on the host; what is appended to it is shown until the end of the block.

    Args:
        action: the plugin whose module works; its connection and rights are used, in a channel of our own.
        prefix: put before each line.
    """
    reader = copy.copy(action)
    reader._connection = copy.copy(action._connection)
    if reader._connection.become:  # it keeps what its last command waits for
        reader._connection.become = copy.copy(reader._connection.become)
    folder = reader._connection._shell.get_option("system_tmpdirs")[0]
    path = f"{folder}/runbook-progress-{uuid.uuid4().hex}"
    ended = threading.Event()
    thread = threading.Thread(target=_follow, args=(reader, path, prefix, ended), name="progress", daemon=True)
    thread.start()
    try:
        yield path
    finally:
        ended.set()
        thread.join(_PATIENCE_SECONDS)


def _follow(reader: ActionBase, path: str, prefix: str, ended: threading.Event) -> None:
    """Show a file's new lines every few seconds, and remove it at the end. Progress is a comfort: it never fails."""
    shown = 0
    remove = f"; rm -f {shlex.quote(path)}"
    while True:
        last = ended.wait(_LOOK_SECONDS)
        look = f"tail -n +{shown + 1} {shlex.quote(path)} 2>/dev/null | head -n {_LINES}"
        try:
            answer = reader._low_level_execute_command(look + remove * last)
        except Exception as error:  # noqa: BLE001 - whatever a connection may raise
            Display().vvv(f"progress: {error}")
        else:
            if answer["rc"] == 0:
                lines = answer["stdout"].replace("\r\n", "\n").split("\n")[:-1]  # what follows is not whole yet
                shown += len(lines)
                for line in lines:
                    Display().display(f"    … {prefix}{line}")
        if last:
            return
