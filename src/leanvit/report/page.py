"""The page around the sections: head, headline, navigation, and the sections that a run has."""

from __future__ import annotations

from leanvit._svg import Markup, tag
from leanvit._version import __version__
from leanvit.report.analysis import analysis_sections
from leanvit.report.attention import attention_section
from leanvit.report.benchmark import benchmark_section
from leanvit.report.bundle import bundle_section
from leanvit.report.gate import gate_section
from leanvit.report.headline import cards, lead
from leanvit.report.origin import origin_section
from leanvit.report.quantization import quantization_section
from leanvit.report.result import result_section
from leanvit.report.run import Run
from leanvit.report.style import STYLE
from leanvit.report.training import training_section

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(run: Run) -> str:
    """The whole page as text."""
    sections = [
        ("result", "Result", result_section(run)),
        ("training", "Training", training_section(run)),
        ("quantization", "Quantization", quantization_section(run)),
        ("attention", "Attention through the depth", attention_section(run)),
        *analysis_sections(run),
        ("bundle", "Bundle", bundle_section(run)),
        ("gate", "Verification gate", gate_section(run)),
        ("benchmark", "Benchmark", benchmark_section(run)),
        ("origin", "How this was made", origin_section(run)),
    ]
    drawn = [(key, title, body) for key, title, body in sections if body is not None]
    nav = tag("nav", *(tag("a", title, href=f"#{key}") for key, title, _ in drawn), aria_label="Sections")
    body = (
        tag("section", tag("h2", name, id=f"{key}-h"), text, id=key, aria_labelledby=f"{key}-h")
        for key, name, text in drawn
    )
    title = _title(run)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", f"{title} · leanvit report"),
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(STYLE)),
    )
    header = tag("header", tag("p", "leanvit report", class_="brand"), tag("h1", title), lead(run), cards(run), nav)
    footer = tag("footer", f"Written by leanvit {__version__}. This page is self-contained: it loads nothing.")
    return "<!doctype html>\n" + tag("html", head, tag("body", header, tag("main", *body), footer), lang="en") + "\n"


def _title(run: Run) -> str:
    train, manifest, analysis = run.get("train"), run.get("bundle"), run.get("analysis")
    if analysis and not train and not manifest:
        return f"{' and '.join(str(model['name']) for model in analysis['models'])} on {analysis.get('data')}"
    architecture = train.get("architecture") or manifest.get("architecture")
    data = train.get("data") or (manifest.get("accuracy") or {}).get("data")
    if not architecture:
        return run.folder.resolve().name
    return f"{architecture} on {data}" if data else str(architecture)
