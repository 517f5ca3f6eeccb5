"""A pass from outside the package, in one file: `leanvit quantize ... --passes weight_tails:TAILS`.

It looks and changes nothing: how heavy the tails of every linear's weights are, for the report. The row is at the end.
"""

from __future__ import annotations

import torch

from leanvit.quant import Pass
from leanvit.quant.work import Work


@torch.no_grad()
def measure_tails(work: Work) -> None:
    """Note the kurtosis of every linear's weight, E[(w - mean)^4] / variance^2: 3 for a normal distribution."""
    tails = {}
    for name, site in work.graph.sites.items():
        if site.kind == "linear":
            weight = work.graph.module.get_parameter(site.weight).double()
            centred = weight - weight.mean()
            tails[name] = float((centred**4).mean() / (centred**2).mean() ** 2)
    work.notes["weight_tails"] = tails


TAILS = Pass("tails", "kurtosis of the weights of every linear, for the report", "an example", "prepare", measure_tails)
