"""Fixtures that several test files share: a small bundle, image folders, and the command line in this process."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from common import LABELS, Outcome, save_image, smooth
from made_once import made_once, shared_folder

pytest_plugins = ("fixtures_run", "ray_cluster")

# How long an example takes is the machine's mood, and the first one imports libraries.
hypothesis.settings.register_profile("leanvit", deadline=None)
hypothesis.settings.load_profile("leanvit")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what repeats a path, and skip what is marked `cuda` where there is no GPU."""
    mark_repeats(config, items)
    skip_without_gpu(items)


def mark_repeats(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark `repeat` what tests/repeats.txt names; raise where it names a test that a collected file doesn't have."""
    lines = (Path(__file__).parent / "repeats.txt").read_text().splitlines()
    repeats = {line for line in lines if line and not line.startswith("#")}
    for item in items:
        if item.nodeid in repeats:
            item.add_marker("repeat")
    if any("::" in argument for argument in config.args):
        return
    found = {item.nodeid for item in items}
    files = {nodeid.partition("::")[0] for nodeid in found}
    if missing := sorted(line for line in repeats - found if line.partition("::")[0] in files):
        raise pytest.UsageError(f"tests/repeats.txt names what is no test (any more): {', '.join(missing)}")


def skip_without_gpu(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and PyTorch finds none"))


@pytest.fixture
def leanvit(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Run the command line in this process: leanvit("predict", bundle, image) -> Outcome."""
    from leanvit.cli import main

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="session", autouse=True)
def only_onnxruntime_by_default() -> Iterator[None]:
    """Exports in tests prove ONNX Runtime only; tests of other runtimes (test_engines, test_lower) name them.

    Proving three runtimes at each of some hundred exports would double the time of the suite.
    """
    from leanvit.export import api

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "available", lambda: ("onnxruntime",))
        yield


@pytest.fixture(scope="session")
def micro_model() -> Any:
    """revit_micro with ten classes and random weights; shared, so nobody may change it."""
    import timm
    import torch

    import leanvit.models  # noqa: F401 - registers revit_micro

    torch.manual_seed(0)
    model = timm.create_model("revit_micro", num_classes=len(LABELS)).eval()
    with torch.no_grad():
        model.head.weight.mul_(20.0)  # probabilities far from equal, so that a wrong one shows
    return model


@pytest.fixture(scope="session")
def shared_bundle(micro_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float bundle of `micro_model`; shared, so nobody may change it."""
    from leanvit.export.api import export

    folder = shared_folder(tmp_path_factory) / "micro"
    return made_once(folder, lambda output: export(micro_model, output, labels=LABELS))


@pytest.fixture
def bundle(shared_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(shared_bundle, tmp_path / "bundle"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A smooth RGB picture as PNG, 48 x 40 pixels."""
    return save_image(tmp_path / "photo.png", smooth(40, 48, seed=5))


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make an image folder: image_folder("data", cat=4, dog=4) writes data/cat/0.png..."""

    def make(name: str = "data", **classes: int) -> Path:
        for index, (label, count) in enumerate(classes.items()):
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(count):
                save_image(tmp_path / name / label / f"{number}.png", smooth(32, 32, seed=100 * index + number))
        return tmp_path / name

    return make


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; skipped where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
