"""The gate against seeded bugs: each is made as the real mistake would make it, and each is rejected by its name."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import ImageOps
from torch import nn

from gate_bugs import (
    CALIBRATION_BUGS,
    EXPORTER_BUGS,
    GOLDEN,
    MANIFEST_BUGS,
    bgr,
    changed,
    initializers,
    preprocessed,
    put,
    tokens_count_once,
)
from leanvit import MPTQConfig, Predictor, export, imaging, quantize
from leanvit.checkpoint import preprocess_for
from leanvit.config import FASHION_MNIST_CLASSES, ExportOptions, Preprocess, from_dict
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import ImageSet, load_split
from leanvit.errors import BundleError, CalibrationError, NumericalError, VerificationError
from leanvit.export import network
from leanvit.export.gate.check import require_passed
from leanvit.export.gate.verify import verify_bundle
from leanvit.files import read_json
from leanvit.models import merge_tokens
from leanvit.quant import QuantizedModel
from leanvit.quant.calibration_images import check_calibration
from leanvit.quant.quantizers import ActivationQuantizer
from leanvit.runtime import predictor as runtime
from leanvit.runtime.bundle import Manifest, read_manifest, sign

LENIENT = ExportOptions(max_drop=3.0)
FAST = MPTQConfig(range_search=False, ratio_search=False)
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
original_resize = imaging._resize_image


@dataclass(frozen=True)
class Subject:
    """A model that exports well, its bundle, and labelled images it gets right."""

    model: nn.Module | QuantizedModel
    bundle: Path
    images: ImageSet
    float_top1: float

    def proto(self) -> onnx.ModelProto:
        """A fresh copy of the exported graph."""
        return onnx.load(str(self.bundle / "model.onnx"))


def tensor(images: ImageSet, preprocess: Preprocess) -> torch.Tensor:
    return torch.cat([to_input(pixels, preprocess) for pixels, _ in Loader(images, preprocess, 64)])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from threads, and lose a lot where other jobs share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits_vit() -> nn.Module:
    """Two blocks of the packed vit_micro whose head is fitted to the digits by least squares: no training."""
    model = timm.create_model("vit_micro", pretrained=True).eval()
    model.blocks = model.blocks[:2]
    train = load_split("digits", "train")
    with torch.no_grad():
        features = model.forward_head(model.forward_features(tensor(train, preprocess_for(model))), pre_logits=True)
        rows = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
        wanted = 20 * nn.functional.one_hot(torch.from_numpy(train.labels)).double() - 10
        solution = torch.linalg.solve(rows.T @ rows + torch.eye(rows.shape[1]), rows.T @ wanted).float()
        model.head.weight.copy_(solution[:-1].T)
        model.head.bias.copy_(solution[-1])
    return model


@pytest.fixture(scope="module")
def preprocess(digits_vit: nn.Module) -> Preprocess:
    return preprocess_for(digits_vit)


def calibration_images() -> ImageSet:
    return load_split("digits", "train").subset(np.arange(0, 1280, 20))


@pytest.fixture(scope="module")
def calibration(preprocess: Preprocess) -> torch.Tensor:
    return tensor(calibration_images(), preprocess)


@pytest.fixture(scope="module")
def held_out() -> ImageSet:
    images = load_split("digits", "val")
    return images.subset(np.arange(0, len(images), 2))


@pytest.fixture(scope="module")
def subjects(
    digits_vit: nn.Module, calibration: torch.Tensor, held_out: ImageSet, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Subject]:
    folder = tmp_path_factory.mktemp("gate")
    x = tensor(held_out, preprocess_for(digits_vit))
    with torch.no_grad():
        top1 = 100 * float((digits_vit(x).argmax(1).numpy() == held_out.labels).mean())
    assert top1 > 75
    models = {"float": digits_vit, "w8a8": quantize(digits_vit, calibration, FAST)}
    return {
        name: Subject(model, export(model, folder / name, LENIENT, images=held_out, float_metric=top1), held_out, top1)
        for name, model in models.items()
    }


@pytest.fixture
def lower_once(subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let export use the graph that was lowered before, with a bug in it: torch.onnx takes seconds."""

    def use(subject: Subject, bug: Callable[[onnx.ModelProto], None] | None = None) -> None:
        proto = subject.proto()
        before = proto.SerializeToString()
        if bug is not None:
            bug(proto)
            assert proto.SerializeToString() != before
        monkeypatch.setattr(network, "lower", lambda *arguments, **options: proto)
        monkeypatch.setattr(network, "trace", lambda *arguments, **options: None)

    return use


def failed(result: dict[str, Any]) -> list[str]:
    return [check["name"] for check in result["checks"] if check["passed"] is False]


def rejected(check: str, model: object, folder: Path, **options: Any) -> list[str]:
    """Export must stop at the gate, name `check` and what to try, and leave FOLDER.rejected alone."""
    with pytest.raises(VerificationError, match=f"'{check}'|{check}[,)]") as caught:
        export(model, folder / "bundle", **options)
    assert caught.value.exit_code == 5
    assert [p.name for p in folder.iterdir()] == ["bundle.rejected"]
    verdict = read_json(folder / "bundle.rejected" / "verify.json")
    first = next(row for row in verdict["checks"] if row["passed"] is False)
    assert first["hint"]
    assert str(caught.value).endswith(first["hint"])
    assert check in failed(verdict)
    return failed(verdict)


def found(folder: Path, check: str) -> dict[str, Any]:
    """One line of a bundle's verify.json."""
    return next(row for row in read_json(folder / "verify.json")["checks"] if row["name"] == check)


# ------------------------------------------------------------------------------------------ bugs of the exporter


@pytest.mark.parametrize(
    ("bug", "kind", "check"), EXPORTER_BUGS, ids=[f"{b.__name__}-{k}" for b, k, _ in EXPORTER_BUGS]
)
def test_bug_of_the_exporter_is_rejected_without_data(
    bug: Callable[[onnx.ModelProto], None],
    kind: str,
    check: str,
    subjects: dict[str, Subject],
    lower_once: Callable[..., None],
    tmp_path: Path,
) -> None:
    lower_once(subjects[kind], bug)
    names = rejected(check, subjects[kind].model, tmp_path)
    again = verify_bundle(tmp_path / "bundle.rejected")
    assert check in failed(again)
    if check == GOLDEN:
        with pytest.raises(VerificationError, match="golden images give"):
            Predictor(tmp_path / "bundle.rejected")
        assert {"onnx", "finite weights", "opset"}.isdisjoint(names)


@pytest.mark.parametrize("kind", ["float", "w8a8"])
def test_merged_tokens_that_count_once_are_rejected(
    kind: str, digits_vit: nn.Module, calibration: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merging without proportional attention, in the file alone."""
    model: nn.Module | QuantizedModel = merge_tokens(copy.deepcopy(digits_vit), 0.6)
    if kind == "w8a8":
        model = quantize(digits_vit, calibration, dataclasses.replace(FAST, keep_tokens=0.6))
    preprocess = preprocess_for(digits_vit)
    export(model, tmp_path / "sound" / "bundle", preprocess=preprocess)
    lower = network.lower

    def lowered(*arguments: Any, **options: Any) -> onnx.ModelProto:
        proto = lower(*arguments, **options)
        tokens_count_once(proto)
        return proto

    monkeypatch.setattr(network, "lower", lowered)
    (tmp_path / "bug").mkdir()
    rejected(GOLDEN, model, tmp_path / "bug", preprocess=preprocess)


@pytest.mark.parametrize("kind", ["float", "w8a8"])
def test_bgr_is_rejected_where_all_data_are_grey(
    kind: str, subjects: dict[str, Subject], lower_once: Callable[..., None], tmp_path: Path
) -> None:
    """Accuracy, agreement and logits on the data are perfect; the coloured charts are not."""
    subject = subjects[kind]
    lower_once(subject, bgr)
    names = rejected(
        GOLDEN, subject.model, tmp_path, options=LENIENT, images=subject.images, float_metric=subject.float_top1
    )
    assert {"accuracy", "accuracy drop", "agreement", "logits"}.isdisjoint(names)


def test_good_bundles_pass_every_check_and_say_what_was_not_verified(subjects: dict[str, Subject]) -> None:
    for subject in subjects.values():
        rows = read_json(subject.bundle / "verify.json")["checks"]
        # These networks are too small to be timed.
        assert {row["name"] for row in rows if row["passed"] is not True} <= {"speed"}
        later = verify_bundle(subject.bundle)
        assert later["passed"]
        unverified = {row["name"]: row["found"] for row in later["checks"] if row["passed"] is None}
        assert set(unverified) == {"accuracy", "label order"}
        assert all("NOT verified" in found for found in unverified.values())


def test_dropout_without_its_training_flag_is_rejected(preprocess: Preprocess, tmp_path: Path) -> None:
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3 * 28 * 28, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(nn.functional.dropout(x.flatten(1), 0.1))

    with pytest.raises(VerificationError, match=r"deterministic|golden images"):
        export(Forgetful(), tmp_path / "bundle", preprocess=preprocess)
    assert not (tmp_path / "bundle").exists()


# ------------------------------------------------------------------------------------------ bugs of the model


def test_nan_in_the_model_is_refused_before_anything_is_calibrated(
    digits_vit: nn.Module, calibration: torch.Tensor
) -> None:
    model = copy.deepcopy(digits_vit)
    model.blocks[1].mlp.fc2.weight.data[3, 4] = torch.nan
    with pytest.raises(NumericalError, match=r"1 values of 'blocks\.1\.mlp\.fc2\.weight' are NaN.*earlier checkpoint"):
        quantize(model, calibration)


def test_head_without_weights_is_rejected(
    digits_vit: nn.Module, subjects: dict[str, Subject], lower_once: Callable[..., None], tmp_path: Path
) -> None:
    """Every image has the same logits: such a bundle agrees with its model, and is of no use."""
    model = copy.deepcopy(digits_vit)
    nn.init.zeros_(model.head.weight)
    lower_once(subjects["float"], lambda proto: put(initializers(proto, 10, 96)[0][0], np.zeros((10, 96), np.float32)))
    assert set(rejected("golden outputs", model, tmp_path)) == {"golden outputs"}


def test_scales_of_another_calibration_are_rejected_without_data(
    digits_vit: nn.Module,
    calibration: torch.Tensor,
    subjects: dict[str, Subject],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Simulation and file agree, because both have the stale scales: only the float answers tell."""
    pale = quantize(digits_vit, 0.1 * calibration[:32], FAST)
    model = copy.deepcopy(subjects["w8a8"].model)
    assert isinstance(model, QuantizedModel)
    stale = {name: m for name, m in pale.module.named_modules() if isinstance(m, ActivationQuantizer)}
    for name, quantizer in stale.items():
        model.module.get_submodule(name).load_state_dict(quantizer.state_dict())
    assert "quantizers" in rejected("quantizers", model, tmp_path)


# ------------------------------------------------------------------------------------------ bugs of calibration


def calibrated_on(images: torch.Tensor, subject: Subject) -> QuantizedModel:
    """The quantized model as if it had been calibrated on `images`: the facts are those of the real check."""
    assert isinstance(subject.model, QuantizedModel)
    facts = {**subject.model.report["calibration"], **check_calibration(list(torch.split(images, 64)))}
    return dataclasses.replace(subject.model, report={**subject.model.report, "calibration": facts})


@pytest.mark.parametrize("bug", CALIBRATION_BUGS)
def test_bug_of_the_calibration_is_rejected(
    bug: str,
    preprocess: Preprocess,
    calibration: torch.Tensor,
    subjects: dict[str, Subject],
    lower_once: Callable[..., None],
    tmp_path: Path,
) -> None:
    change, check = CALIBRATION_BUGS[bug]
    pixels = torch.cat([p for p, _ in Loader(calibration_images(), preprocess, 64)])
    assert torch.equal(to_input(pixels, preprocess), calibration)
    lower_once(subjects["w8a8"])
    rejected(check, calibrated_on(change(pixels, calibration), subjects["w8a8"]), tmp_path)


@pytest.mark.parametrize("position", [0, 1, 2, 783])
def test_one_pixel_at_a_million_is_refused_before_anything_is_calibrated(
    position: int, digits_vit: nn.Module, calibration: torch.Tensor
) -> None:
    damaged = calibration.clone()
    damaged[40].view(3, -1)[2, position] = 1e6
    with pytest.raises(CalibrationError, match=r"1 values .* beyond 1000 \(up to 1e\+06\).*check the loader"):
        quantize(digits_vit, damaged)


def test_images_resized_in_float_are_said_to_be_unverified(
    calibration: torch.Tensor, subjects: dict[str, Subject], lower_once: Callable[..., None], tmp_path: Path
) -> None:
    """Whether they were normalised right can't be told: no failure, and no claim."""
    blurred = nn.functional.avg_pool2d(calibration, 3, 1, 1)
    lower_once(subjects["w8a8"])
    bundle = export(calibrated_on(blurred, subjects["w8a8"]), tmp_path / "bundle", images=subjects["w8a8"].images)
    for check in ("calibration normalisation", "evaluation images"):
        assert found(bundle, check)["passed"] is None
        assert "NOT verified" in found(bundle, check)["found"]


def test_evaluation_on_calibration_images_is_rejected(
    subjects: dict[str, Subject], lower_once: Callable[..., None], tmp_path: Path
) -> None:
    lower_once(subjects["w8a8"])
    images = load_split("digits", "train").subset(np.arange(0, 600, 4))
    names = rejected("evaluation images", subjects["w8a8"].model, tmp_path, images=images)
    assert names == ["evaluation images"]
    assert found(tmp_path / "bundle.rejected", "evaluation images")["found"] == "30 of 150 were calibrated on"


def test_a_site_that_is_mostly_noise_is_rejected_and_named(
    subjects: dict[str, Subject], lower_once: Callable[..., None], tmp_path: Path
) -> None:
    lower_once(subjects["w8a8"])
    model = copy.deepcopy(subjects["w8a8"].model)
    assert isinstance(model, QuantizedModel)
    model.report["sites"][3]["sqnr_db"] = -1.5
    rejected("site SQNR", model, tmp_path)
    assert (
        f"worst sites: {model.report['sites'][3]['name']} -1.5 dB"
        in found(tmp_path / "bundle.rejected", "site SQNR")["found"]
    )


# ------------------------------------------------------------------------------------------ labels and preprocessing


def test_labels_in_another_order_are_rejected(
    subjects: dict[str, Subject], lower_once: Callable[..., None], tmp_path: Path
) -> None:
    """The data set knows the order, and so do packed weights: those of vit_micro name what it was trained on."""
    subject = subjects["float"]
    lower_once(subject)
    by_name = sorted(subject.images.classes, key=lambda name: DIGIT_NAMES[int(name)])
    for labels, images in ((by_name, subject.images), (sorted(FASHION_MNIST_CLASSES), None)):
        assert rejected("label order", subject.model, tmp_path, labels=labels, images=images) == ["label order"]
        shutil.rmtree(tmp_path / "bundle.rejected")


def test_data_that_numbers_its_classes_otherwise_is_rejected(
    subjects: dict[str, Subject], lower_once: Callable[..., None], tmp_path: Path
) -> None:
    """No name is shared, as with ImageNet's folders: only the predictions can tell."""
    subject = subjects["float"]
    lower_once(subject)
    order = np.argsort(DIGIT_NAMES)  # folders of these names are numbered in alphabetic order
    folders = tuple(DIGIT_NAMES[i] for i in order)
    images = dataclasses.replace(subject.images, labels=np.argsort(order)[subject.images.labels], classes=folders)
    digits = tuple("0123456789")
    assert "predicted labels" in rejected("predicted labels", subject.model, tmp_path, labels=digits, images=images)


def test_wrong_preprocessing_on_purpose_is_measured_with_data_and_unverified_without(
    subjects: dict[str, Subject], lower_once: Callable[..., None], preprocess: Preprocess, tmp_path: Path
) -> None:
    """Export believes an explicit preprocessing, says that it is not the model's, and lets accuracy decide."""
    subject = subjects["float"]
    other = dataclasses.replace(preprocess, mean=(0.0,) * 3, std=(1.0,) * 3)

    def bug(proto: onnx.ModelProto) -> None:
        (mean, _), (std, _) = initializers(proto, 1, 3, 1, 1)
        put(mean, np.zeros((1, 3, 1, 1), np.float32))
        put(std, np.ones((1, 3, 1, 1), np.float32))

    lower_once(subject, bug)
    bundle = export(subject.model, tmp_path / "unlabelled", preprocess=other)
    line = found(bundle, "preprocessing of the model")
    assert line["passed"] is None
    assert "mean is [0.0, 0.0, 0.0], not [0.485, 0.456, 0.406]" in line["found"]
    shutil.rmtree(bundle)
    options = {"preprocess": other, "images": subject.images, "float_metric": subject.float_top1}
    rejected("accuracy drop", subject.model, tmp_path, **options)


@pytest.mark.parametrize("kind", ["float", "w8a8"])
@pytest.mark.parametrize("bug", MANIFEST_BUGS)
def test_manifest_that_says_something_else_is_rejected(
    bug: str, kind: str, subjects: dict[str, Subject], tmp_path: Path
) -> None:
    """All hashes match: bundle.json was written by an exporter that took a value from the wrong place."""
    bundle = Path(shutil.copytree(subjects[kind].bundle, tmp_path / "bundle"))
    change, check = MANIFEST_BUGS[bug]
    sign(bundle, change(read_manifest(bundle)))
    result = verify_bundle(bundle)
    assert check in failed(result)
    with pytest.raises(VerificationError, match=check):
        require_passed(result, bundle)


@pytest.mark.parametrize(
    ("patch", "check"),
    [
        (lambda image, preprocess: np.ascontiguousarray(original_resize(image, preprocess)[:, :, ::-1]), "BGR"),
        (lambda image, preprocess: original_resize(ImageOps.flip(image), preprocess), "upside down"),
        (lambda i, preprocess: original_resize(i, dataclasses.replace(preprocess, crop_mode="squash")), "squashed"),
    ],
)
def test_server_that_prepares_images_otherwise_is_noticed(
    patch: Callable[..., np.ndarray], check: str, subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle is right, the code that reads it is not."""
    monkeypatch.setattr(imaging, "_resize_image", patch)
    for subject in subjects.values():
        assert {"prepared pixels", GOLDEN} <= set(failed(verify_bundle(subject.bundle))), check
        with pytest.raises(VerificationError, match="golden images give"):
            Predictor(subject.bundle)


# ------------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("kind", ["float", "w8a8"])
def test_500_random_changes_of_bytes_are_all_noticed_before_an_answer(
    kind: str, subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(subjects[kind].bundle, tmp_path / "bundle"))
    files = {path: path.read_bytes() for path in sorted(bundle.iterdir())}
    assert [path.name for path in files] == ["bundle.json", "golden.npz", "model.onnx", "verify.json"]
    generator = np.random.default_rng(len(kind))
    sessions: list[Any] = []
    monkeypatch.setattr(runtime, "open_engine", lambda *arguments: sessions.append(arguments))
    noticed = 0
    for number in range(500):
        path = list(files)[number % len(files)]
        damaged = changed(files[path], generator)
        assert damaged != files[path]
        path.write_bytes(damaged)
        with pytest.raises((VerificationError, BundleError)) as caught:
            Predictor(bundle)
        assert path.name in str(caught.value)
        noticed += 1
        path.write_bytes(files[path])
    assert noticed == 500
    assert sessions == []
    monkeypatch.undo()
    assert Predictor(bundle).labels == tuple("0123456789")


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "verify.json", "bundle.json"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_truncated_file_is_rejected(name: str, kept: float, subjects: dict[str, Subject], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(subjects["w8a8"].bundle, tmp_path / "bundle"))
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[: int(kept * len(data))])
    assert failed(verify_bundle(bundle)) == ["integrity"]
    with pytest.raises(VerificationError, match="SHA-256 differs"):
        Predictor(bundle)


@pytest.mark.parametrize(("name", "check"), [("model.onnx", "load"), ("golden.npz", "golden file")])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_file_that_was_truncated_before_it_was_signed_is_rejected(
    name: str, check: str, kept: float, subjects: dict[str, Subject], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(subjects["w8a8"].bundle, tmp_path / "bundle"))
    data = (bundle / name).read_bytes()
    manifest = read_manifest(bundle)
    (bundle / name).write_bytes(data[: int(kept * len(data))])
    sign(bundle, manifest)
    assert failed(verify_bundle(bundle))[0] == check


def test_weights_in_another_file_are_rejected(subjects: dict[str, Subject], tmp_path: Path) -> None:
    """A file beside the model is covered by no hash, and ONNX Runtime follows it."""
    bundle = Path(shutil.copytree(subjects["float"].bundle, tmp_path / "bundle"))
    model = onnx.load(str(bundle / "model.onnx"))
    onnx.save(model, str(bundle / "model.onnx"), save_as_external_data=True, location="model.data")
    sign(bundle, from_dict(Manifest, json.loads((bundle / "bundle.json").read_text())))
    assert {"integrity", "self-contained"} <= set(failed(verify_bundle(bundle)))


def test_the_command_line_names_the_check_and_exits_with_5(
    leanvit: Callable[..., Any], subjects: dict[str, Subject], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(subjects["w8a8"].bundle, tmp_path / "bundle"))
    sign(bundle, preprocessed(read_manifest(bundle), interpolation="bilinear"))
    outcome = leanvit("verify", bundle)
    assert outcome.code == 5
    assert "check 'preprocessing' (and prepared pixels" in outcome.error
    assert "interpolation is bilinear, not bicubic" in outcome.error
    assert "Export again" in outcome.error
