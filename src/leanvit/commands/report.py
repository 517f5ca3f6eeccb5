"""leanvit report: draw a run as one HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leanvit import errors

if TYPE_CHECKING:
    from leanvit import config as configs


def run(config: configs.ReportConfig) -> int:
    """Draw a run."""
    from leanvit.commands.golden_pictures import golden_findings
    from leanvit.report import write_report

    print(f"report {write_report(config.run, config.output, golden_findings(config.run))}")
    return errors.EXIT_OK
