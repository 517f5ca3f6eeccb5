"""Codes for what convolutions give: which get them, and the runtime's integers against a product by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from leanvit.checkpoint import CheckpointInfo
from leanvit.config import MPTQConfig, Preprocess
from leanvit.data.loader import to_input
from leanvit.export.gate.golden import synthetic_images
from leanvit.export.onnx.lower import lower
from leanvit.export.onnx.simulation import executed_form
from leanvit.quant import QuantizedModel, quantize
from leanvit.quant.convolution_outputs import fit_output
from leanvit.quant.store import load_quantized, save_quantized
from leanvit.runtime.bundle import sqnr_db
from leanvit.runtime.engines import open_engine
from sessions import open_model

SIDE = 32
PREPROCESS = Preprocess(input_size=(SIDE, SIDE))
INNER = {"second", "third", "fourth"}


class Convolutions(nn.Module):
    """What stands behind convolutions in our networks: a ReLU, SiLU, two readers; three gain, the others do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.second = nn.Conv2d(64, 96, 3, stride=2, padding=2, dilation=2)
        self.third = nn.Conv2d(96, 256, 1)
        self.fourth = nn.Conv2d(256, 64, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.thin = nn.Conv2d(64, 64, 1)
        self.narrow = nn.Conv2d(64, 8, 3)
        self.last = nn.Conv2d(8, 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        second = torch.relu(self.second(torch.relu(self.first(x))))
        third = torch.nn.functional.silu(self.third(second))
        fourth = self.fourth(third)
        return self.last(torch.relu(self.narrow(self.thin(self.depthwise(fourth) + fourth))))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.stack(synthetic_images(24, (SIDE, SIDE)))


@pytest.fixture(scope="module")
def result(pixels: np.ndarray) -> QuantizedModel:
    torch.manual_seed(0)
    return quantize(Convolutions(), to_input(torch.from_numpy(pixels), PREPROCESS), MPTQConfig())


def optimized(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The graph that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    open_model(model, options)
    return onnx.load(options.optimized_model_filepath)


def counts(model: onnx.ModelProto, kind: str) -> int:
    return sum(node.op_type == kind for node in model.graph.node)


def test_dense_convolutions_inside_have_codes(result: QuantizedModel) -> None:
    assert set(result.graph.outputs) == INNER


@pytest.mark.parametrize("profile", ["w8a8", "mixed"])
def test_the_runtime_runs_them_on_integers(
    profile: str, result: QuantizedModel, pixels: np.ndarray, tmp_path: Path
) -> None:
    model = lower(result.graph, PREPROCESS, profile)
    assert counts(optimized(model, tmp_path), "QLinearConv") == len(INNER)
    with torch.no_grad():
        expected = executed_form(result.graph, profile)(to_input(torch.from_numpy(pixels), PREPROCESS)).numpy()
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    for size in (1, 3, 24):
        assert sqnr_db(expected[:size], open_engine(path, "onnxruntime", 1)(pixels[:size])) >= 35


def test_four_bit_weights_run_on_the_same_kernels(pixels: np.ndarray, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = to_input(torch.from_numpy(pixels), PREPROCESS)
    low = quantize(Convolutions(), x, MPTQConfig(weight_bits=4))
    model = lower(low.graph, PREPROCESS, "w4a8")
    assert counts(optimized(model, tmp_path), "QLinearConv") == len(INNER)


def test_a_lifted_convolution_runs_in_float(result: QuantizedModel, tmp_path: Path) -> None:
    model = lower(result.graph, PREPROCESS, "w8a8", ["third"])
    assert counts(optimized(model, tmp_path), "QLinearConv") == len(INNER) - 1


class Chain(nn.Module):
    """Three wide convolutions, one right behind the other; `middle` may be anything of 64 channels."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 64, 3, padding=1), nn.Linear(64, 5)
        self.a, self.b, self.c = nn.Conv2d(64, 64, 3, padding=1), middle, nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(torch.relu(self.first(x))))
        return self.last(torch.relu(self.c(torch.relu(self.b(x)))).mean((2, 3)))


def with_outliers(layer: nn.Module) -> nn.Module:
    """Weights that eight bits with one scale for all hold badly."""
    layer.weight.data[0] *= 60
    return layer


@pytest.mark.parametrize(
    ("middle", "options", "lifted", "integer"),
    [
        (nn.Conv2d(64, 64, 3, padding=1), {}, [], 3),
        (nn.Conv2d(64, 64, 3, padding=1), {}, ["b"], 1),
        (nn.Conv2d(64, 64, 3, padding=1), {"ignored_scope": ("b",)}, [], 1),
        (nn.Conv2d(64, 64, 3, padding=1, groups=64), {}, [], 1),
        (nn.ConvTranspose2d(64, 64, 2, stride=2), {}, [], 1),
    ],
    ids=["all", "lifted", "ignored", "groups", "transposed"],
)
def test_the_runtime_makes_no_integers_of_what_runs_in_float(
    middle: nn.Module, options: dict, lifted: list, integer: int, pixels: np.ndarray, tmp_path: Path
) -> None:
    """ONNX Runtime rounds float weights between two grids: the simulation would not know of it."""
    x = to_input(torch.from_numpy(pixels), PREPROCESS)
    found = quantize(Chain(with_outliers(middle)), x, MPTQConfig(**options))
    assert set(found.graph.outputs) >= {"a", "c"}
    model = lower(found.graph, PREPROCESS, "w8a8", lifted)
    assert counts(optimized(model, tmp_path), "QLinearConv") == integer
    with torch.no_grad():
        expected = executed_form(found.graph, "w8a8", lifted)(x).numpy()
    onnx.save(model, str(tmp_path / "model.onnx"))
    assert sqnr_db(expected, open_engine(tmp_path / "model.onnx", "onnxruntime", 1)(pixels)) >= 45


def test_patch_embeddings_and_upsampled_answers_have_no_codes(pixels: np.ndarray) -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 64, 3, padding=1), nn.GELU(), nn.Conv2d(64, 128, 2, stride=2), nn.GELU(),
        nn.Conv2d(128, 64, 3, padding=1), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Sigmoid(),
    ]  # fmt: skip
    found = quantize(nn.Sequential(*layers), to_input(torch.from_numpy(pixels), PREPROCESS), MPTQConfig())
    assert not found.graph.outputs


def test_profiles_that_run_the_plan_itself_add_no_codes(result: QuantizedModel) -> None:
    for profile in ("exact", "w4a16"):
        network = executed_form(result.graph, profile)
        assert not [name for name, _ in network.named_modules() if name.endswith("_output")]


def test_dead_filters_keep_their_bias(pixels: np.ndarray, tmp_path: Path) -> None:
    """Channels without weights, as pruning leaves them: a bias is counted in steps of the scale."""
    torch.manual_seed(0)
    network = Convolutions().eval()
    with torch.no_grad():
        network.third.weight[:64] = 0
        network.third.weight[64:] *= 8  # so that float16 would take the scale of the dead ones for 0
        network.third.bias[:64] = 1.0
    for bits in (8, 4):
        found = quantize(network, to_input(torch.from_numpy(pixels), PREPROCESS), MPTQConfig(weight_bits=bits))
        profile = "w8a8" if bits == 8 else "w4a8"
        path = tmp_path / f"{profile}.onnx"
        path.write_bytes(lower(found.graph, PREPROCESS, profile).SerializeToString())
        with torch.no_grad():
            expected = executed_form(found.graph, profile)(to_input(torch.from_numpy(pixels), PREPROCESS)).numpy()
        assert sqnr_db(expected, open_engine(path, "onnxruntime", 1)(pixels)) >= 40


def test_integers_are_those_of_a_product_by_hand(tmp_path: Path) -> None:
    """One convolution between codes, in int64, with ONNX Runtime's rounding of the bias to the product's step."""
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Conv2d(16, 48, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48 * SIDE**2, 4)
    )
    pixels = np.stack(synthetic_images(4, (SIDE, SIDE), seed=3))
    x = to_input(torch.from_numpy(pixels), PREPROCESS)
    found = quantize(network, x, MPTQConfig())
    graph, state = found.graph, found.module.state_dict()
    ran = onnx_values(optimized(lower(graph, PREPROCESS, "w8a8"), tmp_path), pixels, tmp_path)
    zero_point = int(state["quantizer_1_input.zero_point"])
    codes, weight = ran["input"].astype(np.int64) - zero_point, state["quantizer_1_weight.codes"].numpy()
    # The file keeps weights' scales as float16.
    weight_scale = state["quantizer_1_weight.scale"].half().double().numpy()
    step = state["quantizer_1_input.scale"].double().numpy() * weight_scale
    bias = np.rint(network[1].bias.detach().double().numpy() / step)
    padded = np.pad(codes, ((0, 0), (0, 0), (1, 1), (1, 1)))
    total = np.zeros((4, 48, SIDE, SIDE), np.int64)
    for row in range(3):
        for column in range(3):
            window = padded[:, :, row : row + SIDE, column : column + SIDE]
            total += np.einsum("oc,bchw->bohw", weight[:, :, row, column].astype(np.int64), window)
    scale, zero = graph.outputs["1"]
    value = (total + bias[:, None, None]) * step[:, None, None]
    expected = np.clip(np.rint(np.maximum(value, 0) / scale) + zero, 0, 255)
    apart = np.abs(expected - ran["output"])
    assert apart.max() <= 1
    assert (apart == 0).mean() > 0.999


def test_biases_are_simulated_as_the_runtime_counts_them(
    result: QuantizedModel, pixels: np.ndarray, tmp_path: Path
) -> None:
    model = optimized(lower(result.graph, PREPROCESS, "w8a8"), tmp_path)
    constants = {value.name: onnx.numpy_helper.to_array(value) for value in model.graph.initializer}
    simulated = executed_form(result.graph, "w8a8")
    names = {f"{name}.bias" for name in ("second", "third")}
    assert names <= {name for name, _ in simulated.named_parameters()}
    counted = []
    for node in (node for node in model.graph.node if node.op_type == "QLinearConv" and len(node.input) == 9):
        step = constants[node.input[1]] * constants[node.input[4]]
        counted.append(constants[node.input[8]] * step)
        assert constants[node.input[8]].dtype == np.int32
    assert len(counted) == len(names)
    for name in names:
        value = simulated.get_parameter(name).detach().numpy()
        assert any(len(one) == len(value) and np.allclose(one, value, rtol=1e-6, atol=0) for one in counted)
        assert not np.allclose(result.graph.module.get_parameter(name).detach().numpy(), value, rtol=1e-5, atol=0)


def test_products_of_matrices_run_on_integers(pixels: np.ndarray, tmp_path: Path) -> None:
    """The head of a detector's boxes: rows and no images, a product and bias that ONNX Runtime takes for a Gemm."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(3 * SIDE**2, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)]
    found = quantize(nn.Sequential(*layers), to_input(torch.from_numpy(pixels), PREPROCESS), MPTQConfig())
    model = optimized(lower(found.graph, PREPROCESS, "w8a8"), tmp_path)
    assert counts(model, "MatMulIntegerToFloat") == 3
    assert counts(model, "Gemm") + counts(model, "FusedGemm") == 0


def onnx_values(model: onnx.ModelProto, pixels: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    """Codes that the one QLinearConv reads and gives, (B, C, H, W)."""
    node = next(node for node in model.graph.node if node.op_type == "QLinearConv")
    for name in (node.input[0], node.output[0]):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = open_model(model, options)
    read, given = session.run([node.input[0], node.output[0]], {"images": pixels})
    if any(attribute.name == "channels_last" and attribute.i for attribute in node.attribute):
        read, given = read.transpose(0, 3, 1, 2), given.transpose(0, 3, 1, 2)
    return {"input": read, "output": given}


def test_codes_of_outputs_survive_a_file(result: QuantizedModel, tmp_path: Path) -> None:
    info = CheckpointInfo("none", labels=tuple("abcd"), preprocess=PREPROCESS)
    save_quantized(tmp_path, result, info)
    loaded, _ = load_quantized(tmp_path, lambda _info: (Convolutions(), torch.zeros(2, 3, SIDE, SIDE)))
    assert loaded.graph.outputs == result.graph.outputs


def test_the_grid_of_an_output_has_the_least_error_of_all_shares() -> None:
    x = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    scale, zero_point = fit_output(x)

    def error(step: float) -> float:
        codes = torch.clamp(torch.round(x / step) + zero_point, 0, 255)
        return float(((codes - zero_point) * step - x).square().sum())

    assert error(scale) <= 1.05 * min(error(scale * share) for share in np.linspace(0.7, 1.3, 25))
