"""leanvit analyze: look into one model or two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from leanvit import errors
from leanvit.commands.inputs import load_model

if TYPE_CHECKING:
    from leanvit import config as configs


def run(config: configs.AnalyzeConfig) -> int:
    """Look into one model or two, and draw the page."""
    from leanvit.analysis.study import describe_run, print_study, require_parts, save_study, study
    from leanvit.config import save_yaml
    from leanvit.files import only_writer
    from leanvit.report import write_report
    from leanvit.train import pick_device

    if not config.models:
        raise errors.ConfigError("no model given, expected one or two. Run: leanvit analyze --help")
    device = pick_device(config.device)
    models = [(spec, *load_model(spec, config.load_options())) for spec in config.models]
    with only_writer(config.output):
        save_yaml(config, Path(config.output) / "config.yaml")
        result, arrays = study(models, config, device)
        save_study(describe_run(config, result), arrays, config.output)
        page = write_report(config.output)
    print_study(result)
    print(f"report {page}")
    require_parts(result, config)
    return errors.EXIT_OK
