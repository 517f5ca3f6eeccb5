"""leanvit optimize: a network and images in; the fastest or smallest proven file that holds the accuracy out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanvit import errors
from leanvit.commands.inputs import open_network
from leanvit.progress import print_table

if TYPE_CHECKING:
    from leanvit import config as configs


def run(config: configs.OptimizeConfig) -> int:
    """Optimize one network and say what came of it."""
    from leanvit.config import save_yaml
    from leanvit.optimize import api

    network, info = open_network(config.model, config.load_options())
    result = api.run(network, config.data, config.output, config.options(), info=info)
    save_yaml(config, Path(config.output) / "config.yaml")
    _print(config, result)
    return errors.EXIT_OK


def _print(config: configs.OptimizeConfig, result: dict[str, Any]) -> None:
    from leanvit.export.explained import lines

    columns = ["file", "what it is", metric_title(result), "drop", "MB", time_title(result), "speed", "result"]
    rows = [_cells(row, result) for row in result["files"]]
    print_table(f"{result['architecture']} on {result['data']}, {result['machine']['cpu']}", columns, rows)
    print(sentence(result))
    # Where float is best, the first other file says why: most want to know what keeps it from being faster.
    told = [row for row in result["files"] if row.get("explain")]
    for row in [row for row in told if row["name"] == result["best"]] or told[:1]:
        for line in lines(row["explain"]):
            print(f"- {row['name']}: {line}")
    for line in result["next"]:
        print(f"next: {line}")
    runtime = "" if result["runtime"] == "onnxruntime" else f" --runtime {result['runtime']}"
    print(f"next: leanvit predict {result['bundle']} IMAGE{runtime}    report: {Path(config.output) / 'report.html'}")


def metric_title(result: dict[str, Any]) -> str:
    """What the column of the metric is called."""
    return str(result["metric"]) + (", %" if result["points"] == 1 else "")


def time_title(result: dict[str, Any]) -> str:
    """What the column of the time is called."""
    return "ms an image" if result["batch_size"] == 1 else f"ms a batch of {result['batch_size']}"


def _cells(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    state = "best" if row["name"] == result["best"] else row["lost"]
    if row["state"] != "made":
        return [row["name"], row["said"], "", "", "", "", "", state]
    reference = next(file for file in result["files"] if file["name"] == "float")
    limit, own = (min(file["milliseconds"].values()) for file in (reference, row))
    places = 2 if result["points"] == 1 else 4
    lifted = f" ({len(row['lifted'])} sites in float)" if row["lifted"] else ""
    return [
        row["name"],
        row["said"] + lifted,
        f"{row['metric']:.{places}f}",
        f"{row['drop']:+.2f}",
        f"{row['bytes'] / 1e6:.2f}",
        f"{own:.2f}",
        f"{limit / own:.2f}",
        state,
    ]


def sentence(result: dict[str, Any]) -> str:
    """What came of it, in one sentence."""
    held = "points lost" if result["labelled"] else "points less agreement with the float network"
    counted = f" on {result['images']} validation images"
    found = f"{result['speed']:.2f} times as fast as float, {result['size']:.0%} of its size"
    if result["best"] == "float":
        found = "nothing that was tried is better than the float file"
    return (
        f"{result['bundle']}: {result['best']} in {result['runtime']}, {found}, {result['drop']:+.2f} {held}{counted}"
    )
