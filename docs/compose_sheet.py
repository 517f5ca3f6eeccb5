"""Draw docs/compose.jpg from a composed folder: leanvit data compose FOLDER; python docs/compose_sheet.py FOLDER."""

from __future__ import annotations

import colorsys
import sys
from pathlib import Path

from PIL import Image

COUNT, GAP = 8, 4
COLOURS = [0, 0, 0, *(int(255 * part) for label in range(10) for part in colorsys.hsv_to_rgb(label / 10, 0.65, 1))]


def main(folder: Path) -> None:
    """Put the first training pictures side by side, each above its class map."""
    pictures = [Image.open(path) for path in sorted((folder / "images/train").iterdir())[:COUNT]]
    maps = [Image.open(path) for path in sorted((folder / "masks/train").iterdir())[:COUNT]]
    width, height = (side + GAP for side in pictures[0].size)
    sheet = Image.new("RGB", (COUNT * width - GAP, 2 * height - GAP), "white")
    for column, (picture, class_map) in enumerate(zip(pictures, maps, strict=True)):
        class_map.putpalette(COLOURS)
        sheet.paste(picture, (column * width, 0))
        sheet.paste(class_map.convert("RGB"), (column * width, height))
    sheet.save(Path(__file__).with_name("compose.jpg"), quality=90)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
