"""The page of `leanvit web` in headless Chromium: the answers of Predictor, and none where the file is not proved."""

from __future__ import annotations

import io
import json
import os
import shutil
from base64 import b64decode
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from skimage import data

from chromium import drive, plain_server, running, unavailable
from common import LABELS, ROOT, smooth
from hand_bundles import LABELS as HAND_LABELS
from hand_bundles import hand_bundle
from leanvit import MPTQConfig, Predictor, quantize
from leanvit.config import ExportOptions
from leanvit.errors import EnvironmentProblem
from leanvit.export.api import export
from leanvit.export.gate.golden import golden_set
from leanvit.runtime.bundle import load_golden, load_golden_records, read_manifest, save_golden, sign
from leanvit.web import onnxruntime_web
from leanvit.web.serving import open_server
from leanvit.web.site import write_site

pytestmark = pytest.mark.browser

PHOTOS = 24
PICTURE = ROOT / "docs" / "web.png"
TASKS = {"detect": {}, "segment": {"scoreThreshold": "0.2"}, "semantic": {}, "pose": {"boxes": "10 5 90 70 0 0 40 40"}}


def encoded(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def jpeg(number: int) -> bytes:
    """JPEGs of odd sizes as cameras and programs write them: subsampled or not, progressive, turned, grey."""
    rng = np.random.default_rng(number)
    height, width = (int(side) for side in rng.integers(9, 400, 2))
    pixels = smooth(height, width, seed=number)
    noise = rng.normal(0, 12, pixels.shape)
    pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    options: dict[str, Any] = {"quality": int(rng.integers(60, 98)), "subsampling": number % 3}
    if number % 4 == 1:
        options["progressive"] = True
    if number % 5 == 2:
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    return encoded(pixels[:, :, 0] if number % 7 == 3 else pixels, **options)


@pytest.fixture(scope="module")
def ort() -> str:
    """The package of onnxruntime-web, which npm downloads once."""
    try:
        return str(onnxruntime_web._downloaded())
    except EnvironmentProblem as error:
        unavailable(str(error))
        raise


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small ViT as float and W8A8."""
    folder = tmp_path_factory.mktemp("bundles")
    torch.manual_seed(0)
    form = {"embed_dim": 64, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 32, "num_classes": len(LABELS)}
    network = timm.create_model("vit_tiny_patch16_224", **form).eval()
    with torch.no_grad():
        network.head.weight.mul_(20.0)
    images = torch.stack([torch.from_numpy(smooth(32, 32, seed=i)).permute(2, 0, 1) for i in range(32)]) / 127.5 - 1
    quantized = quantize(network, images, MPTQConfig(weight_bits=8, activation_bits=8))
    fast = ExportOptions(profile="w8a8", min_speedup=0)
    return {
        "fp32": export(network, folder / "fp32", labels=LABELS),
        "w8a8": export(quantized, folder / "w8a8", fast, labels=LABELS),
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(PHOTOS):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    return sorted(folder.iterdir())


def changed_byte(site: Path) -> None:
    """One byte in the middle of the model."""
    model = site / "bundle" / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)


def other_logits(site: Path) -> None:
    """A whole bundle, signed, of which the recorded logits are those of another network."""
    folder = site / "bundle"
    images, logits = load_golden(folder)
    manifest = read_manifest(folder)
    save_golden(folder, images, logits[::-1], **load_golden_records(folder))
    sign(folder, manifest)


def other_pixels(site: Path) -> None:
    """A bundle that says another filter than the one that made its golden pixels."""
    folder = site / "bundle"
    text = (folder / "bundle.json").read_text(encoding="utf-8")
    assert '"bicubic"' in text
    (folder / "bundle.json").write_text(text.replace('"bicubic"', '"bilinear"'), encoding="utf-8")
    resigned(folder)


def resigned(folder: Path) -> None:
    from leanvit.config import from_dict
    from leanvit.runtime.bundle import Manifest

    values = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    sign(folder, from_dict(Manifest, values))


DAMAGE = {"changed byte": changed_byte, "other logits": other_logits, "other pixels": other_pixels}


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hand")
    images = [*golden_set(4, (48, 64)), tiff(smooth(40, 70, 3)), jpeg(5)]
    return {task: hand_bundle(folder / task, task, images) for task in TASKS}


def tiff(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "TIFF")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def told(
    tmp_path_factory: pytest.TempPathFactory,
    bundles: dict[str, Path],
    hand: dict[str, Path],
    photos: list[Path],
    ort: str,
) -> Iterator[dict[str, Any]]:
    """What Chromium saw in all scenes."""
    folder = tmp_path_factory.mktemp("sites")
    write_site(bundles["w8a8"], folder / "site", float_bundle=bundles["fp32"], onnxruntime_web=ort)
    broken = [folder / "a.txt", folder / "cut.jpg"]
    broken[0].write_text("no picture", encoding="utf-8")
    broken[1].write_bytes(photos[0].read_bytes()[:200])
    cat = folder / "chelsea.jpg"
    Image.fromarray(data.chelsea()).save(cat)
    picture = PICTURE if os.environ.get("LEANVIT_SCREENSHOTS") else folder / "web.png"
    with ExitStack() as stack:
        serve = lambda site: stack.enter_context(running(stack.enter_context(open_server(site))))  # noqa: E731
        refused = {}
        for name, damage in DAMAGE.items():
            damaged = Path(shutil.copytree(folder / "site", folder / name))
            damage(damaged)
            refused[name] = serve(damaged)
        tasks = {}
        for task, bundle in hand.items():
            write_site(bundle, folder / task, onnxruntime_web=ort)
            tasks[task] = {"site": serve(folder / task), "photo": str(photos[0]), "options": TASKS[task]}
        values = {
            "site": serve(folder / "site"), "plain": stack.enter_context(plain_server(folder / "site")),
            "photos": [str(path) for path in photos], "broken": [str(path) for path in broken],
            "refused": refused, "tasks": tasks,
            "picture": {"site": tasks["segment"]["site"], "photo": str(cat), "path": str(picture)},
        }  # fmt: skip
        yield drive("web_page.mjs", values, folder)


def test_labels_are_those_of_predictor(told: dict[str, Any], bundles: dict[str, Path], photos: list[Path]) -> None:
    predictor = Predictor(bundles["w8a8"])
    expected = {path.name: predictor.predict(path, top_k=1)[0][0] for path in photos}
    found = {card["name"]: card["first"] for card in told["answers"]["cards"]}
    assert len(set(expected.values())) > 2
    assert found == expected


def test_golden_images_return_what_was_recorded(told: dict[str, Any]) -> None:
    scene = told["answers"]
    assert scene["state"] == "ready"
    assert scene["isolated"]
    assert float(scene["verdict"].split(":")[1].split()[0]) >= 35


def test_the_page_says_nothing_on_the_console_and_asks_nobody_else(told: dict[str, Any]) -> None:
    for name in ("answers", "ways", "plain", *TASKS):
        said = told[name]["said"]
        assert said["elsewhere"] == [], name
        assert [text for text in said["console"] if "favicon" not in text] == [], name


def test_axe_finds_nothing(told: dict[str, Any]) -> None:
    for name, scene in told.items():
        assert scene.get("violations", []) == [], name


def test_the_keyboard_reaches_everything(told: dict[str, Any]) -> None:
    order = told["answers"]["order"]
    assert [name for name in order if name in ("What was checked", "files", "Camera", "option-topK", "measure")] == [
        "What was checked", "files", "Camera", "option-topK", "measure",
    ]  # fmt: skip


def test_speed_is_shown_beside_float(told: dict[str, Any]) -> None:
    head, *rows = told["answers"]["times"]
    assert head == ["batch", "w8a8, a picture", "float, a picture", "faster"]
    assert [row[0] for row in rows] == ["1", "16"]
    assert all(row[1].endswith(" ms") and row[3].endswith(" times") for row in rows)


def test_the_page_works_offline_after_the_first_load(told: dict[str, Any]) -> None:
    scene = told["answers"]
    assert scene["offline"] == "ready"
    assert scene["offlineCards"][0]["first"] == next(c["first"] for c in scene["cards"] if c["name"] == "0.jpg")


def test_pictures_are_pasted_dropped_and_taken_by_the_camera(told: dict[str, Any], photos: list[Path]) -> None:
    cards = {card["name"]: card for card in told["ways"]["cards"]}
    first = next(card["first"] for card in told["answers"]["cards"] if card["name"] == photos[0].name)
    assert cards["paste.jpg"]["first"] == cards["drop.jpg"]["first"] == first
    assert cards["camera"]["first"] in LABELS


def test_files_that_are_no_pictures_are_named(told: dict[str, Any]) -> None:
    problems = {card["name"]: card["problem"] for card in told["ways"]["cards"]}
    assert "not an image" in problems["a.txt"]
    assert "damaged image" in problems["cut.jpg"]


def test_the_page_fits_in_400_pixels(told: dict[str, Any]) -> None:
    assert told["ways"]["overflow"] <= 0


def test_a_web_server_without_headers_has_threads_too(told: dict[str, Any]) -> None:
    assert (told["plain"]["state"], told["plain"]["isolated"]) == ("ready", True)


@pytest.mark.parametrize(
    ("damage", "words"),
    [("changed byte", "SHA-256"), ("other logits", "expected at least"), ("other pixels", "pixels")],
)
def test_a_file_that_is_not_proved_is_refused(told: dict[str, Any], damage: str, words: str) -> None:
    scene = told[damage]
    assert scene["state"] == "refused"
    assert scene["verdict"].startswith("Refused: ")
    assert words in scene["verdict"]
    assert (scene["inputs"], scene["asked"]) == (0, False)
    assert scene["colour"] == "rgb(179, 38, 30)"


def pixels_of(scene: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(b64decode(scene["canvas"].partition(",")[2]))).convert("RGB"))


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_are_drawn_and_told(
    task: str, told: dict[str, Any], hand: dict[str, Path], photos: list[Path]
) -> None:
    scene = told[task]
    assert scene["state"] == "ready"
    predictor = Predictor(hand[task])
    asked = {"segment": {"score_threshold": 0.2}, "pose": {"boxes": [(10, 5, 90, 70), (0, 0, 40, 40)]}}.get(task, {})
    found = predictor.predict(photos[0], **asked)
    picture = np.asarray(Image.open(photos[0]).convert("RGB"))
    drawn = pixels_of(scene)
    assert drawn.shape == picture.shape
    assert (np.abs(drawn.astype(int) - picture).max(axis=2) > 40).mean() > 0.01
    if task == "semantic":
        names = [HAND_LABELS[label] for label in np.argsort(-np.bincount(found.ravel(), minlength=4), kind="stable")]
        shown = [line for line in scene["found"].splitlines() if line in HAND_LABELS]
        assert shown == [name for name in names if name in shown] != []
    else:
        rows = [line for line in scene["found"].splitlines() if "\t" in line][1:]
        assert len(rows) == len(found) * (3 if task == "pose" else 1) > 1


def test_where_a_mask_is_drawn_is_where_predictor_finds_it(
    told: dict[str, Any], hand: dict[str, Path], photos: list[Path]
) -> None:
    found = Predictor(hand["segment"]).predict(photos[0], score_threshold=0.2)
    plain, drawn = (pixels_of(told[task]).astype(int) for task in ("detect", "segment"))
    masks = np.any([one.mask for one in found], axis=0)
    tinted = np.abs(drawn - plain).max(axis=2) > 10
    assert tinted[masks].mean() > 0.8
    assert tinted[~masks].mean() < 0.35  # frames and labels of more objects


def test_the_picture_of_the_docs_is_made_here(told: dict[str, Any]) -> None:
    """LEANVIT_SCREENSHOTS=1 lays it beside the page about it."""
    assert Image.open(PICTURE).width == 900
