"""Keys with free text are swept like others, one job for each alternative."""

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from qwenvl_lit.cli.alternatives import is_sweep, quote_alternatives, split_alternatives
from qwenvl_lit.cli.command import prepare
from qwenvl_lit.types import DataError


def jobs(*varied: str) -> list[dict]:
    """The values that each job of a sweep gets."""
    arguments = ["-m", "data=jsonl", *varied]
    prepared = [item for item in prepare("train", arguments).arguments if item != "-m"]
    assert prepare("train", ["-m", *prepared]).arguments == ["-m", *prepared]
    parser = OverridesParser.create()
    composed = []
    for overrides in BasicSweeper.split_arguments(parser.parse_overrides(prepared), None)[0]:
        parsed = parser.parse_overrides(overrides)
        composed.append({override.key_or_group: override.value() for override in parsed})
    return composed


def test_files_are_swept():
    swept = jobs(
        "-m",
        "data=jsonl",
        "data.train=a.jsonl,b c.jsonl#200",
        "data.root=/data, old",
        "optim.lr=1,2",
    )
    assert len(swept) == 8
    assert [job["data.train"] for job in swept[::4]] == ["a.jsonl", "b c.jsonl#200"]
    assert {job["data.root"].strip() for job in swept} == {"/data", "old"}


def test_lists_of_files_and_targets_are_swept():
    swept = jobs(
        "-m",
        "data=jsonl",
        "data.train=[a.jsonl,b.jsonl],c.jsonl",
        "adapter.targets=attention,[w1,w2]",
    )
    assert [job["data.train"] for job in swept[::2]] == [["a.jsonl", "b.jsonl"], "c.jsonl"]
    assert [job["adapter.targets"] for job in swept[:2]] == ["attention", ["w1", "w2"]]


def test_a_regular_expression_with_a_comma_in_brackets_is_one_alternative():
    targets = [r"transformer\.h\.\d{1,2}\.attn\.c_attn", r".*\.(w1|w2),?"]
    swept = jobs(f"adapter.targets={','.join(targets)}")
    assert [job["adapter.targets"] for job in swept] == [targets[0], r".*\.(w1|w2)", "?"]


def test_a_name_with_a_comma_is_quoted():
    [one, other] = jobs("data.train='a,b.jsonl',it's.jsonl")
    assert (one["data.train"], other["data.train"]) == ("a,b.jsonl", "it's.jsonl")


def test_without_a_sweep_a_comma_is_part_of_the_name():
    [_, argument] = prepare("train", ["data=jsonl", "data.train=a,b.jsonl"]).arguments
    assert argument == "data.train='a,b.jsonl'"


def test_each_alternative_must_be_a_file_of_the_demo_without_data():
    files = "data.train=[train.jsonl,train_single.jsonl#8],train.jsonl"
    assert prepare("train", ["-m", files]).arguments
    with pytest.raises(DataError, match=r"data\.train: mine\.jsonl is not a file of the demo"):
        prepare("train", ["-m", f"{files},mine.jsonl"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-m"], True),
        (["--multirun", "sweep=none"], True),
        (["sweep=lr"], True),
        (["sweep=none"], False),
        (["sweep.parallel=2"], False),
        ([], False),
    ],
)
def test_a_sweep_is_recognized(arguments, expected):
    assert is_sweep(arguments) is expected


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", [""]),
        ("a", ["a"]),
        ("a,", ["a", ""]),
        ("[a,b", ["[a", "b"]),
        ("'a,b", ["'a", "b"]),
        ("[a,{b:1,c:2}],d", ["[a,{b:1,c:2}]", "d"]),
        ("['a]',b],c", ["['a]',b]", "c"]),
        (r"'a\',b',c", [r"'a\',b'", "c"]),
    ],
)
def test_commas_within_quotes_and_brackets_do_not_separate(text, pieces):
    assert split_alternatives(text) == pieces


def test_other_keys_are_quoted_as_without_a_sweep():
    assert quote_alternatives("paths.run=a,b") == "paths.run='a,b'"
    assert quote_alternatives("optim.lr=1,2") == "optim.lr=1,2"
