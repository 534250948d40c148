import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from qwenvl_lit.data.survey import CHUNK, Finding, measure, stamp, survey
from qwenvl_lit.types import Conversation, DataError, Dropped, Turn


@dataclass
class Numbers:
    """Rows 0, 1, 2, ...; some cannot be read, some are left out, some have a note."""

    count: int
    broken: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    noted: tuple[int, ...] = ()
    read: int = 0

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        self.read += 1
        if place in self.broken:
            raise DataError(f"rows.jsonl:{place + 1}: not JSON")
        if place in self.dropped:
            raise Dropped(f"rows.jsonl:{place + 1}: a bad box")
        notes = ("box clipped",) if place in self.noted else ()
        return Conversation(
            id=f"row-{place}",
            turns=(Turn(role="user", parts=(str(place),)),),
            index=place,
            notes=notes,
        )


class Letters:
    """Counts a conversation as its index, one less of it learned, and refuses index 7."""

    pad_id = 0
    stop_ids = ()

    def __init__(self, **settings):
        self.settings = settings

    def length(self, conversation):
        if conversation.index == 7:
            raise Dropped(f"sample {conversation.id!r}: too long")
        return conversation.index + 2, conversation.index + 1


def index_of(conversation: Conversation) -> int:
    return conversation.index


@dataclass
class WaitForAnother:
    """At row 0 waits until another process has been at the last row, at most 30 seconds."""

    mark: Path
    last: int

    def __call__(self, conversation: Conversation) -> int:
        if conversation.index == self.last:
            self.mark.touch()
        for _ in range(3000 if conversation.index == 0 else 0):
            if self.mark.exists():
                break
            time.sleep(0.01)
        return os.getpid()


def die_at_300(conversation: Conversation) -> int:
    if conversation.index == 300:
        os.kill(os.getpid(), signal.SIGKILL)
    return conversation.index


def test_every_row_is_looked_at_in_order_whatever_the_number_of_processes():
    rows = Numbers(3 * CHUNK + 5, broken=(3,), dropped=(CHUNK + 1,))
    here, there = (list(survey(rows, index_of, workers=workers)) for workers in (0, 2))
    assert here == there
    assert [result for result in here if isinstance(result, int)] == [
        i for i in range(len(rows)) if i not in (3, CHUNK + 1)
    ]
    assert here[3] == Finding(kind="error", index=3, id="", message="rows.jsonl:4: not JSON")
    assert here[CHUNK + 1].kind == "dropped"


def test_several_processes_share_the_work(tmp_path):
    rows = Numbers(8 * CHUNK)
    assert (
        len(
            set(survey(rows, WaitForAnother(tmp_path / "mark", len(rows) - 1), workers=2))
            - {os.getpid()}
        )
        == 2
    )


def test_no_rows_are_no_work():
    assert list(survey(Numbers(0), index_of, workers=2)) == []


def test_progress_goes_up_to_the_number_of_rows():
    for workers in (0, 2):
        seen = []
        list(survey(Numbers(2 * CHUNK + 1), index_of, workers=workers, progress=seen.append))
        assert seen == sorted(seen)
        assert seen[-1] == 2 * CHUNK + 1


def test_a_survey_may_be_left_before_its_end():
    results = survey(Numbers(100 * CHUNK), index_of, workers=2)
    assert next(results) == 0
    results.close()


def test_a_defect_is_not_taken_for_a_bad_row():
    for workers in (0, 2):
        with pytest.raises(TypeError):
            list(survey(Numbers(2 * CHUNK), len, workers=workers))


def test_a_process_that_dies_is_reported():
    with pytest.raises(DataError, match="fewer workers"):
        list(survey(Numbers(2 * CHUNK), die_at_300, workers=2))


def test_lengths_are_zero_where_rows_are_left_out():
    measured = measure(
        Numbers(9, dropped=(2,), noted=(4,)), Letters(), workers=0, cache=None, identity=None
    )
    assert measured.lengths.tolist() == [2, 3, 0, 5, 6, 7, 8, 0, 10]
    assert measured.supervised.tolist() == [1, 2, 0, 4, 5, 6, 7, 0, 9]
    assert measured.lengths.dtype == measured.supervised.dtype == np.int32
    assert measured.findings == (
        Finding(kind="dropped", index=2, id="", message="rows.jsonl:3: a bad box"),
        Finding(kind="note", index=4, id="row-4", message="box clipped"),
        Finding(kind="dropped", index=7, id="row-7", message="sample 'row-7': too long"),
    )


def test_errors_are_counted_and_the_first_are_shown():
    with pytest.raises(
        DataError,
        match=r"6 of 20 rows cannot be used:\nrows.jsonl:1: not JSON\n(?s:.*)rows.jsonl:5.*\n.*1 more",
    ):
        measure(
            Numbers(20, broken=(0, 1, 2, 3, 4, 9)), Letters(), workers=0, cache=None, identity=None
        )


def test_a_second_measurement_is_read_from_the_cache(tmp_path):
    rows = Numbers(9, dropped=(2,), noted=(4,))
    first, again = (
        measure(rows, Letters(), workers=0, cache=tmp_path / "new", identity=["a.jsonl", 1])
        for _ in range(2)
    )
    assert rows.read == 9
    assert again.findings == first.findings
    assert again.lengths.tolist() == first.lengths.tolist()
    assert again.supervised.tolist() == first.supervised.tolist()


@pytest.mark.parametrize(
    "change",
    [{"identity": ["a.jsonl", 2]}, {"processor": Letters(system="")}, {"rows": Numbers(8)}],
)
def test_what_decides_the_lengths_decides_whether_the_cache_holds(tmp_path, change):
    measure(Numbers(9), Letters(), workers=0, cache=tmp_path, identity=["a.jsonl", 1])
    other = {"rows": Numbers(9), "processor": Letters(), "identity": ["a.jsonl", 1], **change}
    measured = measure(
        other["rows"], other["processor"], workers=0, cache=tmp_path, identity=other["identity"]
    )
    assert other["rows"].read == len(measured.lengths) == other["rows"].count
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 broken", b"nonsense"])
def test_a_damaged_cache_is_computed_again(tmp_path, damage):
    first = measure(Numbers(9), Letters(), workers=0, cache=tmp_path, identity=None)
    [file] = tmp_path.iterdir()
    file.write_bytes(damage or file.read_bytes()[:-100])
    rows = Numbers(9)
    assert (
        measure(rows, Letters(), workers=0, cache=tmp_path, identity=None).lengths.tolist()
        == first.lengths.tolist()
    )
    assert rows.read == 9


def test_a_stamp_changes_with_the_file(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("{}")
    before = stamp([file])
    assert before == stamp([Path(file)])
    os.utime(file, ns=(1, 1))
    assert stamp([file]) != before
