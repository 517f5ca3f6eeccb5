"""leanvit predict: classify files, folders and patterns with a bundle; torch-free."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from leanvit.config import PredictConfig
from leanvit.errors import ConfigError, DataError, ImageError, PartialError
from leanvit.files import explain_os_error
from leanvit.imaging import Decoded, decode, find_images, resize
from leanvit.progress import Bar, note
from leanvit.runtime import Predictor

Row = tuple[Path, list[tuple[str, float]]]


def run(config: PredictConfig) -> int:
    """Print the best labels of every image; returns how many images were classified.

    Raises DataError where no image could be read, PartialError where some could not: the others are printed.
    """
    if not config.images:
        raise ConfigError("no images given. Run: leanvit predict BUNDLE IMAGE...")
    paths = list(find_images(config.images))
    predictor = Predictor(config.bundle, threads=config.threads)
    failed: list[str] = []
    done = 0
    with _open_output(config.output) as file:
        writer = _Writer(file, config.format)
        with Bar("predicting", len(paths)) as bar:
            for rows, count in _classify(predictor, paths, config, failed):
                for row in rows:
                    writer.write(*row)
                done += len(rows)
                bar.advance(count)
        if failed and not done:
            one = failed[0] if len(failed) == 1 else f"none of {len(failed)} images could be read: {failed[0]}"
            raise DataError(one)
    if failed:
        raise PartialError(f"{len(failed)} of {len(paths)} images could not be read and were skipped (see above).")
    return done


def _classify(
    predictor: Predictor, paths: list[Path], config: PredictConfig, failed: list[str]
) -> Iterator[tuple[list[Row], int]]:
    for start in range(0, len(paths), config.batch_size):
        chunk = paths[start : start + config.batch_size]
        good: list[Path] = []
        prepared = []
        for path in chunk:
            try:
                decoded = decode(path)
            except ImageError as error:
                failed.append(str(error))
                note(f"skipped {error}")
                continue
            _report_notes(path, decoded)
            prepared.append(resize(decoded.pixels, predictor.manifest.preprocess))
            good.append(path)
        rows = predictor.top(np.stack(prepared), config.top_k) if prepared else []
        yield list(zip(good, rows, strict=True)), len(chunk)


def _report_notes(path: Path, decoded: Decoded) -> None:
    for sentence in decoded.notes:
        note(f"{path}: {sentence}")


@contextlib.contextmanager
def _open_output(path: str | None) -> Iterator[TextIO]:
    """Where results go. A file is whole or as it was before; what was finished before a failure is in PATH.partial."""
    if path is None:
        yield sys.stdout
        return
    target = Path(path)
    # A device or a pipe, such as /dev/stdout, can't be renamed to.
    draft = target if target.exists() and not target.is_file() else target.with_name(f"{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "w", encoding="utf-8", newline="") as file:
            yield file
        if draft != target:
            os.replace(draft, target)
    except OSError as error:
        raise explain_os_error(error, target) from error
    finally:
        if draft != target and draft.is_file():
            if draft.stat().st_size:
                note(f"{draft}: the results up to here")
            else:
                draft.unlink()


class _Writer:
    """One line an image, in the chosen format, flushed so that a pipe sees it at once."""

    def __init__(self, file: TextIO, format: str) -> None:
        self.file = file
        self.format = format
        self.csv: Any = csv.writer(file, lineterminator="\n") if format == "csv" else None
        self.empty = True

    def write(self, image: Path, best: Iterable[tuple[str, float]]) -> None:
        """Write the labels of one image."""
        # A name need not be UTF-8, the output is: bytes that are not become \xNN.
        path = str(image).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        if self.csv is not None and self.empty:
            self.csv.writerow(["path", "label", "probability"])
        self.empty = False
        if self.format == "jsonl":
            labels = [{"label": label, "probability": round(p, 6)} for label, p in best]
            self.file.write(json.dumps({"path": path, "predictions": labels}) + "\n")
        elif self.csv is not None:
            self.csv.writerows([path, label, f"{p:.6f}"] for label, p in best)
        else:
            self.file.write(f"{path}: " + ", ".join(f"{label} {p:.1%}" for label, p in best) + "\n")
        self.file.flush()
