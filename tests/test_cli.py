"""The command line: one line for every bad input, the exit code of docs/errors.md, and nothing lost."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common import LABELS, Outcome, save_image, smooth
from leanvit import cli
from leanvit.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from leanvit.cli import VERBS, main, parse
from leanvit.config import Preprocess, load_yaml
from leanvit.data.loader import load_split
from leanvit.errors import ConfigError

Run = Callable[..., Outcome]
PREPROCESS = Preprocess(input_size=(32, 32))


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def short_training(image_folder: Callable[..., Path], tmp_path: Path) -> list[str]:
    """Arguments of a training that takes about a second and writes to tmp_path/run."""
    data = image_folder("animals", cat=4, dog=4)
    flags = ["--epochs", "1", "--batch-size", "4", "--amp", "none", "--device", "cpu"]
    return ["train", "--data", str(data), "--output", str(tmp_path / "run"), *flags]


@pytest.fixture
def checkpoint(micro_model: torch.nn.Module, tmp_path: Path) -> Path:
    """A good checkpoint with ten classes."""
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, micro_model, CheckpointInfo("revit_micro", LABELS, PREPROCESS))
    return path


# --- Deliver 6 of issue 2: a missing folder ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--data", "{}/gone"], ["data '{}/gone': no such folder", "expected an image folder", "--data"]),
        (["predict", "{}/bundle", "{}/gone"], ["{}/gone: no such file or folder", "Check the path"]),
        (["predict", "{}/gone", "{}/photo.png"], ["{}/gone/bundle.json: No such file", "expected a bundle", "export"]),
        (["verify", "{}/gone"], ["{}/gone/bundle.json: No such file", "expected a bundle folder"]),
        (["val", "{}/gone"], ["{}/gone: no such checkpoint", "expected a safetensors file", "leanvit train"]),
        (["quantize", "{}/gone", "--output", "{}/q"], ["{}/gone: no such checkpoint", "leanvit train"]),
        (["export", "{}/gone", "--output", "{}/b"], ["{}/gone: no such checkpoint", "leanvit train"]),
        (["report", "{}/gone"], ["{}/gone"]),
        (["benchmark", "{}/gone"], ["{}/gone: no such checkpoint"]),
    ],
)
@pytest.mark.usefixtures("photo", "bundle")
def test_a_missing_folder_is_named_and_exits_3(
    arguments: list[str], words: list[str], tmp_path: Path, leanvit: Run
) -> None:
    before = digest(tmp_path)
    extra = ["--output", str(tmp_path / "run")] if arguments[0] == "train" else []
    done = leanvit(*(argument.format(tmp_path) for argument in arguments), *extra)
    assert done.code == 3
    for word in words:
        assert word.format(tmp_path) in done.error
    assert done.out == ""
    assert digest(tmp_path) == before


# --- an empty class, a corrupt image, a 1x1 image ------------------------------------------------------------


def bad_training_leaves_the_run_as_it_was(arguments: list[str], run: Path, leanvit: Run) -> Outcome:
    run.mkdir()
    (run / "model.safetensors").write_bytes(b"of an earlier run")
    done = leanvit(*arguments)
    assert digest(run) == {"model.safetensors": hashlib.sha256(b"of an earlier run").hexdigest()}
    return done


def test_an_empty_class_is_named_and_exits_3(short_training: list[str], tmp_path: Path, leanvit: Run) -> None:
    (tmp_path / "animals" / "eel").mkdir()
    done = bad_training_leaves_the_run_as_it_was(short_training, tmp_path / "run", leanvit)
    assert done.code == 3
    for word in ("animals/eel", "class 'eel' has no images", "expected at least one file ending in", "Add images"):
        assert word in done.error


def damage(path: Path, kind: str) -> str:
    """Replace an image by a bad one; returns what the error must say of it."""
    if kind == "1x1":
        save_image(path, np.zeros((1, 1, 3), np.uint8))
        return "1 x 1 pixels, expected at least 2 on each side. Remove"
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:300])
        return "damaged image"
    path.write_bytes(b"this is a text")
    return "not an image that can be read, expected JPEG, PNG, WebP, BMP or TIFF"


KINDS = ["cut", "text", "1x1"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_stops_training_with_3_and_says_how_to_go_on(
    kind: str, short_training: list[str], tmp_path: Path, leanvit: Run
) -> None:
    victim = tmp_path / "animals" / "dog" / "1.png"
    words = damage(victim, kind)
    done = bad_training_leaves_the_run_as_it_was(short_training, tmp_path / "run", leanvit)
    assert done.code == 3
    for word in (str(victim), words, "--bad-images skip"):
        assert word in done.error


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_is_left_out_of_training_and_listed_where_asked(
    kind: str, short_training: list[str], tmp_path: Path, leanvit: Run
) -> None:
    victim = tmp_path / "animals" / "dog" / "1.png"
    damage(victim, kind)
    done = leanvit(*short_training, "--bad-images", "skip")
    assert done.code == 6, done.err
    left_out = json.loads((tmp_path / "run" / "train.json").read_text())["left_out"]
    assert [*left_out["train"], *left_out["val"]] == [str(victim)]
    assert str(victim) in done.err


def test_quantize_export_and_verify_leave_bad_images_out_where_asked(
    short_training: list[str], image_folder: Callable[..., Path], tmp_path: Path, leanvit: Run
) -> None:
    folder = image_folder("more", cat=24, dog=24)  # more than the 32 that the gate asks to calibrate on
    assert leanvit(*short_training, "--data", str(folder)).code == 0
    run, quantized, bundle = (tmp_path / name for name in ("run", "w8a8", "bundle"))
    info = load_checkpoint(run / "model.safetensors")[1]
    how = {"val_fraction": info.val_fraction, "seed": info.seed}
    victims = [load_split(str(folder), split, **how).name_of(0) for split in ("train", "val")]
    for victim in victims:
        damage(Path(victim), "cut")
    verbs = {
        "quantize": ["quantize", str(run), "--data", str(folder), "--output", str(quantized)],
        "export": ["export", str(quantized), "--data", str(folder), "--output", str(bundle), "--max-drop", "100"],
        "verify": ["verify", str(bundle), "--data", str(folder)],
    }
    read = {"quantize": victims, "export": victims[1:], "verify": victims[1:]}
    for verb, arguments in verbs.items():
        failed = leanvit(*arguments)
        assert failed.code == 3
        assert "--bad-images skip" in failed.error
        done = leanvit(*arguments, "--bad-images", "skip")
        assert done.code == 6, done.err
        assert all(victim in done.err for victim in read[verb])
    held_out = len(load_split(str(folder), "val", **how))
    assert json.loads((bundle / "bundle.json").read_text())["accuracy"]["images"] == held_out - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_among_good_ones_is_skipped_by_predict_with_6(
    kind: str, shared_bundle: Path, photo: Path, tmp_path: Path, leanvit: Run
) -> None:
    victim, other = (save_image(tmp_path / name, smooth(20, 20, seed=1)) for name in ("bad.png", "other.png"))
    words = damage(victim, kind)
    done = leanvit("predict", shared_bundle, photo, victim, other)
    assert done.code == 6
    assert "1 of 3 images could not be read and were skipped" in done.error
    assert [line for line in done.err.splitlines() if str(victim) in line and words in line]
    assert [line.split(":")[0] for line in done.out.splitlines()] == [str(photo), str(other)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_alone_exits_3(kind: str, shared_bundle: Path, photo: Path, leanvit: Run) -> None:
    words = damage(photo, kind)
    done = leanvit("predict", shared_bundle, photo)
    assert done.code == 3
    assert done.out == ""
    assert str(photo) in done.error
    assert words in done.error


# --- a 16-bit PNG, a CMYK JPEG -------------------------------------------------------------------------------


def labels(outcome: Outcome) -> list[Any]:
    return [json.loads(line)["predictions"] for line in outcome.out.splitlines()]


def test_a_16_bit_png_is_classified_as_its_8_bit_twin_with_a_note(
    shared_bundle: Path, tmp_path: Path, leanvit: Run
) -> None:
    grey = smooth(40, 48, seed=8)[:, :, 0]
    twin, deep = tmp_path / "twin.png", tmp_path / "deep.png"
    Image.fromarray(grey).save(twin)
    Image.fromarray(grey.astype(np.uint16) * 257).save(deep)
    with Image.open(deep) as image:
        assert image.mode == "I;16"
    done = leanvit("predict", shared_bundle, deep, twin, "--format", "jsonl", "--top-k", 10)
    assert done.code == 0
    assert labels(done)[0] == labels(done)[1]
    assert done.err.splitlines() == [f"{deep}: 16-bit image scaled to 8 bits"]


def test_a_cmyk_jpeg_is_classified_as_its_rgb_twin_with_a_note(
    shared_bundle: Path, tmp_path: Path, leanvit: Run
) -> None:
    rgb = Image.fromarray(smooth(40, 48, seed=9))
    rgb.save(tmp_path / "twin.png")
    rgb.convert("CMYK").save(tmp_path / "inks.jpg", quality=100, subsampling=0)
    done = leanvit("predict", shared_bundle, tmp_path / "inks.jpg", tmp_path / "twin.png", "--format", "jsonl")
    assert done.code == 0
    (found,), (truth,) = labels(done)
    assert found["label"] == truth["label"]
    assert abs(found["probability"] - truth["probability"]) < 0.05
    assert done.err.splitlines() == [f"{tmp_path}/inks.jpg: CMYK image converted to RGB without its colour profile"]


def test_training_takes_16_bit_and_cmyk_images_with_a_note(
    short_training: list[str], tmp_path: Path, leanvit: Run
) -> None:
    deep = (np.linspace(0, 1, 1024).reshape(32, 32) * 65535).astype(np.uint16)
    for number in range(4):
        Image.fromarray(deep).save(tmp_path / "animals" / "dog" / f"{number}.png")
        (tmp_path / "animals" / "cat" / f"{number}.png").unlink()
        cmyk = Image.fromarray(smooth(32, 32, seed=number)).convert("CMYK")
        cmyk.save(tmp_path / "animals" / "cat" / f"{number}.jpg")
    done = leanvit(*short_training)
    assert done.code == 0, done.err
    assert "16-bit image scaled to 8 bits" in done.err
    assert "CMYK image converted to RGB" in done.err


# --- NaN in a checkpoint -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("verb", ["val", "export", "quantize", "train"])
def test_a_checkpoint_that_is_not_finite_is_refused_with_3(
    verb: str, value: float, checkpoint: Path, short_training: list[str], tmp_path: Path, leanvit: Run
) -> None:
    tensors = load_file(checkpoint)
    with safe_open(checkpoint, "pt") as file:
        metadata = {key: text for key, text in file.metadata().items() if key != "sha256"}
    tensors["head.weight"][3, 5] = value
    tensors["head.weight"][0, 0] = value
    save_file(tensors, checkpoint, metadata)
    output = tmp_path / "run"
    output.mkdir()
    (output / "bundle.json").write_text("of an earlier run")
    before = digest(tmp_path)
    arguments = {
        "val": ["val", checkpoint],
        "export": ["export", checkpoint, "--output", output],
        "quantize": ["quantize", checkpoint, "--output", output],
        "train": [*short_training, "--initial-checkpoint", checkpoint],
    }[verb]
    done = leanvit(*arguments)
    assert done.code == 3
    for word in (str(checkpoint), "2 values of 'head.weight' are NaN or infinite", "expected finite", "Use an earlier"):
        assert word in done.error
    assert digest(tmp_path) == before


@pytest.mark.parametrize("position", [0.02, 0.5, 0.99])
def test_a_checkpoint_with_a_changed_byte_is_refused_with_3(position: float, checkpoint: Path, leanvit: Run) -> None:
    data = bytearray(checkpoint.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + int(position * (len(data) - start))] ^= 1
    checkpoint.write_bytes(data)
    done = leanvit("val", checkpoint)
    assert done.code == 3
    assert str(checkpoint) in done.error
    assert "differ from their SHA-256" in done.error


def test_a_checkpoint_that_is_cut_or_no_checkpoint_is_refused_with_3(checkpoint: Path, leanvit: Run) -> None:
    whole = checkpoint.read_bytes()
    for data in (whole[:-1], whole[:100], b"", b"PK\3\4 a pickle"):
        checkpoint.write_bytes(data)
        done = leanvit("val", checkpoint)
        assert done.code == 3
        assert f"{checkpoint}: not a readable safetensors file" in done.error


# --- an unknown model, an unknown flag -----------------------------------------------------------------------


def test_an_unknown_model_is_answered_with_the_nearest_name_and_2(
    short_training: list[str], tmp_path: Path, leanvit: Run
) -> None:
    arguments = [*short_training, "--model", "revit_mirco"]
    done = bad_training_leaves_the_run_as_it_was(arguments, tmp_path / "run", leanvit)
    assert done.code == 2
    assert done.error == "leanvit: Unknown model 'revit_mirco'. Did you mean 'revit_micro'? Run: leanvit models"


def test_no_model_that_matches_a_pattern_is_answered_with_2(leanvit: Run) -> None:
    done = leanvit("models", "revit_mirco")
    assert done.code == 2
    assert "no model matches 'revit_mirco'. Did you mean 'revit_micro'?" in done.error


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "unknown verb 'trian'. Did you mean 'train'? Run: leanvit --help"),
        (["--bogus"], "unknown verb '--bogus'. Run: leanvit --help"),
        (["train", "--epohcs", "3"], "unknown flag --epohcs. Did you mean '--epochs'? Run: leanvit train --help"),
        (["train", "--epohcs=3"], "unknown flag --epohcs. Did you mean '--epochs'? Run: leanvit train --help"),
        (["train", "extra"], "unknown flag extra. Run: leanvit train --help"),
        (["train", "--epochs"], "argument --epochs: expected one argument Run: leanvit train --help"),
        (["train", "--epochs", "x"], "--epochs is wrong: expected int. Got value: x Run: leanvit train --help"),
        (["train", "--batch-size", "x"], "--batch-size is wrong: expected int. Got value: x Run: leanvit train --help"),
        (["train", "--epochs", "0"], "epochs is 0, expected at least 1"),
        (["train", "--seed", "-1"], "seed is -1, expected at least 0"),
        (["train", "--lr", "-0.1"], "lr is -0.1, expected more than 0"),
        (["train", "--crop-scale", "0.5"], "argument --crop-scale: expected 2 arguments Run: leanvit train --help"),
        (["predict"], "no bundle given, expected one. Run: leanvit predict --help"),
        (["export"], "no model given, expected one. Run: leanvit export --help"),
        (["predict", "bundle"], "no images given. Run: leanvit predict BUNDLE IMAGE..."),
        (["benchmark"], "no targets to time. Give bundles or checkpoints: leanvit benchmark BUNDLE CHECKPOINT"),
        (["quantize", "x", "--weight-bits", "9"], "weight_bits is 9, expected 2 to 8"),
        (["train", "--config"], "argument --config: expected one argument Run: leanvit train --help"),
    ],
)
def test_a_wrong_command_is_answered_with_one_line_and_2(arguments: list[str], line: str, leanvit: Run) -> None:
    done = leanvit(*arguments)
    assert (done.code, done.out, done.err) == (2, "", f"leanvit: {line}\n")


def test_a_wrong_choice_names_the_choices(leanvit: Run) -> None:
    done = leanvit("train", "--amp", "fp16")
    assert done.code == 2
    for word in ("--amp", "fp16", "auto", "bfloat16", "none"):
        assert word in done.error
    assert "typing" not in done.error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epohcs: 3", ["unknown key 'epohcs'. Did you mean 'epochs'?"]),
        ("3: 3", ["unknown key '3'."]),
        ("epochs: many", ["epochs is 'many', expected int"]),
        ("lr: .nan", ["lr is nan, expected a finite number"]),
        ("version: 2", ["version is 2, this leanvit reads version 1"]),
        ("a: b: c", ["not valid YAML", "line 1"]),
        ("- 1", ["holds list, expected keys and values"]),
        (None, ["No such file or directory"]),
    ],
)
@pytest.mark.parametrize("spelling", ["--config={}", "--config {}"])
def test_a_wrong_config_file_is_named_with_2(
    text: str | None, words: list[str], spelling: str, tmp_path: Path, leanvit: Run
) -> None:
    path = tmp_path / "train.yaml"
    if text is not None:
        path.write_text(text)
    done = leanvit("train", *spelling.format(path).split())
    assert done.code == 2
    for word in (str(path), *words):
        assert word in done.error


# --- a bundle with a changed byte ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "verify.json", "bundle.json"])
@pytest.mark.parametrize("position", [0.0, 0.1, 0.37, 0.62, 0.999])
def test_a_bundle_with_a_changed_byte_is_refused_with_5(
    name: str, position: float, bundle: Path, photo: Path, leanvit: Run
) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[int(position * len(data))] ^= 4
    (bundle / name).write_bytes(data)
    before = digest(bundle)
    for arguments in (["predict", bundle, photo], ["verify", bundle]):
        done = leanvit(*arguments)
        assert done.code == 5
        assert done.out == ""
        for word in (str(bundle / name), "SHA-256", "changed or damaged", "Copy the bundle again or export"):
            assert word in done.error
    assert digest(bundle) == before


def test_every_changed_byte_of_a_manifest_is_found(bundle: Path) -> None:
    from leanvit.errors import LeanvitError
    from leanvit.runtime.bundle import read_manifest

    path = bundle / "bundle.json"
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        data = bytearray(good)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises(LeanvitError) as caught:
            read_manifest(bundle)
        assert caught.value.exit_code == 5
    path.write_bytes(good)
    assert read_manifest(bundle).labels == LABELS


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "verify.json", "bundle.json"])
def test_a_bundle_without_one_of_its_files_is_refused_with_3(
    name: str, bundle: Path, photo: Path, leanvit: Run
) -> None:
    (bundle / name).unlink()
    for arguments in (["predict", bundle, photo], ["verify", bundle]):
        done = leanvit(*arguments)
        assert done.code == 3
        assert str(bundle / name) in done.error


def test_a_good_bundle_is_verified_with_0(shared_bundle: Path, leanvit: Run) -> None:
    before = digest(shared_bundle)
    done = leanvit("verify", shared_bundle)
    assert done.code == 0, done.err
    assert "passed" in done.out
    assert "FAILED" not in done.out
    assert digest(shared_bundle) == before


# --- no disk space -------------------------------------------------------------------------------------------


def test_a_full_disk_stops_training_with_4_and_keeps_the_best_checkpoint(
    short_training: list[str], tiny_disk: Path, leanvit: Run
) -> None:
    # A small network, so that the best weights fit on the disk of 1 MB and the optimizer's state does not.
    output = tiny_disk / "run"
    small = ["--model", "mobilenetv3_small_050", "--img-size", "32", "--output", str(output), "--epochs", "2"]
    del small[1]
    small.insert(1, "tinynet_e")
    done = leanvit(*short_training, *small)
    assert done.code == 4, done.err
    for word in (str(tiny_disk), "no space left on the disk", "bytes needed", "Free some space"):
        assert word in done.error
    assert not [path.name for path in output.iterdir() if path.name.endswith(".tmp")]


def test_no_space_left_keeps_the_old_checkpoint_and_exits_4(
    short_training: list[str], tmp_path: Path, leanvit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert leanvit(*short_training).code == 0
    run = tmp_path / "run"
    before = {name: hashed for name, hashed in digest(run).items() if name != ".lock"}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = leanvit(*short_training, "--epochs", "2")
    assert done.code == 4
    assert "no space left on the disk" in done.error
    assert "what was written before is kept" in done.error
    assert {name: hashed for name, hashed in digest(run).items() if name != ".lock"} == before
    assert load_checkpoint(run)[1].labels == ("cat", "dog")


def test_a_full_standard_output_is_one_line_and_4(shared_bundle: Path, photo: Path) -> None:
    for arguments in (["predict", str(shared_bundle), str(photo)], ["--help"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-m", "leanvit", *arguments], stdout=full, stderr=subprocess.PIPE,
                                  text=True, check=False)  # fmt: skip
        assert done.returncode == 4
        assert done.stderr.splitlines()[-1:] == [
            "leanvit: standard output or a file: No space left on device. Free some space or write elsewhere."
        ]
        assert "Exception ignored" not in done.stderr


def test_a_closed_pipe_is_no_error() -> None:
    process = subprocess.Popen([sys.executable, "-m", "leanvit", "--help"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


# --- ctrl-C and SIGTERM --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_stopped_training_keeps_its_checkpoint_and_goes_on_with_resume(
    number: signal.Signals, code: int, word: str, short_training: list[str], tmp_path: Path, leanvit: Run
) -> None:
    command = [sys.executable, "-m", "leanvit", *short_training, "--epochs", "100000"]
    # A shell's background job, as this test may be, ignores ctrl-C, and so would all that it starts.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    log = tmp_path / "run" / "train.json"
    deadline = time.monotonic() + 120
    while not log.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert out == ""
    assert [line for line in err.splitlines() if line.startswith("leanvit:")] == [
        f"leanvit: {word}; what was finished before is kept. Go on with: leanvit train ... --resume"
    ]
    assert "Traceback" not in err
    assert load_checkpoint(tmp_path / "run")[1].labels == ("cat", "dog")
    assert not list((tmp_path / "run").glob("*.tmp"))
    with safe_open(tmp_path / "run" / "last.safetensors", "pt") as file:
        finished = json.loads(file.metadata()["leanvit_progress"])["epoch"]
    done = leanvit(*short_training, "--resume", "--epochs", finished + 1)
    assert done.code == 0, done.err
    assert json.loads(log.read_text())["history"][-1]["epoch"] == finished + 1


def test_an_interrupted_prediction_exits_130_without_speaking_of_resume(
    shared_bundle: Path, photo: Path, leanvit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **how: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("leanvit.runtime.predictor.Predictor.read", interrupt)
    done = leanvit("predict", shared_bundle, photo)
    assert done.code == 130
    assert done.error == "leanvit: interrupted; what was finished before is kept"


# --- other troubles of the machine, and bugs -----------------------------------------------------------------


def test_a_second_training_in_the_same_folder_exits_4_and_names_the_first(
    short_training: list[str], tmp_path: Path, leanvit: Run
) -> None:
    from leanvit.files import only_writer

    with only_writer(tmp_path / "run"):
        done = leanvit(*short_training)
    assert done.code == 4
    assert f"process {os.getpid()} is writing here" in done.error
    assert "choose another --output" in done.error


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            ModuleNotFoundError("No module named 'timm.x'", name="timm.x"),
            4,
            ["timm is not installed", "pip install timm"],
        ),
        (ModuleNotFoundError("no", name="onnxruntime"), 4, ['pip install "leanvit[onnx]"']),
        (ImportError("libx.so is missing", name="torch"), 4, ["torch is installed but can't be imported", "libx.so"]),
        (ImportError("cannot import name 'x'", name="leanvit.data"), 70, ["bug: ImportError"]),
        (MemoryError(), 4, ["out of memory", "--batch-size"]),
        (PermissionError(13, "Permission denied", "/root/x"), 4, ["/root/x: Permission denied", "rights"]),
        (OSError(28, "No space left on device"), 4, ["No space left on device"]),
        (OSError(28, "No space left on device", "/data/x"), 4, ["/data/x: no space left on the disk"]),
        (ValueError("two\nlines"), 70, ["bug: ValueError: two lines.", "--debug"]),
        (RecursionError("deep"), 70, ["bug: RecursionError"]),
    ],
)
def test_every_other_error_is_one_line_with_its_code(
    error: BaseException, code: int, words: list[str], leanvit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(error, monkeypatch)
    done = leanvit("models")
    assert done.code == code
    for word in words:
        assert word in done.error


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("wrong"), 2), (ValueError("odd"), 70), (KeyboardInterrupt(), 130)]
)
def test_debug_adds_the_traceback_and_keeps_line_and_code(
    error: BaseException, code: int, leanvit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(error, monkeypatch)
    plain = leanvit("models")
    for arguments in (["models", "--debug"], ["--debug", "models"]):
        done = leanvit(*arguments)
        assert done.code == plain.code == code
        assert "Traceback" in done.err
        assert done.err.splitlines()[-1] == plain.error
    assert "Traceback" not in plain.err


# --- parsing -------------------------------------------------------------------------------------------------


def test_help_lists_every_verb_and_no_arguments_are_a_usage_error(leanvit: Run) -> None:
    for arguments, code in ((["--help"], 0), (["-h"], 0), (["help"], 0), ([], 2)):
        done = leanvit(*arguments)
        assert done.code == code
        for verb in VERBS:
            assert f"\n  {verb} " in done.out


def test_version_is_the_package_s(leanvit: Run) -> None:
    from importlib.metadata import version

    done = leanvit("--version")
    assert (done.code, done.out) == (0, f"leanvit {version('leanvit')}\n")


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_shows_every_option(verb: str, leanvit: Run) -> None:
    from dataclasses import fields

    from leanvit import config
    from leanvit.config.base import flag_of

    done = leanvit(verb, "--help")
    assert done.code == 0
    for field in fields(getattr(config, VERBS[verb][0])):
        if field.name != "version":
            name = field.name if field.metadata.get("positional") else flag_of(field)
            assert name in done.out
    assert "--version" not in done.out


def test_the_module_can_be_run(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "leanvit", "trian"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


def test_flags_win_over_the_config_file_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("epochs: 3\nlr: 1e-4\ncrop_scale: [0.5, 0.9]\nimg_size: 64\npretrained: true\n")
    flags = ["--epochs", "30"]  # the default of the flag: given is given
    for arguments in ([*flags, "--config", path], ["--config", path, *flags], [f"--config={path}", *flags]):
        config = parse("train", [str(argument) for argument in arguments])
        assert (config.epochs, config.lr, config.crop_scale, config.img_size) == (30, 1e-4, (0.5, 0.9), 64)
        assert config.pretrained is True
        assert config.batch_size == 64


def test_positionals_may_stand_before_between_and_after_flags() -> None:
    for line in ("B x y --top-k 2", "B --top-k 2 x y", "--top-k 2 B x y", "--top-k=2 B x y", "B x --top-k 2 y"):
        config = parse("predict", line.split())
        assert (config.bundle, config.images, config.top_k) == ("B", ["x", "y"], 2)
    config = parse("verify", ["--json", "B", "--data", "digits"])
    assert (config.json, config.bundle, config.data) == (True, "B", "digits")
    assert parse("benchmark", ["a", "b", "--batch-sizes", "1", "8", "--rounds", "4"]).batch_sizes == (1, 8)
    assert parse("train", ["--degrees", "0", "--crop-scale", "0.5", "1"]).crop_scale == (0.5, 1.0)


def test_positionals_can_come_from_the_config_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("bundle: X\nimages: [a, b]\noutput: null\n")
    config = parse("predict", ["--config", str(path)])
    assert (config.bundle, config.images, config.output) == ("X", ["a", "b"], None)
    config = parse("predict", ["--config", str(path), "Y", "c"])
    assert (config.bundle, config.images) == ("Y", ["c"])
    path.write_text("filter: x*\n")
    assert parse("models", ["--config", str(path)]).filter == "x*"


def test_the_config_that_a_run_writes_repeats_that_run(short_training: list[str], tmp_path: Path, leanvit: Run) -> None:
    assert leanvit(*short_training, "--lr", "1e-3", "--crop-scale", "0.9", "1").code == 0
    written = tmp_path / "run" / "config.yaml"
    assert load_yaml(written)["lr"] == 0.001
    done = leanvit("train", "--config", written, "--output", tmp_path / "again")
    assert done.code == 0, done.err
    first, second = (load_yaml(tmp_path / name / "config.yaml") for name in ("run", "again"))
    assert second == first | {"output": str(tmp_path / "again")}
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "again")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_main_takes_the_arguments_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["leanvit", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("leanvit ")


def test_models_can_be_listed_and_filtered(leanvit: Run) -> None:
    done = leanvit("models", "revit_*", "--json")
    assert done.code == 0
    names = [entry["name"] for entry in json.loads(done.out)]
    assert "revit_micro" in names
    assert all(name.startswith("revit_") for name in names)


def test_models_show_what_is_counted_beside_what_the_authors_state(leanvit: Run) -> None:
    (entry,) = json.loads(leanvit("models", "revit_base*", "--json").out)
    assert entry["params"] == entry["paper_params"] == 86_566_121
    assert entry["macs"] == 17.471649792
    assert (entry["paper_macs"], entry["paper_top1"]) == (17.47, 82.4)
    done = leanvit("models", "revit_[bm]*")
    base, micro = (line.split("│")[2:-1] for line in done.out.splitlines() if "│ revit_" in line)
    assert [cell.strip() for cell in base] == ["224x224", "86.566", "17.472", "86.566", "17.470", "82.4"]
    assert [cell.strip() for cell in micro] == ["32x32", "0.683", "0.047", "", "", ""]


def test_what_is_on_by_default_can_be_switched_off() -> None:
    on = parse("quantize", ["model.safetensors"])
    off = parse("quantize", ["--no-range-search", "model.safetensors", "--no-ratio-search"])
    assert (on.range_search, on.ratio_search) == (True, True)
    assert (off.range_search, off.ratio_search) == (False, False)
    assert off.model == "model.safetensors"
