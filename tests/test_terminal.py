"""Text of files and models on a terminal."""

import logging
import pickle

import pytest
from rich.console import Console
from rich.table import Table

from qwenvl_lit.rendering.progress import progress_bars
from qwenvl_lit.rendering.table import plain_table, score_table
from qwenvl_lit.terminal import PrintableRecords, printable, wrapped
from qwenvl_lit.types import DataError

HOSTILE = "a\x1b[2Jb\r\nerror: c\u202e\u2028[red]d[/]"
SHOWN = r"a\x1b[2Jb\r\nerror: c\u202e\u2028[red]d[/]"


def rendered(table: Table) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_control_characters_are_escaped_and_blanks_of_other_scripts_stay():
    assert printable(HOSTILE) == SHOWN
    assert printable("漢\u3000字\u00a0é") == "漢\u3000字\u00a0é"
    assert printable("a\n\tb\x07", keep="\n\t") == "a\n\tb\\x07"


def test_a_message_is_one_line_for_each_argument():
    assert str(DataError(f"{HOSTILE}: no such row", "second line")) == (
        f"{SHOWN}: no such row\nsecond line"
    )
    copy = pickle.loads(pickle.dumps(DataError(HOSTILE)))
    assert str(copy) == SHOWN


def test_a_message_from_a_data_worker_has_no_traceback():
    traceback = "Caught DataError in worker 0.\nTraceback:\n  File x\nqwenvl_lit.types.DataError: "
    assert str(DataError(traceback + "rows.jsonl:3: wrong\n")) == "rows.jsonl:3: wrong"


def test_log_messages_are_escaped():
    record = logging.LogRecord("x", logging.WARNING, "", 0, "file %s\nmore", ("a\x1b[2J",), None)
    assert PrintableRecords().filter(record)
    assert record.getMessage() == "file a\\x1b[2J\nmore"


@pytest.mark.parametrize(
    "table",
    [score_table({f"{HOSTILE}/accuracy": 0.5}), plain_table([{HOSTILE: HOSTILE}])],
    ids=["scores", "benchmarks"],
)
def test_names_in_tables_are_neither_obeyed_nor_markup(table):
    text = rendered(table)
    assert SHOWN in text
    assert "\x1b" not in text


def test_names_of_progress_bars_are_neither_obeyed_nor_markup(capsys):
    with progress_bars(seconds_per_line=0) as report:
        report(HOSTILE, 0, 2)
        report(HOSTILE, 1, 2)
    printed = capsys.readouterr().out
    assert f"{SHOWN}: 1 of 2" in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize("width", [60, 80, 160])
def test_lines_on_a_terminal_break_between_words(monkeypatch, width):
    words = "Validation  every 0.25 epochs, scored by " + "name_to_box_iou, " * 12
    path = "/data/" + "a" * 200
    assert wrapped(words) == words  # one line in a file
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    lines = wrapped(words + path, indent=12).splitlines()
    assert max(map(len, lines[:-1])) <= width
    assert all(line.startswith(" " * 12) for line in lines[1:])
    assert " ".join(line.strip() for line in lines) == words + path
    assert lines[-1].endswith(path)
