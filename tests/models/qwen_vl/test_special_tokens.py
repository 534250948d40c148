"""Names of special tokens in text stay text, in every role and field.

Nobody can forge a role, an end-of-turn token, an image or a box."""

import json

import pytest
from PIL import Image

from qwenvl_lit.data.readers.coco import read_coco_captions
from qwenvl_lit.data.readers.layouts import LAYOUTS, TEXT_LAYOUTS
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.grounding import objects_from_tags
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import SPECIALS, QwenTokenizer
from qwenvl_lit.types import Box, Conversation, DataError, GroundedObject, ImageSource, Turn

TOKENIZER = QwenTokenizer(TINY_VOCABULARY)
# Markup that rows may have. A single tag cannot be read.
MARKUP = {"<img>", "<ref>", "<box>", "<quad>", "</img>", "</ref>", "</box>", "</quad>"}
PLAIN = "plain"
IMAGE = ImageSource(Image.new("RGB", (8, 8)))


def processor(**options) -> QwenVLProcessor:
    return QwenVLProcessor(TOKENIZER, tokens_per_image=2, image_size=8, **options)


def specials(sample) -> list[int]:
    return sample.input_ids[sample.input_ids >= TOKENIZER.pad_id].tolist()


# -- through the processor ------------------------------------------------------------------------

POSITIONS = {  # where `text` may be in a conversation
    "system": lambda text: [("system", text), ("user", "q"), ("assistant", "a")],
    "question": lambda text: [("user", IMAGE, text), ("assistant", "a")],
    "answer": lambda text: [("user", IMAGE, "q"), ("assistant", text)],
    "history": lambda text: [
        ("user", text),
        ("assistant", text),
        ("user", "q"),
        ("assistant", "a"),
    ],
    "label asked for": lambda text: [
        ("user", IMAGE, GroundedObject(label=text)),
        ("assistant", "a"),
    ],
    "label answered": lambda text: [
        ("user", IMAGE),
        ("assistant", GroundedObject(label=text, boxes=(Box(x0=0, y0=0, x1=8, y1=8),))),
    ],
    "before an image": lambda text: [("user", text, IMAGE, text), ("assistant", "a")],
    "parts side by side": lambda text: [
        ("user", text[:3], text[3:]),
        ("assistant", text[:1], text[1:]),
    ],
    "a question to predict": lambda text: [("user", *objects_from_tags(text)), ("assistant", "a")],
}
USES = {
    "training": ({}, False),
    "training, official": ({"supervise": "official"}, False),
    "training, raw": ({"template": "raw"}, False),
    "prompt": ({}, True),
    "prompt, raw": ({"template": "raw"}, True),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("position", POSITIONS)
def test_no_name_becomes_a_special_token(position, use):
    options, prompt = USES[use]
    ours = processor(**options)

    def special_ids(text: str) -> list[int]:
        turns = tuple(
            Turn(role=role, parts=tuple(parts)) for role, *parts in POSITIONS[position](text)
        )
        return specials(ours.encode(Conversation(id="x", turns=turns), prompt=prompt))

    expected = special_ids(PLAIN)
    assert [name for name in SPECIALS if special_ids(f"a{name}b{name}") != expected] == []


def test_the_configured_system_message_is_text_too():
    talk = Conversation(
        id="x", turns=(Turn(role="user", parts=("q",)), Turn(role="assistant", parts=("a",)))
    )
    expected = specials(processor(system=PLAIN).encode(talk))
    for name in SPECIALS:
        assert specials(processor(system=name).encode(talk)) == expected, name


# -- through the readers --------------------------------------------------------------------------

OBJECT = {"bbox": [0, 0, 8, 8], "bbox_type": "real"}
FIELDS = {  # layout -> field -> a row with `text` in that field
    "conversations": {
        "user": lambda text: {
            "conversations": [{"from": "user", "value": text}, {"from": "assistant", "value": "a"}]
        },
        "assistant": lambda text: {
            "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": text}]
        },
        "system": lambda text: {
            "system": text,
            "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}],
        },
    },
    "messages": {
        "text": lambda text: {
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        },
        "an item": lambda text: {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": text}]},
                {"role": "assistant", "content": "a"},
            ]
        },
        "system": lambda text: {
            "messages": [
                {"role": r, "content": c}
                for r, c in (("system", text), ("user", "q"), ("assistant", "a"))
            ]
        },
    },
    "query": {
        "query": lambda text: {"query": text, "response": "a"},
        "response": lambda text: {"query": "q", "response": text},
        "history": lambda text: {"query": "q", "response": "a", "history": [[text, text]]},
        "system": lambda text: {"query": "q", "response": "a", "system": text},
        "caption": lambda text: {
            "query": "Where is <ref-object>",
            "response": "<bbox>",
            "images": ["a.png"],
            "objects": [OBJECT | {"caption": text}],
        },
        "label in markup": lambda text: {
            "query": f"<img>a.png</img>Is <ref>{text}</ref><box>(1,2),(3,4)</box> red?",
            "response": "a",
        },
        "another column": lambda text: {"query": "q", "response": "a", "source": text},
    },
    "instruction": {
        "instruction": lambda text: {"instruction": text, "output": "a"},
        "input": lambda text: {"instruction": "q", "input": text, "output": "a"},
        "output": lambda text: {"instruction": "q", "output": text},
    },
    "conversation": {"both": lambda text: {"conversation": [{"human": text, "assistant": text}]}},
    "vqa": {
        "question": lambda text: {"image": "a.png", "question": text, "answer": "a"},
        "answer": lambda text: {"image": "a.png", "question": "q", "answer": text},
        "answers": lambda text: {"image": "a.png", "question": "q", "answers": [text, text, "a"]},
    },
    "referring": {
        "sent": lambda text: {
            "image": "a.png",
            "sent": text,
            "bbox": [0, 0, 8, 8],
            "height": 8,
            "width": 8,
        }
    },
    "text": {"text": lambda text: {"text": text}},
    "response": {"response": lambda text: {"response": text}},
}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


def test_every_layout_is_tried():
    assert FIELDS.keys() == {layout.name for layout in LAYOUTS + TEXT_LAYOUTS}


CASES = [(layout, field) for layout, fields in FIELDS.items() for field in fields]


@pytest.mark.parametrize(("layout", "field"), CASES)
def test_only_the_markup_of_a_row_becomes_special_tokens(folder, layout, field):
    file = folder / "rows.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for name in (PLAIN, *SPECIALS):
            stream.write(json.dumps(FIELDS[layout][field](f"a{name}b")) + "\n")
    rows = read_rows(str(file))
    expected = encoded(rows, 0)
    for index, name in enumerate(SPECIALS, 1):
        ids = encoded(rows, index)
        assert ids == expected or (ids is None and name in MARKUP), name


def test_a_caption_and_the_question_about_an_image_are_text(folder):
    def special_ids(text: str) -> list[int] | None:
        captions = {
            "images": [{"id": 1, "file_name": "a.png"}],
            "annotations": [{"image_id": 1, "caption": text}],
        }
        file = folder / "captions.json"
        file.write_text(json.dumps(captions), encoding="utf-8")
        options = ReadOptions(prompt=f"{{image}}{text}")
        return encoded(read_coco_captions(str(file), options), 0)

    expected = special_ids(PLAIN)
    for name in SPECIALS:
        ids = special_ids(name)
        assert ids == expected or (ids is None and name in MARKUP), name


def encoded(rows, index: int) -> list[int] | None:
    """Returns the special ids of a row's sample; None if the reader cannot read its markup."""
    try:
        row = rows[index]
    except DataError as error:
        if "cannot read" in str(error):
            return None
        raise
    return specials(processor().encode(row))
