"""What tests of every room share: labels, the outcome of a command, pictures, and where things are."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
GOLDEN_FOLDER = ROOT / "tests" / "golden"
"""Outputs of the authors' programs."""

LABELS = tuple(f"label {i}" for i in range(10))


def main_of(name: str) -> Callable[..., None]:
    """The function `main` of a program in examples/."""
    main: Callable[..., None] = runpy.run_path(str(ROOT / "examples" / name))["main"]
    return main


@dataclass(frozen=True)
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what went wrong; it is the last, and no traceback stands above it."""
        lines = self.err.splitlines()
        assert [line for line in lines if line.startswith("leanvit:")] == lines[-1:], self.err
        assert "Traceback" not in self.err
        return lines[-1]


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """A colourful picture without hard edges: (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x * a / width + y * b / height + c) for a, b, c in rng.uniform(1, 6, (3, 3))]
    return np.stack([np.rint(127.5 + 127 * wave) for wave in waves], axis=2).astype(np.uint8)


def save_image(path: Path, pixels: np.ndarray) -> Path:
    """Write pixels losslessly; returns the path."""
    Image.fromarray(pixels).save(path)
    return path
