"""The commands that `bench_commands.py` measures, and what it reads from their output."""

import json
import sys

import bench_commands
from bench_commands import command_line, moments
from bench_train import Finished

from qwenvl_lit.data.readers.sources import read_rows

TRAIN = [(4.0, "Run folder  run"), (5.0, "step 1/2  loss 3"), (6.04, "step 2/2  loss 2")]
PREDICT = [(4.0, "Batches of 8 rows"), (6.0, "predict: 1,000 rows in 2.0 s, 46.8 images/s, 9 new")]


def test_the_moments_of_a_command_are_read_from_its_lines():
    trained = moments(Finished(lines=TRAIN, code=0, seconds=7.0))
    assert trained == {"first_line": 4.0, "first_step": 5.0, "last_step": 6.0, "end": 7.0}
    predicted = moments(Finished(lines=PREDICT, code=0, seconds=7.0))
    assert predicted == {"first_line": 4.0, "images_per_s": 46.8, "end": 7.0}


def test_rows_are_written_and_each_command_runs_twice_with_one_cache(tmp_path, monkeypatch):
    calls = []

    def follow(line, limit_s, **environment):
        name = line[2].removeprefix("qwenvl_lit.")
        [file] = [argument.split("=")[1] for argument in line if ".jsonl" in argument]
        calls.append((name, len(read_rows(file)), environment["QWENVL_LIT_CACHE"]))
        return Finished(lines=TRAIN if name == "train" else PREDICT, code=0, seconds=7.0)

    file = tmp_path / "commands.json"
    monkeypatch.setattr(bench_commands, "follow", follow)
    monkeypatch.setattr(sys, "argv", f"bench --size small --record {file}".split())
    bench_commands.main()
    assert [call[:2] for call in calls] == [("train", 32)] * 2 + [("predict", 16)] * 2
    assert len({cache for *_, cache in calls}) == 1
    record = json.loads(file.read_text())
    assert record["results"]["train"]["rows"] == 32
    assert record["results"]["predict"]["command"].endswith(
        "data.test=predict.jsonl generation.max_new_tokens=20 generation.min_new_tokens=20"
    )
    assert [run["end"] for run in record["results"]["predict"]["runs"]] == [7.0, 7.0]


def test_full_size_commands_have_no_options_but_model_data_and_new_tokens(tmp_path):
    line = command_line("train", "full", tmp_path / "rows.jsonl")
    assert line[3:-1] == [*bench_commands.MODELS["full"], "data=jsonl"]
