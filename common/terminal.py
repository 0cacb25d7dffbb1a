"""How every FedRad program speaks: one JSON document on stdout, progress and one-line errors on stderr.

Exit codes: 0 done, 1 refused or failed with one clear line, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from common.errors import FedRadError

INTERRUPTED = 130
_SHOW_AFTER_S = 3.0
# click's own, or that of the click inside newer typers, which need no click beside them
_USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def run_program(app: typer.Typer) -> None:
    """Run a typer app; a FedRadError, or a file that the machine refuses, becomes one line and exit code 1.

    Ctrl-C becomes a line and 130. A defect shows where it was but no values: they may be a patient's, a key;
    characters that the terminal does not know are written as JSON does, \\u03b5.
    """
    app.pretty_exceptions_enable = False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)
    except FedRadError as error:
        print(f"error: {error.code}: {error}", file=sys.stderr)
        code = 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {type(error).__name__}: {error.filename}: {error.strerror}", file=sys.stderr)
        code = 1
    except _USAGE_ERROR as error:
        error.show()
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
    raise SystemExit(code if isinstance(code, int) else 0)


def answer(value: Any, *, as_json: bool, text: Callable[[], str]) -> None:
    """Print a command's result: one JSON document, or text for people."""
    print(json.dumps(value, indent=2, ensure_ascii=False) if as_json else text())


class Bars:
    """Progress on stderr: bars on a terminal, a line per tenth elsewhere; silent for the first 3 s."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}
        self._tenths: dict[str, int] = {}
        self._started = time.monotonic()

    def step(self, name: str, done: int, total: int) -> None:
        """Show that `done` of `total` of a named step is finished."""
        if self._progress is not None:
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=total)
            self._progress.update(self._tasks[name], completed=done, total=total)
            return
        tenth = 10 * done // max(1, total)
        if self._tenths.get(name) != tenth and time.monotonic() - self._started > _SHOW_AFTER_S:
            self._tenths[name] = tenth
            print(f"{name}: {done}/{total}", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)


@contextmanager
def bars() -> Iterator[Bars]:
    """Show progress while the block runs."""
    if not sys.stderr.isatty():
        yield Bars(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bars(progress)
