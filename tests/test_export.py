"""What a run has learned, written for others and read back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bench_export
import pytest
import torch
from hydra import compose, initialize_config_dir
from make_checkpoint import write_checkpoint
from omegaconf import MissingMandatoryValue, OmegaConf
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from scripted import CONFIG

from qwenvl_lit import QwenVL, export, predict, test, train
from qwenvl_lit.cli.command import offer_groups, prepare
from qwenvl_lit.models.qwen_vl.export import runnable
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.tokenizer import TINY_VOCABULARY
from qwenvl_lit.runs.run import config_folder, find_run
from qwenvl_lit.types import DataError

QUIET = ["logger=none", "strategy=cpu"]
CODE = ("configuration_qwen", "modeling_qwen", "tokenization_qwen")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base in F, with code of its own, of shards of 40 kB; and rows in rows.jsonl."""
    folder = tmp_path_factory.mktemp("home")
    model = QwenVLFamily(config=CONFIG, vocabulary="tiny", seed=5).load()
    write_checkpoint(model, TINY_VOCABULARY, folder / "F", kind="bin", shard_bytes=40_000)
    for name in CODE:
        (folder / "F" / f"{name}.py").write_text("# the code of the model\n")
    auto = {"auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}
    (folder / "F/tokenizer_config.json").write_text(json.dumps(auto))
    (folder / "F/LICENSE").write_text("a licence\n")
    Image.new("RGB", (30, 20), "teal").save(folder / "a.png")
    rows = [
        {"query": f"<img>a.png</img>What is it, {number}?", "response": "teal " * number}
        for number in range(1, 7)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(verb: str, *arguments: str, monkeypatch, run_folder: Path | str = "out"):
    """The config that a command line gives."""
    line = prepare(verb, arguments, run="start" if verb == "train" else "needed")
    offer_groups(line)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose(verb, [*line.arguments, f"paths.run={run_folder}"])


@pytest.fixture
def does(home, monkeypatch, capsys):
    """Runs a verb in `home`, in this process; gives what it prints."""
    monkeypatch.chdir(home)

    def do(verb, *arguments: str, to: Path | str = "out") -> str:
        config = config_of(
            verb.__name__.rpartition(".")[2], *arguments, monkeypatch=monkeypatch, run_folder=to
        )
        if verb is train:
            Path(to, ".hydra").mkdir(parents=True)
            OmegaConf.save(config, Path(to, ".hydra/config.yaml"))
        verb.main(config)
        return capsys.readouterr().out

    return do


ADAPTERS = {
    "lora": ["adapter=lora_all", "adapter.rank=2"],
    "dora": ["adapter=dora", "adapter.rank=2"],
    "rslora": [
        "adapter=rslora",
        "adapter.rank=2",
        "+adapter.options.bias=lora_only",
        "+adapter.options.modules_to_save=[lm_head]",
    ],
    "full": ["adapter=full"],
}
DATA = ["data=jsonl", "data.train=rows.jsonl", "data.validation=rows.jsonl"]
RECIPE = [*QUIET, "++model.system=Look.", "optim.lr=0.05"]
RECIPE += ["trainer.max_steps=2", "trainer.accumulate_grad_batches=1", "trainer.precision=32-true"]


@pytest.fixture
def trained(home, does):
    """The folder of a run of two large steps, in float32, with an adapter by its name or from what `model` says; made once."""

    def make(name: str, *model: str) -> str:
        if not (home / name).exists():
            model = model or ("model=qwen_vl_chat", "model.path=F", "model.dtype=float32")
            does(train, *model, *DATA, *RECIPE, *ADAPTERS.get(name, []), to=name)
        return name

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of a whole model, as its files have them."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {file: load_file(folder / file) for file in set(index.values())}
    return {name: found[file][name] for name, file in index.items()}


def base_tensors(home: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in (home / "F").glob("*.bin")
        for name, tensor in torch.load(file, weights_only=True).items()
    }


def test_a_merged_layer_is_base_plus_scaled_b_times_a(home, trained, does):
    run = trained("lora")
    printed = does(export, f"ckpt={run}", "out=merged")
    assert "differ by" in bench_export.said(printed)
    learned = torch.load(find_run(run).checkpoint, weights_only=True)["state_dict"]
    base, merged = base_tensors(home), tensors(home / "merged")
    assert merged.keys() == base.keys()
    for name, tensor in base.items():
        layer = f"model.base_model.model.{name.removesuffix('.weight')}"
        if (a := learned.get(f"{layer}.lora_A.default.weight")) is not None:
            assert learned[f"{layer}.lora_B.default.weight"].abs().max() > 0.01, (
                "it has learned something"
            )
            tensor = tensor + 32 / 2 * learned[f"{layer}.lora_B.default.weight"] @ a
        elif name.endswith("attn_pool.attn.in_proj_weight"):
            deltas = []
            for letter in "qkv":
                inner = layer.replace("in_proj_weight", f"{letter}_proj")
                deltas.append(
                    32
                    / 2
                    * learned[f"{inner}.lora_B.default.weight"]
                    @ learned[f"{inner}.lora_A.default.weight"]
                )
            tensor = tensor + torch.cat(deltas)
        assert torch.equal(merged[name], tensor), name


ONCE = ["overwrite=true", "compare=none"]


@pytest.mark.parametrize("name", ["dora", "rslora"])
def test_a_run_and_its_adapter_folder_merge_to_the_same_model(name, home, trained, does):
    run = trained(name)
    does(export, f"ckpt={run}", "out=M0", "overwrite=true")
    does(export, f"ckpt={run}", "out=A1", "merge=false", *ONCE)
    does(export, "ckpt=A1", "out=M1", *ONCE)
    whole, again = tensors(home / "M0"), tensors(home / "M1")
    assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items())
    assert any(not torch.equal(tensor, whole[key]) for key, tensor in base_tensors(home).items())


def test_folders_of_folders_are_the_same_to_the_bit(home, trained, does):
    run = trained("lora")
    does(export, f"ckpt={run}", "out=A1", "merge=false", "overwrite=true")
    does(export, f"ckpt={run}/checkpoints/last_adapter", "out=A2", "merge=false", *ONCE)
    does(export, "ckpt=A1", "out=A3", "merge=false", *ONCE)
    does(export, f"ckpt={run}", "out=M0", *ONCE)
    does(export, "ckpt=M0", "out=M1", "overwrite=true")
    first, *others = (
        load_file(home / folder / "adapter_model.safetensors") for folder in ("A1", "A2", "A3")
    )
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)
    learned = torch.load(find_run(run).checkpoint, weights_only=True)["state_dict"]
    assert {
        key.removeprefix("model.").replace(".default", ""): value.tolist()
        for key, value in learned.items()
    } == {key: value.tolist() for key, value in first.items()}
    whole, again = tensors(home / "M0"), tensors(home / "M1")
    assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items())


def test_a_run_that_trained_everything_is_a_whole_model_only(home, trained, does):
    run = trained("full")
    does(export, f"ckpt={run}", "out=everything")
    learned = torch.load(find_run(run).checkpoint, weights_only=True)["state_dict"]
    written = tensors(home / "everything")
    assert torch.equal(written["lm_head.weight"], learned["model.lm_head.weight"])
    assert not torch.equal(written["lm_head.weight"], base_tensors(home)["lm_head.weight"])
    with pytest.raises(DataError, match="there is no adapter: whole tensors were trained"):
        does(export, f"ckpt={run}", "out=nothing", "merge=false", "compare=none")
    assert not list(home.glob("nothing*"))


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_a_fresh_process_answers_from_the_exported_model_as_the_run_does(home, trained, does):
    run = trained("lora")
    does(export, f"ckpt={run}", "out=M0", "overwrite=true")
    few = ["data=jsonl", "data.test=rows.jsonl", "generation.max_new_tokens=8", "metrics=exact"]
    does(test, f"ckpt={run}", *few, *QUIET, to="answers")
    command = [sys.executable, "-m", "qwenvl_lit.test", "ckpt=M0", *few, "hydra.run.dir=fresh"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "QWENVL_LIT_CACHE": str(home / "cache")}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert predictions(home / "fresh") == predictions(home / "answers")
    assert len({row["prediction"] for row in predictions(home / "fresh")} - {""}) > 0


# Folders as others leave them: ms-swift names a folder of ModelScope's cache, Qwen-VL's finetune.py wrote .bin files.
OLD = {
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
}
OLD |= {
    "layers_to_transform": None,
    "modules_to_save": None,
    "peft_type": "LORA",
    "revision": None,
    "task_type": "CAUSAL_LM",
}
FOREIGN = {
    "official": {
        **OLD,
        "r": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": ["c_attn", "attn.c_proj", "w1", "w2"],
    },
    "swift": {
        **OLD,
        "r": 2,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": ["c_attn"],
        "rank_pattern": {},
    },
}
FOREIGN["official"] |= {"auto_mapping": None, "base_model_name_or_path": "F"}
FOREIGN["swift"] |= {
    "base_model_name_or_path": "/home/them/hub/qwen/Qwen-VL-Chat",
    "lora_dtype": None,
    "lorap_lr_ratio": None,
}
LAYERS = {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "mlp.w1": (32, 32), "mlp.w2": (32, 32)}


def foreign(folder: Path, name: str, **changes) -> Path:
    """An adapter folder with noise for what it has learned."""
    config = FOREIGN[name] | changes
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    made, draw = {}, torch.Generator().manual_seed(1)
    for layer, (width, height) in LAYERS.items():
        if any(layer.endswith(target) for target in config["target_modules"] or ()):
            path = f"base_model.model.transformer.h.0.{layer}"
            made[f"{path}.lora_A.weight"] = torch.randn(config["r"], width, generator=draw)
            made[f"{path}.lora_B.weight"] = torch.randn(height, config["r"], generator=draw) / 50
    if name == "official":
        torch.save(made, folder / "adapter_model.bin")
    else:
        save_file(made, folder / "adapter_model.safetensors")
        (folder / "additional_config.json").write_text("{}")
    return folder


def said(network) -> torch.Tensor:
    with torch.inference_mode():
        return network(input_ids=torch.arange(1, 40)[None]).logits


@pytest.mark.parametrize("name", FOREIGN)
def test_adapters_of_others_compute_what_they_do_in_peft(name, home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    folder = foreign(tmp_path / name, name)
    base = QwenVLFamily(path="F").load()
    plain = said(base)
    expected = said(PeftModel.from_pretrained(base, folder).eval())
    assert (expected - plain).abs().max() > 0.05
    ours = QwenVL.load(folder, base_model="F", dtype="float32", device="cpu")
    assert torch.equal(said(ours.model), expected)


def test_the_base_that_an_adapter_expects_is_said_and_taken(home, does, tmp_path, capsys):
    foreign(tmp_path / "official", "official")
    foreign(tmp_path / "swift", "swift")
    foreign(tmp_path / "nameless", "swift", base_model_name_or_path=None)
    config = find_run(str(tmp_path / "official")).config
    assert (config["model"]["path"], config["adapter"]["rank"]) == ("F", 4)
    assert find_run(str(tmp_path / "swift")).config["model"]["path"] == "Qwen/Qwen-VL-Chat"
    does(
        export, f"ckpt={tmp_path / 'swift'}", "model.path=F", "model.dtype=float32", "out=M2", *ONCE
    )
    capsys.readouterr()
    line = prepare("export", [f"ckpt={tmp_path / 'swift'}", "model.path=F"], run="needed")
    assert line.notes == [
        f"{tmp_path / 'swift'} is an adapter for /home/them/hub/qwen/Qwen-VL-Chat; "
        f"the base model here: model.path=F"
    ]
    with pytest.raises(MissingMandatoryValue, match="path"):
        does(export, f"ckpt={tmp_path / 'nameless'}", "out=M3", *ONCE)


def test_ours_load_in_plain_peft_and_name_nothing_of_this_package(home, trained, does):
    run = trained("lora")
    printed = does(export, f"ckpt={run}", "out=A1", "merge=false", *ONCE)
    assert "q_proj, k_proj and v_proj of the resampler load here only" in printed
    described = (home / "A1/adapter_config.json").read_text()
    assert json.loads(described)["base_model_name_or_path"] == str(home / "F")
    assert "qwenvl_lit" not in described
    there = PeftModel.from_pretrained(QwenVLFamily(path="F").load(), "A1").eval()
    here = QwenVL.load("A1", device="cpu")
    assert torch.equal(said(there), said(here.model))
    assert here.processor.system == "Look."


def test_training_goes_on_from_an_adapter_folder_and_from_a_whole_model(
    home, trained, does, tmp_path
):
    folder = foreign(tmp_path / "swift", "swift", base_model_name_or_path=str(home / "F"))
    further = trained("further", f"ckpt={folder}", "model.dtype=float32")
    learned = find_run(further).config
    assert learned["init"]["checkpoint"] == str(folder / "adapter_model.safetensors")
    assert learned["adapter"]["targets"] == ["c_attn"]
    assert "differ by" in does(export, f"ckpt={further}", "out=M4", "overwrite=true")
    with pytest.raises(DataError, match=r"started from what another had learned .*merge=true"):
        does(export, f"ckpt={further}", "out=A4", "merge=false", *ONCE)
    again = trained("on_top", "ckpt=M4", "adapter.rank=2")
    model = find_run(again).config["model"]
    assert (model["path"], model["dtype"], find_run(again).config["init"]) == ("M4", "float32", {})
    assert QwenVL.load("M4", device="cpu").processor.system == "Look."


def test_what_was_learned_over_few_bits_is_added_to_the_weights_as_they_were(home, trained, does):
    bnb_config = home / "bnb_config"
    shutil.copytree(home / trained("lora"), bnb_config)
    file = bnb_config / ".hydra/config.yaml"
    config = OmegaConf.load(file)
    config.adapter.quantization = {"load_in_4bit": True}
    OmegaConf.save(config, file)
    printed = does(export, "ckpt=bnb_config", "out=M5")
    assert "differ by" in printed
    assert "the run holds its base in few bits" in printed
    assert "the run holds its base in few bits" in (home / "M5/README.md").read_text()
    does(export, "ckpt=lora", "out=M0", *ONCE)
    whole, again = tensors(home / "M0"), tensors(home / "M5")
    assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items())


def test_what_a_run_or_an_export_holds_may_answer_in_4_bits_and_is_not_written_so(
    home, trained, does, monkeypatch
):
    does(export, f"ckpt={trained('lora')}", "out=M0", *ONCE)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # where it is, it needs a GPU
    for ckpt in ("lora", "M0"):
        with pytest.raises(ValueError, match="needs bitsandbytes"):
            does(predict, f"ckpt={ckpt}", "prompt=What?", "model.load_in_4bit=true", "strategy=cpu")
    with pytest.raises(DataError, match="taken when a model is loaded to answer, not written"):
        does(export, "ckpt=lora", "out=M7", "model.load_in_4bit=true")


def test_a_template_that_was_learned_is_the_one_that_is_written(home, trained, does):
    does(
        export,
        f"ckpt={trained('lora')}",
        "model.template=raw",
        "++model.system=null",
        "out=M6",
        *ONCE,
    )
    assert json.loads((home / "M6/generation_config.json").read_text())["chat_format"] == "raw"
    assert QwenVL.load("M6", device="cpu").is_base_model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_written_in_the_type_that_was_asked_for(dtype, home, trained, does):
    printed = does(export, f"ckpt={trained('lora')}", f"out={dtype}", f"dtype={dtype}")
    assert "differ by" in printed
    assert {tensor.dtype for tensor in tensors(home / dtype).values()} == {getattr(torch, dtype)}
    config = json.loads((home / dtype / "config.json").read_text())
    assert (config["torch_dtype"], config["bf16"], config["fp16"]) == (
        dtype,
        dtype == "bfloat16",
        dtype == "float16",
    )


def test_a_whole_model_has_what_the_published_folder_has_and_a_card(home, trained, does):
    does(export, f"ckpt={trained('lora')}", "out=M0", "overwrite=true", "compare=run")
    folder = home / "M0"
    base, config = (json.loads((one / "config.json").read_text()) for one in (home / "F", folder))
    assert (config["model_type"], config["architectures"]) == ("qwen", ["QWenLMHeadModel"])
    for key in ("visual", "auto_map", "seq_length"):
        assert config[key] == base[key]
    for name in (
        "qwen.tiktoken",
        "generation_config.json",
        "tokenizer_config.json",
        "LICENSE",
        *(f"{code}.py" for code in CODE),
    ):
        assert (folder / name).read_bytes() == (home / "F" / name).read_bytes(), name
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in tensors(folder).values()
    )
    card = (folder / "README.md").read_text()
    for part in (
        "base_model: F",
        "| data.train | `rows.jsonl` |",
        "| optim.lr | `0.05` |",
        "| adapter.rank | `2` |",
    ):
        assert part in card, card


def test_code_is_named_only_where_it_is(tmp_path):
    (tmp_path / "modeling_qwen.py").write_text("")
    named = {
        "AutoConfig": "configuration_qwen.A",
        "AutoModel": "Qwen/Qwen-VL--modeling_qwen.B",
        "AutoTokenizer": ["modeling_qwen.C", None],
    }
    assert runnable(named, tmp_path) == {
        "AutoModel": "modeling_qwen.B",
        "AutoTokenizer": ["modeling_qwen.C", None],
    }


def test_what_is_there_stays_unless_it_is_an_export_and_may_go(home, trained, does):
    ckpt = f"ckpt={trained('lora')}"
    does(export, ckpt, "out=kept", "compare=none")
    before = (home / "kept/config.json").stat().st_ino
    refused = {
        "kept": "exists; choose another folder, or overwrite=true",
        ".": "holds what is to be read",
        "null": "out is missing",
    }
    for out, says in refused.items():
        with pytest.raises(DataError, match=says):
            does(export, ckpt, f"out={out}")
    (home / "mine").mkdir(exist_ok=True)
    with pytest.raises(DataError, match="is not an exported folder, and stays"):
        does(export, ckpt, "out=mine", "overwrite=true")
    assert (home / "kept/config.json").stat().st_ino == before


def test_a_model_that_answers_otherwise_is_not_kept(home, trained, does, monkeypatch):
    wrong = export.write_model

    def spoil(task, folder, dtype):
        wrong(task, folder, dtype)
        for file in folder.glob("*.safetensors"):
            save_file(
                {name: tensor * 1.01 for name, tensor in load_file(file).items()},
                file,
                metadata={"format": "pt"},
            )

    monkeypatch.setattr(export, "write_model", spoil)
    with pytest.raises(
        DataError, match="the written model is not the run's: logits differ by up to"
    ):
        does(export, f"ckpt={trained('lora')}", "out=spoiled")
    assert not list(home.glob("spoiled*"))
