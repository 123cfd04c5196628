"""The progress bar: what it shows, where, and that it writes nothing to standard output."""

import io
import subprocess
import sys

import numpy as np
import pytest

from gpt2_jax import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Makes standard error a terminal of so many columns. Returns a function that returns all that was written."""

    def make(columns=100):
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr.getvalue

    return make


@pytest.mark.parametrize("stderr", [io.StringIO(), None])
def test_nothing_is_shown_where_standard_error_is_no_terminal(stderr, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress.bars("count") as bars:
        bars.update("a", 1, 2)
        bars.say("words")
        assert not bars.shown
    assert list(progress.tracked("a")([1, 2])) == [1, 2]
    assert capsys.readouterr().out == ""
    assert not stderr or stderr.getvalue() == ""


def test_a_terminal_sees_no_bar_that_is_not_wanted(terminal):
    written = terminal()
    with progress.bars("count", shown=False) as bars:
        bars.update("a", 1, 2)
    assert list(progress.tracked("a", shown=False)([1])) == [1]
    assert written() == ""


def test_what_is_shown(capsys, terminal):
    """A bar for each title; a line above them, unchanged; brackets are not markup; nothing on standard output."""
    written = terminal()
    with progress.bars("bytes", "speed", "left", shown=None, stay=True) as bars:
        assert bars.shown
        bars.update("one[1]", 5, 10)
        bars.update("two", 0)
        bars.update("two", 7_000, 8_000)
        bars.say("to [bold]read[/bold] 7")
        print("printed meanwhile")
    for part in ("one[1]", "5/10 bytes", "two", "7.0/8.0 kB", "to [bold]read[/bold] 7", "━"):
        assert part in written()
    assert capsys.readouterr().out == "printed meanwhile\n"


def test_a_list_is_tracked_to_its_end(terminal):
    written = terminal()
    assert list(progress.tracked("scoring")([3, 5, 7])) == [3, 5, 7]
    assert "scoring" in written()
    assert "100%" in written()


@pytest.mark.parametrize(("columns", "has_bar"), [(100, True), (94, False)])
def test_the_bar_gives_way_to_the_text(terminal, columns, has_bar):
    written = terminal(columns)
    with progress.bars("text", titled=False, room=85, stay=True) as bars:
        bars.update("training", 3, 10, text="loss 3.25 " + "x" * 70)
    assert ("━" in written()) == has_bar
    assert "loss 3.25 " + "x" * 70 in written()
    assert "training" not in written()
    written = terminal(columns)
    with progress.bars("text", titled=False, room=85, stay=True) as bars:
        bars.update("training", 3, 10, text="x" * 500)
    assert "x…" in written()
    assert "x" * columns not in written()


def test_reading_a_large_model_shows_a_bar(terminal):
    leaves = [("a", np.zeros(500_000, np.uint8)), ("b", np.zeros(500_000, np.uint8))]
    written = terminal()
    assert list(progress.reading(leaves, "reading 355M", 10**6)) == leaves
    assert written() == ""
    assert list(progress.reading(leaves, "reading 355M", progress.LARGE)) == leaves
    assert "reading 355M" in written()
    assert "0.0/1.0 GB" in written()


def test_a_bar_needs_no_jax_and_nothing_shown_needs_no_rich():
    code = "import sys; from gpt2_jax import progress; list(progress.tracked('a')([1])); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "rich"} & set(done.stdout.split())
