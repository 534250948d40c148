"""Extra tokens that the text of rows may hold, `data.special_tokens`."""

import json

import pytest
from commands import compose_config

from qwenvl_lit import build
from qwenvl_lit.cli.from_run import _groups
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTokenizer
from qwenvl_lit.types import Conversation, DataError, Turn

TOKENIZER = QwenTokenizer(TINY_VOCABULARY)
TEXT = "<|extra_7|>yes<|extra_8|><|im_end|>"
EXTRA = TOKENIZER.special["<|extra_7|>"]
TALK = Conversation(
    id="a",
    turns=(Turn(role="user", parts=("<|extra_7|>?",)), Turn(role="assistant", parts=(TEXT,))),
)


def test_named_tokens_are_let_through_and_no_others():
    processor = QwenVLProcessor(TOKENIZER, special_tokens=["<|extra_7|>"])
    ids = processor.encode(TALK).input_ids.tolist()
    assert ids.count(EXTRA) == 2
    assert TOKENIZER.special["<|extra_8|>"] not in ids
    assert ids.count(TOKENIZER.im_end_id) == 3  # the ends of three turns
    assert EXTRA not in QwenVLProcessor(TOKENIZER).encode(TALK).input_ids.tolist()


def test_an_answer_shows_named_tokens():
    ids = TOKENIZER.encode(TEXT, allowed_special=TOKENIZER.special)
    processor = QwenVLProcessor(TOKENIZER, special_tokens=["<|extra_7|>"])
    prediction = processor.decode(ids, TALK)
    assert prediction.text == "<|extra_7|>yes"
    assert QwenVLProcessor(TOKENIZER).decode(ids, TALK).text == "yes"


def test_named_tokens_are_part_of_the_settings_that_cached_lengths_depend_on():
    processor = QwenVLProcessor(TOKENIZER, special_tokens=["<|extra_7|>"])
    assert processor.settings != QwenVLProcessor(TOKENIZER).settings


@pytest.mark.parametrize("name", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<img>", "dog"])
def test_roles_ends_of_turns_and_images_are_never_let_through(name):
    with pytest.raises(ValueError, match=r"cannot be let through; only <.extra_0.> to "):
        QwenVLProcessor(TOKENIZER, special_tokens=["<|extra_0|>", name])
    with pytest.raises(ValueError, match="is a list of names"):
        QwenVLProcessor(TOKENIZER, special_tokens="<|extra_0|>")


def test_the_key_of_the_data_reaches_the_processor(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "<|extra_7|>?", "response": TEXT}))
    files = [f"paths.run={tmp_path}", f"data.train={tmp_path}/rows.jsonl", "data.validation=null"]
    tokens = "data.special_tokens=['<|extra_7|>']"
    config = compose_config("train", "data=jsonl", f"paths.cache={tmp_path}", *files, tokens)
    processor = build.processor(config)
    assert processor.special_tokens == ("<|extra_7|>",)
    training, _ = build.data(config, processor).sets()
    [row] = training["train"]
    assert EXTRA in processor.encode(row).input_ids.tolist()


def test_a_run_keeps_its_tokens_whatever_the_data_of_another_command():
    reference = "${oc.select:data.special_tokens,null}"
    stored = {"model": {"special_tokens": reference}, "data": {"special_tokens": ["<|extra_7|>"]}}
    assert _groups(stored)["model"]["special_tokens"] == ["<|extra_7|>"]


def test_data_with_tokens_that_the_model_does_not_know_is_refused(tmp_path):
    tokens = "data.special_tokens=['<|extra_7|>']"
    config = compose_config("train", "data=jsonl", f"paths.cache={tmp_path}", tokens)
    with pytest.raises(
        DataError, match=r"data\.special_tokens: the model was trained without <.ext"
    ):
        build.data(config, QwenVLProcessor(TOKENIZER))
