"""What could win, as rows of a table: each is tried where its kind of file is wanted and nothing speaks against it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from leanvit.config import Budget, MPTQConfig, Runtime
from leanvit.config.optimize import Aim

FLOAT = "float"
"""Name of the float file: tried first, what all others are compared with, and what is left where none is better."""

Row = dict[str, Any]
"""What is known of one tried setting, as JSON: a line of the journal."""

Rows = Mapping[str, Row]

MIXED_SHARE = 0.75
"""Of the bytes of 8-bit weights that a mixed plan may take: the middle between all in 4 and all in 8 bits."""


def always(rows: Rows, times: Mapping[str, float]) -> str:
    """Nothing speaks against trying it."""
    return ""


def _unless_holds(name: str) -> Callable[[Rows, Mapping[str, float]], str]:
    """Only where `name` does not hold the accuracy, or only with sites in float, and is no slower than float."""

    def reason(rows: Rows, times: Mapping[str, float]) -> str:
        row = rows.get(name, {})
        if row.get("state") == "made" and not row["lifted"]:
            return f"{name} holds the accuracy, and its kernels are the same"
        if name in times and FLOAT in times and times[name] > times[FLOAT]:
            return f"{name}, which computes alike, is slower than float here"
        return ""

    return reason


def _unless_slower_sites(rows: Rows, times: Mapping[str, float]) -> str:
    """Only where some products are slower in 8 bits than in float, and others are not."""
    row = rows.get("w8a8", {})
    if row.get("state") != "made":
        return "w8a8 does not hold the accuracy"
    slower = row["slower_sites"]
    if not row["integer_sites"]:
        return "products of this network were not timed one by one"
    if not slower:
        return "no product was found to be slower in 8 bits than in float"
    if len(slower) == row["integer_sites"]:
        return f"all of its {len(slower)} products are slower in 8 bits than in float here"
    return ""


def _where_faster(rows: Rows) -> MPTQConfig:
    return MPTQConfig(ignored_scope=tuple(rows["w8a8"]["slower_sites"]))


def _between(low: str, high: str) -> Callable[[Rows, Mapping[str, float]], str]:
    """Only where `low` failed or lost sites, and `high` holds."""

    def reason(rows: Rows, times: Mapping[str, float]) -> str:
        lower, upper = rows.get(low, {}), rows.get(high, {})
        if lower.get("state") == "made" and not lower["lifted"]:
            return f"{low} holds the accuracy with fewer bits"
        return "" if upper.get("state") == "made" else f"{high} does not hold the accuracy with more bits"

    return reason


def _unless_it_keeps_tokens(rows: Rows, times: Mapping[str, float]) -> str:
    """Only of a network that can merge tokens, whose plain 8 bits hold the accuracy."""
    if why := rows[FLOAT]["keeps_tokens"]:
        return str(why)
    return "" if rows.get("w8a8", {}).get("state") == "made" else "w8a8 does not hold the accuracy with all tokens"


def _scheme(**values: Any) -> Callable[[Rows], MPTQConfig]:
    return lambda rows: MPTQConfig(**values)


def _mixed(rows: Rows) -> MPTQConfig:
    size = rows["w8a8"]["weight_bytes"]
    return MPTQConfig(budget=Budget(model_bytes=int(MIXED_SHARE * size), levels=(8, 4)))


@dataclass(frozen=True)
class Setting:
    """One row: how a network is quantized and written.

    said: what it is, in words. profile: of the file. scheme: from what was tried before; None: the float network.
    for_aims: of --by. for_runtimes: where its file has something to gain. unless: why it is not tried, "" where it is;
    given what was tried before, and its milliseconds.
    """

    name: str
    said: str
    profile: str
    scheme: Callable[[Rows], MPTQConfig] | None = None
    for_aims: tuple[Aim, ...] = ("latency", "throughput", "size")
    for_runtimes: tuple[Runtime, ...] = ("onnxruntime", "openvino", "openvino-bf16")
    unless: Callable[[Rows, Mapping[str, float]], str] = always

    @property
    def depends(self) -> bool:
        """Whether it is tried only after others were timed."""
        return self.unless is not always


SETTINGS = (
    Setting(FLOAT, "float32", "fp32"),
    Setting("w8a8", "8 bits, MPTQ-ViT", "w8a8", _scheme()),
    Setting(
        "openvino", "8 bits in attention, too, for OpenVINO", "openvino", _scheme(),
        for_aims=("latency", "throughput"), for_runtimes=("openvino", "openvino-bf16"),
    ),
    Setting("w4a8", "weights of 4 bits", "w4a8", _scheme(weight_bits=4), for_aims=("size",)),
    Setting("w4a16", "weights of 4 bits, computed in float", "w4a16", _scheme(weight_bits=4), for_aims=("size",)),
    Setting(
        "w8a8-where-faster", "8 bits where this machine is faster in them", "w8a8", _where_faster,
        for_aims=("latency",), unless=_unless_slower_sites,
    ),
    Setting(
        "w8a8-merged", "8 bits, and 70% of the tokens, alike ones being merged", "w8a8", _scheme(keep_tokens=0.7),
        for_aims=("latency", "throughput"), unless=_unless_it_keeps_tokens,
    ),
    Setting(
        "w8a8-best", "8 bits with error reduction beyond the paper", "w8a8", _scheme(mode="best"),
        unless=_unless_holds("w8a8"),
    ),
    Setting(
        "w4a8-best", "weights of 4 bits with error reduction beyond the paper", "w4a8",
        _scheme(weight_bits=4, mode="best"), for_aims=("size",), unless=_unless_holds("w4a8"),
    ),
    Setting(
        "mixed", "weights of 4 and 8 bits by Greedy MP", "mixed", _mixed, for_aims=("size",),
        unless=_between("w4a8", "w8a8"),
    ),
)  # fmt: skip
"""By promise: what is most likely to win for least time stands first, and is tried first."""


def settings_for(aim: Aim, runtimes: Collection[Runtime]) -> list[Setting]:
    """The rows that could win by an aim in some runtimes, in the order in which they are tried."""
    return [row for row in SETTINGS if aim in row.for_aims and set(runtimes) & set(row.for_runtimes)]
