"""What an image costs as it grows: multiply-adds and activations counted, latency where it is asked for.

Counting runs a copy on torch's meta device, where shapes are worked out and nothing is computed.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leanvit.errors import LeanvitError, ModelError
from leanvit.models import count_macs

Tick = Callable[[], None]


def cost_at(
    model: nn.Module, sides: Sequence[int], *, measure: bool = False, device: str | torch.device = "cpu",
    tick: Tick = lambda: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Cost of one square image at each of `sides` (pixels).

    measure: time the model on `device` too. tick: called after each side.
    Returns rows of {"side", "macs", "activation_bytes", "latency_ms", "latency_iqr_ms"}: multiply-adds; the most
    bytes of intermediate results alive at once in eager float32 inference (fused attention holds no N x N tensor,
    scratch inside kernels is not counted); median and interquartile range of the time, None unless measured. A
    side that the model can't take has "error" in place of numbers. Raises ModelError where it can take none.
    """
    rows = []
    for side in sides:
        try:
            row = _cost(model, side, torch.device(device) if measure else None)
        except ModelError as error:
            row = {"side": side, "error": str(error)}
        rows.append(row)
        tick()
    if rows and all("error" in row for row in rows):
        raise ModelError(rows[0]["error"])
    return rows


def _cost(model: nn.Module, side: int, device: torch.device | None) -> dict[str, Any]:
    counted = copy.deepcopy(model).to("meta")
    try:
        _resize(counted, side)
        macs = count_macs(counted, (side, side))
        live = _count_live(counted, side)
        latency = (None, None) if device is None else _time(model, side, device)
    except (AssertionError, RuntimeError, ValueError, TypeError, LeanvitError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"{type(model).__name__} can't take {side} x {side} pixels ({reason}). Give other --resolutions."
        ) from error
    return {
        "side": side,
        "macs": macs,
        "activation_bytes": live,
        "latency_ms": latency[0],
        "latency_iqr_ms": latency[1],
    }


def _resize(model: nn.Module, side: int) -> None:
    """Set another input size in a model of one, where it can be set; windows keep their size."""
    if not hasattr(model, "set_input_size"):
        return
    # timm's Swin would let its windows grow with the image, and tells the size they have here only.
    windows = getattr(model, "_ref_window_sizes", None)
    options = {} if windows is None else {"window_size": windows}
    cast(Any, model).set_input_size(img_size=(side, side), **options)


def _count_live(model: nn.Module, side: int) -> int:
    """Most bytes of intermediate results alive at once for one image; model: on the meta device."""
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    x = torch.empty(1, getattr(model, "in_chans", 3), side, side, device="meta")
    live = _Live({*known, x.untyped_storage()._cdata})
    with torch.inference_mode(), torch.device("meta"), live, _Fused():
        model.eval()(x)
    return live.peak


class _Fused(TorchFunctionMode):
    """scaled_dot_product_attention as one kernel: on the meta device it would form its weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        if func is F.scaled_dot_product_attention:
            return args[0].new_empty(*args[0].shape[:-1], args[2].shape[-1])
        return func(*args, **(kwargs or {}))


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the results of operations that are still held by someone."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = known
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        for result in tree_leaves(out):
            if isinstance(result, Tensor):
                self._add(result.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _time(model: nn.Module, side: int, device: torch.device) -> tuple[float, float]:
    """Median and interquartile range of one image, in milliseconds."""
    from torch.utils.benchmark import Timer

    timed = copy.deepcopy(model).to(device).eval()
    _resize(timed, side)
    x = torch.randn(1, getattr(model, "in_chans", 3), side, side, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        timer = Timer("model(x)", globals={"model": timed, "x": x}, num_threads=torch.get_num_threads())
        measured = timer.blocked_autorange(min_run_time=0.5)
    return 1e3 * measured.median, 1e3 * measured.iqr
