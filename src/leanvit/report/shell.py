"""The HTML document around a page: head, style, navigation and sections."""

from __future__ import annotations

from collections.abc import Sequence

from leanvit._version import __version__
from leanvit.report.style import STYLE
from leanvit.report.svg import Markup, tag

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def document(brand: str, title: str, header: Sequence[object], sections: Sequence[tuple[str, str, Markup]]) -> str:
    """A self-contained page.

    brand: what kind of page it is. header: what stands below the title. sections: (key, title, content) each.
    """
    nav = tag("nav", *(tag("a", name, href=f"#{key}") for key, name, _ in sections), aria_label="Sections")
    body = (
        tag("section", tag("h2", name, id=f"{key}-h"), text, id=key, aria_labelledby=f"{key}-h")
        for key, name, text in sections
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", f"{title} · {brand}"),
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(STYLE)),
    )
    top = tag("header", tag("p", brand, class_="brand"), tag("h1", title), *header, nav)
    footer = tag("footer", f"Written by leanvit {__version__}. This page is self-contained: it loads nothing.")
    return "<!doctype html>\n" + tag("html", head, tag("body", top, tag("main", *body), footer), lang="en") + "\n"
