"""write_report(): the JSON files of a run folder as one HTML page that needs no network and no script.

A section is drawn where its file is there, so that the folder of a training, a quantization or a bundle
makes a page as well. Numbers that are missing or not finite are shown as a dash, never guessed.
"""

from __future__ import annotations

from pathlib import Path

from leanvit._version import __version__
from leanvit.errors import DataError
from leanvit.files import write_atomic
from leanvit.report.page import render
from leanvit.report.pictures import Pictures
from leanvit.report.run import read_run
from leanvit.report.words import duration, interval

__all__ = ["REPORT_NAME", "Pictures", "duration", "interval", "write_report"]

REPORT_NAME = "report.html"


def write_report(run: str | Path, output: str | Path | None = None, pictures: Pictures | None = None) -> Path:
    """Draw the page of a run folder and return its path; the default is RUN/report.html.

    run: folder of `leanvit demo`, of a training, an evaluation or a quantization, or a bundle. pictures: of what a
    task's bundle finds (leanvit.commands.report).
    Raises DataError where the folder is missing, holds none of the known files, or a file lacks what it
    should hold; BundleError where a file isn't JSON; EnvironmentProblem where the page can't be written.
    """
    found = read_run(run)
    try:
        page = render(found, pictures)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{found.folder}: a file has content that can't be drawn ({type(error).__name__}: {error}), expected "
            f"{', '.join(found.files)} as leanvit {__version__} writes them. Make the run again."
        ) from error
    path = Path(output) if output is not None else found.folder / REPORT_NAME
    # A lone surrogate is legal in JSON and not in UTF-8.
    write_atomic(path, page.encode("utf-8", "replace"))
    return path
