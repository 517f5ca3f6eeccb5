"""Look at a data set of any task once; write inspect.json and the page."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from leanvit._version import __version__
from leanvit.config import DataInspectConfig, save_yaml
from leanvit.errors import PartialError
from leanvit.files import only_writer, write_atomic, write_json
from leanvit.inspection.annotated import inspect_scenes
from leanvit.inspection.labelled import inspect_images
from leanvit.runtime.task import TASKS

RESULT_NAME = "inspect.json"
PAGE_NAME = "inspect.html"


def run(config: DataInspectConfig) -> dict[str, Any]:
    """Decode every image once; write inspect.json and the page with the contact sheet, and return what the JSON holds.

    Raises DataError where the data can't be found, RunLockedError where another process writes to the folder,
    MissingDependencyError where masks are to be drawn without pycocotools. Images that can't be read, and annotations
    that are broken, are part of the result.
    """
    folder = Path(config.output)
    with only_writer(folder):
        result: dict[str, Any] = {
            "data": config.data,
            "leanvit": __version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        inspect = inspect_images if TASKS[config.task].data == "images" else inspect_scenes
        page = inspect(config, result)
        save_yaml(config, folder / "config.yaml")
        write_json(folder / RESULT_NAME, result)
        # A file name need not be UTF-8.
        write_atomic(folder / PAGE_NAME, page.encode("utf-8", "replace"))
    return result


def require_readable(result: dict[str, Any]) -> None:
    """Raise PartialError naming the images that can't be read, where there are some; the result is written then."""
    corrupt = [one["image"] for part in result["parts"].values() for one in part["corrupt"]]
    if corrupt:
        named = ", ".join(corrupt[:3]) + (f" and {len(corrupt) - 3} more" if len(corrupt) > 3 else "")
        total = sum(part["images"] for part in result["parts"].values())
        raise PartialError(
            f"{len(corrupt)} of {total} images can't be read: {named}; all others were looked at. "
            "Replace or remove them, or train with --bad-images skip."
        )
