"""Prediction on Ray: the parts of a run alone, byte for byte, whatever is lost on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from common import save_image, smooth
from leanvit.config import PredictConfig
from leanvit.errors import PartialError
from leanvit.runtime import parts
from leanvit.runtime.sources import Piece
from leanvit.scale import predict as on_ray

IMAGES = 600
EACH = 20


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many pictures that a run takes some seconds, and a damaged one."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(IMAGES):
        save_image(folder / f"{number:04d}.png", smooth(24, 24, seed=number % 50))
    (folder / "0123.png").write_bytes(b"no picture")
    return folder


def config_for(bundle: Path, pictures: Path, output: Path, **more: Any) -> PredictConfig:
    given = {"threads": 1, "part_images": EACH, **more}
    return PredictConfig(bundle=str(bundle), images=[str(pictures)], output=f"{output}/", **given)


@pytest.fixture(scope="module")
def alone(shared_bundle: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts that one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.raises(PartialError, match="1 of 600 images could not be read"):
        parts.run(config_for(shared_bundle, pictures, folder))
    return folder


def parts_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


def test_parts_are_those_of_one_process(
    cluster: ModuleType, shared_bundle: Path, pictures: Path, alone: Path, tmp_path: Path
) -> None:
    for workers in (None, 1):
        output = tmp_path / str(workers)
        with pytest.raises(PartialError, match="1 of 600 images could not be read"):
            on_ray.run(config_for(shared_bundle, pictures, output, ray="local", ray_workers=workers))
        assert parts_in(output) == parts_in(alone)
        assert len(parts_in(output)) == IMAGES // EACH
        told, expected = (json.loads((folder / "manifest.json").read_text()) for folder in (output, alone))
        assert told["parts"] == expected["parts"]


def test_a_part_whose_process_is_killed_is_made_again(
    cluster: ModuleType, shared_bundle: Path, pictures: Path, alone: Path, tmp_path: Path
) -> None:
    killed = []

    def kill_one(job: parts.Job, todo: Iterator[parts.Numbered]) -> Iterator[tuple[int, Piece, parts.Part]]:
        for found in on_ray.parts_of(cluster, job, todo):
            # Between two parts a process is idle: then the next look finds one at work.
            workers = [pid for pid, line in commands() if "ray::make_part" in line]
            if workers and not killed:
                os.kill(workers[0], signal.SIGKILL)
                killed.append(workers[0])
            yield found

    config = config_for(shared_bundle, pictures, tmp_path / "parts", ray="local")
    with pytest.raises(PartialError, match="1 of 600 images could not be read"):
        parts.run(config, kill_one)
    assert killed
    assert parts_in(tmp_path / "parts") == parts_in(alone)


def commands() -> list[tuple[int, str]]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        found.append((int(entry.name), line))
    return found


def test_a_part_whose_process_dies_each_time_fails_by_name_and_the_others_are_kept(
    cluster: ModuleType, shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "TRIES", 1)
    monkeypatch.setattr(on_ray, "make_part", dies_at_the_second)
    cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        save_image(folder / f"{number}.png", smooth(24, 24, seed=number))
    config = config_for(shared_bundle, folder, tmp_path / "parts", ray="local", part_images=1)
    with pytest.raises(PartialError, match=r"1 parts could not be made: .*1\.png.* its process died 2 times"):
        on_ray.run(config)
    assert sorted(name[:11] for name in parts_in(tmp_path / "parts")) == ["part-000000", "part-000002"]


def dies_at_the_second(bundle: list[Any], job: parts.Job, piece: Piece) -> parts.Part:
    if piece.paths[0].endswith("1.png"):
        os.kill(os.getpid(), signal.SIGKILL)
    return parts.Part(b'{"path": "x"}\n', 1)


def test_a_killed_driver_goes_on(
    cluster: ModuleType, shared_bundle: Path, pictures: Path, alone: Path, tmp_path: Path
) -> None:
    address = cluster.get_runtime_context().gcs_address
    command = [
        str(Path(sys.executable).with_name("leanvit")), "predict", str(shared_bundle), str(pictures),
        "--output", f"{tmp_path}/parts/", "--part-images", str(EACH), "--ray", address,
    ]  # fmt: skip
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(parts_in(tmp_path / "parts")) >= 3)
    driver.kill()
    driver.wait()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("part-*")}
    assert 3 <= len(before) < IMAGES // EACH
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 6, done.stderr
    assert parts_in(tmp_path / "parts") == parts_in(alone)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def wait_for(holds: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
