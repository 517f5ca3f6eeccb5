"""Progress of long work: a rich bar in a terminal, plain lines elsewhere, nothing on standard output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

Item = TypeVar("Item")

PLAIN_INTERVAL_SECONDS = 5.0


_silent = False
_displays: list[Any] = []
"""The rich display of the outermost bar: bars inside it add lines there, as two displays would overwrite each other."""


def silence() -> None:
    """Show nothing from now on: of processes that do the same work, one speaks."""
    global _silent
    _silent = True


def note(message: str) -> None:
    """One line to standard error."""
    if _silent:
        return
    print(message, file=sys.stderr, flush=True)


class Bar:
    """A progress bar with a description that may change, e.g. to the current loss."""

    def __init__(self, description: str, total: int | None) -> None:
        """Announce `total` steps of work called `description`; None where nobody has counted them."""
        self.description = description
        self.total = total
        self.done = self._before = 0
        self._printed: int | None = None
        self._detail = ""
        self._started = self._reported = time.monotonic()
        self._rich: Any = None
        self._task: Any = None
        self._outermost = False

    def __enter__(self) -> Self:
        """Show the bar where standard error is a terminal and rich is installed."""
        if sys.stderr.isatty() and not _silent:
            try:
                from rich.console import Console
                from rich.progress import (
                    BarColumn,
                    MofNCompleteColumn,
                    Progress,
                    TextColumn,
                    TimeRemainingColumn,
                )
            except ModuleNotFoundError:
                return self
            if not _displays:
                display = Progress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[detail]}"),
                    console=Console(stderr=True),
                )
                display.start()
                _displays.append(display)
                self._outermost = True
            self._rich = _displays[0]
            self._task = self._rich.add_task(self.description, total=self.total, detail="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the bar; the last plain line is written if any was, and that did not tell the end."""
        if self._outermost:
            _displays.pop().stop()
        elif self._rich is not None:
            self._rich.remove_task(self._task)
        elif self._printed is not None and kind is None and (self.total is None or self._printed < self.done):
            self._print()

    def go_on_from(self, steps: int) -> None:
        """Count steps that an earlier run has done, which say nothing of how fast this one is."""
        self._before += steps
        self.done += steps
        if self._rich is not None:
            self._rich.update(self._task, completed=self.done)

    def expect(self, total: int) -> None:
        """Say how many steps there are, where that is known only now."""
        self.total = total
        if self._rich is not None:
            self._rich.update(self._task, total=total)

    def advance(self, steps: int = 1, detail: str | None = None) -> None:
        """Count `steps` as done and show `detail` beside the bar."""
        self.done += steps
        self._detail = self._detail if detail is None else detail
        if self._rich is not None:
            self._rich.update(self._task, advance=steps, detail=self._detail)
        elif time.monotonic() - self._reported >= PLAIN_INTERVAL_SECONDS:
            self._reported = time.monotonic()
            self._print()

    def _print(self) -> None:
        self._printed = self.done
        elapsed = time.monotonic() - self._started
        detail = f"  {self._detail}" if self._detail else ""
        if self.total is None:
            note(f"{self.description} {self.done}, {elapsed:.0f} s{detail}")
            return
        own = self.done - self._before
        left = elapsed / own * (self.total - self.done) if own else 0.0
        remaining = f", {left:.0f} s left" if self.done < self.total else f", {elapsed:.0f} s"
        note(f"{self.description} {self.done}/{self.total}{remaining}{detail}")


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Iterate over `items` under a progress bar."""
    with Bar(description, total) as bar:
        for item in items:
            yield item
            bar.advance()


def print_json(values: Any) -> None:
    """Indented JSON on standard output."""
    print(json.dumps(values, indent=2))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on standard output: drawn by rich, or aligned plain text where it is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        for row in [columns, *rows]:
            print("  ".join(row))
        return

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    # A pipe has no width of its own, and a table cut at 80 columns loses its numbers.
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)
