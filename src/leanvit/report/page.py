"""The report of a run: headline, navigation, and the sections that it has."""

from __future__ import annotations

from leanvit.report.analysis import analysis_sections
from leanvit.report.attention import attention_section
from leanvit.report.benchmark import benchmark_section
from leanvit.report.bundle import bundle_section
from leanvit.report.evaluation import evaluation_sections
from leanvit.report.gate import gate_section
from leanvit.report.headline import cards, lead
from leanvit.report.html import Section, document
from leanvit.report.metrics import is_task, title_of
from leanvit.report.optimize import optimize_sections
from leanvit.report.origin import origin_section
from leanvit.report.pictures import Pictures, pictures_section
from leanvit.report.quantization import quantization_section
from leanvit.report.result import result_section
from leanvit.report.run import Run
from leanvit.report.training import training_section


def render(run: Run, pictures: Pictures | None = None) -> str:
    """The whole page as text. pictures: what a task's bundle finds."""
    sections = [
        *optimize_sections(run),
        Section("result", "Result", result_section(run)),
        Section("training", "Training", training_section(run)),
        *evaluation_sections(run),
        Section("quantization", "Quantization", quantization_section(run)),
        Section("attention", "Attention through the depth", attention_section(run)),
        *analysis_sections(run),
        Section("pictures", "What the bundle finds", pictures_section(pictures) if pictures else None),
        Section("bundle", "Bundle", bundle_section(run)),
        Section("gate", "Verification gate", gate_section(run)),
        Section("benchmark", "Benchmark", benchmark_section(run)),
        Section("speed", "A network of the size that people ship", benchmark_section(run, "speed")),
        Section("origin", "How this was made", origin_section(run)),
    ]
    return document("leanvit report", _title(run), (lead(run), cards(run)), sections)


def _title(run: Run) -> str:
    if optimized := run.get("optimize"):
        return f"{optimized['architecture']} on {optimized['data']}"
    train, manifest, analysis = run.get("train"), run.get("bundle"), run.get("analysis")
    if analysis and not train and not manifest:
        return f"{' and '.join(str(model['name']) for model in analysis['models'])} on {analysis.get('data')}"
    val = run.get("val")
    architecture = train.get("architecture") or manifest.get("architecture") or val.get("architecture")
    data = train.get("data") or (manifest.get("accuracy") or {}).get("data") or val.get("data")
    if not architecture:
        task = next((values for values in (val, *run.quantized.values()) if is_task(values)), None)
        return f"{title_of(task['task'])} on {task.get('data')}" if task else run.folder.resolve().name
    return f"{architecture} on {data}" if data else str(architecture)
