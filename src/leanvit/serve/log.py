"""JSON lines on standard output: one a request, one an event, and one for what a library would write on standard error.

What an image holds is in none of them.
"""

from __future__ import annotations

import json
import logging
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


class LibraryLines(logging.Handler):
    """Warnings of uvicorn, Pillow and others as lines of this log.

    By themselves they go to standard error as bare text, one a malformed request; where nobody reads that, a pipe is
    full after 64 KiB, and the write that waits for room holds up every request.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, but not uvicorn's advice to install websocket packages: this server has no websockets."""
        message = record.getMessage()
        if "websockets" not in message:
            write("library", library=record.name, level=record.levelname.lower(), message=message)


def take_library_lines() -> None:
    """From now on warnings and errors of any library in this process, Python's own too, come as lines of this log."""
    logging.captureWarnings(capture=True)
    logging.getLogger().handlers[:] = [LibraryLines(logging.WARNING)]
