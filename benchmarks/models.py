"""Speed and memory of the families beside timm's nearest models, alternated in one process.

    python benchmarks/models.py                       (about 15 minutes on 2 cores)
    python benchmarks/models.py --pairs reswin --batch-sizes 8 --rounds 5 --parts inference

For each pair: inference and one training step (AdamW, float32) at each batch size. Forms of ours:

    plain   the definition run layer by layer: attention, residual logits, norms each as operations of their own
    ours    the model as it is built
    fused   the same after fuse()

`ratio` is our median over the peer's, below 1 is faster; `fuse_gain` is plain over fused, and where it is below
1.2, `reason` says how much of the plain time are products and convolutions, which no fusion removes. Ratios
are of the clock; those by CPU seconds (of all threads) are less touched by other work on the machine. Memory is
what one run adds to that of a process which holds the model. Runs for some
pairs or parts are merged with those stored. Results: benchmarks/results/models.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from leanvit.files import write_json
from leanvit.models import _cells, _pooling_attention, fuse, remvit, reswin, revit
from leanvit.progress import note
from measure import SEED, facts, in_fresh_process, merged, run_with_peak

RESULTS = Path(__file__).parent / "results" / "models.json"
# name: (ours, peer, input side)
PAIRS = {
    "revit": ("revit_base_patch16_224", "vit_base_patch16_224", 224),
    "remvit": ("remvitv2_tiny", "mvitv2_tiny", 224),
    "reswin": ("reswin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224", 224),
    "exmobilevit": ("exmobilevit_928", "mobilevit_s", 256),
    "vitae": ("vitaev2_small", "swin_tiny_patch4_window7_224", 224),
}
FUSE_GAIN = 1.2
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "baddbmm_", "mkldnn_convolution", "_slow_conv2d_forward",
            "mkldnn_linear", "_mkldnn_linear", "_scaled_dot_product_flash_attention_for_cpu")  # fmt: skip


def build(name: str, *, fused_attention: bool = True) -> torch.nn.Module:
    """A model with random weights, attention fused or written out."""
    timm.layers.set_fused_attn(fused_attention)
    torch.manual_seed(SEED)
    model = timm.create_model(name)
    timm.layers.set_fused_attn(True)
    return model


def inference(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    """One forward pass in eval mode."""
    model.eval()

    def run() -> Any:
        with torch.inference_mode():
            return model(x)

    return run


def training(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    """One step of AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()

    return run


def mix_plainly(q: Tensor, k: Tensor, previous: Tensor | None, alpha: Any, scale: float) -> Tensor:
    """alpha q k^T scale + (1 - alpha) previous, one operation after the other."""
    own = (q * scale) @ k.transpose(-2, -1)
    return own if previous is None else alpha * own + (1.0 - alpha) * previous


def plain_attention(
    self: revit.ResidualAttention, x: Tensor, previous: Tensor | None, alpha: Any, need_logits: bool = False
) -> tuple[Tensor, Tensor]:
    """ReViT's attention as the paper writes it."""
    batch, tokens, _ = x.shape
    qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    carried = mix_plainly(q, k, previous, alpha, self.scale)
    return self.proj((carried.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)), carried


def plain_windows(
    self: reswin.WindowAttention,
    x: Tensor,
    mask: Tensor | None,
    previous: Tensor | None,
    known: Tensor | None,
    alpha: Any,
) -> tuple[Tensor, Tensor]:
    """ReSwin's attention as the paper writes it, on tokens in window order as the model keeps them."""
    batch, tokens, dim = x.shape
    qkv = self.qkv(x).reshape(batch, tokens // self.area, self.area, 3, self.num_heads, self.head_dim)
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
    bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
    logits = mix_plainly(q, k, None, 1.0, self.scale) + bias
    if previous is not None:
        previous = previous if known is None else torch.where(known, previous, logits)
        logits = alpha * logits + (1.0 - alpha) * previous
    masked = logits if mask is None else logits + mask
    out = masked.softmax(dim=-1) @ v
    return self.proj(out.transpose(2, 3).reshape(batch, tokens, dim)), logits


def plain_position(
    self: remvit.PoolingAttention, logits: Tensor, q: Tensor, q_grid: tuple[int, int], k_grid: tuple[int, int]
) -> Tensor:
    """ReMViTv2's relative positions, added out of place."""
    by_row = q.reshape(-1, self.num_heads, *q_grid, self.head_dim)
    rows = self._table(self.rel_pos_h, self.index_h, q_grid[0], k_grid[0])
    columns = self._table(self.rel_pos_w, self.index_w, q_grid[1], k_grid[1])
    vertical = torch.einsum("bhyxc,ykc->bhyxk", by_row, rows)
    horizontal = torch.einsum("bhyxc,xkc->bhyxk", by_row, columns)
    pairs = logits.view(-1, self.num_heads, *q_grid, *k_grid)
    return (pairs + vertical.unsqueeze(-1) + horizontal.unsqueeze(-2)).view(logits.shape)


def plain(name: str, x: Tensor) -> Callable[[], Any]:
    """Inference of the definition: nothing folded, cut in pieces, mixed in place or run as one fused kernel."""
    run = inference(build(name, fused_attention=False), x)

    def run_plainly() -> Any:
        with ExitStack() as stack:
            for target, attribute, replacement in (
                (_cells, "is_eager_inference", lambda: False),
                (revit.ResidualAttention, "forward", plain_attention),
                (reswin.WindowAttention, "forward", plain_windows),
                (_pooling_attention, "residual_logits", mix_plainly),
                (remvit.PoolingAttention, "_add_position", plain_position),
            ):
                stack.enter_context(mock.patch.object(target, attribute, replacement))
            return run()

    return run_plainly


def product_share(run: Callable[[], Any]) -> float:
    """Share of the operators' time that goes to matrix products and convolutions."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    times = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in profiler.key_averages()}
    return sum(times.get(key, 0.0) for key in PRODUCTS) / sum(times.values())


def alternate(runs: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each run by the clock and of all its threads, taken in turns after one warm-up."""
    for run in runs.values():
        run()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - started, time.process_time() - cpu_started))
    clock, cpu = ({name: statistics.median(t[i] for t in times[name]) for name in runs} for i in (0, 1))
    return clock, cpu


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Ratios of one kind of time."""
    return {
        "ratio": seconds["ours"] / seconds["peer"],
        "ratio_fused": seconds["ours_fused"] / seconds["peer"],
        "ratio_to_unfused_attention": seconds["ours_fused"] / seconds["peer_unfused_attention"],
        "fuse_gain": seconds["plain"] / seconds["ours_fused"],
    }


def added_megabytes(name: str, side: int, batch: int, form: str) -> float:
    """Memory that one run adds; form: "inference", "fused" or "training". In a process of its own."""
    model = build(name)
    model = fuse(model) if form == "fused" else model
    run = (training if form == "training" else inference)(model, torch.randn(batch, 3, side, side))
    return run_with_peak(run)[1]


def compare_inference(pair: str, batch: int, rounds: int) -> dict[str, Any]:
    """Times of one forward pass in every form, and what fuse() gains."""
    ours, peer, side = PAIRS[pair]
    x = torch.randn(batch, 3, side, side)
    runs = {
        "plain": plain(ours, x),
        "ours": inference(build(ours), x),
        "ours_fused": inference(fuse(build(ours)), x),
        "peer": inference(build(peer), x),
        "peer_unfused_attention": inference(build(peer, fused_attention=False), x),
    }
    difference = float((runs["plain"]() - runs["ours_fused"]()).abs().max())
    seconds, cpu_seconds = alternate(runs, rounds)
    share, found = product_share(runs["plain"]), ratios(seconds)
    reason = (
        f"{share:.0%} of the plain time are matrix products and convolutions, which no fusion touches: were all "
        f"the rest free, the gain would be {1 / share:.2f}"
    )
    return {
        "inference_rounds": rounds,
        "inference_seconds": seconds,
        "inference_cpu_seconds": cpu_seconds,
        **found,
        "by_cpu_seconds": ratios(cpu_seconds),
        "reason": reason if found["fuse_gain"] < FUSE_GAIN else None,
        "plain_difference": difference,
        "plain_product_share": share,
        "inference_facts": facts(),
    }


def compare_training(pair: str, batch: int, rounds: int) -> dict[str, Any]:
    """Times of one training step."""
    ours, peer, side = PAIRS[pair]
    x = torch.randn(batch, 3, side, side)
    runs = {"ours": training(build(ours), x), "peer": training(build(peer), x)}
    steps, cpu = alternate(runs, max(3, rounds // 3))
    return {
        "training_seconds": steps,
        "training_cpu_seconds": cpu,
        "training_ratio": steps["ours"] / steps["peer"],
        "training_ratio_by_cpu_seconds": cpu["ours"] / cpu["peer"],
        "training_facts": facts(),
    }


def compare_memory(pair: str, batch: int, rounds: int) -> dict[str, Any]:
    """Memory of one run of every form; once, as it hardly varies."""
    ours, peer, side = PAIRS[pair]
    found = {
        label: {form: in_fresh_process(added_megabytes, name, side, batch, form) for form in forms}
        for label, name, forms in (
            ("ours", ours, ("inference", "fused", "training")),
            ("peer", peer, ("inference", "training")),
        )
    }
    return {"added_megabytes": found, "memory_facts": facts()}


PARTS = {"inference": compare_inference, "training": compare_training, "memory": compare_memory}


def main() -> None:
    """Compare every pair and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    for pair in options.pairs:
        ours, peer, side = PAIRS[pair]
        for batch in options.batch_sizes:
            for part in options.parts:
                torch.manual_seed(SEED)
                row = {"ours": ours, "peer": peer, "batch_size": batch, "side": side}
                row |= PARTS[part](pair, batch, options.rounds)
                write_json(options.output, {"results": merged(options.output, [row], ("ours", "batch_size"))})
                numbers = {key: value for key, value in row.items() if not key.endswith("facts")}
                note(f"{pair} {part}: {numbers}")


if __name__ == "__main__":
    main()
