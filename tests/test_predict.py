"""leanvit predict: the same answers as torch, in every format, for every good image, without torch."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from conftest import LABELS, Outcome, save_image, smooth
from leanvit.config import PredictConfig
from leanvit.errors import ConfigError, DataError, EnvironmentProblem, PartialError
from leanvit.predict import run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of seven pictures of different sizes."""
    (tmp_path / "photos").mkdir()
    for number in range(7):
        save_image(tmp_path / "photos" / f"{number}.png", smooth(30 + 9 * number, 70 - 5 * number, seed=number))
    return tmp_path / "photos"


def truth(model: torch.nn.Module, path: Path) -> np.ndarray:
    """Probabilities by torch, with timm's own preprocessing."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with Image.open(path) as image, torch.inference_mode():
        return model(transform(image.convert("RGB"))[None]).softmax(1)[0].numpy()


def jsonl(text: str) -> dict[str, list[tuple[str, float]]]:
    lines = [json.loads(line) for line in text.splitlines()]
    return {line["path"]: [(p["label"], p["probability"]) for p in line["predictions"]] for line in lines}


def test_labels_and_probabilities_are_those_of_torch_with_timm_s_preprocessing(
    shared_bundle: Path, photos: Path, micro_model: torch.nn.Module, leanvit: Callable[..., Outcome]
) -> None:
    done = leanvit("predict", shared_bundle, photos, "--format", "jsonl", "--top-k", 10)
    assert done.code == 0
    found = jsonl(done.out)
    assert list(found) == [str(path) for path in sorted(photos.iterdir())]
    for path, best in found.items():
        expected = truth(micro_model, Path(path))
        assert len(best) == 10
        for label, probability in best:
            assert abs(probability - expected[LABELS.index(label)]) < 2e-4
        assert [p for _, p in best] == sorted((p for _, p in best), reverse=True)
        assert best[0][0] == LABELS[int(expected.argmax())]


def test_the_three_formats_say_the_same(shared_bundle: Path, photos: Path, leanvit: Callable[..., Outcome]) -> None:
    outputs = {kind: leanvit("predict", shared_bundle, photos, "--top-k", 2, "--format", kind).out
               for kind in ("text", "jsonl", "csv")}  # fmt: skip
    truth = jsonl(outputs["jsonl"])
    rows = list(csv.reader(io.StringIO(outputs["csv"])))
    assert rows[0] == ["path", "label", "probability"]
    flat = [(path, label, p) for path, best in truth.items() for label, p in best]
    assert [(path, label, float(p)) for path, label, p in rows[1:]] == flat
    assert outputs["text"].splitlines() == [
        f"{path}: " + ", ".join(f"{label} {p:.1%}" for label, p in best) for path, best in truth.items()
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_the_batch_size_changes_nothing(
    batch_size: int, shared_bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = run(PredictConfig(bundle=str(shared_bundle), images=[str(photos)], batch_size=batch_size, format="jsonl"))
    assert count == 7
    found = jsonl(capsys.readouterr().out)
    run(PredictConfig(bundle=str(shared_bundle), images=[str(photos)], format="jsonl", threads=1))
    for (path, best), (other, expected) in zip(found.items(), jsonl(capsys.readouterr().out).items(), strict=True):
        assert (path, best[0][0]) == (other, expected[0][0])
        assert abs(best[0][1] - expected[0][1]) < 1e-5


@pytest.mark.parametrize("batch_size", [1, 4])
def test_bad_images_are_named_and_every_other_one_is_in_the_output_in_order(
    batch_size: int, shared_bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "3.png").write_bytes(b"no image")
    (photos / "5.png").write_bytes((photos / "5.png").read_bytes()[:200])
    config = PredictConfig(bundle=str(shared_bundle), images=[str(photos)], batch_size=batch_size, format="jsonl")
    with pytest.raises(PartialError, match=r"^2 of 7 images could not be read"):
        run(config)
    captured = capsys.readouterr()
    assert [Path(path).name for path in jsonl(captured.out)] == ["0.png", "1.png", "2.png", "4.png", "6.png"]
    skipped = [line for line in captured.err.splitlines() if line.startswith("skipped ")]
    assert [str(photos / name) in line for name, line in zip(("3.png", "5.png"), skipped, strict=True)] == [True, True]


def test_no_readable_image_is_a_data_error_and_leaves_no_output(shared_bundle: Path, tmp_path: Path) -> None:
    bad = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in bad:
        path.write_bytes(b"no image")
    output = tmp_path / "out.csv"
    for images in (bad[:1], bad):
        config = PredictConfig(bundle=str(shared_bundle), images=[str(p) for p in images], format="csv",
                               output=str(output))  # fmt: skip
        with pytest.raises(DataError, match=r"a.png: not an image"):
            run(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_without_images_the_command_is_named(shared_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="Run: leanvit predict BUNDLE IMAGE"):
        run(PredictConfig(bundle=str(shared_bundle)))


def test_results_go_to_a_file_and_not_to_standard_output(
    shared_bundle: Path, photos: Path, tmp_path: Path, leanvit: Callable[..., Outcome]
) -> None:
    output = tmp_path / "new folder" / "out.jsonl"
    printed = leanvit("predict", shared_bundle, photos, "--format", "jsonl").out
    done = leanvit("predict", shared_bundle, photos, "--format", "jsonl", "--output", output)
    assert (done.code, done.out) == (0, "")
    assert output.read_text() == printed
    assert os.listdir(output.parent) == ["out.jsonl"]


def stop_after(count: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the decoding of the image after `count` raise `error`."""
    from leanvit import predict

    real, calls = predict.decode, []

    def decode(path: Path) -> Any:
        calls.append(path)
        if len(calls) > count:
            raise error
        return real(path)

    monkeypatch.setattr(predict, "decode", decode)


def test_an_interrupt_keeps_the_old_results_and_what_was_finished(
    shared_bundle: Path, photos: Path, tmp_path: Path, leanvit: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("old results\n")
    stop_after(4, KeyboardInterrupt(), monkeypatch)
    done = leanvit("predict", shared_bundle, photos, "--format", "jsonl", "--output", output, "--batch-size", 2)
    assert done.code == 130
    assert "interrupted" in done.error
    assert output.read_text() == "old results\n"
    assert [Path(path).name for path in jsonl((tmp_path / "out.jsonl.partial").read_text())] == [
        "0.png", "1.png", "2.png", "3.png",
    ]  # fmt: skip
    assert "out.jsonl.partial" in done.err


def test_a_full_disk_keeps_the_old_results(
    shared_bundle: Path, photo: Path, tiny_disk: Path, leanvit: Callable[..., Outcome]
) -> None:
    output = tiny_disk / "out.txt"
    output.write_text("old results\n")
    with (tiny_disk / "ballast").open("wb", buffering=0) as file:
        written = 1
        while written:
            try:
                written = file.write(b"x" * 4096)
            except OSError:
                break
    done = leanvit("predict", shared_bundle, photo, "--output", output)
    assert done.code == 4
    assert "out.txt: no space left on the disk" in done.error
    assert output.read_text() == "old results\n"


def test_an_output_folder_that_can_not_be_made_is_an_environment_error(shared_bundle: Path, photo: Path) -> None:
    config = PredictConfig(bundle=str(shared_bundle), images=[str(photo)], output=str(photo / "x" / "out.txt"))
    with pytest.raises(EnvironmentProblem, match=r"photo.png/x/out.txt: .* Choose another folder"):
        run(config)


def test_a_device_is_written_to_and_not_replaced(shared_bundle: Path, photo: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    run(PredictConfig(bundle=str(shared_bundle), images=[str(photo)], output=str(pipe)))
    out, _ = reader.communicate(timeout=60)
    assert out.startswith(f"{photo}: label ")
    assert pipe.is_fifo()


def test_a_name_that_is_not_utf_8_is_printed_readably(shared_bundle: Path, photo: Path) -> None:
    odd = os.fsencode(photo.parent) + b"/caf\xe9.png"
    os.rename(photo, odd)
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-m", "leanvit", "predict", str(shared_bundle), odd],
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rb"caf\xe9.png: label " in done.stdout


BLOCKED = ("torch", "torchvision", "timm", "jsonargparse", "rich", "yaml", "sklearn", "safetensors", "onnx")
BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ImportError(name + " is blocked", name=name)
sys.meta_path.insert(0, Blocker())
for name in {BLOCKED}:
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit("the blocker does not block " + name)
"""


def test_a_machine_with_onnxruntime_numpy_and_pillow_only_classifies(
    shared_bundle: Path, photos: Path, leanvit: Callable[..., Outcome]
) -> None:
    arguments = ["predict", str(shared_bundle), "--top-k", "3", str(photos), "--format", "jsonl"]
    code = f"{BLOCKER}\nfrom leanvit.cli import main\nsys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, expected = jsonl(done.stdout), jsonl(leanvit(*arguments).out)
    assert list(found) == list(expected)
    for path, best in found.items():
        assert [label for label, _ in best] == [label for label, _ in expected[path]]
        np.testing.assert_allclose([p for _, p in best], [p for _, p in expected[path]], atol=1e-5)


def test_the_python_api_classifies_there_as_well(shared_bundle: Path, photo: Path) -> None:
    code = f"{BLOCKER}\nfrom leanvit import Predictor\nprint(Predictor(sys.argv[1]).predict(sys.argv[2])[0][0])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(shared_bundle), str(photo)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in LABELS


def test_flags_and_errors_work_there_as_well(shared_bundle: Path, photo: Path) -> None:
    code = f"{BLOCKER}\nfrom leanvit.cli import main\nfor line in sys.stdin: print(main(eval(line)), flush=True)"
    lines = [
        ["predict", str(shared_bundle), str(photo), "--top-kk", "3"],
        ["predict", str(shared_bundle), str(photo), "--top-k", "x"],
        ["predict", str(shared_bundle), str(photo), "--format", "xml"],
        ["predict", str(shared_bundle), str(photo), "--top-k", "0"],
        ["predict", "/missing", str(photo)],
        ["predict"],
        ["train", "--epochs", "1"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(map(repr, lines)), capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["2", "2", "2", "2", "3", "2", "4"], done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == len(lines)
    for error, word in zip(
        errors,
        [
            "'--top-k'",
            "--top-k",
            "text, jsonl, csv",
            "at least 1",
            "/missing/bundle.json",
            "no bundle given",
            "pip install",
        ],
        strict=True,
    ):
        assert error.startswith("leanvit: ")
        assert word in error
