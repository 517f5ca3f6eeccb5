"""What torch.onnx could not translate, in one sentence that names the operation."""

from __future__ import annotations

import re

from leanvit.errors import ExportError

WITHOUT_TRANSLATION = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")
"""torch 2.14, torch/onnx/_internal/exporter/_core.py; names are those of aten."""


def refusal(error: BaseException) -> ExportError:
    """The error for users: torch.onnx says the step that failed first, and the reason in the last of its causes."""
    found = WITHOUT_TRANSLATION.search(str(error))
    if found:
        return ExportError(
            f"ONNX has no form of the operation {found[1]} that the network uses, expected operations that torch.onnx "
            "translates. Write that part of the forward with others."
        )
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return ExportError(f"torch.onnx can't translate the graph: {lines[0][:300]}. Report the operation.")
