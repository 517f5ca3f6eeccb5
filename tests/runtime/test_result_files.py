"""The file of results: whole or absent, written by one process, and gone on with from wherever a run was killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from leanvit.config import PredictConfig
from leanvit.errors import RunLockedError
from leanvit.runtime import result_files as results
from leanvit.runtime.result_files import open_results

PATHS = [Path(f"{number}.png") for number in range(9)]
SETTINGS = {"top_k": 1}


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.fixture(autouse=True)
def every_batch_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of them are slow


def config(folder: Path, *, resume: bool = True) -> PredictConfig:
    return PredictConfig(bundle="b", images=["i"], format="csv", output=str(folder / "out"), resume=resume)


def work(folder: Path, stop: int | None = None) -> tuple[int, int]:
    """Write the rows of all PATHS, the fifth of which is corrupt, or of the first `stop`; returns what was counted."""
    left: Iterator[Path] = iter(PATHS)
    with open_results(config(folder), SETTINGS, left, "path,label,probability\n") as file:
        for path in left:
            if path == PATHS[4]:
                file.skip(path, "corrupt")
            else:
                file.write(path, f'{path},"label, with comma",0.5\n')
            file.flush()
            if file.images == stop:
                raise Killed
    return file.images, file.skipped


def test_wherever_a_run_is_killed_the_next_one_writes_what_is_missing_and_nothing_twice(tmp_path: Path) -> None:
    output, draft, journal = (tmp_path / name for name in ("out", "out.partial", "out.partial.progress"))
    assert work(tmp_path) == (9, 1)
    whole = output.read_bytes()
    output.unlink()
    with pytest.raises(Killed):
        work(tmp_path, stop=6)
    rows, notes = draft.read_bytes(), journal.read_bytes()
    for cut in range(len(notes) + 1):
        # Rows are on the disk before they are noted, so more may be there than is noted, the last of it half a line.
        for more in (b"", b"6.p", b"6.png,label"):
            draft.write_bytes(rows + more)
            journal.write_bytes(notes[:cut])
            assert work(tmp_path) == (9, 1), cut
            assert output.read_bytes() == whole, cut
            output.unlink()


def test_a_run_that_fails_before_its_first_row_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Killed), open_results(config(tmp_path), SETTINGS, iter(())) as file:
        fail_after_a_corrupt_image(file)
    assert os.listdir(tmp_path) == []


def fail_after_a_corrupt_image(file: results.Results) -> None:
    file.skip(PATHS[0], "corrupt")
    file.flush()
    raise Killed


@pytest.mark.parametrize("resume", [True, False])
def test_two_runs_do_not_write_one_file(resume: bool, tmp_path: Path) -> None:
    with open_results(config(tmp_path), SETTINGS, iter(()), "path,label,probability\n") as first:
        first.write(PATHS[0], "0.png,label,1.000000\n")
        with (
            pytest.raises(RunLockedError, match=r"out.partial: another process is writing here"),
            open_results(config(tmp_path, resume=resume), SETTINGS, iter(())),
        ):
            pass
    assert (tmp_path / "out").read_text() == "path,label,probability\n0.png,label,1.000000\n"
    assert os.listdir(tmp_path) == ["out"]
