"""Exported models and adapter folders: their content, and what they answer when loaded again."""

import json
import shutil
import sys
from pathlib import Path

import bench_export
import pytest
import torch
from commands import output_of
from gptq_files import SETTINGS, change_config, write_gptq
from hydra import compose, initialize_config_dir
from make_checkpoint import small_sizes, write_checkpoint
from omegaconf import OmegaConf
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from scripted import CONFIG

from qwenvl_lit import QwenVL, export, predict, test, train
from qwenvl_lit.cli.command import offer_groups, prepare
from qwenvl_lit.evaluation.equivalence import ROWS
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.export import runnable, write_companions
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.runs import exported_folder
from qwenvl_lit.runs.run import config_folder, find_run
from qwenvl_lit.types import DataError

QUIET = ["logger=none", "strategy=cpu"]
CODE = ("configuration_qwen", "modeling_qwen", "tokenization_qwen")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a base model in F, with code and several shards, and rows in rows.jsonl."""
    folder = tmp_path_factory.mktemp("home")
    model = QwenVLFamily(config=CONFIG, vocabulary="tiny", seed=5).load()
    write_checkpoint(model, TINY_VOCABULARY, folder / "F", kind="bin", shard_bytes=40_000)
    for name in CODE:
        (folder / "F" / f"{name}.py").write_text("# the code of the model\n")
    auto = {"auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}
    (folder / "F/tokenizer_config.json").write_text(json.dumps(auto))
    (folder / "F/LICENSE").write_text("a licence\n")
    Image.new("RGB", (30, 20), "teal").save(folder / "a.png")
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(1, 7):
            query = f"<img>a.png</img>What is it, {number}?"
            file.write(json.dumps({"query": query, "response": "teal " * number}) + "\n")
    return folder


def config_of(command: str, *arguments: str, run_folder: Path | str = "out"):
    """Composes the config of a command line."""
    line = prepare(command, arguments, run="start" if command == "train" else "needed")
    offer_groups(line)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose(command, [*line.arguments, f"paths.run={run_folder}"])


@pytest.fixture
def run_command(home, monkeypatch, capsys):
    """Runs a command in `home`, in this process, and returns what it prints."""
    monkeypatch.chdir(home)

    def run(module, *arguments: str, to: Path | str = "out") -> str:
        config = config_of(module.__name__.rpartition(".")[2], *arguments, run_folder=to)
        if module is train:
            Path(to, ".hydra").mkdir(parents=True)
            OmegaConf.save(config, Path(to, ".hydra/config.yaml"))
        module.main(config)
        return capsys.readouterr().out

    return run


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
RECIPE += ["trainer.max_steps=2", "trainer.rows_per_step=1", "trainer.precision=32-true"]


@pytest.fixture
def trained(home, run_command):
    """Returns the folder of a training run of two large steps in float32; each is made once.

    The run has the adapter of that name, or starts from the model that `model` names.
    """

    def make(name: str, *model: str) -> str:
        if not (home / name).exists():
            model = model or ("model=qwen_vl_chat", "model.path=F", "model.dtype=float32")
            run_command(train, *model, *DATA, *RECIPE, *ADAPTERS.get(name, []), to=name)
        return name

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Reads the weights of an exported model."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {file: load_file(folder / file) for file in set(index.values())}
    return {name: shards[file][name] for name, file in index.items()}


def base_tensors(home: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for file in (home / "F").glob("*.bin"):
        weights |= torch.load(file, weights_only=True)
    return weights


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def trained_state(run: str) -> dict[str, torch.Tensor]:
    """Reads the trained tensors of a run's checkpoint."""
    return torch.load(find_run(run).checkpoint, weights_only=True)["state_dict"]


def test_an_adapter_over_gptq_weights_is_merged_into_the_dequantized_ones(
    home, trained, run_command
):
    settings = {**SETTINGS, "desc_act": True, "sym": False}
    network = write_gptq(home / "F", home / "Int4", settings, beside=True)
    change_config(home / "Int4", quantization_config=settings)
    run = trained("int4", "model=qwen_vl_chat_int4", "model.path=Int4", "model.dtype=float32")
    printed = run_command(export, f"ckpt={run}", "out=merged_int4")
    assert "differ by" in bench_export.comparison_in(printed)
    state, merged = trained_state(run), tensors(home / "merged_int4")
    name = "transformer.h.0.attn.c_attn"
    a, b = (state[f"model.base_model.model.{name}.lora_{part}.default.weight"] for part in "AB")
    base = network.get_submodule(name).weight
    assert torch.equal(merged[f"{name}.weight"], base + 32 / 8 * b @ a)
    assert not (home / "merged_int4/quantize_config.json").exists()
    written = json.loads((home / "merged_int4/config.json").read_text())
    assert "quantization_config" not in written
    answers = []
    for source in (run, "merged_int4"):
        query = [Image.open(home / "a.png"), "What is it?"]
        answers.append(str(QwenVL.load(source).chat(query, max_new_tokens=4)[0]))
    assert answers[0] == answers[1]


def test_a_merged_layer_is_base_plus_scaled_b_times_a(home, trained, run_command):
    run = trained("lora")
    printed = run_command(export, f"ckpt={run}", "out=merged")
    assert "differ by" in bench_export.comparison_in(printed)
    state, scale = trained_state(run), 32 / 2
    base, merged = base_tensors(home), tensors(home / "merged")
    assert merged.keys() == base.keys()

    def delta(layer: str) -> torch.Tensor | None:
        a, b = (state.get(f"{layer}.lora_{letter}.default.weight") for letter in "AB")
        return None if a is None else scale * b @ a

    changes = []
    for name, tensor in base.items():
        layer = f"model.base_model.model.{name.removesuffix('.weight')}"
        change = delta(layer)
        if name.endswith("attn_pool.attn.in_proj_weight"):
            projections = [layer.replace("in_proj_weight", f"{letter}_proj") for letter in "qkv"]
            change = torch.cat([delta(projection) for projection in projections])
        if change is not None:
            changes.append(change.abs().max())
            tensor = tensor + change
        assert torch.equal(merged[name], tensor), name
    assert min(changes) > 0.01, "training changed every layer"


QUICK = ["overwrite=true", "compare=none"]


@pytest.mark.parametrize("name", ["dora", "rslora"])
def test_a_run_and_its_adapter_folder_merge_to_the_same_model(name, home, trained, run_command):
    run = trained(name)
    no_rows = ["data.validation=null", "data.test=null"]  # generated images are compared
    printed = run_command(export, f"ckpt={run}", "out=M0", "overwrite=true", *no_rows)
    assert f" in {ROWS} rows; " in printed
    run_command(export, f"ckpt={run}", "out=A1", "merge=false", *QUICK)
    run_command(export, "ckpt=A1", "out=M1", *QUICK)
    merged = tensors(home / "M0")
    assert_equal(merged, tensors(home / "M1"))
    assert any(not torch.equal(tensor, merged[key]) for key, tensor in base_tensors(home).items())


def test_exports_of_exports_are_equal_to_the_bit(home, trained, run_command):
    run = trained("lora")
    printed = run_command(export, f"ckpt={run}", "out=A1", "merge=false", "overwrite=true")
    assert f"names its base model by a folder of this machine ({home / 'F'})" in printed
    run_command(export, f"ckpt={run}/checkpoints/last_adapter", "out=A2", "merge=false", *QUICK)
    run_command(export, "ckpt=A1", "out=A3", "merge=false", *QUICK)
    run_command(export, f"ckpt={run}", "out=M0", *QUICK)
    run_command(export, "ckpt=M0", "out=M1", "overwrite=true")
    expected = {
        name.removeprefix("model.").replace(".default", ""): tensor
        for name, tensor in trained_state(run).items()
    }
    for folder in ("A1", "A2", "A3"):
        assert_equal(load_file(home / folder / "adapter_model.safetensors"), expected)
    assert_equal(tensors(home / "M0"), tensors(home / "M1"))
    for folder in ("M0", "M1", "A1", "A3"):  # training starts with the recipe of the run
        config = config_of("train", f"ckpt={folder}", "data=jsonl", "data.train=rows.jsonl")
        recipe = (config.trainer.precision, config.trainer.max_steps, config.optim.lr)
        assert recipe == ("32-true", 2, 0.05), folder
        assert config.adapter.rank == 2
        assert config.trainer.accelerator == "auto", "a key of the machine"


def test_a_run_that_trained_whole_tensors_exports_only_a_whole_model(home, trained, run_command):
    run = trained("full")
    run_command(export, f"ckpt={run}", "out=everything")
    head = tensors(home / "everything")["lm_head.weight"]
    assert torch.equal(head, trained_state(run)["model.lm_head.weight"])
    assert not torch.equal(head, base_tensors(home)["lm_head.weight"])
    for compare in ("none", "run"):
        with pytest.raises(DataError, match="this run trained whole weights, as adapter=full"):
            run_command(export, f"ckpt={run}", "out=nothing", "merge=false", f"compare={compare}")
    assert not list(home.glob("nothing*"))


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_a_fresh_process_answers_from_the_exported_model_as_the_run_does(
    home, trained, run_command
):
    run = trained("lora")
    run_command(export, f"ckpt={run}", "out=M0", "overwrite=true")
    few = ["data=jsonl", "data.test=rows.jsonl", "generation.max_new_tokens=8", "metrics=exact"]
    run_command(test, f"ckpt={run}", *few, *QUIET, to="answers")
    output_of(home, "test", "ckpt=M0", *few, "hydra.run.dir=fresh")
    assert predictions(home / "fresh") == predictions(home / "answers")
    assert len({row["prediction"] for row in predictions(home / "fresh")} - {""}) > 0


# Folders as other software writes them: ms-swift names a folder of ModelScope's cache as the base,
# and Qwen-VL's finetune.py writes .bin files.
OLD = {
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
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
        "auto_mapping": None,
        "base_model_name_or_path": "F",
    },
    "swift": {
        **OLD,
        "r": 2,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": ["c_attn"],
        "rank_pattern": {},
        "base_model_name_or_path": "/home/them/hub/qwen/Qwen-VL-Chat",
        "lora_dtype": None,
        "lorap_lr_ratio": None,
    },
}
LAYERS = {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "mlp.w1": (32, 32), "mlp.w2": (32, 32)}


def foreign(folder: Path, name: str, **changes) -> Path:
    """Writes an adapter folder whose trained tensors are noise."""
    config = FOREIGN[name] | changes
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights, draw = {}, torch.Generator().manual_seed(1)
    for layer, (width, height) in LAYERS.items():
        if any(layer.endswith(target) for target in config["target_modules"] or ()):
            path = f"base_model.model.transformer.h.0.{layer}"
            weights[f"{path}.lora_A.weight"] = torch.randn(config["r"], width, generator=draw)
            weights[f"{path}.lora_B.weight"] = torch.randn(height, config["r"], generator=draw) / 50
    if name == "official":
        torch.save(weights, folder / "adapter_model.bin")
    else:
        save_file(weights, folder / "adapter_model.safetensors")
        (folder / "additional_config.json").write_text("{}")
    return folder


def logits(network) -> torch.Tensor:
    with torch.inference_mode():
        return network(input_ids=torch.arange(1, 40)[None]).logits


@pytest.mark.parametrize("name", FOREIGN)
def test_adapters_of_other_software_compute_the_same_here_as_in_peft(
    name, home, tmp_path, monkeypatch
):
    monkeypatch.chdir(home)
    folder = foreign(tmp_path / name, name)
    base = QwenVLFamily(path="F").load()
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, folder).eval())
    assert (expected - plain).abs().max() > 0.05
    ours = QwenVL.load(folder, base_model="F", dtype="float32", device="cpu")
    assert torch.equal(logits(ours.model), expected)


def test_the_base_model_that_an_adapter_names_is_used(home, run_command, tmp_path, capsys):
    foreign(tmp_path / "official", "official")
    foreign(tmp_path / "swift", "swift")
    foreign(tmp_path / "nameless", "swift", base_model_name_or_path=None)
    config = find_run(str(tmp_path / "official")).config
    assert (config["model"]["path"], config["adapter"]["rank"]) == ("F", 4)
    assert find_run(str(tmp_path / "swift")).config["model"]["path"] == "Qwen/Qwen-VL-Chat"
    run_command(
        export,
        f"ckpt={tmp_path / 'swift'}",
        "model.path=F",
        "model.dtype=float32",
        "out=M2",
        *QUICK,
    )
    capsys.readouterr()
    line = prepare("export", [f"ckpt={tmp_path / 'swift'}", "model.path=F"], run="needed")
    assert line.notes == [
        f"{tmp_path / 'swift'} is an adapter for /home/them/hub/qwen/Qwen-VL-Chat; "
        f"the base model here is F"
    ]
    with pytest.raises(DataError, match=r"names no base model: give model\.path=FOLDER"):
        run_command(export, f"ckpt={tmp_path / 'nameless'}", "out=M3", *QUICK)


def test_an_exported_adapter_loads_in_peft_and_names_nothing_of_this_package(
    home, trained, run_command
):
    run = trained("lora")
    printed = run_command(export, f"ckpt={run}", "out=A1", "merge=false", *QUICK)
    resampler = "transformer.visual.attn_pool.attn"
    layers = ", ".join(f"{resampler}.{name}_proj" for name in ("k", "out", "q", "v"))
    assert f"the adapters on {layers} work here only" in printed
    assert "export a merged model, with merge=true" in printed
    config = (home / "A1/adapter_config.json").read_text()
    assert json.loads(config)["base_model_name_or_path"] == str(home / "F")
    assert "qwenvl_lit" not in config
    with_peft = PeftModel.from_pretrained(QwenVLFamily(path="F").load(), "A1").eval()
    ours = QwenVL.load("A1", device="cpu")
    assert torch.equal(logits(with_peft), logits(ours.model))
    assert ours.processor.system == "Look."


def test_training_starts_from_an_adapter_folder_and_from_an_exported_model(
    home, trained, run_command, tmp_path
):
    folder = foreign(tmp_path / "swift", "swift", base_model_name_or_path=str(home / "F"))
    further = trained("further", f"ckpt={folder}", "model.dtype=float32")
    config = find_run(further).config
    assert config["init"]["checkpoint"] == str(folder / "adapter_model.safetensors")
    assert config["adapter"]["targets"] == r"transformer\.h\.(0)\.(attn\.c_attn)"
    assert "differ by" in run_command(export, f"ckpt={further}", "out=M4", "overwrite=true")
    with pytest.raises(DataError, match=r"started from an adapter folder .*merge=true"):
        run_command(export, f"ckpt={further}", "out=A4", "merge=false", *QUICK)
    again = trained("on_top", "ckpt=M4", "adapter.rank=2")
    model = find_run(again).config["model"]
    assert (model["path"], model["dtype"], find_run(again).config["init"]) == ("M4", "float32", {})
    assert QwenVL.load("M4", device="cpu").processor.system == "Look."


def test_an_adapter_on_a_4_bit_base_is_merged_into_the_published_weights(
    home, trained, run_command
):
    quantized = home / "quantized"
    shutil.copytree(home / trained("lora"), quantized)
    file = quantized / ".hydra/config.yaml"
    config = OmegaConf.load(file)
    config.adapter.quantization = {"load_in_4bit": True}
    OmegaConf.save(config, file)
    printed = run_command(export, "ckpt=quantized", "out=M5")
    assert "differ by" in printed
    assert "the run used 4-bit base weights" in printed
    assert "the run used 4-bit base weights" in (home / "M5/README.md").read_text()
    run_command(export, "ckpt=lora", "out=M0", *QUICK)
    assert_equal(tensors(home / "M0"), tensors(home / "M5"))


def test_runs_and_exports_may_answer_in_4_bits_but_no_export_is_quantized(
    home, trained, run_command, monkeypatch
):
    run_command(export, f"ckpt={trained('lora')}", "out=M0", *QUICK)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # if installed, it needs a GPU
    for ckpt in ("lora", "M0"):
        with pytest.raises(ValueError, match="needs the package bitsandbytes"):
            run_command(
                predict, f"ckpt={ckpt}", "prompt=What?", "model.load_in_4bit=true", "strategy=cpu"
            )
    with pytest.raises(DataError, match="an export is not quantized: leave it out"):
        run_command(export, "ckpt=lora", "out=M7", "model.load_in_4bit=true")


def test_the_template_of_the_run_is_written(home, trained, run_command):
    changes = ["model.template=raw", "++model.system=null"]
    run_command(export, f"ckpt={trained('lora')}", *changes, "out=M6", *QUICK)
    assert json.loads((home / "M6/generation_config.json").read_text())["chat_format"] == "raw"
    assert QwenVL.load("M6", device="cpu").is_base_model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_written_in_the_requested_dtype(dtype, home, trained, run_command):
    printed = run_command(export, f"ckpt={trained('lora')}", f"out={dtype}", f"dtype={dtype}")
    assert "differ by" in printed
    assert {tensor.dtype for tensor in tensors(home / dtype).values()} == {getattr(torch, dtype)}
    config = json.loads((home / dtype / "config.json").read_text())
    assert config["torch_dtype"] == dtype
    assert (config["bf16"], config["fp16"]) == (dtype == "bfloat16", dtype == "float16")


def test_an_exported_model_has_the_files_of_the_published_folder_and_a_card(
    home, trained, run_command
):
    run_command(export, f"ckpt={trained('lora')}", "out=M0", "overwrite=true", "compare=run")
    folder = home / "M0"
    base = json.loads((home / "F/config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen", ["QWenLMHeadModel"])
    for key in ("visual", "auto_map", "seq_length"):
        assert config[key] == base[key]
    companions = ["qwen.tiktoken", "generation_config.json", "tokenizer_config.json", "LICENSE"]
    for name in companions + [f"{code}.py" for code in CODE]:
        assert (folder / name).read_bytes() == (home / "F" / name).read_bytes(), name
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    size = sum(tensor.nbytes for tensor in tensors(folder).values())
    assert index["metadata"]["total_size"] == size
    card = (folder / "README.md").read_text()
    assert "| base | F |" in card
    assert "| data.train | `rows.jsonl` |" in card
    assert "| optim.lr | `0.05` |" in card
    assert "| adapter.rank | `2` |" in card


def companions_of(folder: Path, base: Path | None = None) -> dict[str, dict]:
    """Writes all files of a model but its weights; returns the content of those that name code."""
    family = QwenVLFamily(config=CONFIG, vocabulary="tiny")
    folder.mkdir()
    write_companions(
        folder,
        family.config,
        dtype="float32",
        vocabulary=TINY_VOCABULARY,
        base=base,
        template="chatml",
    )
    names = ("config.json", "tokenizer_config.json")
    return {name: json.loads((folder / name).read_text()) for name in names}


PUBLISHED_MAPS = {
    "config.json": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "tokenizer_config.json": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
}


def test_a_folder_names_the_published_code_before_it_has_it(tmp_path):
    written = companions_of(tmp_path / "F")
    assert {name: content["auto_map"] for name, content in written.items()} == PUBLISHED_MAPS
    assert written["tokenizer_config.json"]["tokenizer_class"] == "QWenTokenizer"


def test_a_base_that_names_no_code_does_not_change_that(tmp_path):
    companions_of(tmp_path / "F")
    for name in PUBLISHED_MAPS:
        (tmp_path / "F" / name).write_text(json.dumps({"model_max_length": 77, "extra": 1}))
    written = companions_of(tmp_path / "G", tmp_path / "F")
    assert {name: content["auto_map"] for name, content in written.items()} == PUBLISHED_MAPS
    assert written["tokenizer_config.json"]["model_max_length"] == 77
    assert written["config.json"]["extra"] == 1


def test_a_small_checkpoint_has_the_resampler_heads_of_the_original_code():
    sizes = small_sizes(image_tokens=256)
    assert sizes["visual"]["resampler_heads"] == sizes["visual"]["output_dim"] // 128 > 0
    family = QwenVLFamily(config=sizes, vocabulary="tiny")
    assert family.config.n_queries == family.processor().tokens_per_image == 256


def test_code_of_the_base_is_named_only_if_the_folder_has_it(tmp_path):
    (tmp_path / "modeling_qwen.py").write_text("")
    auto_map = {
        "AutoConfig": "configuration_qwen.A",
        "AutoModel": "Qwen/Qwen-VL--modeling_qwen.B",
        "AutoTokenizer": ["modeling_qwen.C", None],
    }
    assert runnable(auto_map, tmp_path) == {
        "AutoModel": "modeling_qwen.B",
        "AutoTokenizer": ["modeling_qwen.C", None],
    }


def test_a_folder_is_replaced_only_if_it_is_an_export_and_overwrite_is_true(
    home, trained, run_command
):
    ckpt = f"ckpt={trained('lora')}"
    run_command(export, ckpt, "out=kept", "compare=none")
    before = (home / "kept/config.json").stat().st_ino
    refused = {
        "kept": "exists; choose another folder, or overwrite=true",
        ".": "holds what is to be read",
        "null": "out is missing",
    }
    for out, message in refused.items():
        with pytest.raises(DataError, match=message):
            run_command(export, ckpt, f"out={out}")
    for name in ("mine", "kept.part", "kept.old"):
        (home / name).mkdir(exist_ok=True)
        (home / name / "notes.txt").write_text("keep")
    with pytest.raises(DataError, match="was not written by an export and is not replaced"):
        run_command(export, ckpt, "out=mine", "overwrite=true")
    assert (home / "kept/config.json").stat().st_ino == before
    run_command(export, ckpt, "out=kept", "compare=none", "overwrite=true")
    assert (home / "kept/config.json").stat().st_ino != before
    for name in ("mine", "kept.part", "kept.old"):
        assert (home / name / "notes.txt").read_text() == "keep"
    assert not list(home.glob(".kept.*"))


def test_a_model_that_answers_differently_is_not_kept(home, trained, run_command, monkeypatch):
    write_model = exported_folder.write_model

    def spoil(module, folder, dtype):
        write_model(module, folder, dtype)
        for file in folder.glob("*.safetensors"):
            spoiled = {name: tensor * 1.01 for name, tensor in load_file(file).items()}
            save_file(spoiled, file, metadata={"format": "pt"})

    monkeypatch.setattr(exported_folder, "write_model", spoil)
    with pytest.raises(DataError, match="the exported model is not the run's: logits up to"):
        run_command(export, f"ckpt={trained('lora')}", "out=spoiled")
    assert not list(home.glob("spoiled*"))


def test_an_export_is_uploaded_with_its_card_to_a_private_repository(
    home, trained, run_command, hub
):
    ckpt = f"ckpt={trained('lora')}"
    printed = run_command(export, ckpt, "out=P1", "push=Ann/signs", *QUICK)
    written = {file.name: file.read_bytes() for file in (home / "P1").iterdir()}
    assert hub.repositories == {"Ann/signs": {"private": True, "files": written}}
    said = f"Uploading to {hub.address}/Ann/signs (new, private): {len(written)} files, "
    assert said in printed
    assert printed.endswith(f"Uploaded: {hub.address}/Ann/signs\n")
    card = written["README.md"].decode()
    assert "# signs\n" in card
    assert "hf download Ann/signs --local-dir signs\npython -m qwenvl_lit.chat ckpt=signs" in card


def test_an_adapter_is_uploaded_and_names_a_published_base_model_by_its_name(
    home, trained, run_command, hub, monkeypatch
):
    options = [f"ckpt={trained('lora')}", "merge=false", "push_private=false", *QUICK]
    printed = run_command(export, *options, "out=P2", "push=Ann/mine")
    assert hub.repositories["Ann/mine"]["private"] is False
    assert f"names its base model by a folder of this machine ({home / 'F'})" in printed
    (home / "Qwen-VL-Chat").symlink_to(home / "F")
    base = "model.path=Qwen-VL-Chat"
    printed = run_command(export, *options, base, "out=P3", "push=Ann/other")
    assert "of this machine" not in printed
    files = hub.repositories["Ann/other"]["files"]
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "Qwen/Qwen-VL-Chat"
    assert b"\nbase_model: Qwen/Qwen-VL-Chat\n" in files["README.md"]
    assert not any(str(home).encode() in content for content in files.values())


def test_a_push_that_is_not_possible_is_refused_before_the_export(
    home, trained, run_command, hub, monkeypatch
):
    options = [f"ckpt={trained('lora')}", "out=P4", *QUICK]
    refused = {
        "push=Bob/mine": "the token is of Ann, who may write to repositories of Ann; choose",
        "push=mine": "push is owner/name, a repository on the Hugging Face Hub, got 'mine'",
    }
    for push, message in refused.items():
        with pytest.raises(DataError, match=message):
            run_command(export, *options, push)
    with pytest.raises(DataError, match="push_private is one of true, false, got 'no way'"):
        run_command(export, *options, "push=Ann/mine", "push_private='no way'")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DataError, match="needs a token that may write"):
        run_command(export, *options, "push=Ann/mine")
    assert not (home / "P4").exists()
    assert not hub.repositories
