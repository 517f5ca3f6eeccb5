"""LEADERBOARD.md: each claim of this project with its figure, the peer in the same run, command, date and machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tables_common import day, machine_words, markdown, results
from tables_files import BATCH, MODELS, NEAR_DB, OURS, PEERS, fastest

RUNTIMES = ("ONNX Runtime", "OpenVINO")
COMMIT_LETTERS = 7


def leaderboard() -> str:
    """All claims, a line each."""
    header = ("claim", "figure", "peer in the same run", "command", "date", "commit", "machine")
    return markdown(header, [*_files(), *_tokens(), *_quantization(), *_service(), *_many(), *_browser()], len(header))


def _where(facts: dict[str, Any]) -> tuple[str, str, str]:
    commit = facts.get("commit") or ""
    return day(facts["date"]), commit[:COMMIT_LETTERS], machine_words(facts["machine"])


def _files() -> Iterator[tuple[str, ...]]:
    """The fastest file of each network by runtime."""
    for said, model in MODELS.values():
        for runtime in RUNTIMES:
            best, peer = fastest(model, OURS, NEAR_DB, runtime), fastest(model, PEERS, 0, runtime)
            if best is None or peer is None:
                continue
            yield (
                f"8 bits, {said}, batch {BATCH}, {runtime}",
                f"{best['ratio']:.2f} times float in ONNX Runtime, {best['sqnr_db']:.0f} dB ({best['name']})",
                f"{peer['ratio']:.2f} times, {peer['sqnr_db']:.0f} dB ({peer['name']})",
                f"`benchmarks/deploy.py --models {model}`",
                *_where(best["facts"]),
            )


def _tokens() -> Iterator[tuple[str, ...]]:
    """The fastest file with merged tokens against the same with all."""
    rows = [row for row in results("merge.json")["results"] if row["profile"] != "float" and row["keep"] == 0.6]
    best = max(rows, key=lambda row: row["ratio"])
    yield (
        f"60% of the tokens, {best['model']}, batch {best['batch_size']}",
        f"{best['ratio']:.2f} times the file with all tokens ({best['profile']}, {best['runtime']})", "",
        f"`benchmarks/merge.py --models {best['model']}`", *_where(best),
    )  # fmt: skip


def _quantization() -> Iterator[tuple[str, ...]]:
    """What quantization takes."""
    for row in results("ptq_cost.json")["results"]:
        if row.get("commit"):
            yield (
                f"time and memory of quantization: {row['case']}, {row['model']}, {row['images']} images",
                f"{row['seconds']:.0f} s, {row['peak_megabytes'] / 1024:.2f} GiB", "",
                f'`benchmarks/ptq_cost.py --cases "{row["case"]}"`', *_where(row),
            )  # fmt: skip


def _service() -> Iterator[tuple[str, ...]]:
    """Requests a second beside LitServe."""
    found = results("serve.json")
    ours, theirs = (found["median_requests_a_second"][who]["16"] for who in ("leanvit", "litserve"))
    yield (
        f"HTTP service, 16 clients ({found['bundle']})", f"{ours:.0f} requests a second",
        f"LitServe {theirs:.0f}", "`benchmarks/serve.py`", *_where(found["facts"]),
    )  # fmt: skip


def _many() -> Iterator[tuple[str, ...]]:
    """Prediction over two nodes."""
    row = next(row for row in results("ray_predict.json")["rows"] if row["case"] == "lose")
    killed = row["same_set_of_rows"] and row["distinct_rows"] == row["rows"]
    yield (
        "prediction on Ray, a node removed and the command killed",
        f"{row['rows']:,} rows, {'each once, those of one process' if killed else 'not those of one process'}", "",
        "`benchmarks/ray_predict.py --lose`", *_where(row),
    )  # fmt: skip


def _browser() -> Iterator[tuple[str, ...]]:
    """A bundle in Chromium."""
    found = results("web.json")
    yield (
        f"in the browser, {found['model']}",
        f"w8a8 {found['times'][0]['faster']} the speed of float there", "",
        "`benchmarks/web.py`", *_where(found["facts"]),
    )  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {"leaderboard": leaderboard}
