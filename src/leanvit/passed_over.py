"""What a command passes over: counted, named on standard error, and in its exit code. The one place for all verbs.

Readers call `left_out` where something of the user's takes no part: an image that can't be read, a format that isn't
read, an annotation that is broken. The command line gathers it (`gathering`) and ends with exit code 6, partly done,
where everything else worked. What is no image of the user's (companion files of a Mac, a link back to a folder that
was read already) is said by `note_once` and costs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from leanvit.errors import PartialError
from leanvit.progress import note

SHOWN = 3
"""Names in a line: enough to see what kind they are, and the line stays one."""


@dataclass
class Gathered:
    """What one command passed over.

    names: of all that was left out, each once, in order. said: lines of `note_once`.
    """

    names: dict[str, None] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)

    def require_none(self) -> None:
        """Raise PartialError with the number and the first names where something was left out."""
        if self.names:
            count = f"{len(self.names)} {'was' if len(self.names) == 1 else 'were'}"
            raise PartialError(f"partly done: {count} left out (see above): {few(tuple(self.names))}.")


_current: list[Gathered] = []


@contextlib.contextmanager
def gathering() -> Iterator[Gathered]:
    """Gather what is left out from here on; commands inside commands have their own."""
    _current.append(Gathered())
    try:
        yield _current[-1]
    finally:
        _current.pop()


def left_out(names: Sequence[str], what: str, *, said: bool = False) -> None:
    """Count things that take no part, and say so in one line: `what`, then the first names.

    names: of files or annotations. Each counts once in a command, however many parts or passes meet it. said: the
    caller has said it in words of its own.
    """
    known: dict[str, None] = _current[-1].names if _current else {}
    news = [name for name in dict.fromkeys(names) if name not in known]
    known.update(dict.fromkeys(news))
    if news and not said:
        note(f"left out: {len(news)} {what}: {few(news)}")


def names_left_out() -> tuple[str, ...]:
    """What was left out so far in the command."""
    return tuple(_current[-1].names) if _current else ()


def forget() -> None:
    """Let the exit code be that of a command that did all: for starters that run a command again on any other code."""
    if _current:
        _current[-1].names.clear()


def note_once(line: str) -> None:
    """Say a line to standard error, once in a command."""
    said = _current[-1].said if _current else set()
    if line not in said:
        said.add(line)
        note(line)


def few(names: Sequence[str]) -> str:
    """The first names and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
