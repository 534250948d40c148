"""Every yaml composes, lands where it says, and names things that exist."""

from pathlib import Path

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
VERBS = ("train", "test", "predict", "chat", "check", "export")
CHOICES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
KEYS = {
    "train": {
        "seed",
        "paths",
        "adapter",
        "optim",
        "trainer",
        "generation",
        "metrics",
        "model",
        "data",
        "callbacks",
        "logger",
        "sweep",
    },
    "test": {
        "seed",
        "paths",
        "adapter",
        "trainer",
        "generation",
        "metrics",
        "model",
        "data",
        "callbacks",
        "logger",
        "ckpt",
        "baseline",
    },
}
KEYS["train"] |= {"resume", "init", "ckpt", "memory", "speed"}
KEYS["test"] |= {"init"}
BASIC = KEYS["test"]
KEYS["test"] = BASIC | {"benchmarks", "predictions", "compare"}
KEYS["predict"] = BASIC - {"baseline"} | {"image", "prompt", "answered"}
KEYS["chat"] = BASIC - {"baseline", "data", "callbacks", "logger"} | {
    "device",
    "system",
    "multiline",
}
KEYS["export"] = BASIC - {"baseline", "callbacks", "logger"} | {
    "out",
    "merge",
    "dtype",
    "overwrite",
    "compare",
    "device",
}
KEYS["check"] = KEYS["train"] - {
    "callbacks",
    "logger",
    "sweep",
    "resume",
    "init",
    "ckpt",
    "memory",
    "speed",
} | {"workers", "examples"}
ONLY_TRAIN = {"sweep", "init", "experiment", "speed"}
NOT_OF = {
    "train": set(),
    "test": ONLY_TRAIN,
    "predict": ONLY_TRAIN,
    "check": {"callbacks", "logger", "strategy", *ONLY_TRAIN},
}
NOT_OF["chat"] = NOT_OF["check"] | {"data"}
NOT_OF["export"] = NOT_OF["check"]
GROUPS = {
    verb: {group for group, _ in CHOICES} - NOT_OF[verb] - {"benchmark"} for verb in VERBS
}  # `test` composes benchmarks by name


@pytest.fixture(autouse=True, scope="module")
def a_run():
    """What `ckpt=` offers: the nodes of a composed training run."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        trained = composed("train")
        for group in FROM_RUN:
            ConfigStore.instance().store(
                group=group, name="run", node=OmegaConf.to_container(trained[group])
            )
        yield


def composed(verb: str, *overrides: str) -> DictConfig:
    return compose(verb, list(overrides))


def plain(config: DictConfig, key: str) -> dict:
    OmegaConf.update(config, "paths.run", "run", force_add=True)
    return OmegaConf.to_container(config[key], resolve=True)


def targets(node) -> set[str]:
    if isinstance(node, dict):
        return {value for key, value in node.items() if key == "_target_"}.union(
            *map(targets, node.values())
        )
    return set().union(*map(targets, node)) if isinstance(node, list) else set()


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_the_known_keys_and_no_others(verb):
    assert set(composed(verb)) == KEYS[verb]


@pytest.mark.parametrize(
    ("verb", "group", "choice"),
    [(verb, *choice) for verb in VERBS for choice in CHOICES if choice[0] in GROUPS[verb]],
)
def test_every_choice_composes_and_names_things_that_exist(verb, group, choice):
    config = composed(verb, f"{group}={choice}")
    assert set(config) - {"optim"} == KEYS[verb] - {"optim"}
    placed = {"strategy": ["trainer"], "experiment": sorted(set(config) & GROUPS[verb])}.get(
        group, [group]
    )
    for target in set().union(*(targets(plain(config, key)) for key in placed)):
        assert callable(get_object(target)), target


@pytest.mark.parametrize(
    "path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF))
)
def test_a_file_says_when_to_pick_it_and_its_package_stands_first(path: Path):
    lines = path.read_text().splitlines()
    placed = [number for number, line in enumerate(lines) if line.startswith("# @package")]
    assert placed in ([], [0]), "below line 1 the package is ignored in silence"
    assert lines[len(placed)].startswith("# "), "a comment on top says when to pick the file"


def test_the_model_chooses_its_recipe_and_the_command_line_wins():
    tiny, chat = composed("train"), composed("train", "model=qwen_vl_chat")
    assert (tiny.adapter._target_, tiny.optim.lr, tiny.trainer.accumulate_grad_batches) == (
        "qwenvl_lit.training.adapters.methods.Full",
        2e-3,
        1,
    )
    assert (chat.adapter.rank, chat.adapter.alpha, chat.adapter.dropout) == (8, 32, 0.05)
    assert (chat.optim.lr, chat.optim.betas, chat.optim.weight_decay, chat.optim.warmup) == (
        1e-4,
        [0.9, 0.95],
        0.1,
        0.05,
    )
    assert (
        chat.trainer.accumulate_grad_batches,
        chat.trainer.gradient_clip_val,
        chat.trainer.precision,
    ) == (16, 1.0, "bf16-mixed")
    own = composed("train", "model=qwen_vl_chat", "adapter=full", "optim.lr=2e-5")
    assert (own.adapter._target_, own.optim.lr) == (
        "qwenvl_lit.training.adapters.methods.Full",
        2e-5,
    )


@pytest.mark.parametrize(
    ("choices", "rate"),
    [
        (["model=qwen_vl_chat"], 1e-4),
        (["model=qwen_vl_chat", "strategy=fsdp"], 1e-4),
        (["model=qwen_vl_chat", "adapter=full", "strategy=fsdp"], 1e-5),
        (["model=qwen_vl_chat", "adapter=full", "optim=adamw"], 1e-4),
        (["adapter=full"], 2e-3),
    ],
)
def test_what_is_trained_chooses_its_rate_unless_the_model_or_the_command_line_does(choices, rate):
    optim = composed("train", *choices).optim
    assert optim.lr == rate
    assert optim.get("rounding", "stochastic") == "stochastic"


def test_processes_that_others_start_are_counted_by_the_environment(monkeypatch):
    def trainer(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        node = plain(composed("train", "strategy=multi_node_fsdp"), "trainer")
        return node["devices"], node["num_nodes"]

    assert trainer(SLURM_NTASKS_PER_NODE="4", SLURM_NNODES="2") == (4, 2)
    assert trainer(LOCAL_WORLD_SIZE="8", GROUP_WORLD_SIZE="3") == (8, 3)


def test_the_data_chooses_its_metrics_and_the_command_line_wins():
    assert "caption" in composed("train").metrics
    assert set(composed("train", "data=docvqa").metrics) == {"anls", "anls_official"}
    assert not composed("train", "data=jsonl").metrics, (
        "nobody knows how a user's own answers are to be scored"
    )
    assert set(composed("train", "data=jsonl", "metrics=grounding").metrics) == {
        "acc_at_50",
        "mean_iou",
    }


def test_a_run_gives_what_the_command_line_does_not_choose():
    config = composed("test", "data=jsonl", "metrics=exact", "generation.max_new_tokens=5")
    assert config.model.config.hidden_size == 96
    assert config.data.train is None
    assert config.generation.max_new_tokens == 5
    assert set(config.metrics) == {"exact_match"}


def test_a_published_model_is_used_without_a_run():
    config = composed("test", "model=qwen_vl_chat", "data=jsonl")
    assert config.model.path == "Qwen/Qwen-VL-Chat"
    assert config.generation.max_new_tokens == 512
    assert (config.trainer.precision, config.trainer.enable_checkpointing) == ("32-true", False)


def test_callbacks_are_added_removed_and_replaced(tmp_path):
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "mine.yaml").write_text(
        "# Mine.\nmine:\n  _target_: lightning.pytorch.callbacks.TQDMProgressBar\n"
    )
    path = f"hydra.searchpath=[{tmp_path}]"
    added = composed("test", path, "callbacks=[test,mine]").callbacks
    assert added.mine._target_.endswith("TQDMProgressBar")
    assert "boxes" in added
    assert "boxes" not in composed("test", "~callbacks.boxes").callbacks
    replaced = composed(
        "test",
        "callbacks.progress._target_=lightning.pytorch.callbacks.TQDMProgressBar",
        "~callbacks.progress.leave",
    )
    assert replaced.callbacks.progress == {
        "_target_": "lightning.pytorch.callbacks.TQDMProgressBar"
    }


@pytest.mark.parametrize("data", ["jsonl", "docvqa"])
def test_paths_of_another_machine_are_mapped_from_the_command_line(data):
    argument = quote_free_text("data.path_map={/their/images: /mine}")
    assert composed("check", f"data={data}", argument).data.path_map["/their/images"] == "/mine"


def test_a_mixture_holds_what_the_files_of_its_datasets_say():
    config = composed(
        "train",
        "data=mixture",
        "data.datasets={demo:2000,mine:{use:jsonl,rows:0.5,train:my.jsonl,root:/my},other:{use:jsonl}}",
    )
    expand_datasets(config)
    once = OmegaConf.to_container(config)
    demo, mine, other = once["data"]["datasets"].values()
    assert demo["_target_"] == "qwenvl_lit.data.mixture.DatasetSpec"
    assert (demo["rows"], demo["root"], demo["train"]) == (
        2000,
        "${paths.cache}/demo",
        ["train_single.jsonl#5120", "train.jsonl#17920"],
    )
    assert (mine["rows"], mine["root"], mine["train"], mine["split_file"]) == (
        0.5,
        "/my",
        "my.jsonl",
        "${paths.run}/split_mine.json",
    )
    assert (other["rows"], other["split_file"]) == (None, "${paths.run}/split_other.json")
    assert not {"batch_size", "order", "_partial_"} & set(mine)
    expand_datasets(config)
    assert OmegaConf.to_container(config) == once, "what is complete stays as it is"


@pytest.mark.parametrize(
    ("datasets", "says"),
    [
        ("{nowhere:5}", r"data\.datasets\.nowhere: .*nowhere"),
        ("{demo:{rwos:5}}", r"data\.datasets\.demo has no key rwos; its keys are use, "),
    ],
)
def test_a_mistake_in_a_mixture_is_named(datasets, says):
    config = composed("train", "data=mixture", f"data.datasets={datasets}")
    with pytest.raises(DataError, match=says):
        expand_datasets(config)
