"""Adapters teach the demo new classes. Minutes, since the demo is trained first."""

import os
import subprocess
import sys

import pytest
from bench_new_classes import fine_tune, table


@pytest.mark.slow
def test_adapters_teach_new_classes_to_a_trained_demo(tmp_path, monkeypatch):
    monkeypatch.setenv("QWENVL_LIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    train = [sys.executable, "-m", "qwenvl_lit.train", "hydra.run.dir=demo"]
    subprocess.run(train, check=True, env=os.environ)
    for adapter in ("lora", "lora_all"):
        scores = fine_tune(tmp_path / "demo", adapter, tmp_path)
        assert scores["baseline"]["new_classes/caption"] < 0.1
        assert scores["test"]["new_classes/caption"] > 0.6
        assert scores["test"]["old_classes/caption"] > 0.6


def test_the_table_has_new_and_old_classes_side_by_side():
    scores = {}
    for metric in ("caption", "counting", "left_right", "grounded_caption"):
        scores |= {f"new_classes/{metric}": 0.25, f"old_classes/{metric}": 0.25}
    rows = {"the demo, before": scores, "lora": {**scores, "trained": 12288, "steps": 5}}
    header, line, before, after = table(rows).splitlines()
    assert header.startswith("| adapter | trained | caption, exact: new | caption, exact: old |")
    assert line.count("---") == 10
    assert before == "| the demo, before |  |" + " 0.250 |" * 8
    assert after == "| lora | 12,288 |" + " 0.250 |" * 8
