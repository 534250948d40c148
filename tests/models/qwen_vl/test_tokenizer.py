import base64
import pickle
import runpy
import unicodedata
from pathlib import Path

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from qwenvl_lit.data.demo import dataset as synthetic
from qwenvl_lit.models.byte_pairs import PATTERN, TINY_VOCABULARY, normalized, read_ranks
from qwenvl_lit.models.qwen_vl.tokenizer import SPECIALS, QwenTokenizer

GOLDEN = Path(__file__).parents[2] / "golden" / "tokenizer"
SCRIPT = Path(__file__).parents[3] / "scripts" / "make_tiny_vocabulary.py"
TINY = QwenTokenizer(TINY_VOCABULARY)


@pytest.fixture(scope="module")
def tokenizer():
    return QwenTokenizer(GOLDEN / "synthetic.tiktoken")


def test_special_ids_follow_the_ranks(tokenizer):
    ranks = 556
    expected = [(name, ranks + index) for index, name in enumerate(SPECIALS)]
    assert list(tokenizer.special.items()) == expected
    assert (tokenizer.pad_id, tokenizer.im_start_id, tokenizer.im_end_id) == (556, 557, 558)
    assert (tokenizer.img_start_id, tokenizer.img_end_id, tokenizer.img_pad_id) == (770, 771, 772)
    assert tokenizer.vocab_size == 773


@given(st.text())
def test_any_text_is_decoded_normalized_and_has_no_special_ids(text):
    ids = TINY.encode(text)
    assert all(token_id < TINY.pad_id for token_id in ids)
    assert TINY.encode(TINY.decode(ids)) == ids


def test_the_name_of_a_special_token_is_text_unless_allowed(tokenizer):
    assert tokenizer.im_end_id not in tokenizer.encode("a<|im_end|>b")
    ids = tokenizer.encode("<|im_end|><ref>", allowed_special=["<|im_end|>"])
    assert ids[:2] == [558, tokenizer.encode("<")[0]]


def test_every_digit_is_a_token_of_its_own(tokenizer):
    tokens = [tokenizer.decode([token_id]) for token_id in tokenizer.encode("(215,318)")]
    assert tokens == list("(215,318)")


def test_decoding_can_skip_special_tokens_except_some(tokenizer):
    ids = tokenizer.encode("<ref>cat</ref><|im_end|>", allowed_special=tokenizer.special)
    assert tokenizer.decode(ids) == "<ref>cat</ref><|im_end|>"
    assert tokenizer.decode(ids, skip_special=True) == "cat"
    assert tokenizer.decode(ids, skip_special=True, keep=tokenizer.tag_ids) == "<ref>cat</ref>"


def test_unknown_ids_are_an_error_only_if_strict(tokenizer):
    assert tokenizer.decode([0, 773, -1]) == "!\ufffd\ufffd"
    assert tokenizer.decode([0, 773], errors="ignore") == "!"
    message = r"token id 773 is not among the 773 ids of .*synthetic\.tiktoken"
    with pytest.raises(ValueError, match=message):
        tokenizer.decode([0, 773], errors="strict")


def test_a_path_in_a_span_is_decoded(tokenizer):
    span = [770, *"é.png".encode(), 772, 772, 771]
    assert tokenizer.decode([0, *span, 0]) == "!<img>é.png</img>!"
    assert tokenizer.decode([770, 772, 772, 771]) == "<img></img>"


@pytest.mark.parametrize("span", [[770], [770, 5], [770, 772], [770, 600, 772, 771], [770, 5, 771]])
def test_a_span_without_a_path_does_not_raise(tokenizer, span):
    assert tokenizer.decode(span).startswith("<img>")


def test_streaming_never_emits_half_a_character():
    text = "A 图 é 🙂!"
    ids = TINY.encode(text)  # the tiny vocabulary has these characters only as bytes
    pieces = list(TINY.stream(iter(ids)))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert "图" in pieces


def test_streaming_yields_a_character_as_soon_as_it_is_complete():
    taken = []

    def ids():
        for token_id in TINY.encode("图a"):
            taken.append(token_id)
            yield token_id

    assert next(TINY.stream(ids())) == "图"
    assert len(taken) == 3


@given(st.lists(st.integers(-2, TINY.vocab_size + 2)))
def test_a_stream_is_the_decoded_text_in_pieces(ids):
    assert "".join(TINY.stream(ids)) == TINY.decode(ids)


def test_a_pickle_holds_the_path_only(tokenizer):
    data = pickle.dumps(tokenizer)
    assert len(data) < 500
    assert pickle.loads(data).special == tokenizer.special


def test_a_malformed_vocabulary_is_reported_with_file_and_line(tmp_path):
    lines = TINY_VOCABULARY.read_text().splitlines()
    file = tmp_path / "vocabulary.tiktoken"

    def message(changed: list[str]) -> str:
        file.write_text("\n".join(changed))
        with pytest.raises(ValueError, match="vocabulary") as caught:
            QwenTokenizer(file)
        return str(caught.value)

    assert "tiktoken:3: expected base64, a blank and a rank, got b'no rank here'" in message(
        [*lines[:2], "no rank here", *lines[3:]]
    )
    assert "tiktoken:3: expected base64" in message([*lines[:2], "I===w 2", *lines[3:]])
    assert "tiktoken:3: expected a new token of rank 2, got b'$' of rank 3" in message(
        [*lines[:2], *lines[3:]]
    )
    assert "tiktoken:4: expected a new token of rank 3, got b'#' of rank 3" in message(
        [*lines[:3], lines[2].replace(" 2", " 3")]
    )
    assert "tiktoken:250: the file ends without the single bytes" in message(lines[:250])
    assert "tiktoken cannot be read: it is empty" in message([])


def test_the_script_writes_the_tiny_vocabulary():
    assert runpy.run_path(str(SCRIPT))["vocabulary"]() == TINY_VOCABULARY.read_text()


def test_the_tiny_vocabulary_has_the_bytes_in_the_published_order():
    published = list(read_ranks(GOLDEN / "synthetic.tiktoken"))
    assert list(read_ranks(TINY_VOCABULARY))[:256] == published[:256]


def test_every_word_of_the_demo_is_one_tiny_token():
    words = {word for text in synthetic.sentences() for word in regex.findall(PATTERN, text)}
    words |= set(regex.findall(PATTERN, "You are a helpful assistant."))
    words |= {"system", "user", "assistant", "\n"}
    assert [word for word in words if len(TINY.encode(word)) != 1] == []
    assert TINY.pad_id < 512


def test_tiny_tokens_are_built_from_pairs_of_earlier_ones():
    ranks = read_ranks(TINY_VOCABULARY)
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        earlier = [max(ranks.get(a, rank), ranks.get(b, rank)) < rank for a, b in halves]
        assert any(earlier), base64.b64encode(token)


@given(
    st.text(
        st.sampled_from("ae\u1161\u11a8가각\u3099\u0301\u0323\u0344\u0f71\u0f73\u0f74\u05b0"),
        max_size=300,
    )
)
def test_many_combining_marks_are_normalized_as_python_does(text):
    marks = "\u0323\u0301\u0f73\u0f71" * 50
    assert normalized(text + marks) == unicodedata.normalize("NFC", text + marks)


@pytest.mark.parametrize("blank", [" ", "\t", "\u3000", " \t"])
def test_more_blanks_than_tiktoken_can_take_are_refused(blank):
    message = r"^text has [\d,]+ white space characters in a row, and at most 500,000 can"
    for text in (blank * 1_000_000, f"a{blank * 1_000_000}b"):
        with pytest.raises(ValueError, match=message):
            TINY.encode(text)
    text = f"a{' ' * 499_999}b{' ' * 499_999}"
    assert TINY.decode(TINY.encode(text)) == text
