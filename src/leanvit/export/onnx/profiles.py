"""Execution profiles: how a file computes, one row of data each. No torch.

A new profile is one row, from inside this package or from outside:

    from leanvit.export.onnx.profiles import Profile, register

    register(Profile("int8-attention", attention="integer", fast=True))

Then `leanvit.export(q, "out/", ExportOptions(profile="int8-attention"))` writes it. Simulation, lowering, gate and
manifest ask the row and know no profile by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from leanvit.config import MPTQConfig, Runtime
from leanvit.errors import ConfigError, did_you_mean

AUTO = "auto"
"""In place of a name: the profile that fits the network."""


@dataclass(frozen=True)
class Profile:
    """How sites are stored and run, for which runtime, and which networks it fits.

    name: as in --profile. runtime: the one that it is made for, where its file must pass and is timed.
    weights: as stored: "float32", and the profile is for float networks; "int8", with a scale per output channel;
    "int4", INT4 where the plan has 4 bits or fewer, else int8; "blocks", MatMulNBits with 4 or 8 bits.
    linears, convolutions, attention: kernels. On "float" ones the activation quantizers in front are left out.
    Convolutions "where faster" are those of leanvit.quant.convolution_outputs, which also write integers. Attention
    "around zero" is that of plain attention alone, on int8 without zero points, quantized before heads are moved.
    least_activation_bits: of the quantizers that are left. integer_only: each of them must have an integer kernel.
    fused_products: linears with their bias and products of a transposed operand as operations of com.microsoft.
    four_bit_types: quantized integers of 4 bits and fewer are read as INT4 and UINT4, which compilers look for; else
    an INT4 weight passes a Cast to INT8, which runtimes compute once at load.
    compact: biases, gains and scales of weights are float16 where that loses no more than its rounding, and attributes
    that say a default are left out.
    fast: it promises speed: the gate times it, and sites run in float where accuracy drops too far.
    simulated: written for a compiler; no speed on a CPU is claimed.
    passes: beyond the paper, that quantization for this profile runs even in mode paper (see `scheme_for`).
    """

    name: str
    runtime: Runtime = "onnxruntime"
    weights: Literal["float32", "int8", "int4", "blocks"] = "int4"
    linears: Literal["float", "integer"] = "integer"
    convolutions: Literal["float", "integer", "integer where faster"] = "integer where faster"
    attention: Literal["float", "integer", "integer around zero"] = "float"
    least_activation_bits: int = 2
    integer_only: bool = False
    fused_products: bool = True
    four_bit_types: bool = False
    compact: bool = True
    fast: bool = False
    simulated: bool = False
    passes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ConfigError for kernels that can't read weights which are stored so."""
        if self.weights in ("float32", "blocks") and self.linears != "float":
            raise ConfigError(
                f"profile {self.name} stores weights as {self.weights} and runs linears on {self.linears} kernels, "
                "expected linears='float': those kernels read float activations."
            )

    @property
    def for_float(self) -> bool:
        """Whether it is for networks that are not quantized."""
        return self.weights == "float32"

    @property
    def has_integer_kernels(self) -> bool:
        """Whether products run on int8, which saturates on CPUs without VNNI where a runtime can't be told not to."""
        return self.linears == "integer"

    @property
    def stores_int4(self) -> bool:
        """Whether weights of 4 bits and fewer take half a byte."""
        return self.weights in ("int4", "blocks")


PROFILES: dict[str, Profile] = {}
"""All rows by name; `register` adds one."""


def register(profile: Profile) -> Profile:
    """Add a row to the table. Raises ConfigError where the name is taken by another one."""
    if profile.name == AUTO or PROFILES.get(profile.name, profile) != profile:
        raise ConfigError(f"there is a profile '{profile.name}' already. Give the new one another name.")
    return PROFILES.setdefault(profile.name, profile)


FP32 = register(
    Profile(
        "fp32", weights="float32", linears="float", convolutions="float", fused_products=False, compact=False,
    )
)  # fmt: skip
W8A8 = register(Profile("w8a8", weights="int8", least_activation_bits=8, fast=True))
W4A8 = register(Profile("w4a8", least_activation_bits=8, fast=True))
# Integers around zero waste their range on keys and values that lie to one side of it, and one step for all channels
# of a head suits none where they differ: balance mends both, exactly in float.
OPENVINO = register(
    Profile(
        "openvino", runtime="openvino", attention="integer around zero", least_activation_bits=8, fast=True,
        passes=("balance",),
    )
)  # fmt: skip
MIXED = register(Profile("mixed", fast=True))
EXACT = register(Profile("exact", convolutions="integer", attention="integer", integer_only=True, compact=False))
W4A16 = register(Profile("w4a16", weights="blocks", linears="float", convolutions="float", fused_products=False))
ACCELERATOR = register(
    Profile(
        "accelerator", convolutions="integer", attention="integer", fused_products=False, four_bit_types=True,
        compact=False, simulated=True,
    )
)  # fmt: skip


def find(profile: Profile | str) -> Profile:
    """The row of a name; a row itself is returned as it is. Raises ConfigError for a name that has none."""
    if isinstance(profile, Profile):
        return profile
    if profile not in PROFILES:
        raise ConfigError(
            f"profile is '{profile}', expected one of {', '.join(PROFILES)}.{did_you_mean(profile, PROFILES)}"
        )
    return PROFILES[profile]


def scheme_for(scheme: MPTQConfig, name: str) -> MPTQConfig:
    """How a network is quantized that the profile of this name is to run: a scheme that names no pass beyond the paper
    gets the profile's own. "auto" leaves it as it is."""
    passes = () if name == AUTO else find(name).passes
    return scheme if scheme.active_passes else replace(scheme, passes=passes)


def require_known(name: str) -> None:
    """Raise ConfigError for a name that neither is "auto" nor has a row."""
    if name != AUTO:
        find(name)


def pick(name: str, linears: Mapping[str, tuple[int, int]] | None = None, ends: Collection[str] = ()) -> Profile:
    """The profile that writes a network: the row of `name`, or for "auto" the one that fits.

    linears: weight and activation bits of a quantized network's linears, None for a float network. ends: those that
    read the image or return the logits.
    Raises ConfigError where the profile is for the other kind of network, or unknown.
    """
    profile = find(name) if name != AUTO else FP32 if linears is None else fitting(linears, ends)
    if profile.for_float and linears is not None:
        raise ConfigError(
            f"profile {profile.name} does not fit a quantized network. Export the checkpoint itself, or choose one of "
            f"{', '.join(row.name for row in PROFILES.values() if not row.for_float)}."
        )
    if not profile.for_float and linears is None:
        raise ConfigError(
            f"profile {profile.name} does not fit a float network. Quantize it first: leanvit quantize CHECKPOINT"
        )
    return profile


def fitting(linears: Mapping[str, tuple[int, int]], ends: Collection[str] = ()) -> Profile:
    """What "auto" takes for a quantized network: a fast profile where activations have 8 bits, else the plan as it is.

    linears, ends: as in `pick`. The ends keep 8 bits by convention and say nothing about the plan's weights.
    """
    if any(activation_bits < W8A8.least_activation_bits for _, activation_bits in linears.values()):
        return EXACT
    low = {weight_bits <= 4 for name, (weight_bits, _) in linears.items() if name not in ends}
    return MIXED if len(low) > 1 else W4A8 if low == {True} else W8A8
