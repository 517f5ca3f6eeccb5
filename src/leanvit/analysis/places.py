"""Where the tokens of an attention layer stand on the image: the grids of windows, patches and pooled maps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.mobilevit import MobileVitBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn

from leanvit.models import reswin, vitaev2
from leanvit.models._attention import make_windows
from leanvit.models._mobilevit import MobileViTBlock

Grid = tuple[int, int]
Inputs = dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Places:
    """Where the queries or the keys of a layer stand.

    index: (groups, tokens) int64, place of each token on the row-major grid; -1 for class tokens and padding.
    """

    index: Tensor
    grid: Grid

    @property
    def known(self) -> Tensor:
        """Which tokens have a place: (groups, tokens) bool."""
        return self.index >= 0

    def centres(self, size: Grid) -> Tensor:
        """Centre (y, x) in pixels of every token on an image of `size`: (groups, tokens, 2); of -1 no meaning."""
        rows, columns = self.grid
        y = (self.index // columns + 0.5) * (size[0] / rows)
        x = (self.index % columns + 0.5) * (size[1] / columns)
        return torch.stack([y, x], dim=-1)


def prefix_tokens(model: nn.Module) -> int:
    """Class tokens and their like before the patches, as timm's models state it."""
    return int(getattr(model, "num_prefix_tokens", 0) or 0)


def find_places(
    name: str, modules: dict[str, nn.Module], inputs: Inputs, shape: tuple[int, ...], size: Grid, prefix: int
) -> tuple[Places | None, Places | None]:
    """Places of the queries and of the keys of the attention module `name`; None where they are not known.

    inputs: arguments of each module, shapes in place of tensors. shape: (groups, Nq, Nk). size: of the image.
    prefix: class tokens of the model.
    """
    groups, *tokens = shape
    index = _grouped(name, modules, inputs)
    if index is not None:
        fits = tuple(index.index.shape) == (groups, tokens[0]) and tokens[0] == tokens[1]
        return (index, index) if fits else (None, None)
    if groups > 1:
        return None, None
    queries, keys = (_global(count, size, prefix) for count in tokens)
    return queries, keys


def _grouped(name: str, modules: dict[str, nn.Module], inputs: Inputs) -> Places | None:
    """Places inside windows or patches, told by the nearest module around `name` whose layout is known."""
    parts = name.split(".")
    for depth in range(len(parts), -1, -1):
        path = ".".join(parts[:depth])
        module = modules[path]
        if isinstance(module, SwinTransformerBlock | SwinTransformerV2Block):
            return _swin(cast(Any, module), inputs[path][0])
        if isinstance(module, reswin.Stage):
            return _reswin(module, inputs[path][0], int(parts[depth + 1]))
        if isinstance(module, vitaev2.WindowAttention):
            return _vitaev2(module.window_size, inputs[path][1])
        if isinstance(module, MobileViTBlock):
            return _mobilevit((2, 2), inputs[path][0])
        if isinstance(module, MobileVitBlock):
            return _mobilevit(tuple(cast(Any, module).patch_size), inputs[path][0])
    return None


def _global(tokens: int, size: Grid, prefix: int) -> Places | None:
    """All tokens at once, class tokens first."""
    for before in dict.fromkeys((prefix, 0)):
        grid = grid_of(tokens - before, size)
        if grid is not None:
            index = torch.arange(-before, tokens - before).clamp(min=-1)
            return Places(index[None], grid)
    return None


def grid_of(tokens: int, size: Grid) -> Grid | None:
    """Rows and columns of a map of `tokens` places on an image of `size`: both sides divided by one number.

    Where the number does not divide them the map has a last incomplete row and column, or lacks them.
    Returns None where no number leads to as many places.
    """
    for step in range(1, max(size) + 1):
        for rounded in (math.ceil, math.floor):
            rows, columns = (rounded(side / step) for side in size)
            if rows * columns == tokens:
                return rows, columns
    return None


def _cut(grid: Grid, window: Grid, roll: Grid = (0, 0), before: Grid = (0, 0)) -> Places:
    """Windows over a grid that is rolled up and left by `roll`, then padded to whole windows.

    before: rows above and columns to the left that the padding puts there; the rest goes below and right.
    """
    raster = torch.arange(grid[0] * grid[1]).reshape(grid).roll((-roll[0], -roll[1]), (0, 1))
    after = [-side % of - first for side, of, first in zip(grid, window, before, strict=True)]
    padded = F.pad(raster, (before[1], after[1], before[0], after[0]), value=-1)
    rows, columns = padded.shape
    cut = padded.reshape(rows // window[0], window[0], columns // window[1], window[1]).transpose(1, 2)
    return Places(cut.reshape(-1, window[0] * window[1]), grid)


def _swin(block: Any, shape: tuple[int, ...]) -> Places:
    """shape: (B, H, W, C) of the block's input."""
    return _cut((shape[1], shape[2]), tuple(block.window_size), tuple(block.shift_size))


def _reswin(stage: reswin.Stage, shape: tuple[int, ...], block: int) -> Places:
    """shape: (B, H, W, C) of the stage's input; every second block is shifted."""
    grid = (shape[1], shape[2])
    order = make_windows(grid, stage.window, False, torch.device("cpu"))[block % 2].order
    columns = -(-grid[1] // stage.window) * stage.window
    y, x = order // columns, order % columns
    inside = (y < grid[0]) & (x < grid[1])
    index = torch.where(inside, y * grid[1] + x, -1)
    return Places(index.reshape(-1, stage.window**2), grid)


def _vitaev2(window: int, grid: Grid) -> Places:
    """Windows without shift, padding split evenly with the odd line after."""
    top, left = (-side % window // 2 for side in grid)
    return _cut(grid, (window, window), before=(top, left))


def _mobilevit(patch: tuple[int, ...], shape: tuple[int, ...]) -> Places:
    """shape: (B, C, H, W) of the block's input; one group for each position in the patches."""
    high, wide = patch
    rows, columns = -(-shape[2] // high), -(-shape[3] // wide)
    raster = torch.arange(rows * high * columns * wide).reshape(rows, high, columns, wide)
    return Places(raster.permute(1, 3, 0, 2).reshape(high * wide, rows * columns), (rows * high, columns * wide))
