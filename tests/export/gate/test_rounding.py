"""What the gate asks of a quantized network: less where rounding alone moves the answers, and no less than that."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from leanvit.config import MPTQConfig
from leanvit.export.gate.calibration import hint_of_difference
from leanvit.export.gate.given import Given
from leanvit.export.gate.limits import LOW_BIT_SQNR_DB, QUANTIZED_SQNR_DB
from leanvit.export.gate.outputs import check_golden_labels
from leanvit.export.gate.rounding import in_double, least_sqnr_db
from leanvit.quant import quantize
from leanvit.quant.quantizers import UniformQuantizer
from leanvit.runtime import engines
from leanvit.runtime.bundle import sqnr_db
from leanvit.runtime.golden_objects import LEAST_SHARE, MATCHED_SHARE, SHARE_MARGIN, golden_records, least_share


class Casting(nn.Module):
    """Asks for float32 by name, as softmax in half precision does, and makes a tensor without naming a dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.position = nn.Linear(1, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mean(2) + self.position(torch.linspace(-1, 1, 8)[:, None]).mean(0)
        return self.head(x.to(torch.float32).softmax(-1, dtype=torch.float32))


def own_db(network: nn.Module, x: Tensor) -> float:
    """SQNR of a network's answers to those of its copy in float64."""
    return sqnr_db(in_double(network, lambda copied: ask(copied, x)), ask(network, x))


def ask(network: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return network(x.to(next(iter(network.buffers())).dtype)).float().numpy()


def test_a_copy_in_double_computes_in_double() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    module = quantize(Casting(), x, MPTQConfig()).module
    with torch.no_grad():
        assert in_double(module, lambda copied: copied(x.double())).dtype == torch.float64
    assert module(x).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    assert own_db(module, x) > 60


class Ties(nn.Module):
    """Two codes far apart; every value lies between them, where the last bit decides."""

    def __init__(self, bits: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.quantizer = UniformQuantizer(bits)
        self.quantizer.set_parameters(torch.tensor(scale), torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.full_like(x, 0.5) if x.dtype == torch.float32 else torch.full_like(x, 0.5) * (1 + 1e-9)
        return self.quantizer(halves) + 10 * torch.sign(x)


def test_rounding_that_moves_the_answers_is_not_asked_of_a_runtime() -> None:
    x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    network = Ties()
    # In float32 0.5 rounds to 0, half to even; in float64 it is a little more and rounds to 1: noise 1 on signal 100.
    found = least_sqnr_db(network, lambda: own_db(network, x))
    assert found == pytest.approx(20.04 - 3, abs=3.0)
    assert found >= LOW_BIT_SQNR_DB


def test_exact_answers_are_asked_for_in_full() -> None:
    x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    network = Ties(scale=1e-3)
    assert least_sqnr_db(network, lambda: own_db(network, x)) == QUANTIZED_SQNR_DB


def test_few_bits_are_asked_for_less() -> None:
    assert (
        least_sqnr_db(Ties(bits=4, scale=0.1), lambda: pytest.fail("asked for what does not count")) == LOW_BIT_SQNR_DB
    )


def given(
    runtime: str = "onnxruntime", profile: str = "w8a8", task: str = "classify", minimum_db: float = 35.0,
    share: float = MATCHED_SHARE,
) -> Given:  # fmt: skip
    """A bundle that is checked, as far as the advice depends on it."""
    manifest = SimpleNamespace(task=task, profile=profile, quantization={"site_sqnr_db": {"blocks.0.mlp.fc1": 12.5}})
    bundle = SimpleNamespace(manifest=manifest, runtime=runtime, minimum_sqnr_db=minimum_db, minimum_share=share)
    return Given(bundle)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "runtime", "profile", "is_told"),
    [
        ("sse4_2 avx2", "openvino", "openvino", True),
        ("sse4_2 avx2", "openvino-bf16", "w8a8", True),
        ("avx2 avx512f avx512_vnni", "openvino", "openvino", False),
        ("avx2 avx_vnni", "openvino", "openvino", False),
        ("sse4_2 avx2", "onnxruntime", "w8a8", False),
        ("sse4_2 avx2", "openvino", "fp32", False),
        ("", "openvino", "openvino", False),
    ],
)
def test_a_cpu_that_saturates_is_named(
    monkeypatch: pytest.MonkeyPatch, flags: str, runtime: str, profile: str, is_told: bool
) -> None:
    monkeypatch.setattr(engines, "cpuinfo", lambda: {"flags": flags} if flags else {})
    assert ("no VNNI" in hint_of_difference(given(runtime, profile))) is is_told


@pytest.mark.parametrize(
    ("task", "minimum_db", "share", "words"),
    [
        ("classify", 80.0, MATCHED_SHARE, "export again"),
        ("embed", 35.0, MATCHED_SHARE, "export again"),
        ("embed", 26.0, MATCHED_SHARE, "than 26 dB are asked"),
        ("detect", 35.0, MATCHED_SHARE, "export again"),
        ("detect", 35.0, 0.6, "than 35 dB and 60% of its objects are asked"),
    ],
)
def test_noise_is_not_called_a_wrong_file(task: str, minimum_db: float, share: float, words: str) -> None:
    advice = hint_of_difference(given(task=task, minimum_db=minimum_db, share=share))
    assert words in advice
    assert ("Train it" in advice) is ("are asked" in words)
    assert "blocks.0.mlp.fc1 12.5 dB" in advice


def found_objects(count: int, moved: int) -> dict[str, np.ndarray]:
    """One picture's objects in a row of squares, the first `moved` of them elsewhere."""
    corners = np.arange(count, dtype=np.float32)[:, None] * 20
    boxes = np.concatenate([corners, corners, corners + 10, corners + 10], 1)
    boxes[:moved] += 7
    return {"boxes": boxes[None], "scores": np.full((1, count), 0.9), "labels": np.zeros((1, count), np.int64)}


@pytest.mark.parametrize(("moved", "least"), [(0, MATCHED_SHARE), (2, 0.8 - SHARE_MARGIN), (10, LEAST_SHARE)])
def test_objects_that_rounding_loses_are_not_asked_for(moved: int, least: float) -> None:
    records = golden_records(found_objects(10, 0))
    assert least_share(found_objects(10, moved), records, 1) == pytest.approx(least)


def test_a_network_that_finds_nothing_leaves_the_share_as_it_is() -> None:
    nothing = {name: value[:, :0] for name, value in found_objects(3, 0).items()}
    assert least_share(nothing, golden_records(nothing), 1) == MATCHED_SHARE


@pytest.mark.parametrize(("minimum_db", "wrong"), [(35.0, 1), (20.0, 0)])
def test_labels_that_the_allowed_noise_may_swap_are_ties(minimum_db: float, wrong: int) -> None:
    # Of root mean square 1: at 20 dB each logit may be 0.1 off, and a difference of two 4 * 1.41 * 0.1 = 0.57.
    expected = np.array([[1.2, 0.9, -0.8, -1.05]], np.float32)
    assert np.sqrt((expected**2).mean()) == pytest.approx(1, abs=0.01)
    found = expected[:, [1, 0, 2, 3]]
    check = check_golden_labels(expected, found, minimum_db, "")
    assert check.passed is not bool(wrong)
    assert check.found == f"0 of 1 equal, {wrong} clear ones differ"
