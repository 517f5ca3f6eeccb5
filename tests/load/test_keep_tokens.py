"""--keep-tokens from the command line: every verb that takes a network obeys it, and files remember it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leanvit import load
from leanvit.config import LoadOptions, MPTQConfig
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import load_split
from leanvit.errors import ConfigError
from leanvit.export.onnx.simulation import executed_form
from leanvit.models._token_merging import MergingBlocks
from leanvit.quant import quantize
from leanvit.quant.store import load_quantized
from leanvit.runtime.engines import available
from leanvit.runtime.predictor import Predictor
from sessions import exact_runtimes

DIGITS = ("--data", "digits", "--model", "vit_micro", "--img-size", 28, "--epochs", 1, "--images-per-class", 20)


def counts(network: Any) -> list[int]:
    assert isinstance(network.blocks, MergingBlocks)
    return [block.count for block in network.blocks]


def test_a_trained_network_is_loaded_as_it_was_trained(tmp_path: Path, leanvit: Callable[..., Any]) -> None:
    done = leanvit("train", *DIGITS, "--keep-tokens", 0.6, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    network, info = load(tmp_path / "run")
    assert info.kwargs["keep_tokens"] == 0.6
    assert sum(counts(network)) == 20
    with pytest.raises(ConfigError, match="merges tokens already"):
        load(tmp_path / "run", LoadOptions(keep_tokens=0.5))
    assert leanvit("val", tmp_path / "run", "--data", "digits", "--limit", 20).code == 0


@pytest.mark.slow
def test_the_file_computes_what_is_simulated(tmp_path: Path, leanvit: Callable[..., Any]) -> None:
    """The same choices are made in both runtimes: images agree, not only those that the gate looks at."""
    assert leanvit("train", *DIGITS, "--output", tmp_path / "run").code == 0
    quantized, bundle = tmp_path / "quantized", tmp_path / "bundle"
    done = leanvit("quantize", tmp_path / "run", "--data", "digits", "--keep-tokens", 0.6, "--output", quantized)
    assert done.code == 0, done.err
    assert leanvit("export", quantized, "--output", bundle, "--min-speedup", 0).code == 0
    assert "20 of 49 tokens are merged in block" in done.err
    model, info = load_quantized(quantized)
    assert sum(model.config.keep_tokens) == 20
    pixels = np.concatenate([x.numpy() for x, _ in Loader(load_split("digits", "val"), info.preprocess, 64)])
    with torch.no_grad():
        own = executed_form(model.graph, "w8a8")(to_input(torch.from_numpy(pixels), info.preprocess)).numpy()
    for runtime in exact_runtimes(available()):
        found = Predictor(bundle, runtime=runtime).logits(pixels)
        assert (found.argmax(1) == own.argmax(1)).mean() >= 0.995, runtime
        assert 10 * np.log10((own**2).sum() / ((found - own) ** 2).sum()) >= 35, runtime


def test_products_that_choose_tokens_are_no_sites_and_are_named() -> None:
    network, _ = load("vit_micro.fmnist", LoadOptions(keep_tokens=0.6))
    found = quantize(network, torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(0)), MPTQConfig())
    assert len(found.plan) == 38
    assert found.report["unquantized"] == ["aten.matmul.default that only chooses tokens at blocks.2"]


def test_what_cannot_merge_is_refused_by_the_verbs(tmp_path: Path, leanvit: Callable[..., Any]) -> None:
    for verb in ("quantize", "export", "optimize"):
        done = leanvit(verb, "swin_micro.fmnist", "--data", "digits", "--keep-tokens", 0.5, "--output", tmp_path / verb)
        assert done.code == 2, verb
        assert "SwinTransformer can't merge tokens" in done.err
        assert not (tmp_path / verb).exists()
    done = leanvit("train", *DIGITS, "--task", "semantic", "--keep-tokens", 0.5, "--output", tmp_path / "run")
    assert done.code == 2
    assert "keep_tokens" in done.err
    assert leanvit("quantize", "vit_micro.fmnist", "--data", "digits", "--keep-tokens", 0).code == 2
