"""HTML of the pages: the document and its parts, each drawn by a template of report/templates.

Everything that is no Markup is escaped; a value that a template misses is an error; None is drawn as nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from markupsafe import Markup

from leanvit._version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment

Part = Markup | None


@dataclass(frozen=True)
class Section:
    """One section of a page. key: its id. content: None where there is nothing to show, and so no section."""

    key: str
    title: str
    content: Part


@dataclass(frozen=True)
class Card:
    """One number in large type. unit: stands beside it, small. why: what it is to be compared with."""

    name: str
    value: str
    unit: str = ""
    why: str = ""


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("leanvit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: "" if value is None else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _part(name: str, *values: object) -> Markup:
    """A macro of templates/parts.html.j2 with these values."""
    return Markup(getattr(_templates().get_template("parts.html.j2").module, name)(*values))


def document(brand: str, title: str, header: Sequence[Part], sections: Sequence[Section]) -> str:
    """A self-contained page. brand: what kind of page it is. header: what stands below the title."""
    return _templates().get_template("page.html.j2").render(
        brand=brand,
        title=title,
        header=[part for part in header if part is not None],
        sections=[section for section in sections if section.content is not None],
        version=__version__,
    )  # fmt: skip


def join(parts: Iterable[object]) -> Markup:
    """Parts in one: Markup as it is, None as nothing, everything else escaped."""
    return Markup("").join(str(part) if not isinstance(part, Markup) else part for part in parts if part is not None)


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[object]], align: str, pick: int = -1) -> Markup:
    """A table with a row header a line. align: 'l' or 'r' for each column. pick: index of the row to point out."""
    classes = ["r" if side == "r" else None for side in align]
    head = list(zip(heads, classes, strict=True))
    body = [list(zip(row, classes, strict=True)) for row in rows]
    return _part("table", caption, head, body, caption.split(". ")[0], pick)


def figure(caption: str, *contents: object) -> Markup:
    """Pictures with the words that say what is seen."""
    return _part("figure", caption, contents)


def panels(*charts: object) -> Markup:
    """Charts side by side where there is room."""
    return _part("panels", charts)


def titled(title: str, *contents: object) -> Markup:
    """A chart, or a grid, below its title."""
    return _part("titled", title, contents)


def details(summary: str, *contents: object) -> Markup:
    """Content that opens with a click."""
    return _part("details", summary, contents)


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """Samples of the classes l1, l2 (lines) and s1 to s4 (areas) with their names."""
    return _part("legend", [(_part("swatch", css), text) for css, text in entries])


def bit_legend(bits: Iterable[int | None]) -> Markup:
    """Cells of a bit grid with their names, None for float."""
    return _part("legend", [(_part("bit", b), "float" if b is None else f"{b} bits") for b in bits])


def facts(entries: Iterable[tuple[str, object]]) -> Markup:
    """Names and values; entries without a value are left out."""
    return _part("facts", [(name, value) for name, value in entries if value not in (None, "", "–")])


def cards(entries: Iterable[Card]) -> Part:
    """Numbers in large type beside each other, None where there are none."""
    rows = [(card.name, card.value, card.unit, card.why) for card in entries]
    return _part("cards", rows) if rows else None


def heading(text: str) -> Markup:
    """A heading inside a section."""
    return _part("heading", text)


def paragraph(*texts: object, css: str | None = None) -> Markup:
    """One paragraph of these texts."""
    return _part("paragraph", join(texts), css)


def bullets(items: Iterable[object]) -> Markup:
    """A list with a bullet a line."""
    return _part("bullets", list(items))


def chips(items: Sequence[object]) -> Markup:
    """A list of short names in one flow."""
    return _part("chips", items)


def lines(parts: Iterable[object]) -> Markup:
    """Parts under each other."""
    return _part("lines", [part for part in parts if part is not None])


def code(text: object) -> Markup:
    """Text as it is typed."""
    return _part("code", text)


def strong(text: object) -> Markup:
    """Text in bold."""
    return _part("strong", text)


def mark(text: object, css: str) -> Markup:
    """Text in the style of a class: "badge", "mute"."""
    return _part("mark", text, css)


def state(passed: bool | None, text: str) -> Markup:
    """Text after a tick (True), a cross (False) or an open circle (None)."""
    return _part("state", passed, text)


def gallery(shots: Iterable[tuple[str, str, str]]) -> Markup:
    """Pictures beside each other where there is room: (data URI, name, what is seen) each."""
    return _part("gallery", list(shots))


def image(uri: str, alt: str, height: int) -> Markup:
    """One picture of a fixed height, in pixels."""
    return _part("image", uri, alt, height)


def maps(cells: Sequence[tuple[str, str, Sequence[object]]], wide: int, narrow: int) -> Markup:
    """Small pictures in a grid: (data URI, what is seen, lines below it). wide, narrow: how many in a line of a desk's
    and of a phone's screen."""
    return _part("maps", cells, wide, narrow)


def ramp(uri: str, top: str) -> Markup:
    """The colour scale of maps from 0 to `top` times even attention."""
    return _part("ramp", uri, top)


@dataclass(frozen=True)
class BitCell:
    """Bits of one site, None for float. words: what is shown over it."""

    words: str
    weights: int | None
    activations: int | None


def bit_grid(
    title: str,
    spans: Sequence[tuple[str, int]],
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[BitCell | None]]],
    *,
    many: bool,
) -> Markup:
    """A table of bit pairs. spans: (what columns beside each other share, how many). many: whether cells are thin."""
    return _part("bit_grid", title, spans, columns, rows, many)
