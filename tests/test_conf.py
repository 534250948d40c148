"""Every yaml file composes, sets the keys of its group, and names classes that exist."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from qwenvl_lit.cli.from_run import FROM_RUN
from qwenvl_lit.cli.mixture import expand_datasets
from qwenvl_lit.cli.overrides import quote_free_text
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.types import DataError

CONF = config_folder()
COMMANDS = ("train", "test", "predict", "chat", "serve", "check", "export")
CHOICES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
FULL = "qwenvl_lit.training.adapters.methods.Full"
PROGRESS_BAR = "lightning.pytorch.callbacks.TQDMProgressBar"

# The keys at the top of each command's config.
MODEL_AND_DATA = {
    "seed",
    "trust",
    "verify",
    "paths",
    "adapter",
    "trainer",
    "generation",
    "metrics",
    "model",
    "data",
}
TRAINING = MODEL_AND_DATA | {"optim"}
USING_A_RUN = MODEL_AND_DATA | {"ckpt", "init"}
LOGGING = {"callbacks", "logger"}
KEYS = {
    "train": TRAINING | LOGGING | {"sweep", "resume", "init", "ckpt", "memory", "speed"},
    "test": USING_A_RUN | LOGGING | {"baseline", "benchmarks", "predictions", "compare"},
    "predict": USING_A_RUN | LOGGING | {"image", "prompt", "answered"},
    "chat": USING_A_RUN - {"data"} | {"device", "system", "multiline"},
    "serve": USING_A_RUN - {"data"} | {"device", "serve", "engine", "adapters", "vllm"},
    "export": USING_A_RUN
    | {"out", "merge", "dtype", "overwrite", "compare", "device", "push", "push_private"},
    "check": TRAINING | {"workers", "examples"},
}

# The groups that a command does not have. `test` composes benchmarks by name.
ONLY_TRAIN = {"sweep", "init", "experiment", "speed"}
WITHOUT_TRAINER = ONLY_TRAIN | {"callbacks", "logger", "strategy"}
MISSING_GROUPS = {
    "train": set(),
    "test": ONLY_TRAIN,
    "predict": ONLY_TRAIN,
    "chat": WITHOUT_TRAINER | {"data"},
    "serve": WITHOUT_TRAINER | {"data"},
    "export": WITHOUT_TRAINER,
    "check": WITHOUT_TRAINER,
}
ALL_GROUPS = {group for group, _ in CHOICES} - {"benchmark"}
GROUPS = {command: ALL_GROUPS - MISSING_GROUPS[command] for command in COMMANDS}
COMMAND_CHOICES = []
for _command in COMMANDS:
    COMMAND_CHOICES += [(_command, *choice) for choice in CHOICES if choice[0] in GROUPS[_command]]


@pytest.fixture(autouse=True, scope="module")
def run_groups():
    """Offers the groups of a training run to Hydra, as `ckpt=` does."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = composed("train")
        for group in FROM_RUN:
            node = OmegaConf.to_container(config[group])
            ConfigStore.instance().store(group=group, name="run", node=node)
        yield


def composed(command: str, *overrides: str) -> DictConfig:
    return compose(command, list(overrides))


def resolved(config: DictConfig, key: str) -> dict:
    OmegaConf.update(config, "paths.run", "run", force_add=True)
    return OmegaConf.to_container(config[key], resolve=True)


def targets(node: Any) -> set[str]:
    """The values of every `_target_` in a resolved config."""
    if isinstance(node, list):
        return set().union(*map(targets, node))
    if not isinstance(node, dict):
        return set()
    nested = set().union(*map(targets, node.values()))
    return nested | {node["_target_"]} if "_target_" in node else nested


def keys_of_group(group: str, config: DictConfig, command: str) -> list[str]:
    """The keys of a config that a choice of `group` sets."""
    if group == "strategy":
        return ["trainer"]
    if group == "experiment":
        return sorted(set(config) & GROUPS[command])
    return [group]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_the_known_keys_and_no_others(command):
    assert set(composed(command)) == KEYS[command]


@pytest.mark.parametrize(("command", "group", "choice"), COMMAND_CHOICES)
def test_every_choice_composes_and_names_classes_that_exist(command, group, choice):
    config = composed(command, f"{group}={choice}")
    assert set(config) - {"optim"} == KEYS[command] - {"optim"}
    for key in keys_of_group(group, config, command):
        for target in targets(resolved(config, key)):
            assert callable(get_object(target)), target


@pytest.mark.parametrize(
    "path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF))
)
def test_a_file_says_when_to_choose_it_below_its_package(path: Path):
    lines = path.read_text().splitlines()
    package_lines = [index for index, line in enumerate(lines) if line.startswith("# @package")]
    assert package_lines in ([], [0]), "Hydra ignores a package below line 1 without a message"
    assert lines[len(package_lines)].startswith("# "), "no comment on when to choose the file"
    head = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    is_choice = path.parent != CONF and path.parent.name not in ("callbacks", "shared")
    assert not is_choice or "hoose" in "".join(head), "the comment says not when to choose it"


def test_the_model_chooses_its_recipe():
    tiny, chat = composed("train"), composed("train", "model=qwen_vl_chat")
    assert (tiny.adapter._target_, tiny.optim.lr) == (FULL, 2e-3)
    assert (tiny.data.batch_size, tiny.trainer.rows_per_step) == (32, None)
    assert (chat.adapter.rank, chat.adapter.alpha, chat.adapter.dropout) == (8, 32, 0.05)
    assert (chat.optim.lr, chat.optim.warmup) == (1e-4, 0.05)
    assert (chat.optim.betas, chat.optim.weight_decay) == ([0.9, 0.95], 0.1)
    assert chat.trainer.rows_per_step == 16
    assert (chat.trainer.gradient_clip_val, chat.trainer.precision) == (1.0, "bf16-mixed")


def test_the_command_line_overrides_the_recipe_of_the_model():
    config = composed("train", "model=qwen_vl_chat", "adapter=full", "optim.lr=2e-5")
    assert (config.adapter._target_, config.optim.lr) == (FULL, 2e-5)


@pytest.mark.parametrize(
    ("choices", "learning_rate"),
    [
        (["model=qwen_vl_chat"], 1e-4),
        (["model=qwen_vl_chat", "strategy=fsdp"], 1e-4),
        (["model=qwen_vl_chat", "adapter=full", "strategy=fsdp"], 1e-5),
        (["model=qwen_vl_chat", "adapter=full", "optim=adamw"], 1e-4),
        (["adapter=full"], 2e-3),
    ],
)
def test_the_adapter_chooses_its_learning_rate_unless_the_model_or_the_command_line_does(
    choices, learning_rate
):
    optim = composed("train", *choices).optim
    assert optim.lr == learning_rate
    assert optim.get("rounding", "stochastic") == "stochastic"


def test_the_environment_tells_how_many_processes_a_launcher_started(monkeypatch):
    def devices_and_nodes(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        trainer = resolved(composed("train", "strategy=multi_node_fsdp"), "trainer")
        return trainer["devices"], trainer["num_nodes"]

    assert devices_and_nodes(SLURM_NTASKS_PER_NODE="4", SLURM_NNODES="2") == (4, 2)
    assert devices_and_nodes(LOCAL_WORLD_SIZE="8", GROUP_WORLD_SIZE="3") == (8, 3)


def test_the_data_chooses_its_metrics_and_the_command_line_overrides_them():
    assert "caption" in composed("train").metrics
    assert set(composed("train", "data=docvqa").metrics) == {"anls", "anls_official"}
    # The package cannot know how the answers of a user's own rows are to be scored.
    assert not composed("train", "data=jsonl").metrics
    chosen = composed("train", "data=jsonl", "metrics=grounding").metrics
    assert set(chosen) == {"acc_at_50", "mean_iou"}


def test_groups_that_the_command_line_does_not_choose_come_from_the_run():
    config = composed("test", "data=jsonl", "metrics=exact", "generation.max_new_tokens=5")
    assert config.model.config.hidden_size == 96
    assert config.data.train is None
    assert config.generation.max_new_tokens == 5
    assert set(config.metrics) == {"exact_match"}


def test_a_published_model_needs_no_run():
    config = composed("test", "model=qwen_vl_chat", "data=jsonl")
    assert config.model.path == "Qwen/Qwen-VL-Chat"
    assert config.generation.max_new_tokens == 512
    assert (config.trainer.precision, config.trainer.enable_checkpointing) == ("32-true", False)


def test_callbacks_are_added_removed_and_replaced(tmp_path):
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks/mine.yaml").write_text(f"# Mine.\nmine:\n  _target_: {PROGRESS_BAR}\n")
    search_path = f"hydra.searchpath=[{tmp_path}]"
    added = composed("test", search_path, "callbacks=[test,mine]").callbacks
    assert added.mine._target_ == PROGRESS_BAR
    assert "boxes" in added
    assert "boxes" not in composed("test", "~callbacks.boxes").callbacks
    target = f"callbacks.progress._target_={PROGRESS_BAR}"
    replaced = composed("test", target, "~callbacks.progress.leave").callbacks
    assert replaced.progress == {"_target_": PROGRESS_BAR}


@pytest.mark.parametrize("data", ["jsonl", "docvqa"])
def test_paths_of_another_machine_are_mapped_from_the_command_line(data):
    argument = quote_free_text("data.path_map={/their/images: /mine}")
    assert composed("check", f"data={data}", argument).data.path_map["/their/images"] == "/mine"


def test_a_mixture_is_expanded_to_the_settings_of_its_datasets():
    datasets = "demo:2000,mine:{use:jsonl,rows:0.5,train:my.jsonl,root:/my},other:{use:jsonl}"
    config = composed("train", "data=mixture", f"data.datasets={{{datasets}}}")
    expand_datasets(config)
    expanded = OmegaConf.to_container(config)
    demo, mine, other = expanded["data"]["datasets"].values()
    assert demo["_target_"] == "qwenvl_lit.data.mixture.DatasetSpec"
    assert (demo["rows"], demo["root"]) == (2000, "${paths.cache}/demo")
    assert demo["train"] == ["train_single.jsonl#5120", "train.jsonl#17920"]
    assert (mine["rows"], mine["root"], mine["train"]) == (0.5, "/my", "my.jsonl")
    assert mine["split_file"] == "${paths.run}/split_mine.json"
    assert (other["rows"], other["split_file"]) == (None, "${paths.run}/split_other.json")
    assert not {"batch_size", "order", "_partial_"} & set(mine)
    expand_datasets(config)
    assert OmegaConf.to_container(config) == expanded, "expanding again changes nothing"


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ("{nowhere:5}", r"data\.datasets\.nowhere: .*nowhere"),
        ("{demo:{rwos:5}}", r"data\.datasets\.demo has no key rwos; its keys are use, "),
    ],
)
def test_a_mistake_in_a_mixture_is_named(datasets, message):
    config = composed("train", "data=mixture", f"data.datasets={datasets}")
    with pytest.raises(DataError, match=message):
        expand_datasets(config)
