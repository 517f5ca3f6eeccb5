"""Section of pictures with what a task's bundle finds in them."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass

from leanvit.report import svg
from leanvit.report.svg import Markup, tag


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
        return tag("p", f"No pictures: {pictures.left_out}", class_="mute")
    return svg.figure(pictures.caption, gallery(pictures.shots))


def gallery(shots: Iterable[Shot]) -> Markup:
    """Pictures beside each other where there is room, each with its words below."""
    return tag("div", *(_shot(shot) for shot in shots), class_="shots")


def _shot(shot: Shot) -> Markup:
    uri = f"data:image/{shot.kind};base64," + base64.b64encode(shot.image).decode()
    said = f"{shot.name}: {shot.said}"
    return tag("div", tag("img", src=uri, alt=said, title=said), tag("b", shot.name), f" {shot.said}", class_="shot")
