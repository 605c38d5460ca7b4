"""Progress over a connection: each whole line once, whatever the connection does to it; no run ever fails of it."""

from __future__ import annotations

import threading
from types import SimpleNamespace

from ansible.errors import AnsibleConnectionFailure
from ansible_collections.settler.runbook.plugins.plugin_utils import _progress


class Reader:
    """An action whose connection gives prepared answers, and ends the task with the last one."""

    def __init__(self, answers, ended):
        self.answers, self.ended, self.commands = list(answers), ended, []

    def _low_level_execute_command(self, command):
        self.commands.append(command)
        answer = self.answers.pop(0)
        if len(self.answers) == 1:
            self.ended.set()
        if isinstance(answer, Exception):
            raise answer
        return answer


def shown_of(answers, monkeypatch):
    """Return the lines that are shown, and the commands that are run."""
    ended, lines = threading.Event(), []
    reader = Reader(answers, ended)
    monkeypatch.setattr(_progress, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(_progress, "Display", lambda: SimpleNamespace(display=lines.append, vvv=lambda _line: None))
    _progress._follow(reader, "/var/tmp/p", "host: ", ended)
    return lines, reader.commands


def answer(text, rc=0):
    return {"rc": rc, "stdout": text}


def test_each_whole_line_is_shown_once_and_the_file_is_removed_at_the_end(monkeypatch):
    answers = [answer(""), answer("one\r\ntwo\r\nthr"), answer("", rc=1), answer("three — ü\n"), answer("four\n")]
    lines, commands = shown_of(answers, monkeypatch)
    assert lines == [f"    … host: {line}" for line in ("one", "two", "three — ü", "four")]
    assert [command.split()[2] for command in commands] == ["+1", "+1", "+3", "+3", "+4"]
    assert ["rm -f /var/tmp/p" in command for command in commands] == [False, False, False, False, True]


def test_connection_that_breaks_is_no_failure(monkeypatch):
    answers = [AnsibleConnectionFailure("gone"), answer("one\n"), AnsibleConnectionFailure("gone again")]
    assert shown_of(answers, monkeypatch)[0] == ["    … host: one"]
