import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from qwenvl_lit.data.survey import CHUNK, Finding, measure_lengths, stamp, survey
from qwenvl_lit.types import Conversation, DataError, Dropped, Length, Turn


@dataclass
class Numbers:
    """Rows 0, 1, 2, ...; some cannot be read, some are dropped, some have a note."""

    count: int
    broken: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    noted: tuple[int, ...] = ()
    read: int = 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read += 1
        if index in self.broken:
            raise DataError(f"rows.jsonl:{index + 1}: not JSON")
        if index in self.dropped:
            raise Dropped(f"rows.jsonl:{index + 1}: a bad box")
        notes = ("box clipped",) if index in self.noted else ()
        turn = Turn(role="user", parts=(str(index),))
        return Conversation(id=f"row-{index}", turns=(turn,), index=index, notes=notes)


class Letters:
    """Measures a row as its index plus two, plus one supervised, and drops index 7."""

    pad_id = 0
    stop_ids = ()

    def __init__(self, **settings):
        self.settings = settings

    def length(self, conversation):
        if conversation.index == 7:
            raise Dropped("too long")
        return Length(conversation.index + 2, conversation.index + 1, 5 * conversation.index)


def index_of(conversation: Conversation) -> int:
    return conversation.index


@dataclass
class WaitForAnother:
    """Waits at row 0 until another process has read the last row, for at most 30 seconds."""

    last_row_read: Path
    last: int

    def __call__(self, conversation: Conversation) -> int:
        if conversation.index == self.last:
            self.last_row_read.touch()
        for _ in range(3000 if conversation.index == 0 else 0):
            if self.last_row_read.exists():
                break
            time.sleep(0.01)
        return os.getpid()


def die_at_300(conversation: Conversation) -> int:
    if conversation.index == 300:
        os.kill(os.getpid(), signal.SIGKILL)
    return conversation.index


def test_rows_are_read_in_order_with_any_number_of_processes():
    rows = Numbers(3 * CHUNK + 5, broken=(3,), dropped=(CHUNK + 1,))
    results = list(survey(rows, index_of, workers=0))
    assert list(survey(rows, index_of, workers=2)) == results
    assert results.pop(CHUNK + 1).kind == "dropped"
    error = Finding(kind="error", index=3, id="", message="rows.jsonl:4: not JSON")
    assert results.pop(3) == error
    assert results == [index for index in range(len(rows)) if index not in (3, CHUNK + 1)]


def test_several_processes_share_the_work(tmp_path):
    rows = Numbers(8 * CHUNK)
    wait = WaitForAnother(tmp_path / "last row read", last=len(rows) - 1)
    processes = set(survey(rows, wait, workers=2))
    assert len(processes - {os.getpid()}) == 2


def test_a_survey_of_no_rows_is_empty():
    assert list(survey(Numbers(0), index_of, workers=2)) == []


def test_progress_rises_to_the_number_of_rows():
    for workers in (0, 2):
        seen = []
        list(survey(Numbers(2 * CHUNK + 1), index_of, workers=workers, progress=seen.append))
        assert seen == sorted(seen)
        assert seen[-1] == 2 * CHUNK + 1


def test_a_survey_can_be_closed_before_its_end():
    results = survey(Numbers(100 * CHUNK), index_of, workers=2)
    assert next(results) == 0
    results.close()


def test_an_exception_other_than_data_error_is_raised():
    for workers in (0, 2):
        with pytest.raises(TypeError):
            list(survey(Numbers(2 * CHUNK), len, workers=workers))


def test_a_process_that_dies_is_reported():
    with pytest.raises(DataError, match="fewer workers"):
        list(survey(Numbers(2 * CHUNK), die_at_300, workers=2))


def test_the_length_of_a_dropped_row_is_zero():
    measured = measure_lengths(
        Numbers(9, dropped=(2,), noted=(4,)), Letters(), workers=0, cache=None, identity=None
    )
    assert measured.lengths.tolist() == [2, 3, 0, 5, 6, 7, 8, 0, 10]
    assert measured.supervised.tolist() == [1, 2, 0, 4, 5, 6, 7, 0, 9]
    assert measured.image_tokens.tolist() == [0, 5, 0, 15, 20, 25, 30, 0, 40]
    assert measured.lengths.dtype == measured.supervised.dtype == np.int32
    assert measured.findings == (
        Finding(kind="dropped", index=2, id="", message="rows.jsonl:3: a bad box"),
        Finding(kind="note", index=4, id="row-4", message="row 'row-4': box clipped"),
        Finding(kind="dropped", index=7, id="row-7", message="row 'row-7': too long"),
    )


def test_the_error_counts_unusable_rows_and_quotes_the_first():
    rows = Numbers(20, broken=(0, 1, 2, 3, 4, 9))
    message = (
        r"6 of 20 rows cannot be used:\nrows.jsonl:1: not JSON\n"
        r"(?s:.*)rows.jsonl:5.*\n.*1 more: qwenvl_lit.check lists all of them"
    )
    with pytest.raises(DataError, match=message):
        measure_lengths(rows, Letters(), workers=0, cache=None, identity=None)


def test_a_second_measurement_is_read_from_the_cache(tmp_path):
    rows = Numbers(9, dropped=(2,), noted=(4,))
    options = {"workers": 0, "cache": tmp_path / "new", "identity": ["a.jsonl", 1]}
    first = measure_lengths(rows, Letters(), **options)
    second = measure_lengths(rows, Letters(), **options)
    assert rows.read == 9
    assert second.findings == first.findings
    assert second.lengths.tolist() == first.lengths.tolist()
    assert second.supervised.tolist() == first.supervised.tolist()
    assert second.image_tokens.tolist() == first.image_tokens.tolist()


@pytest.mark.parametrize(
    "change",
    [{"identity": ["a.jsonl", 2]}, {"processor": Letters(system="")}, {"rows": Numbers(8)}],
)
def test_a_change_of_what_determines_the_lengths_invalidates_the_cache(tmp_path, change):
    measure_lengths(Numbers(9), Letters(), workers=0, cache=tmp_path, identity=["a.jsonl", 1])
    changed = {"rows": Numbers(9), "processor": Letters(), "identity": ["a.jsonl", 1], **change}
    measured = measure_lengths(**changed, workers=0, cache=tmp_path)
    assert changed["rows"].read == len(measured.lengths) == changed["rows"].count
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 broken", b"nonsense"])
def test_lengths_are_measured_again_if_the_cache_is_damaged(tmp_path, damage):
    options = {"workers": 0, "cache": tmp_path, "identity": None}
    first = measure_lengths(Numbers(9), Letters(), **options)
    [file] = tmp_path.iterdir()
    file.write_bytes(damage or file.read_bytes()[:-100])
    rows = Numbers(9)
    second = measure_lengths(rows, Letters(), **options)
    assert second.lengths.tolist() == first.lengths.tolist()
    assert rows.read == 9


def test_a_stamp_changes_with_the_file(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("{}")
    before = stamp([file])
    assert before == stamp([Path(file)])
    os.utime(file, ns=(1, 1))
    assert stamp([file]) != before
