"""Which profile runs a quantized network, and the network that it runs: what val measures is what a bundle computes."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from leanvit.errors import ConfigError
from leanvit.export.onnx.profiles import AUTO, PROFILES, Profile, pick
from leanvit.export.onnx.simulation import executed_form
from leanvit.progress import note, track
from leanvit.quant import QuantizedModel
from leanvit.quant.graph import end_sites
from leanvit.quant.losses import divergence, outputs_from
from leanvit.quant.parts import QuantizedNetwork, models_of, own_sites
from leanvit.tasks.parts import part_inputs, parts_of, with_parts

PROFILE_KEY = "profile"
"""Where the report of a quantized network says in which profile it was measured; None: in none."""

PROFILE_LOSSES_KEY = "profile_losses"
"""Where the report of a quantized network keeps `profile_losses`."""

COMPARED_IMAGES = 16
COMPARED_PIXELS = COMPARED_IMAGES * 224 * 224
"""Calibration images on which profiles are compared, and pixels of all of them: each fast profile runs on them once.
Few, as only losses that are LOSES_MORE apart are of interest."""

LOSES_MORE = 2.0
"""Times the loss of another profile, from which it is worth a word."""


def profile_for(model: QuantizedModel | QuantizedNetwork, name: str = AUTO) -> Profile:
    """The profile that runs a quantized network: the named one; for "auto" the one that quantize measured, else what
    fits its bits. Raises ConfigError for one that is unknown or for float networks.
    """
    chosen = name if name != AUTO else model.report.get(PROFILE_KEY) or AUTO
    linears: dict[str, tuple[int, int]] = {}
    ends: set[str] = set()
    for part, quantized in models_of(model).items():
        ends |= {f"{part}.{site}" for site in end_sites(quantized.graph)}
        linears |= {f"{part}.{site}": bits for site, bits in quantized.plan.items() if _is_linear(quantized, site)}
    return pick(chosen, linears, ends)


def _is_linear(model: QuantizedModel, site: str) -> bool:
    return model.graph.sites[site].kind == "linear"


def simulated(
    model: QuantizedModel | QuantizedNetwork, profile: Profile | str = AUTO, lifted: Collection[str] = ()
) -> nn.Module:
    """The network that a profile runs, in torch: a copy with the quantizers that the profile's kernels have.

    (B, 3, H, W) float32 -> what the float network returns. profile: as in `profile_for`. lifted: sites that run in
    float all the same. A bundle's outputs are these, but for the rounding of float sums.
    Raises ConfigError where the profile can't run a quantizer.
    """
    chosen = profile if isinstance(profile, Profile) else profile_for(model, profile)
    forms: dict[str, nn.Module] = {
        name: executed_form(part.graph, chosen, own_sites(model, name, lifted))
        for name, part in models_of(model).items()
    }
    return with_parts(model.network, forms) if isinstance(model, QuantizedNetwork) else next(iter(forms.values()))


@torch.no_grad()
def profile_losses(
    model: QuantizedModel | QuantizedNetwork, network: nn.Module, x: Tensor, seed: int = 0
) -> dict[str, float]:
    """What the fast profiles that run every quantizer lose, on the first calibration images; by their names.

    network: float. x: (N, 3, H, W) float32. Divergence of outputs from the float ones: KL in nats for a classifier;
    of a network in parts, the sum over them. It sees what too few labels, or none, would not.
    """
    count = min(COMPARED_IMAGES, max(2, COMPARED_PIXELS // (x.shape[-2] * x.shape[-1])))
    inputs = part_inputs(network.eval(), x[:count], seed)
    truth = {name: outputs_from(part(inputs[name])) for name, part in parts_of(network).items()}
    models, found = models_of(model), dict[str, float]()
    fast = [row for row in PROFILES.values() if row.fast]
    for row in track(fast, "comparing profiles", len(fast)):
        try:
            forms = {name: executed_form(part.graph, row) for name, part in models.items()}
        except ConfigError:
            continue  # it can't run these bits, and export says so
        found[row.name] = sum(
            divergence(truth[name], outputs_from(form(inputs[name])), models[name].graph.measure)
            for name, form in forms.items()
        )
    return found


def say_what_it_loses(model: QuantizedModel | QuantizedNetwork, profile: Profile) -> None:
    """Note on standard error where another profile loses far less of this network than the one of its file."""
    losses = model.report.get(PROFILE_LOSSES_KEY) or {}
    if profile.name not in losses or not all(map(math.isfinite, losses.values())):
        return
    best = min(losses, key=lambda name: losses[name])
    if losses[profile.name] > LOSES_MORE * losses[best] > 0:
        advice = "" if not profile.passes else f" If it was quantized for another: --profile {profile.name} there, too."
        note(
            f"profile {profile.name} moves this network's outputs by {losses[profile.name]:.2g}, {best} by "
            f"{losses[best]:.2g} (divergence on calibration images): see that the accuracy holds, with --data, or "
            f"take --profile {best}.{advice}"
        )


def say_other_profile(model: QuantizedModel | QuantizedNetwork, profile: Profile) -> None:
    """Note on standard error where a file has another profile than the one that quantize measured."""
    recorded = model.report.get(PROFILE_KEY)
    if recorded and recorded != profile.name:
        note(
            f"the quantized network was measured in profile {recorded}, this file has {profile.name}: another network. "
            f"Measure it: leanvit val QUANTIZED --profile {profile.name}"
        )


def measured_form(model: QuantizedModel | QuantizedNetwork, profile: str = AUTO) -> tuple[nn.Module, str | None]:
    """What quantize measures: the network that export would write, and its profile's name.

    Where "auto" finds no profile that runs every quantizer, all of them are simulated, and that is said.
    Raises ConfigError where the given profile can't run a quantizer.
    """
    try:
        chosen = profile_for(model, profile)
        return simulated(model, chosen), chosen.name
    except ConfigError as error:
        if profile != AUTO:
            raise
        note(f"measured with every quantizer, which no bundle runs: {error}")
        return model.module, None
