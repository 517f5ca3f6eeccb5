"""Runtimes behind one call: the same answers, proved by the gate, chosen by measurement, and silent."""

from __future__ import annotations

import subprocess
import sys
from base64 import b64decode
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from leanvit.checkpoint import load_checkpoint
from leanvit.config import ExportOptions
from leanvit.data.loader import Loader
from leanvit.data.sets import load_split
from leanvit.errors import BundleError, ConfigError, VerificationError
from leanvit.export import api
from leanvit.export.api import export
from leanvit.export.gate.verify import verify_bundle
from leanvit.files import read_json
from leanvit.quant.store import load_quantized
from leanvit.runtime import engines
from leanvit.runtime import predictor as runtime
from leanvit.runtime.bundle import read_manifest, sqnr_db
from leanvit.runtime.engines import INTEGER_PRODUCT, open_session, saturates
from leanvit.runtime.predictor import Predictor
from sessions import CPU, SATURATES

pytest.importorskip("openvino")

OPENVINO = ExportOptions(runtimes=("openvino",))


@pytest.fixture(scope="module")
def proved(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's W8A8 network, proved in ONNX Runtime and OpenVINO on labelled digits."""
    if SATURATES:
        pytest.skip("OpenVINO's int8 products saturate on this CPU, so that nothing is proved there: it has no VNNI")
    quantized, info = load_quantized(demo_run / "quantize-w8a8")
    images = load_split("digits", "val", val_fraction=info.val_fraction, seed=info.seed)
    folder = tmp_path_factory.mktemp("engines") / "bundle"
    return export(quantized, folder, preprocess=info.preprocess, images=images, options=OPENVINO)


@pytest.fixture(scope="module")
def val_pixels(proved: Path) -> np.ndarray:
    manifest = read_manifest(proved)
    images = load_split("digits", "val", val_fraction=manifest.data.get("val_fraction", 0.2), seed=0)
    return np.concatenate([pixels.numpy() for pixels, _ in Loader(images, manifest.preprocess, 64)])


def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make OpenVINO compute something else, as it does with bit shifts (specs/deploy.md)."""
    real = engines.open_engine

    def open_engine(model: Path, name: Any, threads: int = 0) -> Any:
        engine = real(model, name, threads)
        if name == "onnxruntime":
            return engine
        return replace(engine, run=lambda images: [engine(images) * np.linspace(0.5, 2, 10, dtype=np.float32)])

    monkeypatch.setattr(runtime, "open_engine", open_engine)


def test_a_file_for_a_newer_onnxruntime_says_what_to_do(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["x2"])], "g", [value],
                                   [onnx.helper.make_tensor_value_info("x2", onnx.TensorProto.FLOAT, [1])])  # fmt: skip
    newer = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 99)], ir_version=10)
    (tmp_path / "newer.onnx").write_bytes(newer.SerializeToString())
    with pytest.raises(BundleError, match=r"too old for the file\..*or export with --opset 21"):
        open_session(tmp_path / "newer.onnx")


def test_bundle_names_the_runtimes_that_were_proved(proved: Path) -> None:
    assert set(read_manifest(proved).runtimes) == {"onnxruntime", "openvino"}
    checks = {check["name"]: check["passed"] for check in read_json(proved / "verify.json")["checks"]}
    for name in ("golden images at batch 1", "golden images at batch 8", "agreement", "logits", "accuracy"):
        assert checks[f"{name} in openvino"] is True


def test_both_runtimes_answer_alike(proved: Path, val_pixels: np.ndarray) -> None:
    first, second = (Predictor(proved, runtime=name).logits(val_pixels) for name in ("onnxruntime", "openvino"))
    assert sqnr_db(first, second) >= 35
    assert (first.argmax(1) == second.argmax(1)).mean() >= 0.995


def test_answers_are_not_overwritten_by_the_next_call(proved: Path, val_pixels: np.ndarray) -> None:
    predictor = Predictor(proved, runtime="openvino")
    first = predictor.logits(val_pixels[:4])
    kept = first.copy()
    predictor.logits(val_pixels[4:8])
    np.testing.assert_array_equal(first, kept)


def test_a_runtime_that_computes_otherwise_is_noticed(proved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy(monkeypatch)
    failed = [check["name"] for check in verify_bundle(proved)["checks"] if check["passed"] is False]
    assert "golden images at batch 1 in openvino" in failed
    with pytest.raises(VerificationError, match="dB in openvino on this machine"):
        Predictor(proved, runtime="openvino")
    Predictor(proved, runtime="onnxruntime")


def test_a_runtime_that_fails_is_left_out_unless_it_was_asked_for(
    demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy(monkeypatch)
    monkeypatch.setattr(api, "available", lambda: ("onnxruntime", "openvino"))
    model, info = load_checkpoint(demo_run / "train")
    bundle = export(model, tmp_path / "left-out", preprocess=info.preprocess, labels=info.labels)
    assert list(read_manifest(bundle).runtimes) == ["onnxruntime"]
    assert "openvino is left out" in capsys.readouterr().err
    with pytest.raises(VerificationError, match="in openvino"):
        export(model, tmp_path / "asked", preprocess=info.preprocess, labels=info.labels, options=OPENVINO)
    assert (tmp_path / "asked.rejected").is_dir()


def test_auto_takes_the_fastest_and_remembers_it(proved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured: list[Any] = []

    def measure(model: Path, candidates: Any, images: Any, threads: int) -> dict[str, float]:
        measured.append(tuple(candidates))
        assert images.dtype == np.uint8
        return {"onnxruntime": 2.0, "openvino": 1.0}

    monkeypatch.setattr(engines, "_measure", measure)
    assert Predictor(proved, runtime="auto").runtime == "openvino"
    assert Predictor(proved, runtime="auto").runtime == "openvino"
    assert measured == [("onnxruntime", "openvino")]
    engines.remembered_choices().write_text("damaged")
    assert Predictor(proved, runtime="auto").runtime == "openvino"
    assert len(measured) == 2


def test_measuring_runs_every_candidate(proved: Path, val_pixels: np.ndarray) -> None:
    seconds = engines._measure(proved / "model.onnx", ["onnxruntime", "openvino"], val_pixels[:2], 1)
    assert set(seconds) == {"onnxruntime", "openvino"}
    assert min(seconds.values()) > 0


def test_an_unknown_runtime_is_a_configuration_error(proved: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of onnxruntime, openvino"):
        Predictor(proved, runtime="tensorrt")  # type: ignore[arg-type]


def test_openvino_is_imported_without_its_telemetry() -> None:
    code = (
        "import sys\n"
        "from leanvit.runtime.engines import openvino_core\n"
        "openvino_core()\n"
        "assert not [name for name in sys.modules if name.startswith('openvino_telemetry')]\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_sites_are_lifted_until_none_is_left_and_then_the_gate_refuses(demo_run: Path, tmp_path: Path) -> None:
    quantized, info = load_quantized(demo_run / "quantize-w8a8")
    images = load_split("digits", "val", val_fraction=info.val_fraction, seed=info.seed).subset(np.arange(64))
    ratios = {site["name"]: site["sqnr_db"] for site in quantized.report["sites"]}
    with pytest.raises(VerificationError, match="accuracy drop"):
        # No network is as good as a point more than all images right, so that every step is taken.
        export(
            quantized, tmp_path / "b", preprocess=info.preprocess, images=images, float_metric=101.0,
            options=ExportOptions(max_drop=0.0),
        )  # fmt: skip
    manifest = read_manifest(tmp_path / "b.rejected")
    lifted = manifest.quantization["lifted"]
    linears = [name for name in quantized.plan if quantized.graph.sites[name].kind == "linear"]
    assert sorted(lifted) == sorted(linears)
    assert [ratios[name] for name in lifted] == sorted(ratios[name] for name in linears)
    model = onnx.load(str(tmp_path / "b.rejected" / "model.onnx"))
    # The patch embedding is a convolution as a product, and stays.
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) == 1


def test_nothing_is_lifted_where_the_drop_holds(demo_run: Path, tmp_path: Path) -> None:
    quantized, info = load_quantized(demo_run / "quantize-w8a8")
    images = load_split("digits", "val", val_fraction=info.val_fraction, seed=info.seed).subset(np.arange(64))
    with torch.no_grad():
        bundle = export(
            quantized, tmp_path / "b", preprocess=info.preprocess, images=images, float_metric=50.0
        )  # fmt: skip
    assert read_manifest(bundle).quantization["lifted"] == []


@pytest.mark.skipif(not CPU, reason="only Linux tells of its CPU")
def test_the_runtime_itself_tells_whether_its_products_saturate() -> None:
    assert saturates() == SATURATES


def test_the_file_that_asks_it_is_one_product_of_integers() -> None:
    model = onnx.load_from_string(b64decode(INTEGER_PRODUCT))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["MatMulInteger"]
    types = [value.type.tensor_type.elem_type for value in model.graph.input]
    assert types == [onnx.TensorProto.UINT8, onnx.TensorProto.INT8]


def test_integer_products_do_not_saturate_on_any_cpu(tmp_path: Path) -> None:
    """255 x 127 twice over is more than int16 holds: kernels of CPUs without VNNI clip there unless told otherwise."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    weight = np.full((64, 16), 127, np.int8)
    weight[:, ::2] = -127
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "rows"], ["flat"]),
        helper.make_node("QuantizeLinear", ["flat", "one", "zero"], ["whole"]),
        helper.make_node(
            "MatMulIntegerToFloat", ["whole", "weight", "one", "one", "zero"], ["logits"], domain="com.microsoft"
        ),
    ]
    constants = {
        "rows": np.array([-1, 64], np.int64), "one": np.float32(1), "zero": np.uint8(0), "weight": weight
    }  # fmt: skip
    graph = helper.make_graph(
        nodes, "saturation",
        [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["batch", 4, 16, 1])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 16])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    session = engines.open_session(tmp_path / "model.onnx", threads=1)
    found = session.run(None, {"images": np.full((2, 4, 16, 1), 255, np.uint8)})[0]
    np.testing.assert_array_equal(found, np.tile(255.0 * 64 * weight[0].astype(np.float64), (2, 1)))
