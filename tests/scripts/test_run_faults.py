"""The record of the bench of faults and its table."""

import json

import run_faults
from faults.tally import RECORD, Tally, tallied

KILLS = {"group": "killed", "kind": "train", "tried": 8, "passed": 8, "failed": []}
SOAK = {"group": "long work", "kind": "train, 3,000", "tried": 1, "passed": 1, "failed": []}
SOAK |= {"mb_at_start_and_end": [450.3, 456.2], "mb_per_1000_after_warm_up": 0.2}


def test_the_table_names_a_group_once_and_shows_what_was_measured():
    assert run_faults.table_of([KILLS, {**KILLS, "kind": "sweep", "tried": 1200}, SOAK]) == (
        "| fault | | tried | passed |\n"
        "|---|---|---|---|\n"
        "| killed | train | 8 | 8 |\n"
        "|  | sweep | 1,200 | 8 |\n"
        "| long work | train, 3,000: 450 to 456 MB | 1 | 1 |"
    )


def test_the_table_replaces_the_one_before(tmp_path, monkeypatch):
    page = tmp_path / "reliability.md"
    page.write_text(f"before\n{run_faults.BEGIN}\nold\n{run_faults.END}\nafter\n")
    monkeypatch.setattr(run_faults, "PAGE", page)
    run_faults.write_table([KILLS])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| killed | train | 8 | 8 |" in text


def test_the_page_has_the_place_of_the_table():
    text = run_faults.PAGE.read_text()
    assert text.index(run_faults.BEGIN) < text.index(run_faults.END)


def test_attempts_are_counted_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv(RECORD, str(tmp_path))
    with tallied("group", "kind") as tally, tally.attempt("three") as attempt:
        attempt.count = 3
    [row] = run_faults.read_rows(tmp_path)
    assert (row["tried"], row["passed"], row["failed"]) == (3, 3, [])
    json.dumps(run_faults.report_of([row], 1.0))


def test_a_failed_attempt_is_counted_with_its_message_and_does_not_end_the_others():
    tally = Tally("group", "kind")
    for divisor in (0, 1):
        with tally.attempt(f"by {divisor}"):
            _ = 1 / divisor
    assert (tally.tried, tally.passed) == (2, 1)
    assert tally.failed == ["by 0: ZeroDivisionError: division by zero"]
