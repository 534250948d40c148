"""Nobody forges a role, an end mark, an image or a box: names of special tokens in text stay text, in every role and field."""

import json

import pytest
from PIL import Image

from qwenvl_lit.data.readers.coco import read_coco_captions
from qwenvl_lit.data.readers.layouts import LAYOUTS, TEXT_LAYOUTS
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.grounding import objects_from_tags
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import SPECIALS, TINY_VOCABULARY, QwenTokenizer
from qwenvl_lit.types import Box, Conversation, DataError, GroundedObject, ImageSource, Turn

TOKENIZER = QwenTokenizer(TINY_VOCABULARY)
MARKUP = {
    f"<{end}{kind}>" for kind in ("img", "ref", "box", "quad") for end in ("", "/")
}  # of rows; alone it cannot be read
PLAIN = "plain"
IMAGE = ImageSource(Image.new("RGB", (8, 8)))


def processor(**options) -> QwenVLProcessor:
    return QwenVLProcessor(TOKENIZER, tokens_per_image=2, image_size=8, **options)


def specials(sample) -> list[int]:
    return [id for id in sample.input_ids.tolist() if id >= TOKENIZER.pad_id]


# -- through the processor --------------------------------------------------------------------------------------------------------

PLACES = {  # where `text` may stand in a conversation
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
@pytest.mark.parametrize("place", PLACES)
def test_no_name_becomes_a_special_token(place, use):
    options, prompt = USES[use]
    made = processor(**options)

    def found(text: str) -> list[int]:
        turns = tuple(Turn(role=role, parts=tuple(parts)) for role, *parts in PLACES[place](text))
        return specials(made.encode(Conversation(id="x", turns=turns), prompt=prompt))

    expected = found(PLAIN)
    assert [name for name in SPECIALS if found(f"a{name}b{name}") != expected] == []


def test_the_configured_system_message_is_text_too():
    talk = Conversation(
        id="x", turns=(Turn(role="user", parts=("q",)), Turn(role="assistant", parts=("a",)))
    )
    expected = specials(processor(system=PLAIN).encode(talk))
    assert [
        name for name in SPECIALS if specials(processor(system=name).encode(talk)) != expected
    ] == []


# -- through the readers ----------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("layout", "field"), [(layout, field) for layout, fields in FIELDS.items() for field in fields]
)
def test_a_row_makes_special_tokens_of_its_formats_markup_only(folder, layout, field):
    names = [PLAIN, *SPECIALS]
    rows = [FIELDS[layout][field](f"a{name}b") for name in names]
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    expected, *found = [
        encoded(read_rows(str(folder / "rows.jsonl")), place) for place in range(len(names))
    ]
    refused = {name for name, ids in zip(SPECIALS, found, strict=True) if ids is None}
    assert refused <= MARKUP
    assert [
        name for name, ids in zip(SPECIALS, found, strict=True) if ids not in (expected, None)
    ] == []


def test_a_caption_and_the_question_about_a_image_are_text(folder):
    def found(text: str) -> list[int] | None:
        captions = {
            "images": [{"id": 1, "file_name": "a.png"}],
            "annotations": [{"image_id": 1, "caption": text}],
        }
        (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
        return encoded(
            read_coco_captions(
                str(folder / "captions.json"), ReadOptions(prompt=f"{{image}}{text}")
            ),
            0,
        )

    expected = found(PLAIN)
    assert [
        name
        for name in SPECIALS
        if found(name) not in (expected, *([None] if name in MARKUP else []))
    ] == []


def encoded(rows, place: int) -> list[int] | None:
    """Special ids of the row's sample; None if the reader cannot read its markup."""
    try:
        row = rows[place]
    except DataError as fault:
        if "cannot read" in str(fault):
            return None
        raise
    return specials(processor().encode(row))
