"""Section of pictures with what a task's bundle finds in them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

from leanvit.report import html
from leanvit.report.pixels import data_uri


@dataclass(frozen=True)
class Shot:
    """One picture of a page.

    image: encoded. kind: "png" or "jpeg". name: what it is. said: what is seen, in words.
    """

    image: bytes
    name: str
    said: str
    kind: str = "png"


@dataclass(frozen=True)
class Pictures:
    """Drawn pictures for a page, or why there are none.

    shots: the pictures. caption: what is drawn, and how. left_out: the reason where there are none.
    """

    shots: tuple[Shot, ...]
    caption: str
    left_out: str = ""


def pictures_section(pictures: Pictures) -> Markup:
    """The pictures beside each other, or the reason why there are none."""
    if not pictures.shots:
        return html.paragraph(f"No pictures: {pictures.left_out}", css="mute")
    return html.figure(pictures.caption, gallery(pictures.shots))


def gallery(shots: Iterable[Shot]) -> Markup:
    """Pictures beside each other where there is room, each with its words below."""
    return html.gallery((data_uri(shot.image, shot.kind), shot.name, shot.said) for shot in shots)
