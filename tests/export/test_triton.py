"""A bundle in a Triton repository: what config.pbtxt says by Triton's own schema, and what is never overwritten."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from google.protobuf import text_format

from common import LABELS, smooth
from hand_bundles import hand_bundle
from leanvit import Predictor
from leanvit.checkpoint import CheckpointInfo, save_checkpoint
from leanvit.config import Preprocess, from_dict
from leanvit.errors import BundleError, ConfigError, VerificationError
from leanvit.export import triton
from leanvit.export.triton import saturates, write_triton
from leanvit.files import read_json, sha256, write_json
from leanvit.imaging import encode_png
from leanvit.runtime.bundle import Manifest, read_manifest, sign

TYPES = {"TYPE_UINT8": "tensor(uint8)", "TYPE_FP32": "tensor(float)", "TYPE_INT64": "tensor(int64)"}


@lru_cache(maxsize=1)
def schema() -> Any:
    """Triton's model_config.proto as its client brings it; the package around it would want gRPC."""
    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("tritonclient is not installed")
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["model_config_pb2"] = module
    spec.loader.exec_module(module)
    return module


def described(model: Path) -> Any:
    """config.pbtxt as Triton reads it: an unknown key or a wrong type raises."""
    return text_format.Parse((model / "config.pbtxt").read_text(), schema().ModelConfig())


def changed(bundle: Path, **changes: Any) -> Path:
    """The bundle with another manifest, and signed again with the files that are there."""
    values = read_json(bundle / "bundle.json") | changes
    sign(bundle, from_dict(Manifest, values))
    return bundle


def tensors(entries: Any) -> list[tuple[str, str, list[Any]]]:
    names = schema().DataType.Name
    return [(one.name, TYPES[names(one.data_type)], [-1, *one.dims]) for one in entries]


def in_file(found: Any) -> list[tuple[str, str, list[Any]]]:
    return [(one.name, one.type, [size if isinstance(size, int) else -1 for size in one.shape]) for one in found]


def same_files(left: Path, right: Path) -> bool:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    return all(sha256(left / name) == sha256(right / name) for name in names)


def test_a_classifier_s_description_is_that_of_the_file_that_was_copied(bundle: Path, tmp_path: Path) -> None:
    version = write_triton(bundle, tmp_path / "repository")
    assert version == tmp_path / "repository" / "bundle" / "1"
    assert same_files(version, bundle)
    found = described(version.parent)
    session = onnxruntime.InferenceSession(version / "model.onnx")
    assert tensors(found.input) == in_file(session.get_inputs())
    assert tensors(found.output) == in_file(session.get_outputs())
    assert (found.name, found.backend) == ("bundle", "onnxruntime")
    assert (found.max_batch_size, found.dynamic_batching.default_queue_policy.max_queue_size) == (16, 64)
    assert [group.count for group in found.instance_group] == [1]
    assert found.output[0].label_filename == "labels.txt"
    assert (version.parent / "labels.txt").read_text().splitlines() == list(read_manifest(bundle).labels)
    assert sorted(path.name for path in (tmp_path / "repository").iterdir()) == ["bundle"]
    # What stands there is a bundle still, for every verb that takes one.
    image = encode_png(smooth(40, 48, 1))
    assert Predictor(version).predict(image) == Predictor(bundle).predict(image)


def passed(bundle: Path) -> Path:
    write_json(bundle / "verify.json", {"passed": True, "checks": []})
    return changed(bundle)


def test_a_detector_s_outputs_have_no_labels_by_place(tmp_path: Path) -> None:
    bundle = passed(hand_bundle(tmp_path / "boxes", "segment", [encode_png(smooth(48, 64, 1))]))
    changed(bundle, labels=tuple("abcdef"))  # as many as boxes
    found = described(write_triton(bundle, tmp_path / "repository").parent)
    names = ["boxes", "scores", "labels", "objectness", "masks"]
    sizes = [[6, 4], [6], [6], [6], [6, 28, 28]]
    assert [(output.name, list(output.dims)) for output in found.output] == list(zip(names, sizes, strict=True))
    kinds = [schema().DataType.Name(output.data_type) for output in found.output]
    assert kinds == ["TYPE_FP32", "TYPE_FP32", "TYPE_INT64", "TYPE_FP32", "TYPE_FP32"]
    assert [output.label_filename for output in found.output] == [""] * 5


def test_a_file_of_one_batch_size_is_refused(bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(bundle / "model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, bundle / "model.onnx")
    with pytest.raises(BundleError, match=r"images is tensor\(uint8\) \[1, .*expected a batch of any size"):
        write_triton(changed(bundle), tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_a_label_of_two_lines_keeps_its_place(bundle: Path, tmp_path: Path) -> None:
    labels = ("one\ntwo", *read_manifest(bundle).labels[1:])
    version = write_triton(changed(bundle, labels=labels), tmp_path / "repository")
    assert (version.parent / "labels.txt").read_text().splitlines() == ["one two", *labels[1:]]


def test_another_export_is_the_next_version_and_the_same_one_is_there_already(bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    first = write_triton(bundle, repository)
    config = first.parent / "config.pbtxt"
    config.write_text(config.read_text() + "version_policy { all {} }\n")
    text, before = config.read_text(), sha256(first / "bundle.json")
    assert write_triton(bundle, repository) == first
    # Triton passes over these; so does what counts versions.
    for other in ("007", "notes"):
        (first.parent / other).mkdir()
    changed(bundle, data={"name": "other"})
    second = write_triton(bundle, repository)
    assert second.name == "2"
    assert same_files(second, bundle)
    assert (sha256(first / "bundle.json"), config.read_text()) == (before, text)
    second.rename(second.with_name("10"))
    assert write_triton(bundle, repository).name == "10"
    changed(bundle, data={"name": "third"})
    assert write_triton(bundle, repository).name == "11"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "repository"]


def test_nothing_but_the_whole_version_is_ever_in_the_repository(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    write_triton(bundle, repository)
    changed(bundle, data={"name": "other"})
    seen = []
    write = triton.write_atomic

    def watched(path: Path, data: bytes) -> None:
        seen.append(sorted(path.relative_to(repository).as_posix() for path in repository.rglob("*")))
        write(path, data)

    monkeypatch.setattr(triton, "write_atomic", watched)
    before = sorted(path.relative_to(repository).as_posix() for path in repository.rglob("*"))
    write_triton(bundle, repository)
    assert seen == [before] * 4


def test_a_repository_is_written_where_the_command_stands(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    assert write_triton(bundle, ".").resolve() == tmp_path / "repository" / "bundle" / "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "repository"]


def test_what_is_no_such_model_is_not_overwritten(bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    (repository / "bundle" / "1").mkdir(parents=True)
    with pytest.raises(ConfigError, match="it is not overwritten"):
        write_triton(bundle, repository)
    shutil.rmtree(repository / "bundle")
    version = write_triton(bundle, repository)
    labels = read_manifest(bundle).labels
    changed(bundle, labels=labels[::-1])
    with pytest.raises(ConfigError, match=r"labels\.txt has other labels.*another name"):
        write_triton(bundle, repository)
    changed(bundle, labels=labels)
    # A version by somebody else is no bundle.
    hand = hand_bundle(tmp_path / "hand", "pose", [encode_png(smooth(48, 64, 1))])
    (version / "bundle.json").unlink()
    shutil.copy(hand / "model.onnx", version)
    with pytest.raises(ConfigError, match=r"inputs images TYPE_UINT8 \[48, 64, 3\], the bundle images TYPE_UINT8 \[32"):
        write_triton(bundle, repository)
    renamed = bundle.rename(tmp_path / "other")
    assert write_triton(renamed, repository) == repository / "other" / "1"
    assert sorted(path.name for path in version.parent.iterdir()) == ["1", "config.pbtxt", "labels.txt"]


@pytest.mark.parametrize("name", ["a b", ".hidden", "a/b"])
def test_a_name_that_can_t_be_served_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="can't be the name of a model"):
        write_triton(bundle, tmp_path / "repository", name)
    assert write_triton(bundle, tmp_path / "repository", "cats.v2").parent.name == "cats.v2"


def test_only_what_the_gate_has_passed_is_written(bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    with pytest.raises(BundleError, match=r"onnxruntime.*Export with --runtimes onnxruntime"):
        write_triton(changed(bundle, runtimes={"openvino": 35.0}), repository)
    check = {"name": "golden", "passed": False, "found": "6 dB", "expected": "35 dB", "hint": "Export again."}
    write_json(bundle / "verify.json", {"passed": False, "checks": [check]})
    with pytest.raises(VerificationError, match="check 'golden' failed: 6 dB"):
        write_triton(changed(bundle, runtimes={}), repository)
    (bundle / "verify.json").unlink()
    with pytest.raises(VerificationError, match=r"no verify\.json"):
        write_triton(changed(bundle), repository)
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(data)
    with pytest.raises(VerificationError, match="SHA-256"):
        write_triton(bundle, repository)
    assert not repository.exists()


@pytest.mark.parametrize(("profile", "told"), [("fp32", False), ("w4a16", False), ("w8a8", True), ("exact", True)])
def test_profiles_on_int8_kernels_are_told_to_saturate(bundle: Path, tmp_path: Path, profile: str, told: bool) -> None:
    assert saturates(read_manifest(changed(bundle, profile=profile))) is told
    text = (write_triton(bundle, tmp_path / "repository").parent / "config.pbtxt").read_text()
    assert ("without VNNI" in text) is told


def test_the_verb_adds_a_bundle_that_is_there(bundle: Path, tmp_path: Path, leanvit: Callable[..., Any]) -> None:
    repository = tmp_path / "repository"
    done = leanvit("export", bundle, "--triton", repository)
    assert done.code == 0, done.err
    assert f"triton model {repository / 'bundle'}, version 1" in done.out
    assert f"--model-repository={repository}" in done.out
    refused = leanvit("export", bundle, "--triton", repository, "--profile", "w8a8", "--smallest")
    assert refused.code == 2
    assert "--profile, --smallest: of an export" in refused.err
    assert leanvit("export", bundle).code == 3


def test_the_verb_exports_and_adds_in_one_go(micro_model: Any, tmp_path: Path, leanvit: Callable[..., Any]) -> None:
    repository = tmp_path / "repository"
    save_checkpoint(
        tmp_path / "net.safetensors", micro_model, CheckpointInfo("revit_micro", LABELS, Preprocess((32, 32)))
    )
    done = leanvit("export", tmp_path / "net.safetensors", "--output", tmp_path / "cats", "--triton", repository)
    assert done.code == 0, done.err
    assert same_files(repository / "cats" / "1", tmp_path / "cats")
