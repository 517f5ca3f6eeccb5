"""The page around the sections: head, headline, navigation, and the sections that a run has."""

from __future__ import annotations

from leanvit.report.analysis import analysis_sections
from leanvit.report.attention import attention_section
from leanvit.report.benchmark import benchmark_section
from leanvit.report.bundle import bundle_section
from leanvit.report.evaluation import evaluation_sections
from leanvit.report.gate import gate_section
from leanvit.report.headline import cards, lead
from leanvit.report.origin import origin_section
from leanvit.report.quantization import quantization_section
from leanvit.report.result import result_section
from leanvit.report.run import Run
from leanvit.report.shell import document
from leanvit.report.training import training_section


def render(run: Run) -> str:
    """The whole page as text."""
    sections = [
        ("result", "Result", result_section(run)),
        ("training", "Training", training_section(run)),
        *evaluation_sections(run),
        ("quantization", "Quantization", quantization_section(run)),
        ("attention", "Attention through the depth", attention_section(run)),
        *analysis_sections(run),
        ("bundle", "Bundle", bundle_section(run)),
        ("gate", "Verification gate", gate_section(run)),
        ("benchmark", "Benchmark", benchmark_section(run)),
        ("origin", "How this was made", origin_section(run)),
    ]
    drawn = [(key, title, body) for key, title, body in sections if body is not None]
    return document("leanvit report", _title(run), (lead(run), cards(run)), drawn)


def _title(run: Run) -> str:
    train, manifest, analysis = run.get("train"), run.get("bundle"), run.get("analysis")
    if analysis and not train and not manifest:
        return f"{' and '.join(str(model['name']) for model in analysis['models'])} on {analysis.get('data')}"
    val = run.get("val")
    architecture = train.get("architecture") or manifest.get("architecture") or val.get("architecture")
    data = train.get("data") or (manifest.get("accuracy") or {}).get("data") or val.get("data")
    if not architecture:
        return run.folder.resolve().name
    return f"{architecture} on {data}" if data else str(architecture)
