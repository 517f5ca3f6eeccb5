"""leanvit predict: the same answers as torch, in every format, for every good image, without torch."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from common import LABELS, Outcome, save_image, smooth
from leanvit.config import PredictConfig
from leanvit.errors import ConfigError, DataError, EnvironmentProblem, PartialError
from leanvit.runtime import result_files as results
from leanvit.runtime.bundle import read_manifest, write_manifest
from leanvit.runtime.predict import find, run
from leanvit.runtime.predictor import Predictor
from leanvit.runtime.task import Options


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


@contextlib.contextmanager
def stopped_at(name: str, error: BaseException) -> Iterator[None]:
    """Let the decoding of the image of this name raise `error`."""
    real = Predictor.read

    def read(self: Predictor, path: Path, options: Options, **how: Any) -> Any:
        if path.name == name:
            raise error
        return real(self, path, options, **how)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Predictor, "read", read)
        yield


def test_an_interrupt_keeps_the_old_results_and_what_was_finished(
    shared_bundle: Path, photos: Path, tmp_path: Path, leanvit: Callable[..., Outcome]
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("old results\n")
    with stopped_at("4.png", KeyboardInterrupt()):
        done = leanvit("predict", shared_bundle, photos, "--format", "jsonl", "--output", output, "--batch-size", 2)
    assert done.code == 130
    assert "interrupted" in done.error
    assert output.read_text() == "old results\n"
    assert [Path(path).name for path in jsonl((tmp_path / "out.jsonl.partial").read_text())] == [
        "0.png", "1.png", "2.png", "3.png",
    ]  # fmt: skip
    assert "out.jsonl.partial: the results up to here; the same command with --resume goes on" in done.err


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


# --- very many images ----------------------------------------------------------------------------------------

COUNT, BAD = 300, frozenset(range(7, 300, 30))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 small images in three folders, ten of them corrupt."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(COUNT):
        path = folder / f"{number // 100}" / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        save_image(path, smooth(8 + number % 5, 9, seed=number))
        if number in BAD:
            path.write_bytes(path.read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def uninterrupted(many: Path, shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run over all of `many` writes, by format."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for kind in ("jsonl", "csv"):
        with pytest.raises(PartialError, match=r"^10 of 300 images"):
            run(large(shared_bundle, many, folder / kind, format=kind))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def large(bundle: Path, images: Path, output: Path, **options: Any) -> PredictConfig:
    """The run that the tests below interrupt."""
    config = PredictConfig(bundle=str(bundle), images=[str(images)], batch_size=8, format="jsonl", output=str(output))
    return replace(config, **options)


def test_every_good_image_of_many_is_in_the_output_in_order(uninterrupted: dict[str, bytes], many: Path) -> None:
    expected = [str(path) for path in sorted(many.rglob("*.png")) if int(path.stem) not in BAD]
    assert list(jsonl(uninterrupted["jsonl"].decode())) == expected
    rows = list(csv.reader(io.StringIO(uninterrupted["csv"].decode())))
    assert [row[0] for row in rows] == ["path", *expected]


class Counted(type(Path())):  # type: ignore[misc]
    """A path that knows how many of its kind there are."""

    alive = 0

    def __new__(cls, *parts: str) -> Counted:
        Counted.alive += 1
        return super().__new__(cls, *parts)  # type: ignore[no-any-return]

    def __del__(self) -> None:
        Counted.alive -= 1


def test_paths_are_taken_as_they_are_needed_and_forgotten_when_done(shared_bundle: Path, many: Path) -> None:
    taken = given = most = 0

    def paths() -> Iterator[Path]:
        nonlocal taken
        for path in sorted(map(str, many.rglob("*.png"))):
            taken += 1
            yield Counted(path)

    batch = None
    for batch in find(Predictor(shared_bundle), paths(), 8, Options(top_k=1)):
        given += len(batch)
        # Two batches are decoded ahead of the one that is handed over.
        assert taken <= given + 2 * 8 + 1
        most = max(most, Counted.alive)
    assert (taken, given) == (COUNT, COUNT)
    # The batch handed over before lives until the next one is asked for.
    assert most <= 4 * 8 + 2


def test_images_are_decoded_while_those_before_are_classified(
    shared_bundle: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = threading.Event()

    def read(self: Predictor, path: Path, options: Options, **how: Any) -> Any:
        if path.stem == "015":
            ahead.set()
        return self.inputs(smooth(8, 8, seed=0)), (), None

    def results(self: Predictor, pictures: Any, options: Options, batch_size: int) -> Any:
        assert ahead.wait(60), "the second batch is not decoded before the network runs on the first one"
        return [[("label", 1.0)]] * len(pictures)

    monkeypatch.setattr(Predictor, "read", read)
    monkeypatch.setattr(Predictor, "results", results)
    paths = sorted(many.rglob("*.png"))
    batches = list(find(Predictor(shared_bundle, check=False), paths, 8, Options(top_k=1)))
    assert sum(map(len, batches)) == COUNT


def test_a_list_names_the_images_in_its_order(shared_bundle: Path, many: Path, tmp_path: Path) -> None:
    names = [str(many / "2" / "200.png"), str(many / "missing.png"), str(many / "0" / "000.png")]
    (tmp_path / "list.txt").write_text("\n".join(names))
    with pytest.raises(PartialError, match=r"^1 of 3 images"):
        run(large(shared_bundle, Path(f"@{tmp_path / 'list.txt'}"), tmp_path / "out"))
    assert list(jsonl((tmp_path / "out").read_text())) == [names[0], names[2]]


KILLED = """
import os, signal, sys
from leanvit.cli import main
from leanvit.runtime import result_files as results
from leanvit.runtime.predictor import Predictor

def killing(function, last):
    calls = iter(range(last))
    def call(*arguments, **how):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **how)
    return call

results.SAVE_SECONDS = 0.0
where, last = sys.argv[1], int(sys.argv[2])
if where == "decode":
    Predictor.read = killing(Predictor.read, last)
else:
    setattr(os, where, killing(getattr(os, where), last))
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_run_killed_again_and_again_gives_the_file_of_a_run_that_was_not(
    kind: str, shared_bundle: Path, many: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    draft, journal = tmp_path / "out.partial", tmp_path / "out.partial.progress"
    command = ["predict", shared_bundle, many, "--batch-size", 8, "--format", kind, "--output", output, "--resume"]
    reached = []
    for where, last in (("decode", 70), ("fsync", 5), ("decode", 100), ("replace", 0)):
        arguments = [sys.executable, "-c", KILLED, where, last, *command]
        done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not output.exists()
        reached.append(json.loads(journal.read_text().splitlines()[-1])["images"])
        # A kill in the middle of a line, in either file.
        draft.write_bytes(draft.read_bytes() + b'{"path": "hal')
        journal.write_bytes(journal.read_bytes() + b'\n{"images": 29')
    assert 0 < reached[0] < reached[1] < reached[2] < reached[3] == COUNT
    done = subprocess.run(
        [sys.executable, "-m", *map(str, ["leanvit", *command])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 6, done.stderr
    assert "10 of 300 images could not be read" in done.stderr
    assert output.read_bytes() == uninterrupted[kind]
    assert os.listdir(tmp_path) == ["out"]


@pytest.fixture
def stopped(shared_bundle: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PredictConfig:
    """The configuration of a run that was interrupted in its middle; what it left is beside `output`."""
    monkeypatch.setattr(results, "SAVE_SECONDS", 0.0)
    config = large(shared_bundle, many, tmp_path / "out")
    with stopped_at("120.png", KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        run(config)
    return replace(config, resume=True)


def test_a_run_that_goes_on_decodes_only_what_is_left_and_counts_all_that_is_corrupt(
    stopped: PredictConfig, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []
    real = Predictor.read
    monkeypatch.setattr(
        Predictor, "read", lambda self, path, *how, **more: decoded.append(path) or real(self, path, *how, **more)
    )
    with pytest.raises(PartialError, match=r"^10 of 300 images could not be read"):
        run(stopped)
    assert sorted(path.name for path in decoded) == [f"{number:03}.png" for number in range(120, COUNT)]
    assert Path(str(stopped.output)).read_bytes() == uninterrupted["jsonl"]


def test_without_resume_a_run_starts_over(stopped: PredictConfig, uninterrupted: dict[str, bytes]) -> None:
    with stopped_at("050.png", KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        run(replace(stopped, resume=False))
    assert len(Path(f"{stopped.output}.partial").read_text().splitlines()) < 50
    with pytest.raises(PartialError, match=r"^10 of 300"):
        run(stopped)
    assert Path(str(stopped.output)).read_bytes() == uninterrupted["jsonl"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_k": 3}, "was written with top_k 1; found top_k 3"),
        ({"format": "csv"}, "was written with format jsonl; found format csv"),
        ({"batch_size": 9, "threads": 1}, "with batch_size 8, threads 0; found batch_size 9, threads 1"),
        ({"images": ["{}/0"]}, "was written with images ['"),
        ({"bundle": "{}"}, "was written with bundle "),
    ],
)
def test_what_differs_from_the_run_before_is_named(
    change: dict[str, Any], words: str, stopped: PredictConfig, bundle: Path, many: Path
) -> None:
    if "images" in change:
        change = {"images": [str(many / "0")]}
    if "bundle" in change:
        manifest = read_manifest(bundle)
        write_manifest(bundle, replace(manifest, labels=manifest.labels[::-1]))
        change = {"bundle": str(bundle)}
    before = {path: path.read_bytes() for path in bundle.parent.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match="Go on with the command that wrote it, or start over") as caught:
        run(replace(stopped, **change))
    assert words in str(caught.value)
    assert {path: path.read_bytes() for path in bundle.parent.iterdir() if path.is_file()} == before


def test_a_bundle_that_was_moved_is_the_same(
    stopped: PredictConfig, bundle: Path, uninterrupted: dict[str, bytes]
) -> None:
    with pytest.raises(PartialError):
        run(replace(stopped, bundle=str(bundle)))
    assert Path(str(stopped.output)).read_bytes() == uninterrupted["jsonl"]


def test_a_folder_that_changed_where_the_run_has_been_is_found(
    shared_bundle: Path, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "SAVE_SECONDS", 0.0)
    config = large(shared_bundle, photos, tmp_path / "out", batch_size=1)
    with stopped_at("5.png", KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        run(config)
    save_image(photos / "00.png", smooth(9, 9, seed=0))
    with pytest.raises(ConfigError, match="written for 5 images that are not the first ones now"):
        run(replace(config, resume=True))
    (photos / "00.png").rename(photos / "9.png")
    assert run(replace(config, resume=True)) == 8


def test_a_file_that_was_cut_by_another_is_not_gone_on_with(stopped: PredictConfig) -> None:
    os.truncate(f"{stopped.output}.partial", 100)
    with pytest.raises(DataError, match=r"partial: 100 bytes, expected at least \d+: the file was cut"):
        run(stopped)


def test_resume_starts_where_there_is_nothing_and_does_nothing_where_all_is_done(
    shared_bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = large(shared_bundle, photos, tmp_path / "out", resume=True)
    assert run(config) == 7
    whole = (tmp_path / "out").read_bytes()
    # What a kill between the last two steps leaves.
    (tmp_path / "out.partial.progress").write_text("{}")
    assert run(replace(config, top_k=2)) == 0
    assert "out: already there and whole, nothing to go on with" in capsys.readouterr().err
    assert (tmp_path / "out").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_resume_needs_a_file(shared_bundle: Path, photos: Path, leanvit: Callable[..., Outcome]) -> None:
    done = leanvit("predict", shared_bundle, photos, "--resume")
    assert done.code == 2
    assert "resume without output, expected the file of the run to go on with. Give --output FILE." in done.error
    with pytest.raises(ConfigError, match="expected a file: a device keeps no results"):
        run(large(shared_bundle, photos, Path("/dev/null"), resume=True))


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
