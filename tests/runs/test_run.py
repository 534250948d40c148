import hashlib
import json
import os

import pytest
import torch

from qwenvl_lit.cli.command import prepare
from qwenvl_lit.runs.run import Run, contents, find_run, init_from
from qwenvl_lit.types import DataError

FAMILY = {"_target_": "qwenvl_lit.models.qwen_vl.family.QwenVLFamily"}
GENERATION = {"_target_": "qwenvl_lit.generation.generation.Generation"}
GROUPS = {"adapter": {}, "generation": GENERATION, "data": {}, "optim": {}, "trainer": {}}


def write_run(folder, *checkpoints: str):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/config.yaml").write_text(
        json.dumps({"model": {**FAMILY, "path": "${paths.cache}/x"}, **GROUPS})
    )
    (folder / "checkpoints").mkdir()
    for name in checkpoints:
        torch.save(
            {"config": {"model": {**FAMILY, "path": "stored"}, **GROUPS}, "state_dict": {}},
            folder / "checkpoints" / name,
        )
    return folder


def write_folder_with(folder, name: str):
    folder.mkdir(parents=True)
    (folder / name).write_text("{}")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_folder_gives_its_best_checkpoint(tmp_path):
    run = find_run(str(write_run(tmp_path / "run", "last.ckpt", "best.ckpt")))
    assert run.checkpoint.name == "best.ckpt"
    assert run.config == {"model": {**FAMILY, "path": "${paths.cache}/x"}, **GROUPS}


def test_without_a_best_checkpoint_it_gives_the_last(tmp_path):
    assert find_run(str(write_run(tmp_path / "run", "last.ckpt"))).checkpoint.name == "last.ckpt"


def test_a_checkpoint_file_in_a_run_folder_gives_that_run(tmp_path):
    folder = write_run(tmp_path / "run", "last.ckpt", "best.ckpt")
    run = find_run(str(folder / "checkpoints/last.ckpt"))
    assert (run.checkpoint.name, run.folder) == ("last.ckpt", folder)


def test_a_checkpoint_file_elsewhere_gives_the_config_stored_in_it(tmp_path):
    file = tmp_path / "alone.ckpt"
    torch.save(
        {"config": {"model": {**FAMILY, "path": "stored"}, **GROUPS}, "state_dict": {}}, file
    )
    run = find_run(str(file))
    assert (run.config, run.folder) == ({"model": {**FAMILY, "path": "stored"}, **GROUPS}, None)


def test_latest_is_the_newest_run_with_a_checkpoint(tmp_path):
    folders = (
        (30, "old", ["best.ckpt"]),
        (20, "new", ["last.ckpt"]),
        (10, "unfinished", []),
    )
    for age, name, checkpoints in folders:
        folder = write_run(tmp_path / "outputs/train" / name, *checkpoints)
        os.utime(folder, (1e9 - age, 1e9 - age))
    assert find_run("latest").folder.name == "new"
    with pytest.raises(DataError, match="the newest run here is outputs/train/new"):
        find_run("nowhere")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist; .* train one first"),
        (lambda path: path.mkdir(), "is not a run folder"),
        (lambda path: write_folder_with(path, "adapter_config.json"), "only LORA"),
        (
            lambda path: write_folder_with(path / "checkpoint-9", "adapter_config.json"),
            "in folders of their own; choose one: ckpt=.*path/checkpoint-9$",
        ),
        (lambda path: write_run(path), "stopped before it saved one"),
        (lambda path: path.write_text("hello"), "is not a checkpoint of a run"),
        (lambda path: torch.save({"state_dict": {}}, path), "has no config"),
        (lambda path: torch.save([1], path), "cannot be read as a checkpoint"),
    ],
)
def test_a_path_that_is_not_a_run_is_an_error_with_the_reason(tmp_path, make, message):
    make(tmp_path / "path")
    with pytest.raises(DataError, match=message):
        find_run(str(tmp_path / "path"))


def test_a_sweep_gets_the_folders_of_its_jobs(tmp_path):
    for name in (*map(str, range(11)), "notes"):
        (tmp_path / "sweep" / name).mkdir(parents=True)
        if name != "notes":
            write_run(tmp_path / "sweep" / name)
    jobs = ", ".join(f"{tmp_path}/sweep/{number}" for number in range(4))
    with pytest.raises(DataError, match=rf"it holds the runs {jobs} and 7 more: give one"):
        find_run(str(tmp_path / "sweep"))
    (tmp_path / "sweep/3/checkpoints").mkdir(exist_ok=True)
    with pytest.raises(DataError, match=rf"the run is {tmp_path}/sweep/3"):
        find_run(str(tmp_path / "sweep/3/checkpoints"))


QWEN3_VL = "qwenvl_lit.models.qwen3_vl.family.Qwen3VLFamily"


def write_model(folder, **settings):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def write_adapter(folder, base: str | None):
    """An adapter folder as peft writes it, without what does not matter here."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    settings["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{}.weight"
    torch.save({name.format(side): torch.ones(2, 2) for side in "AB"}, folder / "adapter_model.bin")
    return folder


def test_a_full_model_has_the_recipe_of_its_kind(tmp_path):
    folder = write_model(tmp_path / "mine", model_type="qwen3_vl")
    run = find_run(str(folder))
    assert (run.config["model"]["_target_"], run.config["model"]["path"]) == (QWEN3_VL, str(folder))
    assert (run.checkpoint, run.config["data"], run.config["init"]) == (None, {}, {})
    folder = write_model(tmp_path / "old", model_type="qwen", visual={})
    assert find_run(str(folder)).config["model"]["_target_"] == FAMILY["_target_"]


def test_a_full_model_that_is_not_read_is_refused(tmp_path):
    folder = write_model(tmp_path / "mine", model_type="qwen2_vl")
    with pytest.raises(DataError, match=r"config\.json: .* 'qwen2_vl' \(Qwen2-VL\) are not read"):
        find_run(str(folder))


def test_settings_of_an_export_without_a_class_are_those_of_its_kind_of_model(tmp_path):
    folder = write_model(tmp_path / "mine", model_type="qwen3_vl")
    (folder / "qwenvl_lit.json").write_text(json.dumps({"model": {"system": "Be brief."}}))
    model = find_run(str(folder)).config["model"]
    assert (model["_target_"], model["system"]) == (QWEN3_VL, "Be brief.")


@pytest.mark.parametrize(
    ("base", "path", "target"),
    [
        ("Qwen/Qwen-VL-Chat", "Qwen/Qwen-VL-Chat", FAMILY["_target_"]),
        ("/cache/Qwen/Qwen2___5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", QWEN3_VL),
        (
            "unsloth/Qwen3-VL-8B-Instruct-unsloth-bnb-4bit",
            "Qwen/Qwen3-VL-8B-Instruct",
            QWEN3_VL,
        ),
        ("me/qwen3-vl-medical", "me/qwen3-vl-medical", QWEN3_VL),
        (None, "???", FAMILY["_target_"]),
    ],
)
def test_an_adapter_has_the_recipe_of_the_base_model_that_it_names(tmp_path, base, path, target):
    model = find_run(str(write_adapter(tmp_path / "adapter", base))).config["model"]
    assert (model["path"], model["_target_"]) == (path, target)


def test_the_given_base_model_of_an_adapter_decides_on_its_recipe(tmp_path):
    base = write_model(tmp_path / "theirs", model_type="qwen3_vl")
    adapter = write_adapter(tmp_path / "adapter", "/home/them/checkpoint-500")
    model = find_run(str(adapter), base_model=str(base)).config["model"]
    assert (model["path"], model["_target_"]) == (str(base), QWEN3_VL)
    groups = prepare("chat", [f"ckpt={adapter}", f"model.path={base}"], run="needed").run_groups
    assert groups["model"]["_target_"] == QWEN3_VL


def test_init_names_the_checkpoint_and_those_that_its_run_started_from(tmp_path):
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.write_bytes(b"weights")
    adapter, earlier = {"_target_": "x.Full"}, {"checkpoint": "/first.ckpt"}
    config = {"adapter": adapter, "init": earlier}
    node = init_from(Run(config=config, checkpoint=checkpoint, folder=None))
    assert node.pop("sha256") == hashlib.sha256(b"weights").hexdigest()
    assert node == {
        "_target_": "qwenvl_lit.training.adapters.merging.StartingCheckpoint",
        "checkpoint": str(checkpoint),
        "adapter": adapter,
        "init": earlier,
    }


def test_without_a_run_latest_says_where_it_looked_and_what_to_do(tmp_path):
    looked_in = rf"there is no run with a checkpoint in {tmp_path}/outputs/train; .*ckpt=FOLDER"
    with pytest.raises(DataError, match=looked_in):
        find_run("latest")


def test_contents_lists_existing_files_only(tmp_path):
    write_run(tmp_path / "run", "last.ckpt")
    (tmp_path / "run/curves").mkdir()
    lines = contents(tmp_path / "run").splitlines()
    assert [line.split()[0] for line in lines] == ["checkpoints/last.ckpt", "curves"]
