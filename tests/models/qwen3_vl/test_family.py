"""Folders of checkpoints: read, checked, written, and read by plain transformers and peft."""

import json
import re
from pathlib import Path

import pytest
import torch
from gptq_files import SETTINGS, random_layer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_qwen3_vl import KINDS, LIMITS, cat, image, talk, tiny_qwen3_vl
from torch import nn
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwenvl_lit.data.collate import Pad
from qwenvl_lit.models.qwen3_vl.config import ARCHITECTURES, IMAGES
from qwenvl_lit.models.qwen3_vl.family import Qwen3VLFamily
from qwenvl_lit.training.adapters.methods import LoRA
from qwenvl_lit.training.adapters.peft_files import write_peft_folder
from qwenvl_lit.types import Batch, Conversation, DataError

ROWS = (
    talk((image(200, 100), "Where?"), (cat(10, 20, 30, 40),)),
    talk((image(64, 64), image(40, 90, "blue"), "Two?"), "Yes.", "Sure?", "No."),
    talk("Text?", "Fine."),
)


@pytest.fixture(scope="module", params=KINDS)
def family(request) -> Qwen3VLFamily:
    return tiny_qwen3_vl(request.param)


@pytest.fixture(scope="module")
def exported(family, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    family.export(family.base_reader(), folder, dtype=torch.float32)
    return folder


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    """A copy of the exported folder that a test may damage."""
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def batch_of(family: Qwen3VLFamily, rows=ROWS) -> Batch:
    processor = family.processor()
    collate = Pad(pad_id=processor.pad_id, collate_vision=processor.collate_vision)
    return collate([processor.encode(row) for row in rows])


def logits(family: Qwen3VLFamily, model: nn.Module, rows=ROWS) -> torch.Tensor:
    with torch.inference_mode():
        return model(**family.inputs(batch_of(family, rows))).logits


def published_logits(family: Qwen3VLFamily, model: nn.Module, row: Conversation) -> torch.Tensor:
    """Logits of plain transformers at the supervised positions of a row."""
    processor = family.processor()
    sample = processor.encode(row)
    ids = sample.input_ids[None]
    arguments = {}
    if row.images:
        images = Qwen2VLImageProcessorPil(
            patch_size=processor.images.patch_size,
            min_pixels=processor.images.min_pixels,
            max_pixels=processor.images.max_pixels,
            image_mean=processor.images.mean,
            image_std=processor.images.std,
        )
        arguments = dict(images([one.open() for one in row.images], return_tensors="pt"))
        arguments["mm_token_type_ids"] = (ids == family.config.image_token_id).int()
    with torch.inference_mode():
        found = model(input_ids=ids, **arguments).logits[0, :-1]
    return found[sample.labels[1:] >= 0]


def change(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_an_exported_folder_gives_equal_logits_in_plain_transformers(family, exported):
    published = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32)
    assert type(published).__module__.startswith("transformers.")
    model = family.load()
    for row in ROWS:
        expected = published_logits(family, published, row)
        torch.testing.assert_close(logits(family, model, [row]), expected, atol=1e-4, rtol=0)


def test_an_exported_folder_has_the_published_files(family, exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["architectures"] == [ARCHITECTURES[family.config.model_type]]
    [shard] = exported.glob("*.safetensors")
    first = {"qwen2_5_vl": "model.embed_tokens", "qwen3_vl": "model.language_model.embed_tokens"}
    assert f"{first[family.config.model_type]}.weight" in load_file(shard)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ours = family.processor()
    assert tokenizer("a cat <|im_end|>")["input_ids"] == ours.tokenizer.encode(
        "a cat <|im_end|>", allowed_special=["<|im_end|>"]
    )
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    sample = ours.encode(talk((image(64, 64), "q"), "a"), prompt=True)
    assert prompt == ours.text(sample.input_ids.tolist())
    images = Qwen2VLImageProcessorPil.from_pretrained(exported)
    limits = {"shortest_edge": LIMITS["min_pixels"], "longest_edge": LIMITS["max_pixels"]}
    assert dict(images.size) == limits
    stops = GenerationConfig.from_pretrained(exported).eos_token_id
    assert stops == list(ours.stop_ids)


def test_an_exported_folder_reads_back_to_the_bit(family, exported):
    again = Qwen3VLFamily(path=str(exported))
    state = family.load().state_dict()
    loaded = again.load().state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())
    assert again.processor().settings == family.processor().settings
    read = again.base_reader()
    assert all(torch.equal(read(name), state[name]) for name in state if name != "lm_head.weight")


def test_a_folder_that_transformers_wrote_loads(family, exported, tmp_path):
    published = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32)
    published.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((exported / "tokenizer.json").read_bytes())
    loaded = Qwen3VLFamily(path=str(tmp_path), **LIMITS)
    assert torch.equal(logits(loaded, loaded.load()), logits(family, family.load()))
    assert loaded.images.mean == tuple(IMAGES[family.config.model_type]["image_mean"])


def test_tensors_may_have_the_names_of_any_version_of_transformers(family, copy):
    [shard] = copy.glob("*.safetensors")
    tensors = load_file(shard)
    names = {"model.": "model.language_model.", "visual.": "model.visual."}
    if family.config.model_type == "qwen3_vl":
        names = {after: before for before, after in names.items()}
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        renamed[names.get(prefix, "") + name.removeprefix(prefix)] = tensor
    for file in copy.glob("model*"):
        file.unlink()
    save_file(renamed, copy / "model.safetensors")
    state, expected = Qwen3VLFamily(path=str(copy)).load().state_dict(), family.load().state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.items())


def test_an_export_in_another_dtype_says_so(family, exported, tmp_path):
    again = Qwen3VLFamily(path=str(exported), max_pixels=9000)
    again.export(again.base_reader(), tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    read = Qwen3VLFamily(path=str(tmp_path), dtype="bfloat16")
    assert read.load().dtype == torch.bfloat16
    assert read.images.max_pixels == 9000
    published = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto")
    assert published.dtype == torch.bfloat16


def test_tied_weights_may_be_in_the_file_or_not(tmp_path):
    config = {**tiny_qwen3_vl("qwen3_vl").sizes, "tie_word_embeddings": True}
    tied = tiny_qwen3_vl("qwen3_vl", config=config)
    model = tied.load()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    tied.export(tied.base_reader(), tmp_path, dtype=torch.float32)
    [shard] = tmp_path.glob("*.safetensors")
    tensors = load_file(shard)
    assert "lm_head.weight" not in tensors
    again = Qwen3VLFamily(path=str(tmp_path))
    assert torch.equal(logits(again, again.load()), logits(tied, model))
    for file in tmp_path.glob("model*"):
        file.unlink()
    save_file({**tensors, "lm_head.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    again = Qwen3VLFamily(path=str(tmp_path))
    assert torch.equal(logits(again, again.load()), logits(tied, model))


@pytest.mark.parametrize("targets", ["attention", "language", "all-linear"])
def test_an_adapter_loads_in_plain_peft(family, exported, targets, tmp_path):
    based = Qwen3VLFamily(path=str(exported))
    torch.manual_seed(0)
    model = LoRA(rank=2, alpha=4, dropout=0.0, targets=targets).apply(based.load(), based)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(tensor, std=0.1)
    state = {name: tensor for name, tensor in model.state_dict().items() if "lora" in name}
    write_peft_folder(model, tmp_path, state, base=str(exported))
    published = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(published, tmp_path)
    row = ROWS[0]
    expected = published_logits(based, adapted, row)
    ours = logits(based, model, [row])
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert (ours - logits(family, family.load(), [row])).abs().max() > 1e-3


def test_groups_of_layers_are_those_of_the_language_model(family):
    model = family.load()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = {}
    for group, pattern in family.lora_targets.items():
        found[group] = [name for name in linear if re.fullmatch(pattern, name)]
    layers = model.config.text_config.num_hidden_layers
    assert len(found["attention"]) == 4 * layers
    assert len(found["language"]) == 7 * layers
    assert not any("visual" in name for name in found["language"])


def test_gptq_weights_are_dequantized(copy, tmp_path_factory):
    [shard] = copy.glob("*.safetensors")
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    parts, weight = random_layer(32, 48, SETTINGS)
    del tensors[name]
    for part, tensor in parts.items():
        tensors[name.replace("weight", part)] = tensor
    for file in copy.glob("model*"):
        file.unlink()
    save_file(tensors, copy / "model.safetensors")
    change(copy / "config.json", quantization_config=SETTINGS)
    family = Qwen3VLFamily(path=str(copy))
    loaded = family.load().get_submodule("model.language_model.layers.0.mlp.up_proj").weight
    assert torch.equal(loaded, torch.tensor(weight))
    folder = tmp_path_factory.mktemp("dequantized")
    family.export(family.base_reader(), folder, dtype=torch.float32)
    assert torch.equal(load_file(next(folder.glob("*.safetensors")))[name], torch.tensor(weight))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llava"}, r"config\.json is of another model, 'llava'; the model_type of"),
        ({"model_type": None}, "is of another model"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"AWQ \(4 bits\), which is"),
        ({"image_token_id": 7}, r"<\|image_pad\|> is \d+ in .*, but image_token_id of the model"),
        ({"vision_config": 3}, r"config\.json cannot be read"),
        ({"tie_word_embeddings": "no"}, r"config\.json cannot be read"),
    ],
)
def test_a_folder_of_another_kind_is_refused_in_one_line(copy, values, message):
    change(copy / "config.json", **values)
    with pytest.raises(DataError, match=message) as caught:
        Qwen3VLFamily(path=str(copy)).load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(copy, file):
    (copy / file).unlink()
    with pytest.raises(DataError, match=rf"lacks {file}; expected config\.json, tokenizer\.json"):
        Qwen3VLFamily(path=str(copy)).load()


def test_tensors_that_do_not_match_are_named_before_loading(copy):
    [shard] = copy.glob("*.safetensors")
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    tensors["model.extra.weight"] = tensors.pop(name)
    for file in copy.glob("model*"):
        file.unlink()
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(DataError) as caught:
        Qwen3VLFamily(path=str(copy)).load()
    message = str(caught.value)
    assert "missing 1: model.language_model.layers.0.mlp.up_proj.weight" in message
    assert "unexpected 1: model.language_model.extra.weight" in message


def test_weights_that_are_not_finite_are_refused(copy):
    [shard] = copy.glob("*.safetensors")
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, shard)
    with pytest.raises(DataError, match=rf"{name} is not finite"):
        Qwen3VLFamily(path=str(copy)).load()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_size": 7}, "patch_size=7 is not supported"),
        ({"do_resize": False}, "do_resize=False is not supported"),
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\], expected a number per"),
        ({"max_pixels": "many"}, r"max_pixels is 'many', expected"),
    ],
)
def test_settings_of_images_that_are_not_supported_are_named(copy, values, message):
    change(copy / "preprocessor_config.json", **values)
    with pytest.raises(DataError, match=rf"preprocessor_config\.json: {message}"):
        Qwen3VLFamily(path=str(copy)).processor()


def test_settings_of_images_may_be_in_the_file_of_newer_transformers(copy):
    stored = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").unlink()
    del stored["min_pixels"], stored["max_pixels"]
    stored["size"] = {"shortest_edge": 2048, "longest_edge": 4096}
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": stored}))
    images = Qwen3VLFamily(path=str(copy)).images
    assert (images.min_pixels, images.max_pixels) == (2048, 4096)


@pytest.mark.parametrize(
    ("file", "template"),
    [
        ("chat_template.jinja", "{{- '<|im_start|>assistant\\n<think>\\n' }}"),
        ("chat_template.json", {"chat_template": "{{- '<|im_start|>assistant\n<think>\n' }}"}),
        ("tokenizer_config.json", {"chat_template": "{{- '<|im_start|>assistant\\n<think>\\n' }}"}),
    ],
)
def test_a_thinking_checkpoint_is_recognized_by_its_chat_template(copy, file, template):
    assert not Qwen3VLFamily(path=str(copy)).thinks
    text = template if isinstance(template, str) else json.dumps(template)
    (copy / file).write_text(text)
    assert Qwen3VLFamily(path=str(copy)).processor().thinks


# -- random weights of published size -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"),  # of the model cards
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3.75),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8.29),
        ("Qwen/Qwen3-VL-2B-Instruct", 2.13),
        ("Qwen/Qwen3-VL-4B-Thinking", 4.44),
        ("/models/Qwen3-VL-8B-Instruct", 8.77),
    ],
)
def test_published_sizes_need_no_download(name, billions):
    family = Qwen3VLFamily(path=name, weights="random", vocabulary="tiny", dtype="bfloat16")
    parameters = family.meta_model().num_parameters()
    assert round(parameters / 1e9, 2) == billions
    assert family.thinks == ("Thinking" in name)


def test_an_unknown_size_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"Qwen/Qwen3-VL-9B is not known: .*Qwen3-VL-8B-Instruct"):
        Qwen3VLFamily(path="Qwen/Qwen3-VL-9B", weights="random", vocabulary="tiny").meta_model()
    with pytest.raises(ValueError, match=r"come without a vocabulary: give model\.vocabulary=FILE"):
        Qwen3VLFamily(path="Qwen/Qwen3-VL-8B-Instruct", weights="random").processor()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a `path`, or a `config`"),
        ({"config": {"model_type": "qwen3_vl"}}, "random weights need a `vocabulary`"),
        ({"config": {"model_type": "x"}, "vocabulary": "tiny"}, r"model_type is one of qwen2_5_vl"),
        ({"path": "a", "weights": "none"}, "weights is checkpoint or random"),
        ({"path": "a", "dtype": "int8"}, "floating-point type"),
        ({"path": "a", "max_pixels": 0}, r"model\.max_pixels"),
    ],
)
def test_settings_that_make_no_sense_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Qwen3VLFamily(**options)


def test_random_weights_depend_on_the_seed_alone():
    first, again, other = (
        tiny_qwen3_vl("qwen3_vl", seed=seed).load().lm_head.weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
