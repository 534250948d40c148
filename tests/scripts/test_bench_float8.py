"""The arithmetic of the comparison, without a run."""

import json

import pytest
from bench_float8 import (
    RUNS,
    choices,
    compare,
    curve,
    deviation,
    smoothed,
    table,
    train_and_test,
    write,
)
from hydra import compose, initialize_config_dir

from qwenvl_lit.runs.run import config_folder


def test_smoothing_is_the_mean_of_a_window_of_losses():
    assert smoothed([1.0, 3.0, 5.0, 9.0], window=2) == [2.0, 4.0, 7.0]
    assert smoothed([1.0, 3.0], window=2) == [2.0]
    with pytest.raises(
        ValueError, match="3 losses cannot be smoothed over 20; train for more steps"
    ):
        smoothed([1.0, 2.0, 3.0])


def test_deviations_are_absolute_and_relative_to_the_expected_curve():
    assert deviation([2.0, 3.0, 0.5], [2.0, 4.0, 0.25]) == {
        "largest": 1.0,
        "largest_at": 2,
        "mean": 1.25 / 3,
        "largest_relative": 1.0,
        "mean_relative": 1.25 / 3,
        "bias": pytest.approx(-0.25),
    }


def test_smoothing_removes_alternating_deviations():
    plain = [2.0] * 40
    apart = compare([2.5, 1.5] * 20, plain)
    assert apart["raw"]["largest"] == apart["raw"]["mean"] == 0.5
    assert apart["smoothed"]["largest"] == 0.0
    with pytest.raises(ValueError, match="longer"):
        compare([2.0] * 39, plain)


def test_a_curve_has_every_step_and_no_validation():
    log = [{"step": 1, "loss": 4.0}, {"step": 1, "val/loss": 9.0}, {"step": 2, "loss": 3.0}]
    assert curve(log) == [4.0, 3.0]
    with pytest.raises(ValueError, match=r"trainer\.log_every_n_steps=1"):
        curve([*log, {"step": 4, "loss": 2.0}])


def test_the_record_has_a_line_per_curve_and_the_table_a_line_per_run(tmp_path):
    plain, float8 = [2.0] * 20, [2.5] * 20
    keys = ("new_classes/caption", "new_classes/grounded_caption", "old_classes/grounded_caption")
    scores = {"validation": {"val/loss": 0.12500001}, "test": dict.fromkeys(keys, 0.5)}
    runs = {"plain": {**scores, "loss": plain}, "float8": {**scores, "loss": float8}}
    adapters = {
        "lora": {"steps": 20, "from_plain": {"float8": compare(float8, plain)}, "runs": runs}
    }
    write(tmp_path / "float8.json", adapters)
    text = (tmp_path / "float8.json").read_text()
    written = json.loads(text)["adapters"]
    assert written["lora"]["runs"]["plain"]["validation"] == {"val/loss": 0.125}  # five digits
    assert written["lora"]["from_plain"] == adapters["lora"]["from_plain"]
    assert [run["loss"] for run in written["lora"]["runs"].values()] == [plain, float8]
    assert sum("2.5, 2.5" in line for line in text.splitlines()) == 1
    _, _, first, second = table(adapters).splitlines()
    assert first == "| lora | plain | 2.0000 |  |  | 0.1250 | 0.500 | 0.500 | 0.500 |"
    assert (
        second
        == "| lora | float8 | 2.5000 | 0.500 | 0.5000 (25.0%) | 0.1250 | 0.500 | 0.500 | 0.500 |"
    )


def test_runs_differ_only_in_precision_or_in_the_seed_of_adapters():
    with initialize_config_dir(str(config_folder()), version_base=None):
        configs = {name: compose("train", choices(name, "lora_all", 8)) for name in RUNS}
    settings = {}
    for name, config in configs.items():
        settings[name] = (config.speed.float8, config.seed, config.data.seed)
    assert settings == {
        "plain": (False, 42, 42),
        "float8": (True, 42, 42),
        "other_seed": (False, 43, 42),
    }
    for config in configs.values():
        assert config.trainer.log_every_n_steps == 1
        assert config.trainer.max_epochs == 8
        assert config.adapter.dropout == 0
        config.speed.float8, config.seed, config.data.seed = None, None, None
    assert configs["plain"] == configs["float8"] == configs["other_seed"]


def test_finished_runs_are_read_and_not_repeated(tmp_path):
    run, scored = tmp_path / "lora_plain", tmp_path / "lora_plain_scores"
    for folder, scores in (
        (run, {"fit": {"last": {"val/loss": 0.5}}}),
        (scored, {"test": {"new_classes/caption": 1.0}}),
    ):
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps(scores))
    (run / "logging.jsonl").write_text('{"step": 1, "loss": 1.23456789}\n')
    assert train_and_test(tmp_path / "no_such_demo", ["adapter=lora"], run) == {
        "command": "python -m qwenvl_lit.train ckpt=DEMO adapter=lora",
        "validation": {"val/loss": 0.5},
        "test": {"new_classes/caption": 1.0},
        "loss": [1.23456789],
    }
