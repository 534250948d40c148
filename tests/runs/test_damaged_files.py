"""Files of checkpoints, runs and adapters in every state: each is one line, and nothing runs."""

import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from make_checkpoint import write_checkpoint
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tiny import CONFIG

from qwenvl_lit import QwenVL
from qwenvl_lit.cli.command import prepare
from qwenvl_lit.cli.resume import LAST, steps_of
from qwenvl_lit.data.predictions import answered_rows
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.reports.scores import read_answer_texts
from qwenvl_lit.runs.run import COMPOSED_CONFIG, config_folder, find_run
from qwenvl_lit.stored_files import read_checkpoint, read_json_object, read_tensors
from qwenvl_lit.training.adapters.methods import LoRA
from qwenvl_lit.training.adapters.peft_files import peft_names
from qwenvl_lit.types import DataError

EVIDENCE = "executed"  # the folder that a pickle would create
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
ANY = "."  # the messages are checked by `one_line`
FLIPS = 8  # positions of a file in which a bit is flipped, one after the other


class Executes:
    """An object whose pickle creates a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, (EVIDENCE,)


def zipped_pickle(value) -> bytes:
    file = Path("pickle.zip")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value))
        archive.writestr("archive/version", "3\n")
    return file.read_bytes()


def endless_list() -> list:
    nested: list = []
    for _ in range(60):
        nested = [nested, nested]
    return nested


# What a file may hold instead of its content; each is refused
ANYTHING: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "noise": lambda content: random.Random(0).randbytes(5000),
    "zeros": lambda content: bytes(len(content)),
    "a git-lfs pointer": lambda content: LFS_POINTER,
    "a bare pickle": lambda content: pickle.dumps({"state_dict": Executes(), "config": {}}),
    "a zipped pickle": lambda content: zipped_pickle({"state_dict": Executes()}),
    "a list": lambda content: b"[1, 2]",
    "a number": lambda content: b"3",
    "a string": lambda content: b'"text"',
    "nested": lambda content: b"[" * 100_000,
}
YAML: dict[str, Callable[[bytes], bytes]] = {
    "a python tag": lambda content: b"model: !!python/object/apply:os.mkdir [executed]\n",
    "a group that is text": lambda content: b"model: x\nadapter: {}\ngeneration: {}\n",
    "references": lambda content: b"a: &a [x, x]\nmodel: {config: [*a, *a]}\n",
    "a broken interpolation": lambda content: b"model: {path: '${a'}\nadapter: {}\ngeneration: {}",
    "no group": lambda content: b"seed: 1\n",
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    """A folder with one of everything, from a tiny model."""
    folder = tmp_path_factory.mktemp("everything")
    family = QwenVLFamily(config=CONFIG, vocabulary="tiny")
    model = family.load()
    write_checkpoint(model, TINY_VOCABULARY, folder / "safetensors", kind="safetensors")
    write_checkpoint(model, TINY_VOCABULARY, folder / "bin", kind="bin")
    settings = {"model": {"template": "chatml"}, "generation": {"max_new_tokens": 2}}
    (folder / "safetensors/qwenvl_lit.json").write_text(json.dumps(settings))
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = OmegaConf.to_container(compose("train"))
    config["model"] |= {"config": CONFIG}
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    trained = {name: state[f"model.{name}"] for name, _ in model.named_parameters()}
    stored = {
        "state_dict": {f"model.{name}": tensor for name, tensor in trained.items()},
        "config": config,
        "global_step": 3,
        "epoch": 0,
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    (folder / "run/checkpoints").mkdir(parents=True)
    (folder / "run/.hydra").mkdir()
    torch.save(stored, folder / "run" / LAST)
    torch.save(stored, folder / "alone.ckpt")
    OmegaConf.save(config, folder / "run" / COMPOSED_CONFIG)
    (folder / "run/.hydra/overrides.yaml").write_text("[data=demo, 'seed=1']\n")
    adapted = LoRA(rank=2, alpha=4, dropout=0.0, targets="attention").apply(model, family)
    tensors = {name: adapted.state_dict()[inner] for name, inner in peft_names(adapted).items()}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"]}
    settings["base_model_name_or_path"] = "safetensors"
    for kind in ("adapter", "adapter_bin"):
        (folder / kind).mkdir()
        (folder / kind / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter/adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_bin/adapter_model.bin")
    row = {"set": "test", "index": 0, "id": "x", "prediction": "y"}
    (folder / "answers").mkdir()
    (folder / "answers/predictions.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.fixture(autouse=True)
def nothing_was_executed(everything, tmp_path, monkeypatch) -> Iterator[None]:
    """Tests run in a folder that links to everything; they replace what they damage."""
    monkeypatch.chdir(tmp_path)
    for file in everything.rglob("*"):
        if file.is_file():
            target = Path(file.relative_to(everything))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
    yield
    assert not Path(EVIDENCE).exists()


def write(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def load(source: str) -> None:
    QwenVL.load(source, device="cpu", dtype="float32", template=None)


READERS: dict[str, Callable[[], object]] = {
    f"run/{LAST}": lambda: (load("run"), steps_of(Path("run", LAST))),
    "alone.ckpt": lambda: load("alone.ckpt"),
    f"run/{COMPOSED_CONFIG}": lambda: load("run"),
    "run/.hydra/overrides.yaml": lambda: prepare("train", ["resume=run", "data=demo"], run="start"),
    "adapter/adapter_config.json": lambda: load("adapter"),
    "adapter/adapter_model.safetensors": lambda: load("adapter"),
    "adapter_bin/adapter_model.bin": lambda: load("adapter_bin"),
    "safetensors/config.json": lambda: load("safetensors"),
    "safetensors/generation_config.json": lambda: load("safetensors"),
    "safetensors/qwenvl_lit.json": lambda: load("safetensors"),
    "safetensors/qwen.tiktoken": lambda: load("safetensors"),
    "safetensors/model.safetensors.index.json": lambda: load("safetensors"),
    "safetensors/model-00001-of-00001.safetensors": lambda: load("safetensors"),
    "bin/pytorch_model.bin.index.json": lambda: load("bin"),
    "bin/pytorch_model-00001-of-00001.bin": lambda: load("bin"),
    "answers/predictions.jsonl": lambda: (
        read_answer_texts(Path("answers/predictions.jsonl")),
        answered_rows(Path("answers")),
    ),
}


def one_line(error: ValueError) -> str:
    """The message, as the commands print it."""
    message = str(error)
    assert message
    assert "\n" not in message
    assert message.isprintable()
    assert "weights_only" not in message
    return message


@pytest.mark.parametrize("file", READERS)
def test_everything_can_be_read(file):
    READERS[file]()


@pytest.mark.parametrize("damage", ANYTHING)
@pytest.mark.parametrize("file", READERS)
def test_a_file_that_holds_something_else_is_one_line_that_names_it(file, damage):
    write(Path(file), ANYTHING[damage](Path(file).read_bytes()))
    with pytest.raises(ValueError, match=ANY) as error:
        READERS[file]()
    message = one_line(error.value)
    assert Path(file).name in message
    if damage == "a git-lfs pointer" and not file.endswith("jsonl"):
        assert "git lfs pull" in message


@pytest.mark.parametrize("file", READERS)
def test_a_folder_in_place_of_a_file_is_one_line(file):
    Path(file).unlink()
    Path(file).mkdir()
    with pytest.raises(ValueError, match=ANY) as error:
        READERS[file]()
    one_line(error.value)


@pytest.mark.parametrize("file", READERS)
def test_a_file_with_a_flipped_bit_is_read_or_one_line(file):
    content = Path(file).read_bytes()
    generator = random.Random(file)
    for _ in range(FLIPS):
        changed = bytearray(content)
        near_an_end = generator.randrange(min(400, len(content)))
        anywhere = generator.randrange(len(content))
        position = generator.choice([near_an_end, anywhere, -1 - near_an_end])
        changed[position] ^= 1 << generator.randrange(8)
        write(Path(file), bytes(changed))
        try:
            READERS[file]()
        except ValueError as error:
            one_line(error)


@pytest.mark.parametrize("damage", YAML)
def test_a_config_of_another_kind_is_one_line(damage):
    file = Path("run", COMPOSED_CONFIG)
    write(file, YAML[damage](file.read_bytes()))
    with pytest.raises(DataError) as error:
        find_run("run")
    one_line(error.value)


@pytest.mark.parametrize(
    "stored",
    [
        [1],
        {"config": {}},
        {"state_dict": [1], "config": {}},
        {"state_dict": {"a": 1}, "config": {}},
        {"state_dict": {}, "config": "text"},
        {"state_dict": {}, "config": {"model": "text"}},
        {"state_dict": {}, "config": {"model": endless_list()}},
        {"state_dict": {}, "config": {"model": {"a": endless_list()}, "adapter": {}}},
        {"state_dict": {}, "config": {"model": {b"a": 1}, "adapter": {}, "generation": {}}},
        {"state_dict": {"a": torch.zeros(2).to_sparse()}, "config": {}},
    ],
)
def test_a_checkpoint_with_other_content_is_one_line(stored):
    torch.save(stored, "other.ckpt")
    with pytest.raises(DataError, match=r"other\.ckpt") as error:
        find_run("other.ckpt")
    one_line(error.value)


@pytest.mark.parametrize("key", ["global_step", "epoch", "loops", "optimizer_states"])
@pytest.mark.parametrize("value", [None, "x", 1.5])
def test_a_checkpoint_that_cannot_be_resumed_is_one_line(key, value):
    stored = torch.load(Path("run", LAST), weights_only=True)
    torch.save({**stored, key: value}, "other.ckpt")
    with pytest.raises(DataError, match=rf"other\.ckpt cannot be resumed: its {key} is no"):
        steps_of(Path("other.ckpt"))


def test_a_damaged_record_of_a_checkpoint_is_found_by_its_checksum():
    content = bytearray(Path("run", LAST).read_bytes())
    content[content.index(b"max_epochs") + 3] ^= 0x10
    Path("flipped.ckpt").write_bytes(content)
    with pytest.raises(DataError, match=r"flipped\.ckpt cannot be read: .*CRC"):
        read_checkpoint(Path("flipped.ckpt"))


def test_a_pipe_in_place_of_a_file_does_not_hang():
    os.mkfifo("pipe.json")
    with pytest.raises(DataError, match="is not a regular file"):
        read_json_object(Path("pipe.json"))
    os.rename("pipe.json", "pipe.safetensors")
    with pytest.raises(DataError, match="is not a regular file"):
        read_tensors(Path("pipe.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "x"}, "hidden_size is 'x', expected a whole number"),
        ({"hidden_size": 32.5}, "hidden_size is 32.5"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 1000"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number"),
        ({"visual": 3}, "visual is 3"),
        ({"visual": {"heads": 0}}, "visual lacks"),
        ({"visual": None}, "visual is None"),
        ({"no_bias": "yes"}, "no_bias is 'yes'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "GPTQ lack bits and group_size"),
        ({"quantization_config": {"quant_method": "fp8"}}, "FP8, which is not read"),
        ({"quantization_config": ["gptq"]}, "quantization_config is .* expected settings"),
    ],
)
def test_a_value_of_config_json_is_checked(changes, message):
    file = Path("safetensors/config.json")
    settings = json.loads(file.read_text())
    write(file, json.dumps({**settings, **changes}).encode())
    with pytest.raises(DataError, match=message) as error:
        load("safetensors")
    assert "config.json" in one_line(error.value)


def test_code_that_config_json_names_is_not_fetched():
    file = Path("safetensors/config.json")
    names = {"attn_implementation": "stranger/kernel", "_attn_implementation": "stranger/kernel"}
    names |= {"auto_map": {"AutoConfig": "stranger/code--x.Y"}, "torch_dtype": "evil"}
    write(file, json.dumps({**json.loads(file.read_text()), **names}).encode())
    model = QwenVL.load("safetensors", device="cpu", dtype="float32").model
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert not hasattr(model.config, "auto_map")


@pytest.mark.parametrize("shard", ["../alone.ckpt", "/etc/passwd", 3])
def test_a_shard_elsewhere_is_refused(shard):
    file = Path("safetensors/model.safetensors.index.json")
    write(file, json.dumps({"weight_map": {"lm_head.weight": shard}}).encode())
    with pytest.raises(DataError, match=r"index\.json") as error:
        load("safetensors")
    one_line(error.value)


def test_control_characters_of_file_names_are_escaped():
    name = "a\x1b[2J\nerror: b.ckpt"
    Path(name).write_bytes(b"x")
    with pytest.raises(DataError) as error:
        find_run(name)
    assert r"a\x1b[2J\nerror: b.ckpt" in one_line(error.value)
