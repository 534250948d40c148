import math

import pytest
import torch
from torchmetrics import MeanMetric
from toy_task import conversation

from qwenvl_lit.metrics.per_sample import sample_key, warn_without_rows
from qwenvl_lit.metrics.sample_mean import SampleMean
from qwenvl_lit.types import Conversation, Prediction


class Length(SampleMean):
    """Length of the answer; rows with an empty one are left out."""

    needs = "answer"

    def score(self, prediction):
        return float(len(prediction.text)) if prediction.text else None


def test_a_metric_without_needs_is_refused_when_its_class_is_created():
    with pytest.raises(TypeError, match="Nameless has no `needs`: name what a row must have"):
        type("Nameless", (SampleMean,), {"score": lambda self, prediction: 1.0})
    type("Unfinished", (SampleMean,), {})  # abstract: a subclass may set it
    type("Inheriting", (Length,), {"score": lambda self, prediction: 1.0})


def answer(name: str, text: str, **columns: str) -> Prediction:
    row = Conversation(id=name, turns=(), columns=columns)
    return Prediction(conversation=row, text=text, parts=())


def test_the_mean_is_over_all_batches():
    metric = Length()
    metric.update([answer("a", "x"), answer("b", "xx")])
    metric.update([answer("c", "xxxxxx")])
    assert metric.compute() == 3
    assert metric.count == 3


def test_where_selects_rows_by_one_or_several_values():
    rows = [
        answer("a", "x", task="left"),
        answer("b", "xxx", task="right"),
        answer("c", "xxxxxxxx", task="count"),
        answer("d", "x"),
    ]
    one, several = Length(where={"task": "left"}), Length(where={"task": ["left", "right"]})
    for metric in (one, several):
        metric.update(rows)
    assert (one.compute(), one.count) == (1, 1)
    assert (several.compute(), several.count) == (2, 2)


def test_a_repeated_row_counts_once_in_one_process_and_across_ranks():
    rank0, rank1 = Length(), Length()
    rank0.update([answer("a", "x"), answer("c", "xxx")])
    rank1.update([answer("b", "xx"), answer("a", "x")])  # "a" fills the last batch of rank 1
    rank0.merge_state(rank1)
    assert rank0.compute() == 2
    assert rank0.count == 3


def test_a_rank_without_rows_does_not_change_the_score():
    rank0, rank1 = Length(), Length()
    rank0.update([answer("a", "xx")])
    rank1.update([])
    rank0.merge_state(rank1)
    assert rank0.compute() == 2


def test_rows_that_cannot_be_scored_are_left_out_with_a_warning(caplog):
    metric = Length()
    metric.update([answer("a", "xx"), answer("b", "")])
    assert metric.compute() == 2
    assert metric.count == 1
    assert caplog.messages == ["Length: 1 of 2 rows left out, they have no answer"]


def test_a_warning_names_the_score_and_is_logged_once(caplog):
    for _ in range(2):  # validations
        metric = Length()
        metric.title = "val/length"
        metric.update([answer("a", "xx"), answer("b", "")])
        metric.compute()
    assert caplog.messages == ["val/length: 1 of 2 rows left out, they have no answer"]


def test_without_rows_the_mean_is_nan_with_a_warning(caplog):
    metric = Length(where={"task": "find"})
    metric.update([answer("a", "x", task="count")])
    assert math.isnan(metric.compute())
    assert caplog.messages == ["Length is nan: there is no row with task=find"]
    assert metric.count == 0


def test_scores_without_rows_of_several_sets_are_one_warning(caplog):
    metrics = []
    for name in ("find", "left", "count"):
        for kind in (["find"], ["left", "right"]):
            metric = Length(where={"task": kind, "split": "val"})
            metric.title, metric.advice = f"{name}/{kind[0]}", "; give more rows"
            metric.update([answer("a", "x", task=name, split="val")])
            metric.compute()
            metrics.append(metric)
    assert not caplog.messages
    for _ in range(2):
        warn_without_rows(metrics)
    left, find = "task=left or right and split=val", "task=find and split=val"
    assert caplog.messages == [
        f"scores without any row are nan: find/left ({left}), left/find ({find}), "
        f"count/find ({find}), count/left ({left}); give more rows"
    ]


def test_a_warning_names_a_few_scores_without_rows(caplog):
    metrics = [Length() for _ in range(8)]
    for number, metric in enumerate(metrics):
        metric.title = f"set{number}/length"
        metric.update([])
        metric.compute()
    warn_without_rows([*metrics, MeanMetric()])
    [message] = caplog.messages
    assert message.endswith(", set5/length (any row) and 2 more")


def test_reset_removes_the_rows():
    metric = Length()
    metric.update([answer("a", "xxxx")])
    metric.reset()
    metric.update([answer("b", "x")])
    assert metric.compute() == 1


def test_the_mean_does_not_depend_on_the_order_of_rows():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 1000, (500,), generator=generator).tolist()
    rows = [answer(str(index), "x" * length) for index, length in enumerate(lengths)]
    forward, backward = Length(), Length()
    forward.update(rows)
    backward.update(rows[::-1])
    assert torch.equal(forward.compute(), backward.compute())


def test_evaluate_scores_rows_without_changing_the_state(caplog):
    metric = Length(where={"task": "a"})
    metric.update([answer("a", "xxxxxx", task="a")])
    rows = [
        answer("b", "x", task="a"),
        answer("c", "xxx", task="a"),
        answer("c", "xx", task="a"),  # the last answer of an id counts
        answer("d", "", task="a"),
        answer("e", "xxxx", task="b"),
    ]
    score, row_scores = metric.evaluate(rows)
    assert "Length: 1 of 3 rows left out" in caplog.text
    assert score == 1.5
    assert row_scores == {sample_key("b"): 1, sample_key("c"): 2}
    assert metric.compute() == 6


def test_keys_are_stable_and_distinct():
    assert sample_key("row 1") == sample_key(conversation(1).id)
    assert len({sample_key(str(number)) for number in range(10_000)}) == 10_000
