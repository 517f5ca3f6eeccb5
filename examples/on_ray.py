"""What a bundle says of a folder of images, over Ray on this machine; more machines are another address.

    pip install "leanvit[ray]"
    python examples/on_ray.py BUNDLE FOLDER OUTPUT [ADDRESS]

BUNDLE: what leanvit.export wrote of a classifier. FOLDER: images. OUTPUT: folder for the results, in parts. ADDRESS:
HOST:PORT of a cluster that runs (ray start --head), instead of one of this machine that ends with the program.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from leanvit.commands import predict
from leanvit.config import PredictConfig
from leanvit.errors import PartialError


def main(bundle: str, folder: str, output: str, address: str = "local", part_images: int = 1024) -> None:
    """From the images to parts of results, each whole or absent, to how often each label was said."""
    config = PredictConfig(
        bundle=bundle, images=[folder], output=f"{output}/", ray=address, threads=1, part_images=part_images,
        resume=(Path(output) / "run.json").is_file(),  # goes on with a run that was killed
    )  # fmt: skip
    try:
        predict.run(config)
    except PartialError as error:
        print(f"not all: {error}")

    rows = [json.loads(line) for part in sorted(Path(output).glob("part-*.jsonl")) for line in part.open()]
    said = Counter(row["predictions"][0]["label"] for row in rows if "error" not in row)
    print(f"{len(rows)} images in {len(list(Path(output).glob('part-*')))} parts")
    for label, count in said.most_common():
        print(f"{label}: {count}")
    for row in rows:
        if "error" in row:
            print(f"{row['path']}: {row['error']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
