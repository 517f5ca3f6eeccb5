"""The journal: what it holds is found again, a cut line is not, and lines of other inputs are left out and said."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanvit.optimize.journal import Journal


def test_what_was_added_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = Journal(path, {"weights": "a"})
    assert first.is_new
    first.add("file", "w8a8", {"state": "made"}, 1.5)
    first.add("file", "w8a8", {"state": "failed"}, 2.0)
    again = Journal(path, {"weights": "a"})
    assert not again.is_new
    assert again.get("file", "w8a8") == {"state": "failed"}
    assert again.get("times", "w8a8") is None
    assert again.seconds == 3.5


def test_other_inputs_start_anew_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, {"weights": "a"}).add("file", "w8a8", {}, 1.0)
    other = Journal(path, {"weights": "b"})
    assert other.is_new
    assert other.get("file", "w8a8") is None
    assert "starts anew" in capsys.readouterr().err
    other.add("file", "float", {}, 1.0)
    assert Journal(path, {"weights": "b"}).get("file", "float") == {}


@pytest.mark.parametrize("kept", [0, 1, 20, -1, -2])
def test_a_file_that_was_cut_loses_that_line_only(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "facts")
    journal.add("file", "float", {"state": "made"}, 1.0)
    whole = path.read_bytes()
    journal.add("file", "w8a8", {"state": "made"}, 1.0)
    path.write_bytes(whole + path.read_bytes()[len(whole) :][:kept])
    assert Journal(path, "facts").get("file", "float") == {"state": "made"}
