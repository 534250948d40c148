import json
import pickle
import random
import time

import pytest
from tiny_qwen3_vl import published_ranks, published_tokenizer_json
from tokenizers import Tokenizer

from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen3_vl.tokenizer import MARKUP, Qwen2Tokenizer, tokenizer_json
from qwenvl_lit.types import DataError

# Of tokenizer_config.json of Qwen/Qwen3-VL-8B-Instruct
PUBLISHED_IDS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
    "<tool_call>": 151657,
    "<|file_sep|>": 151664,
    "<tool_response>": 151665,
    "<think>": 151667,
    "</think>": 151668,
}
TEXTS = (
    "Hello world 123 foo_bar",
    "图片里有什么？",
    "الْعَرَبِيَّة",
    "🎉👩‍👩‍👧 emoji",
    "def f(x):\n    return x**2\n\n",
    '{"bbox_2d": [12, 345, 6789, 10], "label": "猫"}',
    "हिन्दी भाषा",
    "한국어 텍스트",
    "e\u0301 cafe\u0301 Å",
    "   \t\n  x  ",
    "<box>(1,2)</box> <|im_start|>",
    "<think>\n\n</think>",
)
TINY = Qwen2Tokenizer(TINY_VOCABULARY)


@pytest.fixture(scope="module")
def published() -> Qwen2Tokenizer:
    return Qwen2Tokenizer(published_ranks())


@pytest.fixture
def stored(tmp_path):
    """The tiny vocabulary as the content of a tokenizer.json, and a function that reads it."""
    content = tokenizer_json(TINY.vocabulary)

    def read() -> Qwen2Tokenizer:
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps(content))
        return Qwen2Tokenizer(file)

    return content, read


def random_text(generator: random.Random) -> str:
    if generator.random() < 0.5:
        ranges = ((32, 126), (0x4E00, 0x9FFF), (0x600, 0x6FF), (0x1F300, 0x1F6FF), (0x900, 0x97F))
        codes = [generator.randint(*generator.choice(ranges)) for _ in range(40)]
        return "".join(map(chr, codes))
    characters = list("".join(generator.choices(TEXTS, k=3)))
    generator.shuffle(characters)
    return "".join(characters)


def test_special_tokens_have_their_published_ids(published):
    ids = {**published.special, **published.plain}
    assert {name: ids[name] for name in PUBLISHED_IDS} == PUBLISHED_IDS
    assert published.vocab_size == 151669
    assert Qwen2Tokenizer(published_ranks(), think=False).vocab_size == 151665


def test_ids_are_those_of_the_tokenizer_json_of_the_same_vocabulary(published):
    reference = Tokenizer.from_str(published_tokenizer_json())
    reference.encode_special_tokens = True
    generator = random.Random(0)
    texts = [*TEXTS, *(random_text(generator) for _ in range(1000))]
    for text in texts:
        assert published.encode(text) == reference.encode(text).ids, text


def test_the_published_number_of_merges_follows_from_the_ranks():
    assert len(json.loads(published_tokenizer_json())["model"]["merges"]) == 151387


def test_a_tokenizer_json_reads_as_the_ranks_it_was_made_of(stored):
    _, read = stored
    again = read()
    assert again.vocabulary == TINY.vocabulary
    assert again.checksum == TINY.checksum
    assert again.checksum != Qwen2Tokenizer(TINY_VOCABULARY, think=False).checksum


@pytest.mark.parametrize("name", MARKUP)
def test_text_never_becomes_markup(name):
    ids = TINY.encode(f"a {name} b")
    assert not set(ids) & set(TINY.special.values())
    assert TINY.decode(ids) == f"a {name} b"


def test_words_that_the_published_tokenizer_knows_are_tokens():
    assert TINY.encode("<think>") == [TINY.plain["<think>"]]
    assert TINY.decode([TINY.plain["<think>"]], skip_special=True) == "<think>"


def test_special_tokens_are_shown_or_left_out():
    ids = [TINY.im_start_id, *TINY.encode("cat"), TINY.im_end_id]
    assert TINY.decode(ids) == "<|im_start|>cat<|im_end|>"
    assert TINY.decode(ids, skip_special=True) == "cat"
    assert TINY.decode(ids, skip_special=True, keep=[TINY.im_end_id]) == "cat<|im_end|>"


def test_pieces_of_a_stream_never_end_within_a_character():
    ids = TINY.encode("a 猫 🎉")
    pieces = list(TINY.stream(ids))
    assert "".join(pieces) == "a 猫 🎉"
    assert "\ufffd" not in "".join(pieces)


def test_ids_without_a_token_are_replaced():
    assert TINY.decode([TINY.vocab_size, -1]) == "\ufffd\ufffd"


def test_long_blanks_are_quick(published):
    start = time.monotonic()
    assert published.decode(published.encode(" " * 400_000)) == " " * 400_000
    assert time.monotonic() - start < 5  # hours, if it were quadratic


def test_a_tokenizer_reads_its_file_again_when_it_is_unpickled():
    again = pickle.loads(pickle.dumps(Qwen2Tokenizer(TINY_VOCABULARY, think=False)))
    assert len(pickle.dumps(again)) < 1000
    assert again.plain.keys() < TINY.plain.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model=3), "no vocabulary"),
        (lambda c: c["model"].update(type="WordPiece"), "its model is 'WordPiece'"),
        (lambda c: c.update(normalizer=None), "does not normalize"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"].pop(0), "splits text in another way"),
        (lambda c: c["model"]["vocab"].update({"猫": 3}), "is not of bytes"),
        (lambda c: c["model"]["vocab"].update(ab=10**6), "not consecutive"),
        (lambda c: c["model"]["merges"].reverse(), "not in the order of the ids"),
        (lambda c: c["model"].update(merges=["a"]), "is not a pair"),
        (lambda c: c["added_tokens"].pop(1), r"no special token <\|im_start\|>"),
        (lambda c: c["added_tokens"][-1].update(id=9999), "not consecutive from 423 on"),
        (lambda c: c.update(added_tokens=[{"id": 1}]), "no content or no id"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(stored, change, message):
    content, read = stored
    change(content)
    with pytest.raises(DataError, match=rf"tokenizer\.json is not a tokenizer of .*{message}"):
        read()


def test_added_tokens_of_a_derived_checkpoint_are_read(stored):
    content, read = stored
    token_id = content["added_tokens"][-1]["id"] + 1
    content["added_tokens"].append({"id": token_id, "content": "<|click|>", "special": True})
    tokenizer = read()
    assert tokenizer.special["<|click|>"] == token_id
    assert "<|click|>" in tokenizer.extras
    assert tokenizer.encode("<|click|>", allowed_special=["<|click|>"]) == [token_id]
