"""The choice among tried files: never slower than float, never below the accuracy, and the best of what is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from leanvit.config import OptimizeOptions
from leanvit.optimize.choose import LEAST_GAIN, advice, choose


def row(name: str, *, drop: float = 0.0, size: int = 100, state: str = "made", why: str = "") -> dict[str, Any]:
    return {"name": name, "state": state, "why": why, "drop": drop, "bytes": size, "lifted": []}


def random_rows(seed: int) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Rows and times as they come from hard networks: drops of all sizes, files that failed, times near each other."""
    rng = np.random.default_rng(seed)
    rows = {"float": row("float")}
    for i in range(rng.integers(1, 7)):
        state = "made" if rng.random() < 0.8 else "failed"
        rows[f"file{i}"] = row(f"file{i}", drop=float(rng.normal(0.5, 1)), size=int(rng.integers(20, 120)), state=state)
    runtimes = ["onnxruntime", "openvino"][: rng.integers(1, 3)]
    times = {name: {r: float(rng.uniform(5, 15)) for r in runtimes} for name in rows if rows[name]["state"] == "made"}
    return rows, times


@pytest.mark.parametrize("by", ["latency", "throughput", "size"])
def test_the_best_is_never_slower_than_float_and_never_drops_more(by: Any) -> None:
    for seed in range(200):
        rows, times = random_rows(seed)
        options = OptimizeOptions(by=by, max_drop=0.5)
        found = choose(rows, times, options)
        limit = min(times["float"].values())
        allowed = [n for n in times if rows[n]["drop"] <= 0.5 and min(times[n].values()) <= limit]
        assert found.name in allowed
        assert times[found.name][found.runtime] == min(times[found.name].values()) <= limit
        if by == "size":
            assert rows[found.name]["bytes"] == min(rows[name]["bytes"] for name in allowed)
        else:
            best = min(min(times[name].values()) for name in allowed)
            assert times[found.name][found.runtime] == (best if best * LEAST_GAIN <= limit else limit)
        assert set(found.lost) == set(rows) - {found.name}
        assert all(found.lost.values())


def test_a_file_that_is_hardly_faster_does_not_replace_float() -> None:
    rows = {"float": row("float"), "w8a8": row("w8a8")}
    assert choose(rows, {"float": {"r": 10.0}, "w8a8": {"r": 9.9}}, OptimizeOptions()).name == "float"
    assert choose(rows, {"float": {"r": 10.0}, "w8a8": {"r": 9.0}}, OptimizeOptions()).name == "w8a8"


def test_where_each_file_lost_is_said() -> None:
    rows = {
        "float": row("float"),
        "slow": row("slow"),
        "coarse": row("coarse", drop=2.0),
        "broken": row("broken", state="failed", why="check 'accuracy drop' failed"),
        "second": row("second"),
        "first": row("first"),
    }
    times = {"float": 10.0, "slow": 20.0, "coarse": 1.0, "second": 8.0, "first": 4.0}
    lost = choose(rows, {name: {"r": ms} for name, ms in times.items()}, OptimizeOptions(max_drop=0.5)).lost
    assert lost == {
        "float": "2.50 times the time of first",
        "slow": "slower than float: 2.00 times its time",
        "coarse": "drops 2.00 points, at most 0.5 wanted",
        "broken": "failed: check 'accuracy drop' failed",
        "second": "2.00 times the time of first",
    }


def test_what_to_try_next_follows_from_where_files_lost() -> None:
    rows = {
        "float": row("float"),
        "w8a8": row("w8a8"),
        "late": row("late", state="left out", why="60 s of 60 s were spent"),
        "coarse": row("coarse", state="failed", why="check 'accuracy drop' failed"),
    }
    options = OptimizeOptions(max_drop=0.5)
    choice = choose(rows, {"float": {"r": 10.0}, "w8a8": {"r": 20.0}}, options)
    told = advice(rows, choice, options, one_image=2.5, has_integers=False, more_runtimes=["openvino"])
    said = " ".join(told)
    for words in ("--minutes: late", "coarse lost too much", "no int8 dot product", "2.50 points", "--for any"):
        assert words in said
