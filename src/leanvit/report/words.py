"""Numbers from JSON as words: decimals, units, shares, intervals, durations; a dash where there is none."""

from __future__ import annotations

import math
from typing import Any

Json = dict[str, Any]


def finite(value: Any) -> float | None:
    """A number from JSON as a float; None where it is absent, not a number, NaN or infinite."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def fixed(value: Any, digits: int = 0, unit: str = "") -> str:
    """A number with `digits` decimals and a true minus sign, such as '−0.28%'; a dash where there is none."""
    number = finite(value)
    return "–" if number is None else f"{number:,.{digits}f}{unit}".replace("-", "−")


def significant(value: Any, unit: str = "") -> str:
    """A number with about three significant digits and no exponent."""
    number = finite(value)
    if number is None or number == 0:
        return fixed(number, 0, unit)
    return fixed(number, min(6, max(0, 2 - math.floor(math.log10(abs(number))))), unit)


def short(text: str, limit: int) -> str:
    """At most `limit` characters; an ellipsis takes the place of the front, because ends tell names apart."""
    return text if len(text) <= limit else "…" + text[len(text) - limit + 1 :]


def megabytes(value: Any, unit: str = "") -> str:
    """Bytes as 10⁶ bytes."""
    number = finite(value)
    return "–" if number is None else significant(number / 1e6, unit)


def ratio(numerator: Any, denominator: Any) -> float | None:
    """numerator / denominator of two numbers from JSON; None where it is not defined."""
    above, below = finite(numerator), finite(denominator)
    return None if above is None or not below else above / below


def percent(part: Any, whole: Any) -> float | None:
    """100 part / whole of two numbers from JSON; None where it is not defined."""
    share = ratio(part, whole)
    return None if share is None else 100 * share


def accuracy_text(values: Json) -> str:
    """'98.05% (352 of 359 images)', or a dash."""
    if finite(values.get("top1")) is None:
        return "–"
    return f"{fixed(values['top1'], 2, '%')} ({fixed(values.get('correct'))} of {fixed(values.get('images'))} images)"


def interval(correct: Any, images: Any) -> tuple[float, float] | None:
    """Wilson's 95% interval of an accuracy, in percent: how much so few test images can say."""
    hits, count = finite(correct), finite(images)
    if hits is None or not count:
        return None
    z, share = 1.96, hits / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 100 / (1 + z * z / count)
    return scale * (middle - half), scale * (middle + half)


def duration(seconds: Any) -> str:
    """Seconds as '41 s' or '3 min 5 s'."""
    number = finite(seconds)
    if number is None:
        return "–"
    minutes, rest = divmod(round(number), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def versions(values: Json) -> str:
    """'leanvit 0.1.0, torch 2.14.1', empty where there are none."""
    return ", ".join(f"{name} {version}" for name, version in (values.get("versions") or {}).items())
