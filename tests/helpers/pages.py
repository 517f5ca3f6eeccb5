"""Pages of the report and of an inspection as tests read them: a folder of JSON files in, elements and rows out."""

from __future__ import annotations

import io
import json
import re
from base64 import b64decode
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from leanvit.report import write_report

SCRIPT = "<script>alert(1)</script>"
MACHINE = {"cpu": "Intel(R) Xeon(R) Platinum 8481C", "cores": 2, "features": ["avx2", "avx512_vnni", "amx_int8"]}
VERSIONS = {"leanvit": "0.2.0", "python": "3.11.2", "torch": "2.14.1", "onnxruntime": "1.32.0"}


def make_run(folder: Path, files: dict[str, Any]) -> Path:
    """Write values as JSON files, by their names in the folder."""
    for name, values in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """A page as a browser must see it; any tag that is not closed where it should be is an error."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} repeats an attribute"
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def headings(self) -> list[str]:
        return [text for tag, text in self.texts if tag == "h2"]

    def text(self) -> str:
        return " ".join(text for tag, text in self.texts if tag != "style")


def draw(folder: Path, files: dict[str, Any]) -> str:
    """The report of a folder with these JSON files, as text."""
    return write_report(make_run(folder, files)).read_text(encoding="utf-8")


def rows_of(page: str) -> list[list[str]]:
    """Cells of all table rows as plain text."""
    plain = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", page)]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in plain]


def replaced(values: Any, change: Callable[[Any], Any]) -> Any:
    """JSON values with every leaf changed."""
    if isinstance(values, dict):
        return {key: replaced(value, change) for key, value in values.items()}
    return [replaced(value, change) for value in values] if isinstance(values, list) else change(values)


def picture(uri: str) -> np.ndarray:
    """Pixels of a PNG in a data URI."""
    return np.asarray(Image.open(io.BytesIO(b64decode(uri.removeprefix("data:image/png;base64,")))))
