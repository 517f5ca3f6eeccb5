"""Tensors of a file as those of a network: wrappers, prefixes, precision, older layouts and other sizes."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leanvit.errors import CheckpointError

Grid = tuple[int, int]

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
PLAIN = ("state_dict", "model_state_dict", "model_state", "model", "teacher", "student", "weights", "net")
"""Where training programs keep the weights: those of timm, Lightning, DeiT, MAE, DINO (of which the teacher is what is
used), torchvision's references and the papers of leanvit.models; averaged ones first."""

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.", "network.")
"""What wrappers put before every name: DataParallel, torch.compile, Lightning modules, and attributes of one's own."""

COMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask", "num_batches_tracked")
"""Last parts of the names of tensors that a network computes or counts by itself."""


def weights_in(checkpoint: Mapping[str, Any], *, ema: bool) -> tuple[dict[str, Tensor], str]:
    """The tensors of a training checkpoint and the key that they stood under ('' where they are all that there is).

    ema: take the averaged ones where there are any. Raises CheckpointError where there are none.
    """
    for key in (*(AVERAGED if ema else ()), *PLAIN):
        inner = checkpoint.get(key)
        if isinstance(inner, Mapping) and inner:
            # An average is often kept as a module's state, once more under a key of its own.
            deeper = next((inner[k] for k in (*PLAIN, "module") if isinstance(inner.get(k), Mapping)), inner)
            tensors = {str(name): value for name, value in deeper.items() if isinstance(value, Tensor)}
            if tensors:
                return tensors, key
    tensors = {str(name): value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"no weights in the checkpoint; its keys are {', '.join(map(str, list(checkpoint)[:5]))}. "
            f"Expected tensors, or one of {', '.join((*PLAIN[:4], *AVERAGED[:2]))}."
        )
    return tensors, ""


def without_prefixes(tensors: Mapping[str, Tensor], names: set[str] | None = None) -> dict[str, Tensor]:
    """Tensors by the names that they have without wrappers.

    names: of the network's own tensors. A prefix that all names have is taken off while none of them is the
    network's; where only some have it (a criterion beside the network), those are kept and the rest is left out.
    """
    found = dict(tensors)
    for _ in range(4):  # module._orig_mod.model.net. is as deep as wrappers are nested in practice
        known = len(names & found.keys()) if names else 0
        if names and known >= len(names) // 2:
            break
        prefix = next((p for p in PREFIXES if _is_wrapped(found, p, names)), None)
        if prefix is None:
            break
        found = {name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)}
    return found


def _is_wrapped(tensors: Mapping[str, Tensor], prefix: str, names: set[str] | None) -> bool:
    under = [name for name in tensors if name.startswith(prefix)]
    if names is None:
        return len(under) == len(tensors) and prefix in PREFIXES[:2]
    # A network may have a part of that name itself.
    return bool(under) and not any(name.startswith(prefix) for name in names)


def in_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with those of half or double precision in float32."""
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def fitted(tensors: Mapping[str, Tensor], network: nn.Module, source: nn.Module | None = None) -> dict[str, Tensor]:
    """Tensors for `network`: its own, and where only the input size differs, positions resampled to it.

    source: the same network at the size of the tensors, where that is known; else its grid is taken to be square.
    What does not fit is left as it is, for `load_weights` to name.
    """
    wanted = network.state_dict()
    found = {name: t for name, t in tensors.items() if name in wanted or name.rpartition(".")[2] not in COMPUTED}
    if not _fits(found, wanted):
        found = _as_timm_writes(found, network, wanted)
    for name, own in wanted.items():
        given = found.get(name)
        if name.rpartition(".")[2] in COMPUTED and (given is None or given.shape != own.shape):
            found[name] = own
        elif given is not None and given.shape != own.shape:
            old = grid_of(source, name) if source is not None else _square_grid(name, given, own, network)
            resampled = resampled_positions(name, given, own, old, grid_of(network, name))
            found[name] = given if resampled is None else resampled
    return found


def _fits(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    same = {name for name, own in wanted.items() if name in tensors and tensors[name].shape == own.shape}
    lacking = {name for name in wanted if name not in same and name.rpartition(".")[2] not in COMPUTED}
    return not lacking and set(tensors) <= set(wanted)


def _as_timm_writes(tensors: dict[str, Tensor], network: nn.Module, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the layout of timm's network, by the architecture's own rule for older and foreign files.

    That rule would also resample kernels of another patch size, so it is not asked where they differ.
    """
    rule = getattr(sys.modules.get(type(network).__module__), "checkpoint_filter_fn", None)
    kernels = [n for n, own in wanted.items() if own.dim() == 4 and n in tensors and tensors[n].dim() == 4]
    if rule is None or any(
        tensors[name].shape[-2:] != wanted[name].shape[-2:] for name in kernels if "pos" not in name
    ):
        return tensors
    try:
        return dict(rule(dict(tensors), network))
    except (KeyError, RuntimeError, AttributeError, IndexError, ValueError, TypeError):
        return tensors  # of another architecture: what is missing is named by load_weights


def _square_grid(key: str, value: Tensor, wanted: Tensor, network: nn.Module) -> Grid | None:
    new = grid_of(network, key)
    if new is None:
        return None
    name = key.rpartition(".")[2]
    if name == "relative_position_bias_table":
        side = (math.isqrt(value.shape[0]) + 1) // 2
    elif value.dim() == 3:
        side = math.isqrt(value.shape[1] - (wanted.shape[1] - new[0] * new[1]))
    else:
        return None
    return (side, side)


def grid_of(network: nn.Module, key: str) -> Grid | None:
    """(rows, columns) of the patches or the window that a tensor of positions is for; None where no module says."""
    from timm.layers import to_2tuple

    owner = network.get_submodule(key.rpartition(".")[0])
    grid = getattr(owner, "window_size", None) or getattr(getattr(owner, "patch_embed", None), "grid_size", None)
    return to_2tuple(grid) if grid else None


def resampled_positions(key: str, value: Tensor, wanted: Tensor, old: Grid | None, new: Grid | None) -> Tensor | None:
    """Positions at another size, by name: embeddings (1, N, C) or (1, C, H, W), relative tables (offsets, C).

    Tables over both axes (Swin) go by timm's rule, those over one (MViTv2) by linear interpolation. None for anything
    else: another width or depth is no matter of size.
    """
    from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table

    name = key.rpartition(".")[2]
    if name == "pos_embed" and value.dim() == wanted.dim() == 3 and value.shape[-1] == wanted.shape[-1] and old and new:
        prefix = wanted.shape[1] - new[0] * new[1]
        if value.shape[1] != old[0] * old[1] + prefix:
            return None
        embedding: Tensor = resample_abs_pos_embed(value, list(new), list(old), num_prefix_tokens=prefix)
        return embedding if embedding.shape == wanted.shape else None
    if name == "pos_embed" and value.dim() == 4 and value.shape[:2] == wanted.shape[:2] and value.shape[0] == 1:
        return F.interpolate(value.float(), wanted.shape[-2:], mode="bicubic", align_corners=False)
    if value.dim() != 2 or wanted.dim() != 2 or value.shape[1] != wanted.shape[1]:
        return None
    if name == "relative_position_bias_table" and old and new:
        table: Tensor = resize_rel_pos_bias_table(value, new, tuple(wanted.shape), old)
        return table
    if name.startswith("rel_pos"):
        return F.interpolate(value.T[None].float(), wanted.shape[0], mode="linear", align_corners=False)[0].T
    return None


def on_meta(make: Any) -> nn.Module:
    """A network without storage: for its names and shapes only."""
    with torch.device("meta"):
        network: nn.Module = make()
    return network
