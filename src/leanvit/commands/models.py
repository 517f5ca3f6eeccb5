"""leanvit models: the architectures that leanvit registers with timm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leanvit import errors
from leanvit.progress import print_json, print_table

if TYPE_CHECKING:
    from leanvit import config as configs


def run(config: configs.ModelsConfig) -> int:
    """List architectures: what is counted on them beside what their authors state."""
    from leanvit.models import list_models, model_names

    entries = list_models(config.filter)
    if not entries:
        raise errors.UnknownModelError(
            f"no model matches '{config.filter}'.{errors.did_you_mean(config.filter, model_names())} "
            "Run: leanvit models"
        )
    if config.json:
        print_json(entries)
        return errors.EXIT_OK

    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    rows = [
        [
            e["name"],
            "x".join(map(str, e["input_size"])),
            cell(e["params"] / 1e6, 3),
            cell(e["macs"], 3),
            cell(e["paper_params"] and e["paper_params"] / 1e6, 3),
            cell(e["paper_macs"], 3),
            cell(e["paper_top1"], 1),
        ]
        for e in entries
    ]
    columns = ["model", "input", "params (M)", "GMACs", "params (paper)", "GMACs (paper)", "ImageNet top-1 (paper)"]
    print_table("leanvit models: counted here, and stated by the authors; timm's own are usable as well", columns, rows)
    return errors.EXIT_OK
