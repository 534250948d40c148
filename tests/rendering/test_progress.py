import io
import sys
import time

import rich
from rich.console import Console

from qwenvl_lit.rendering.progress import progress_bars


def test_a_terminal_shows_a_bar_for_each_name(monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(rich, "_console", terminal)  # what rich prints to by default
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with progress_bars() as report:
        report("rows", 3, 10)
        report("images", 0, 1200)
        report("rows", 10, 10)
    printed = terminal.file.getvalue()
    assert "rows" in printed
    assert "10/10" in printed
    assert "0/1200" in printed


def test_without_a_terminal_lines_are_printed_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress_bars(seconds_per_line=60) as report:
        for now[0], done in ((30, 500), (61, 1000), (100, 1500), (122, 2000)):
            report("images", done, 2000)
    assert capsys.readouterr().out == "images: 1,000 of 2,000\nimages: 2,000 of 2,000\n"


def test_nothing_is_printed_if_it_is_not_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(time, "monotonic", iter(range(0, 10_000, 100)).__next__)
    with progress_bars() as report:
        report("images", 1, 2)
    with progress_bars(enabled=False, seconds_per_line=1) as report:
        report("images", 1, 2)
    assert capsys.readouterr().out == ""
