import json

from qwenvl_lit.reports.model_card import model_card
from qwenvl_lit.runs.run import Run

ADAPTER = {
    "_target_": "qwenvl_lit.training.adapters.methods.LoRA",
    "rank": 8,
    "targets": "a|b",
    "options": {},
    "quantization": None,
}


def card(folder, trained=(), path="Qwen/Qwen-VL-Chat", merged=True, **run):
    source = Run(config={"adapter": ADAPTER}, checkpoint=folder / "best.ckpt", folder=folder, **run)
    config = {"model": {"path": path, "template": "chatml"}}
    return model_card(
        "mine",
        run=source,
        training=dict(trained),
        config=config,
        merged=merged,
        dtype="bfloat16",
        comparison="equal",
    ).splitlines()


def test_a_card_has_the_adapter_the_data_and_the_scores(tmp_path):
    best = {"step": 50, "val/loss": 1.23456, "val/caption": 0.5, "loss": 9}
    last = {"step": 90, "val/loss": 2.0, "val/caption": None}
    (tmp_path / "metrics.json").write_text(json.dumps({"fit": {"best": best, "last": last}}))
    trained = {
        "data": {"train": "my.jsonl", "test": {}, "num_workers": 3},
        "optim": {"lr": 1e-4},
        "init": {"checkpoint": "before.ckpt"},
    }
    lines = card(tmp_path, trained)
    assert lines[1] == "base_model: Qwen/Qwen-VL-Chat"
    for line in (
        "| trained | LoRA |",
        "| adapter.rank | `8` |",
        "| adapter.targets | `a\\|b` |",
        "| started from | `before.ckpt` |",
        "| data.train | `my.jsonl` |",
        "| optim.lr | `0.0001` |",
        "| comparison | equal |",
        "| | best, step 50 | last, step 90 |",
        "| loss | 1.235 | 2 |",
        "| caption | 0.5 | - |",
    ):
        assert line in lines, "\n".join(lines)
    assert not any("num_workers" in line or "quantization" in line for line in lines)


def test_a_base_model_in_a_folder_is_named_without_its_path(tmp_path):
    (tmp_path / "Qwen-VL-Chat").mkdir()
    lines = card(tmp_path, path=str(tmp_path / "Qwen-VL-Chat"), merged=False)
    assert lines[1] == "base_model: Qwen-VL-Chat"
    assert "| base | Qwen-VL-Chat |" in lines
    assert "python -m qwenvl_lit.chat ckpt=mine model.path=FOLDER-OF-Qwen-VL-Chat" in lines
    assert str(tmp_path) not in "\n".join(lines)
    assert "python -m qwenvl_lit.chat ckpt=mine" in card(tmp_path, merged=False)


def test_a_card_names_the_kind_of_model(tmp_path):
    for path, name in (
        ("Qwen/Qwen-VL-Chat", "Qwen-VL"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL"),
        ("Qwen/Qwen3-VL-8B-Thinking", "Qwen3-VL"),
    ):
        lines = card(tmp_path, path=path)
        assert f"{name} in the format of the published checkpoint, bfloat16." in lines
        assert f"The weights of {name} have their own license." in lines
        assert f"A PEFT adapter for {name}, float32." in card(tmp_path, path=path, merged=False)


def test_a_run_without_scores_has_no_table_of_scores(tmp_path):
    assert not any("Scores" in line for line in card(tmp_path))
