"""Files of a stranger that would execute code: every command refuses them, and nothing runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults.damage import write_pickle
from faults.processes import fork_command
from faults.tally import sizes, tallied
from omegaconf import OmegaConf

QUESTION = ["image=images/train_00000.png", "prompt=What?"]
EVIDENCE = "executed"  # the folder that hostile files would create
Line = list[str]

# Keys of a stored config, at any depth, that are handed to Hydra or to peft
KEYS = ("model.config", "adapter.targets", "adapter.options.rank_pattern", "data.read")
KEYS += ("data.test.mine", "metrics.mine", "generation.top_p", "optim", "trainer.strategy")


def readers_of(name: str) -> list[Line]:
    """Commands that read the run, exported folder, adapter or checkpoint `name`."""
    lines = [["predict", f"ckpt={name}", *QUESTION], ["chat", f"ckpt={name}"]]
    lines += [["export", f"ckpt={name}", "out=out"]]
    lines += [["test", f"ckpt={name}", "data=jsonl", "data.test=rows.jsonl", "metrics=exact"]]
    train = ["train", f"ckpt={name}", "data=jsonl", "data.train=rows.jsonl", "trainer=smoke"]
    return [*lines, train]


def target_in(folder: Path) -> dict:
    return {"_target_": "os.mkdir", "_args_": [str(folder / EVIDENCE)]}


def change_config(file: Path, key: str, value: object) -> None:
    config = OmegaConf.load(file)
    OmegaConf.update(config, key, value, merge=False, force_add=True)
    OmegaConf.save(config, file)


def change_json(file: Path, key: str, value: object) -> None:
    settings = json.loads(file.read_text())
    node = settings
    *parents, last = key.split(".")
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = value
    file.write_text(json.dumps(settings))


def change_checkpoint(file: Path, key: str, value: object) -> None:
    stored = torch.load(file, weights_only=True)
    config = OmegaConf.create(stored["config"])
    OmegaConf.update(config, key, value, merge=False, force_add=True)
    stored["config"] = OmegaConf.to_container(config)
    torch.save(stored, file)


def run_with_target(folder: Path, key: str) -> list[Line]:
    change_config(folder / "run/.hydra/config.yaml", key, target_in(folder))
    resume = ["train", "resume=run", "trainer.max_steps=6"]
    return [*readers_of("run"), resume]


def checkpoint_with_target(folder: Path, key: str) -> list[Line]:
    shutil.copyfile(folder / "run/checkpoints/last.ckpt", folder / "alone.ckpt")
    change_checkpoint(folder / "alone.ckpt", key, target_in(folder))
    return readers_of("alone.ckpt")


def export_with_target(folder: Path, key: str) -> list[Line]:
    change_json(folder / "exported/qwenvl_lit.json", key, target_in(folder))
    return readers_of("exported")


def answers_with_target(folder: Path, key: str) -> list[Line]:
    (folder / "answers/.hydra").mkdir(exist_ok=True)
    change_config(folder / "answers/.hydra/config.yaml", key, target_in(folder))
    return [["test", "predictions=answers"]]


def adapter_with_target(folder: Path, key: str) -> list[Line]:
    change_json(folder / "adapter/adapter_config.json", key, target_in(folder))
    return readers_of("adapter")


def pickled(file: str, *lines: Line, instead_of: str = "") -> dict[str, Callable]:
    """Two attacks: `file` becomes a pickle of each kind; the file `instead_of` is removed."""

    def attack(folder: Path, zipped: bool) -> list[Line]:
        if instead_of:
            (folder / instead_of).unlink()
        write_pickle(folder / file, folder / EVIDENCE, zipped=zipped)
        return list(lines)

    return {
        f"{file}, a zipped pickle": lambda folder: attack(folder, True),
        f"{file}, a bare pickle": lambda folder: attack(folder, False),
    }


def write_yaml_tag(folder: Path) -> list[Line]:
    file = folder / "run/.hydra/config.yaml"
    tag = f"!!python/object/apply:os.mkdir ['{folder / EVIDENCE}']"
    file.write_text(file.read_text() + f"\nmore: {tag}\n")
    return [*readers_of("run")[:3], ["train", "resume=run", "trainer.max_steps=6"]]


def write_remote_code(folder: Path) -> list[Line]:
    """A model folder with code, which `transformers` runs if it is asked to trust it."""
    code = f"import os\nos.mkdir({str(folder / EVIDENCE)!r})\nclass QWenConfig: pass\n"
    for name in ("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py"):
        (folder / "exported" / name).write_text(code)
    names = {"AutoConfig": "configuration_qwen.QWenConfig"}
    names["AutoModelForCausalLM"] = "modeling_qwen.QWenLMHeadModel"
    change_json(folder / "exported/config.json", "auto_map", names)
    return []  # they may also succeed


KINDS: dict[str, dict[str, Callable[[Path], list[Line]]]] = {
    "_target_ in a run": {key: lambda f, key=key: run_with_target(f, key) for key in KEYS},
    "_target_ in a checkpoint": {
        key: lambda f, key=key: checkpoint_with_target(f, key) for key in KEYS
    },
    "_target_ in an exported folder": {
        key: lambda f, key=key: export_with_target(f, key)
        for key in ("model.config", "model.seed", "generation", "generation.top_p")
    },
    "_target_ in an adapter folder": {
        key: lambda f, key=key: adapter_with_target(f, key)
        for key in ("rank_pattern", "layers_pattern", "target_modules", "r", "loftq_config")
    },
    "_target_ in stored answers": {
        key: lambda f, key=key: answers_with_target(f, key) for key in ("metrics.mine", "data.read")
    },
    "pickles and yaml tags": {
        **pickled("run/checkpoints/best.ckpt", *readers_of("run")),
        **pickled("run/checkpoints/last.ckpt", ["train", "resume=run", "trainer.max_steps=6"]),
        **pickled("alone.ckpt", *readers_of("alone.ckpt")),
        **pickled(
            "adapter/adapter_model.bin",
            *readers_of("adapter"),
            instead_of="adapter/adapter_model.safetensors",
        ),
        **pickled(
            "exported/pytorch_model.bin",
            *readers_of("exported"),
            instead_of="exported/model-00001-of-00001.safetensors",
        ),
        "a yaml tag": write_yaml_tag,
    },
}
IN_SHORT = {"_target_ in a run": "adapter.targets", "pickles and yaml tags": "a yaml tag"}


def attack(everything: Path, folder: Path, write: Callable[[Path], list[Line]], tally) -> None:
    """Writes a hostile file into a copy of `everything`; every command must refuse it."""
    shutil.copytree(everything, folder)
    for line in write(folder):
        with tally.attempt(" ".join(line[:2])):
            finished = fork_command(folder, *line)
            assert not (folder / EVIDENCE).exists(), "EXECUTED"
            finished.refuses()
    shutil.rmtree(folder)


@sizes(short=1, full=None)
@pytest.mark.parametrize("kind", IN_SHORT)
def test_a_hostile_file_is_refused(kind, everything, tmp_path, size):
    with tallied("hostile files", kind) as tally:
        attack(everything, tmp_path / "home", KINDS[kind][IN_SHORT[kind]], tally)


@sizes(short=None, full=1)
@pytest.mark.parametrize("kind", KINDS)
def test_every_hostile_file_is_refused_by_every_command(kind, everything, tmp_path, size):
    with tallied("hostile files", kind) as tally:
        for name, write in KINDS[kind].items():
            failures = len(tally.failed)
            attack(everything, tmp_path / "home", write, tally)
            for number in range(failures, len(tally.failed)):
                tally.failed[number] = f"{name}: {tally.failed[number]}"


@sizes(short=None, full=1)
def test_code_in_a_model_folder_never_runs(everything, tmp_path, size):
    with tallied("hostile files", "code in a model folder") as tally:
        folder = tmp_path / "home"
        shutil.copytree(everything, folder)
        write_remote_code(folder)
        for line in readers_of("exported"):
            with tally.attempt(" ".join(line[:2])):
                finished = fork_command(folder, *line)
                assert not (folder / EVIDENCE).exists(), "EXECUTED"
                finished.refuses_or_works()
