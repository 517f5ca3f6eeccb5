"""Which of the tried files is best, and where each other one lost. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from leanvit.config import OptimizeOptions
from leanvit.optimize.settings import FLOAT, Row, Rows

LEAST_GAIN = 1.03
"""By speed, the time of float over that of a file that takes its place. A judgement: even in turns a median moves by a
percent or two, and a file that is hardly faster has nothing to give for its rounding."""

Times = Mapping[str, Mapping[str, float]]
"""Milliseconds a batch by name of the setting and runtime."""


@dataclass(frozen=True)
class Choice:
    """The best file, the runtime in which it is, and why each other one is not: {name: words}."""

    name: str
    runtime: str
    lost: dict[str, str]


def fastest(times: Times) -> dict[str, float]:
    """Milliseconds of each file in its fastest runtime."""
    return {name: min(found.values()) for name, found in times.items() if found}


def holds(row: Row, options: OptimizeOptions) -> bool:
    """Whether a file was made and drops no more than it may."""
    return row["state"] == "made" and row["drop"] <= options.max_drop + 1e-9


def choose(rows: Rows, times: Times, options: OptimizeOptions) -> Choice:
    """The fastest or smallest file that holds the drop and is not slower than float; float where there is none."""
    best = fastest(times)
    limit = best[FLOAT]
    quick = [name for name, row in rows.items() if holds(row, options) and best[name] <= limit]
    if options.by == "size":
        winner = min(quick, key=lambda name: (rows[name]["bytes"], best[name]))
    else:
        winner = min(quick, key=lambda name: best[name])
        if best[winner] * LEAST_GAIN > limit:
            winner = FLOAT
    runtime = min(times[winner], key=lambda name: times[winner][name])
    lost = {name: _lost(name, row, winner, rows, best, options) for name, row in rows.items() if name != winner}
    return Choice(winner, runtime, lost)


def _lost(name: str, row: Row, winner: str, rows: Rows, best: Mapping[str, float], options: OptimizeOptions) -> str:
    """Why one file is not the best, in a few words."""
    if row["state"] != "made":
        return f"{row['state']}: {row['why']}"
    if not holds(row, options):
        return f"drops {row['drop']:.2f} points, at most {options.max_drop:g} wanted"
    if name != FLOAT and best[name] > best[FLOAT]:
        return f"slower than float: {best[name] / best[FLOAT]:.2f} times its time"
    if options.by == "size":
        return f"{row['bytes'] / rows[winner]['bytes']:.2f} times the size of {winner}"
    if winner == FLOAT and name != FLOAT:
        return f"no faster than float, which rounds nothing: {best[FLOAT] / best[name]:.2f} times its speed"
    return f"{best[name] / best[winner]:.2f} times the time of {winner}"


def advice(
    rows: Rows,
    choice: Choice,
    options: OptimizeOptions,
    *,
    one_image: float,
    has_integers: bool,
    more_runtimes: Collection[str],
) -> list[str]:
    """What to try next: sentences, the most useful first.

    one_image: points that one validation image is, 0 where images are not counted. has_integers: whether the processor
    multiplies int8 in one instruction. more_runtimes: installed ones that were not wanted.
    """
    found = []
    left = [name for name, row in rows.items() if row["state"] == "left out"]
    if left:
        found.append(f"Give more --minutes: {', '.join(left)} had no time and would be tried then.")
    dropped = [name for name, row in rows.items() if row["state"] == "failed" and "drop" in row["why"]]
    if dropped:
        found.append(
            f"{', '.join(dropped)} lost too much: allow more with --max-drop, calibrate on more images of the task "
            "(--calibration-images), or fine-tune the network, which makes it easier to quantize."
        )
    slow = [name for name, words in choice.lost.items() if words.startswith("slower than float")]
    if slow and not has_integers:
        found.append(
            f"This processor has no int8 dot product, which is why {', '.join(slow)} is slower than float: give the "
            "same command on the machine that will run the file."
        )
    if one_image > options.max_drop > 0:
        found.append(
            f"One validation image is {one_image:.2f} points, more than --max-drop {options.max_drop:g}: no image may "
            "be lost. More validation images would tell finer."
        )
    if more_runtimes:
        found.append(f"{', '.join(more_runtimes)} is installed, too: --for any times its files as well.")
    if options.by != "size" and choice.name != FLOAT:
        found.append("Where bytes count more than time: --by size tries weights of 4 bits, too.")
    return found


def summary(row: Row, float_row: Row, best: Mapping[str, float]) -> dict[str, Any]:
    """How a file stands against float: speed and size as ratios."""
    name = row["name"]
    return {"speed": best[FLOAT] / best[name], "size": row["bytes"] / float_row["bytes"]}
