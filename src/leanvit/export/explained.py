"""What `leanvit.export.explain` found, in words. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Values = dict[str, Any]


def lines(explanation: Values, shown: int = 3) -> list[str]:
    """What `explain` and `site_costs` found, as sentences."""
    return [*integer_lines(explanation), *cost_lines(explanation.get("costs") or [], shown)]


def integer_lines(explanation: Values) -> list[str]:
    """How much runs on integer kernels, and what does not and why."""
    total = explanation["macs"]
    if not total:
        return []
    found = [f"{explanation['integer_macs'] / total:.0%} of the multiply-adds run on integer kernels"]
    for entry in explanation["float"]:
        names = ", ".join(entry["sites"][:2])
        more = f" and {len(entry['sites']) - 2} more" if len(entry["sites"]) > 2 else ""
        found.append(f"in float {entry['macs'] / total:.1%}: {entry['reason']} ({names}{more})")
    if explanation["no_site"]:
        found.append(f"in float, not counted: {', '.join(explanation['no_site'][:3])}")
    return found


def cost_lines(costs: Sequence[Values], shown: int = 3) -> list[str]:
    """Which sites cost most, and what it would take to lift each."""
    worst = [entry for entry in costs[:shown] if entry["share"] > 0]
    if not worst:
        return []
    parts = []
    for entry in worst:
        price = f"{entry['macs']:.1%} of the multiply-adds in float"
        if entry["lifting_ms"] is not None:
            price = f"{entry['lifting_ms']:+.3f} ms"
        parts.append(f"{entry['site']} {entry['share']:.0%} (lifted: {price})")
    return [f"sites that cost most of the quantized network's error: {'; '.join(parts)}"]
