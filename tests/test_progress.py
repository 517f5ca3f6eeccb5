"""Progress: on standard error only, quiet for short work, and a table that loses nothing in a pipe."""

from __future__ import annotations

import io
import re
import sys

import pytest

from leanvit import progress
from leanvit.progress import Bar, note, print_table, track


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_note_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    note("something was converted")
    assert capsys.readouterr() == ("", "something was converted\n")


@pytest.mark.usefixtures("clock")
def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("work", 3) as bar:
        for _ in range(3):
            bar.advance()
    assert capsys.readouterr() == ("", "")


def test_long_work_is_told_every_five_seconds_with_the_time_left_and_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Bar("training", 10) as bar:
        for step in range(10):
            clock.now += 2.0
            bar.advance(detail=f"loss {step}")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "training 3/10, 14 s left  loss 2",
        "training 6/10, 8 s left  loss 5",
        "training 9/10, 2 s left  loss 8",
        "training 10/10, 20 s  loss 9",
    ]


def test_a_detail_stays_until_there_is_a_new_one(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("work", 4) as bar:
        bar.advance(detail="first")
        clock.now += 6
        bar.advance(2)
        assert capsys.readouterr().err == "work 3/4, 2 s left  first\n"


def test_what_an_earlier_run_did_does_not_shorten_the_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Bar("work", None) as bar:
        bar.go_on_from(6)
        bar.expect(10)
        clock.now += 6
        bar.advance()
        assert capsys.readouterr().err == "work 7/10, 18 s left\n"


def test_work_that_fails_does_not_claim_to_have_ended(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        with Bar("work", 4) as bar:
            clock.now += 6
            bar.advance()
            capsys.readouterr()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Bar("reading", 3) as bar:
        bar.advance(3, detail="almost done")
    for word in ("reading", "3/3", "almost done"):
        assert word in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_bars_inside_a_bar_share_its_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Bar("exporting", 2) as outer:
        for _ in range(2):
            with Bar("timing", 5) as inner:
                inner.advance(5, detail="batch 8")
            outer.advance()
    drawn = terminal.getvalue()
    # The cursor is hidden once and shown once; what remains on the last screen is the outer bar alone.
    assert (drawn.count("\x1b[?25l"), drawn.count("\x1b[?25h")) == (1, 1)
    last = drawn.split("\x1b[2K")[-1]
    assert "exporting" in last
    assert "2/2" in last
    assert "timing" not in last
    with Bar("another", 1) as later:
        later.advance()
    assert "another" in terminal.getvalue()


def test_the_end_is_told_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("exporting", 2) as bar:
        bar.advance()
        clock.now += 6
        bar.advance()
    assert capsys.readouterr().err == "exporting 2/2, 6 s\n"


def test_a_terminal_without_rich_gets_plain_lines(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("rich", "rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Bar("reading", 2) as bar:
        clock.now += 6
        bar.advance()
        assert capsys.readouterr().err == "reading 1/2, 6 s left\n"


def test_work_that_nobody_has_counted_is_told_without_an_end(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bar("predicting", None) as bar:
        bar.advance(40)
        clock.now += 6
        bar.advance(2)
    assert capsys.readouterr().err.splitlines() == ["predicting 42, 6 s", "predicting 42, 6 s"]
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Bar("predicting", None) as bar:
        bar.advance(42)
    assert "42/?" in terminal.getvalue()


def test_track_gives_every_item_in_order_and_no_sooner_than_asked_for() -> None:
    taken: list[int] = []
    tracked = track((taken.append(i) or i for i in range(5)), "work", 5)
    assert next(tracked) == 0
    assert taken == [0]
    assert list(tracked) == [1, 2, 3, 4]


COLUMNS = ["target", "median ms", "size"]
ROWS = [["runs/demo/bundle", "1.25", "[red]2.7 MB"], ["a much longer name " * 4, "130.00", "1 MB"]]


def test_a_table_in_a_pipe_keeps_every_cell_and_takes_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("the title", COLUMNS, ROWS)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "the title" in captured.out
    for cell in [*COLUMNS, *(cell.strip() for row in ROWS for cell in row)]:
        assert cell in captured.out
    assert "\x1b" not in captured.out


def test_a_table_without_rich_is_plain_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("rich", "rich.console", "rich.table"):
        monkeypatch.setitem(sys.modules, module, None)
    print_table("the title", COLUMNS, ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(" {2,}", line.strip()) for line in lines[-3:]] == [
        [cell.strip() for cell in row] for row in [COLUMNS, *ROWS]
    ]
