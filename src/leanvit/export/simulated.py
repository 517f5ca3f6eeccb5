"""Which profile runs a quantized network, and the network that it runs: what val measures is what a bundle computes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

from torch import nn

from leanvit.config import Profile
from leanvit.errors import ConfigError
from leanvit.export.onnx.simulation import LoweredProfile, executed_form
from leanvit.progress import note
from leanvit.quant import QuantizedModel
from leanvit.quant.graph import end_sites
from leanvit.quant.parts import QuantizedNetwork, models_of, own_sites
from leanvit.tasks.parts import with_parts

PROFILE_KEY = "profile"
"""Where the report of a quantized network says in which profile it was measured; None: in none."""


def profile_for(model: QuantizedModel | QuantizedNetwork, profile: Profile = "auto") -> LoweredProfile:
    """The profile that runs a quantized network: the given one; for "auto" the one that quantize measured, else what
    fits its bits. Raises ConfigError for fp32.
    """
    if profile == "fp32":
        raise ConfigError("profile fp32 does not fit a quantized model. Export the checkpoint itself.")
    if profile != "auto":
        return profile
    recorded = model.report.get(PROFILE_KEY)
    return cast(LoweredProfile, recorded) if recorded else _fitting_profile(models_of(model))


def _fitting_profile(parts: Mapping[str, QuantizedModel]) -> LoweredProfile:
    """By the bits of the linears: the fast profiles where activations have 8, else the plan as it is."""
    linear = {(part, name) for part, model in parts.items() for name in model.plan if _is_linear(model, name)}
    if any(parts[part].plan[name][1] < 8 for part, name in linear):
        return "exact"
    # The ends keep 8 bits by convention and say nothing about the plan.
    inner = linear - {(part, name) for part, model in parts.items() for name in end_sites(model.graph)}
    low = {parts[part].plan[name][0] <= 4 for part, name in inner}
    return "mixed" if len(low) > 1 else "w4a8" if low == {True} else "w8a8"


def _is_linear(model: QuantizedModel, site: str) -> bool:
    return model.graph.sites[site].kind == "linear"


def simulated(
    model: QuantizedModel | QuantizedNetwork, profile: Profile = "auto", lifted: Collection[str] = ()
) -> nn.Module:
    """The network that a profile runs, in torch: a copy with the quantizers that the profile's kernels have.

    (B, 3, H, W) float32 -> what the float network returns. profile: as in `profile_for`. lifted: sites that run in
    float all the same. A bundle's outputs are these, but for the rounding of float sums.
    Raises ConfigError where the profile can't run a quantizer.
    """
    chosen = profile_for(model, profile)
    forms: dict[str, nn.Module] = {
        name: executed_form(part.graph, chosen, own_sites(model, name, lifted))
        for name, part in models_of(model).items()
    }
    return with_parts(model.network, forms) if isinstance(model, QuantizedNetwork) else next(iter(forms.values()))


def say_other_profile(model: QuantizedModel | QuantizedNetwork, profile: LoweredProfile) -> None:
    """Note on standard error where a file has another profile than the one that quantize measured."""
    recorded = model.report.get(PROFILE_KEY)
    if recorded and recorded != profile:
        note(
            f"the quantized network was measured in profile {recorded}, this file has {profile}: another network. "
            f"Measure it: leanvit val QUANTIZED --profile {profile}"
        )


def measured_form(
    model: QuantizedModel | QuantizedNetwork, profile: Profile = "auto"
) -> tuple[nn.Module, LoweredProfile | None]:
    """What quantize measures: the network that export would write, and its profile.

    Where "auto" finds no profile that runs every quantizer, all of them are simulated, and that is said.
    Raises ConfigError where the given profile can't run a quantizer.
    """
    try:
        chosen = profile_for(model, profile)
        return simulated(model, chosen), chosen
    except ConfigError as error:
        if profile != "auto":
            raise
        note(f"measured with every quantizer, which no bundle runs: {error}")
        return model.module, None
