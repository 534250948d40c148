"""Qwen, the language model of Qwen-VL alone: rows and questions of text."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import check_family
from models.qwen_vl.test_contract import row
from parity import network
from PIL import Image
from safetensors.torch import load_file
from tiny import SIZES, VISUAL
from transformers import AutoModelForCausalLM

from qwenvl_lit import QwenVL
from qwenvl_lit.callbacks.vision_cache import VisionCache
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.grounding import Box
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.checkpoint import OLD_NAMES
from qwenvl_lit.models.qwen_vl.config import QWEN_VL_VISUAL, QwenVLConfig
from qwenvl_lit.models.qwen_vl.flops import training_flops
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM
from qwenvl_lit.models.qwen_vl.text_only import QwenFamily, published_config
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.memory import estimate_memory, images_with, training_inputs
from qwenvl_lit.types import Conversation, DataError, GroundedObject, ImageSource, Turn

ROWS = (
    row("one turn", (("1 + 1?",), "2")),
    row("longer", (("Name three colours.",), "red, green and blue, in this order")),
    row("two turns", (("What is it?",), "blue"), (("Sure?",), "yes, it is")),
)


@pytest.fixture(scope="module")
def family() -> QwenFamily:
    return QwenFamily(config=SIZES, vocabulary="tiny")


def test_it_does_what_every_family_must_do(family, tmp_path):
    check_family.check_lengths(family, ROWS)
    check_family.check_batches(family, ROWS)
    check_family.check_training(family, ROWS, tmp_path)
    check_family.check_adapter(family, ROWS)
    check_family.check_answers(family, ROWS)
    exported = tmp_path / "exported"
    check_family.check_export(family, exported, lambda folder: QwenFamily(path=str(folder)))
    assert "visual" not in json.loads((exported / "config.json").read_text())


# -- parity ----------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parents[2] / "golden" / "model"
CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]
TEXT_CASES = [case for case in CASES if not case["images"] and not case.get("quirk")]


def network_of_case(case: dict, *, alone: bool) -> QwenVLForCausalLM:
    """The tiny network of the golden values; `alone`: the same weights without the tower."""
    dtype = getattr(torch, case.get("dtype", "float32"))
    if not alone:
        return network.load(GOLDEN, case.get("config_overrides"), dtype)
    stored = json.loads((GOLDEN / "config.json").read_text()) | (case.get("config_overrides") or {})
    sizes = {key: stored[key] for key in QwenVLConfig.__annotations__ if key in stored}
    state = {}
    for name, tensor in network.weights(GOLDEN).items():
        if ".visual." not in name:
            state[name] = tensor.clone()
    config = QwenVLConfig(**{**sizes, "visual": None})
    return QwenVLForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


@pytest.mark.parametrize("case", TEXT_CASES, ids=lambda case: case["name"])
def test_logits_are_those_of_qwen_vl_to_the_last_bit(case):
    tensors = load_file(GOLDEN / case["file"])
    inputs = {name: tensors[name] for name in ("input_ids", "attention_mask")}
    alone, sees = (network_of_case(case, alone=choice) for choice in (True, False))
    assert alone.state_dict().keys() < sees.state_dict().keys()
    for model in (alone, sees):
        model.train(case["mode"] == "train")
    with torch.no_grad():
        if "prefill" in case:
            compared = network.compare_decoding(case, tensors, alone, inputs)
            assert all(result.passed for _, result in compared)
            return
        ours, theirs = alone(**inputs).logits, sees(**inputs).logits
        assert torch.equal(ours, theirs)
        forward = {key: value for key, value in case.items() if key != "grad_norms"}
        compared = dict(network.compare_forward(forward, tensors, alone, inputs))
    assert "logits" in compared
    assert all(result.passed for result in compared.values())


def test_a_text_is_decoded_as_by_qwen_vl():
    """With the static cache, beyond the length of training."""
    case = next(case for case in TEXT_CASES if case["name"] == "long_eval_80")
    ids = load_file(GOLDEN / case["file"])["input_ids"][:, :60]
    answers = []
    for alone in (True, False):
        model = network_of_case(case, alone=alone).eval()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        answers.append(Generation(max_new_tokens=8)(model, inputs, stop_ids=(), pad_id=0))
    assert answers[0] == answers[1]


# -- images ----------------------------------------------------------------------------------------

IMAGE = ImageSource(Image.new("RGB", (9, 9)))


def test_a_row_with_an_image_is_refused_by_name(family):
    turns = (
        Turn(role="user", parts=(IMAGE, "What is it?")),
        Turn(role="assistant", parts=("A dot.",)),
    )
    asked = Conversation(id="seven", turns=turns, where="rows.jsonl:7")
    processor = family.processor()
    for ask in (processor.encode, processor.length):
        for prompt in (True, False):
            with pytest.raises(
                DataError, match=r"rows.jsonl:7.*seven.*this model reads no images: .*qwen_vl_"
            ) as e:
                ask(asked, prompt=prompt)
            assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="has no vision tower and reads no images"):
        family.load()(torch.zeros(1, 9, dtype=torch.int64), pixel_values=torch.zeros(1, 3, 16, 16))


def test_tags_are_plain_text(family):
    box = "<ref>cat</ref><box>(1,2),(3,4)</box> and <img>"
    tokenizer, processor = family.tokenizer, family.processor()
    assert "<ref>" not in tokenizer.special
    assert len(tokenizer.special) == 208  # up to <|extra_204|>, as published
    assert tokenizer.decode(tokenizer.encode(box)) == box
    asked = row("tags", (("Where?",), box))
    prediction = processor.decode(tokenizer.encode(box), asked)
    assert prediction.parts == (box,)
    assert prediction.reference == box
    found = GroundedObject(label="cat", boxes=(Box(x0=1, y0=2, x1=3, y1=4, frame="grid"),))
    with_object = row("object", (("Where is ", found, "?"), "here"))
    text = processor.text(processor.encode(with_object, prompt=True).input_ids.tolist())
    assert "Where is <ref>cat</ref><box>(1,2),(3,4)</box>?" in text


# -- settings --------------------------------------------------------------------------------------


def test_adapters_for_images_and_the_vision_cache_are_refused(family):
    for adapter in (
        Full(freeze=["vision"], train=["resampler"]),
        Full(freeze=["all"], train=["resampler"]),
    ):
        with pytest.raises(
            ValueError, match=r"reads no images and has no component res.*language, emb"
        ):
            adapter.apply(family.meta_model(), family)
    cache = VisionCache(None, "nowhere")
    module = SimpleNamespace(family=family)
    with pytest.raises(
        DataError, match=r"vision_cache=true: models of the family Qwen cannot read im"
    ):
        cache.setup(None, module, "fit")


def test_groups_of_layers_fit(family):
    adapted = LoRA(rank=1, alpha=1, dropout=0, targets="language").apply(
        family.meta_model(), family
    )
    assert len([name for name, _ in adapted.named_parameters() if ".lora_A." in name]) == 4


def test_memory_and_flops_are_those_of_the_language_model(family):
    assert images_with(family, 0) == 0
    inputs = training_inputs(family, 2, tokens=40, images=1, targets=3)
    assert inputs["input_ids"].shape == (2, 40)
    estimate = estimate_memory(family.meta_model().train(), inputs, family.components)
    assert set(estimate.weights) == {"language", "embeddings", "head", "other"}
    answering = {"rows": 1, "tokens": 100, "image_tokens": 0, "new_tokens": 10, "at_once": False}
    assert family.answering_memory(**answering) > 0
    assert family.loss_memory(rows=1, tokens=100, image_tokens=0, supervised=3) > 0
    counts = {"lengths": [30], "images": 0, "targets": 5, "trained": {"language": 1.0}}
    sees = QwenVLConfig(**{**family.sizes, "visual": {**VISUAL, "image_start_id": 9}})
    assert training_flops(QwenVLConfig(**family.sizes), **counts) == training_flops(sees, **counts)


@pytest.mark.parametrize(
    ("name", "parameters"),  # as published: 1.84 B, 7.72 B and 14.17 B
    [("Qwen-1_8B-Chat", 1836828672), ("Qwen-7B", 7721324544), ("Qwen-14B", 14167290880)],
)
def test_random_weights_have_the_published_sizes(name, parameters):
    random = QwenFamily(path=f"Qwen/{name}", weights="random", vocabulary="tiny")
    assert random.meta_model().num_parameters() == parameters
    with pytest.raises(ValueError, match="the size of Qwen/Qwen-9B is not known"):
        published_config("Qwen/Qwen-9B")


# -- folders ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(family, tmp_path) -> Path:
    """An exported folder that a test may change."""
    family.export(family.base_reader(), tmp_path, dtype=torch.float32)
    return tmp_path


def change_config(folder: Path, **changes) -> None:
    settings = json.loads((folder / "config.json").read_text()) | changes
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(settings))


def test_the_names_of_the_first_config_files_are_read(folder, family):
    settings = json.loads((folder / "config.json").read_text())
    old = {name: settings[new] for name, new in OLD_NAMES.items()}
    change_config(folder, **dict.fromkeys(OLD_NAMES.values()), **old)
    config = QwenFamily(path=str(folder)).config
    for new in OLD_NAMES.values():
        assert getattr(config, new) == getattr(family.config, new)


def test_auto_classes_load_it_without_a_tower(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, QwenVLForCausalLM)
    assert model.transformer.visual is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"visual": QWEN_VL_VISUAL},
            r"config\.json has `visual`: it is of Qwen-VL, which model=qwen_vl",
        ),
        (
            {"audio": {}},
            r"config\.json has `audio`: it is of Qwen-Audio, whose audio tower is not r",
        ),
        ({"model_type": "monkey"}, r"config\.json is of another model, 'monkey'"),
        ({"vocab_size": 9999}, r"tokens, but `vocab_size` of the model's config is 9999; choose"),
    ],
)
def test_other_folders_are_refused(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises((DataError, ValueError), match=message):
        QwenFamily(path=str(folder)).load()


def test_a_vocabulary_from_elsewhere_takes_the_place_of_the_folders_own(folder, family, tmp_path):
    (folder / "qwen.tiktoken").unlink()
    with pytest.raises(DataError, match=r"lacks qwen\.tiktoken;.*with model\.vocabulary=FILE$"):
        QwenFamily(path=str(folder)).load()
    loaded = QwenFamily(path=str(folder), vocabulary=str(TINY_VOCABULARY)).load()
    assert torch.equal(loaded.lm_head.weight, family.load().lm_head.weight)


def test_chat_refuses_images_and_answers_texts(folder):
    model = QwenVL.load(folder, dtype="float32", max_new_tokens=3)
    assert model.family.published.example == "Qwen/Qwen-7B-Chat"
    answer, history = model.chat("What is it?")
    assert len(history) == 1
    assert answer.new_tokens <= 3
    with pytest.raises(DataError, match=r"^there is an image, and this model reads no images"):
        model.chat([IMAGE.open(), "What is it?"], history)
