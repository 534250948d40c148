"""One dataset trains three generations: the example of docs/models.md, half as long."""

import json

import pytest
from commands import run_command

STEPS = 360  # half an epoch of the demo


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen_vl_tiny", "qwen2_5_vl_tiny", "qwen3_vl_tiny"])
def test_each_generation_learns_from_the_same_rows(model, tmp_path):
    train = [f"model={model}", "data=demo", f"trainer.max_steps={STEPS}", "hydra.run.dir=run"]
    process = run_command(tmp_path, "train", *train, "data.validation=null", seconds=900)
    assert process.returncode == 0, process.stderr
    process = run_command(tmp_path, "test", "ckpt=run", "hydra.run.dir=scores", seconds=300)
    assert process.returncode == 0, process.stderr
    log = [json.loads(line) for line in (tmp_path / "run/logging.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if line.get("loss") is not None]
    assert losses[-1] < losses[0] / 10
    rows = [
        json.loads(line)
        for file in (tmp_path / "scores").rglob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    located = [row for row in rows if any(item["boxes"] for item in row.get("objects", ()))]
    assert len(located) > 100  # answers are read as boxes in pixels, whatever their markup
    assert {item["frame"] for row in located for item in row["objects"]} == {"pixel"}
