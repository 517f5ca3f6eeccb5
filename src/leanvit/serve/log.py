"""JSON lines on standard output: one a request and one an event. What an image holds is in none of them."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Any

LONGEST = 200
"""Characters of a text that a client chose."""


def write(event: str, **values: Any) -> None:
    """One line with the time, the process' event and its values."""
    shown = {key: value[:LONGEST] if isinstance(value, str) else value for key, value in values.items()}
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    try:
        sys.stdout.write(json.dumps({"time": now, "event": event, **shown}) + "\n")
        sys.stdout.flush()
    except (OSError, ValueError):
        pass  # who reads the log has left; that is no reason to stop serving
