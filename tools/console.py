"""What a person sees: headings, outcomes and elapsed times; colour only where it is wanted."""

from __future__ import annotations

import os
import sys
import time

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "cyan": "36"}


def prepare() -> None:
    """Print at once, also into a pipe, and never die of a terminal that lacks a character."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", line_buffering=True)


def coloured() -> bool:
    """Tell whether colours are welcome: on a terminal that knows them, and not against NO_COLOR."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def style(text: str, *names: str) -> str:
    """Return the text in the given styles, or as it is where colours are not welcome."""
    if not coloured():
        return text
    return f"\033[{';'.join(_STYLES[name] for name in names)}m{text}\033[0m"


def heading(text: str) -> None:
    """Open a section."""
    print(f"\n{style('▸ ' + text, 'bold', 'cyan')}")


def good(text: str, seconds: float | None = None) -> None:
    """Say that something holds."""
    print(f"  {style('✓', 'green')} {text}{_elapsed(seconds)}")


def bad(text: str, seconds: float | None = None) -> None:
    """Say that something does not hold."""
    print(f"  {style('✗', 'red')} {text}{_elapsed(seconds)}")


def note(text: str) -> None:
    """Say what is going on, for a reader who is waiting."""
    print(f"  {style('· ' + text, 'dim')}")


def error(text: str) -> None:
    """Say why the command ends here."""
    print(f"{style('error:', 'bold', 'red')} {text}", file=sys.stderr)


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {seconds % 60:.0f} s"


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Return the seconds until now."""
        return time.monotonic() - self._start


def _elapsed(seconds: float | None) -> str:
    return "" if seconds is None else "  " + style(duration(seconds), "dim")
