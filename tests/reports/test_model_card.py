import json

import pytest
import yaml

from qwenvl_lit.reports.model_card import model_card
from qwenvl_lit.runs.run import Run

ADAPTER = {
    "_target_": "qwenvl_lit.training.adapters.methods.LoRA",
    "rank": 8,
    "targets": "a|b",
    "options": {},
    "quantization": None,
}


def card(folder, trained=(), path="Qwen/Qwen-VL-Chat", merged=True, adapter=ADAPTER, **options):
    source = Run(config={"adapter": adapter}, checkpoint=folder / "best.ckpt", folder=folder)
    config = {"model": {"path": path, "template": "chatml"}}
    return model_card(
        "mine",
        run=source,
        training=dict(trained),
        config=config,
        merged=merged,
        dtype="bfloat16",
        comparison="equal",
        **options,
    ).splitlines()


def metadata(lines):
    """What the Hugging Face Hub reads from a card."""
    return yaml.safe_load("\n".join(lines).split("---\n")[1])


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
    assert metadata(lines)["base_model"] == "Qwen/Qwen-VL-Chat"
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


def test_the_metadata_are_those_that_the_hub_reads(tmp_path):
    train = ["rows.jsonl", "hf://ann/signs:train", "hf://bob/cars"]
    data = {"train": train, "validation": "hf://ann/signs:test"}
    assert metadata(card(tmp_path, {"data": data})) == {
        "base_model": "Qwen/Qwen-VL-Chat",
        "datasets": ["ann/signs", "bob/cars"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "tongyi-qianwen-license-agreement",
        "license_link": "https://github.com/QwenLM/Qwen-VL/blob/master/LICENSE",
        "pipeline_tag": "image-text-to-text",
        "tags": ["qwenvl_lit", "lora"],
    }
    full = {**ADAPTER, "_target_": "qwenvl_lit.training.adapters.methods.Full"}
    assert metadata(card(tmp_path, adapter=full))["tags"] == ["qwenvl_lit"]
    adapter = metadata(card(tmp_path, merged=False))
    assert adapter["library_name"] == "peft"
    assert "datasets" not in adapter


@pytest.mark.parametrize(
    ("path", "base", "expected"),
    [
        ("Qwen/Qwen3-VL-8B-Thinking", "Qwen/Qwen3-VL-8B-Thinking", "apache-2.0"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", "apache-2.0"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct", "qwen-research"),
        ("Qwen/Qwen2.5-VL-72B-Instruct", "Qwen/Qwen2.5-VL-72B-Instruct", "qwen"),
        ("ann/Qwen3-VL-8B-Instruct-bnb-4bit", "ann/Qwen3-VL-8B-Instruct-bnb-4bit", "apache-2.0"),
        ("ann/my-qwen-vl", "ann/my-qwen-vl", None),
        ("mine", None, None),
        (None, None, None),
    ],
)
def test_the_license_is_that_of_the_published_weights_and_none_if_unknown(
    path, base, expected, tmp_path
):
    found = metadata(card(tmp_path, path=path))
    assert found.get("base_model") == base
    assert found.get("license_name", found.get("license")) == expected


def test_a_card_of_a_repository_says_how_to_fetch_it(tmp_path):
    lines = card(tmp_path, repository="ann/mine")
    fetch = lines.index("hf download ann/mine --local-dir mine")
    assert lines[fetch + 1] == "python -m qwenvl_lit.chat ckpt=mine"
