"""The journal: a line for each file that was tried and for each round of timing, from which a killed run goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from leanvit.files import write_atomic
from leanvit.progress import note

JOURNAL_NAME = "journal.jsonl"


class Journal:
    """Lines of JSON in a file; those of other inputs are left out, and that is said."""

    def __init__(self, path: Path, facts: Any) -> None:
        """facts: JSON values of everything that the lines depend on. Reads what the file holds of the same facts."""
        self.path = path
        self.run = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        found = _read(path)
        self.lines = [line for line in found if line.get("run") == self.run]
        self.is_new = not self.lines
        if found and self.is_new:
            note(f"{path}: of another network, other images or other options; it starts anew")

    @property
    def seconds(self) -> float:
        """Time that is in the lines."""
        return float(sum(line["seconds"] for line in self.lines))

    def get(self, kind: str, key: str) -> Any:
        """What was added last under a kind and key, None where nothing was."""
        found = [line["value"] for line in self.lines if (line["kind"], line["key"]) == (kind, key)]
        return found[-1] if found else None

    def add(self, kind: str, key: str, value: Any, seconds: float) -> None:
        """Remember JSON values; on disk at once, the file as a whole."""
        self.lines.append({"run": self.run, "kind": kind, "key": key, "seconds": round(seconds, 3), "value": value})
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.lines)
        write_atomic(self.path, text.encode())


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # of a file that was cut while it was copied
        if isinstance(line, dict) and {"run", "kind", "key", "seconds", "value"} <= set(line):
            found.append(line)
    return found
