"""`leanvit data inspect`: what a data set holds, and what would harm a training on it, before the training."""

from leanvit.inspection.annotated_page import PROBLEMS_SHOWN
from leanvit.inspection.run import PAGE_NAME, RESULT_NAME, require_readable, run

__all__ = ["PAGE_NAME", "PROBLEMS_SHOWN", "RESULT_NAME", "require_readable", "run"]
