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
from leanvit.report.pictures import Pictures, pictures_section
from leanvit.report.quantization import quantization_section
from leanvit.report.result import result_section
from leanvit.report.run import Run
from leanvit.report.shell import document
from leanvit.report.task_evaluation import task_evaluation_section
from leanvit.report.task_quantization import network_section
from leanvit.report.task_training import task_training_section
from leanvit.report.task_words import TASKS, is_task
from leanvit.report.training import training_section


def render(run: Run, pictures: Pictures | None = None) -> str:
    """The whole page as text. pictures: what a task's bundle finds."""
    network = any("parts" in report for report in run.quantized.values())
    sections = [
        ("result", "Result", result_section(run)),
        ("training", "Training", (task_training_section if is_task(run.get("train")) else training_section)(run)),
        *(
            [("evaluation", "Evaluation", task_evaluation_section(run))]
            if is_task(run.get("val"))
            else evaluation_sections(run)
        ),
        ("quantization", "Quantization", (network_section if network else quantization_section)(run)),
        ("attention", "Attention through the depth", attention_section(run)),
        *analysis_sections(run),
        ("pictures", "What the bundle finds", pictures_section(pictures) if pictures else None),
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
        task = next((values for values in (val, *run.quantized.values()) if is_task(values)), None)
        return f"{TASKS.get(task['task'], task['task'])} on {task.get('data')}" if task else run.folder.resolve().name
    return f"{architecture} on {data}" if data else str(architecture)
