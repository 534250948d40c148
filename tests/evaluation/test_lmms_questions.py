"""What the model of lmms-eval makes of tasks' messages and settings; needs no lmms-eval."""

import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.evaluation.lmms.questions import conversation_of, task_settings
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.types import Box, DataError, GroundedObject, ImageSource

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
IMAGE = {"type": "image", "url": Image.new("RGB", (10, 10))}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*content) -> dict:
    return {"role": "user", "content": list(content)}


def read(*messages, continues_text=False):
    options = ReadOptions()
    return conversation_of(
        messages, row="mme, row 3", read_options=options, continues_text=continues_text
    )


def test_the_entry_points_of_the_package_name_functions_that_exist():
    groups = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]
    assert {"lmms_eval.models", "vllm.general_plugins"} <= groups.keys()
    for entries in groups.values():
        for target in entries.values():
            module, _, name = target.partition(":")
            assert callable(getattr(import_module(module), name))


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        # As the tasks mme, pope, mmvet, seephys, ocrbench and mmmu give them
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1},
            {"max_new_tokens": 16, "num_beams": 1, **GREEDY},
        ),
        ({"temperature": 0, "top_p": 0, "do_sample": False}, GREEDY),
        ({"temperature": 0.0, "do_sample": True}, GREEDY),
        ({"temperature": 0.2, "top_p": None}, {"do_sample": True, "temperature": 0.2}),
        ({"do_sample": True}, {"do_sample": True}),
        ({"until": []}, {}),
        ({"image_aspect_ratio": "original", "use_cache": True}, {}),
        (
            {"repetition_penalty": 1.2, "top_k": 1, "seed": 0},
            {"repetition_penalty": 1.2, "top_k": 1, "seed": 0},
        ),
    ],
)
def test_settings_of_tasks_become_settings_of_generation(given, settings):
    assert task_settings("mme", given).generation == settings
    Generation(**settings)


def test_a_temperature_that_greedy_decoding_does_not_use_is_warned_about(caplog):
    assert task_settings("mmvet", {"temperature": 0.2, "do_sample": False}).generation == GREEDY
    assert "task mmvet: do_sample=false, so temperature=0.2 has no effect" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_aspect_ratio": "pad"}, r"image_aspect_ratio='pad' is not .*ratio=original$"),
        ({"max_gen_toks": 5}, r"^task mme: .* max_gen_toks=5 is not supported; there are until, "),
        ({"stop_sequences": ["\n"]}, "stop_sequences"),
        ({"num_return_sequences": 4}, "num_return_sequences=4"),
        ({"skip_special_tokens": False}, "skip_special_tokens=False"),
        ({"compile": True}, "compile=True"),
        ({"until": 5}, "until must be a text or a list of texts, got 5"),
        ({"until": [""]}, "until must be"),
    ],
)
def test_settings_that_are_not_supported_are_refused(given, message):
    with pytest.raises(DataError, match=message):
        task_settings("mme", given)


@pytest.mark.parametrize(
    ("until", "answer"),
    [
        ([], "A cat. Q: no\n\nB"),
        ("Q:", "A cat."),
        (["\n\n", "Q:"], "A cat."),
        (["</s>"], "A cat. Q: no\n\nB"),
        (["A"], ""),
    ],
)
def test_an_answer_ends_at_the_first_stop_text(until, answer):
    assert task_settings("mme", {"until": until}).answer(" A cat. Q: no\n\nB\n") == answer


def test_messages_become_a_conversation_with_images_where_they_stand():
    system = {"role": "system", "content": "Be short."}
    answer = {"role": "assistant", "content": [text("A <box>(1,1),(2,2)</box>")]}
    row = read(system, user(text("a"), IMAGE, text("b")), answer, user(IMAGE, text("c")))
    assert [turn.role for turn in row.turns] == ["system", "user", "assistant", "user"]
    kinds = [[type(part) for part in turn.parts] for turn in row.turns]
    assert kinds == [[str], [str, ImageSource, str], [str], [ImageSource, str]]
    assert row.turns[2].parts == ("A <box>(1,1),(2,2)</box>",)
    assert row.id == "mme, row 3"


def test_markup_of_the_user_is_read_and_other_tags_stay_text():
    words = "<img>/etc/passwd</img><|im_end|><ref>a dog</ref><box>(1,2),(3,4)</box>?"
    [turn] = read(user(IMAGE, IMAGE, text(words))).turns
    box = Box(x0=1, y0=2, x1=3, y1=4, frame="grid")
    assert turn.parts[2:] == (
        "<img>/etc/passwd</img><|im_end|>",
        GroundedObject(label="a dog", boxes=(box,), image=1),
        "?",
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([user({"type": "video", "url": "a.mp4"})], "^mme, row 3 has content of type 'video'"),
        ([user({"type": "audio", "url": "a.wav"})], "type 'audio': .* without video and audio"),
        ([user("words")], "type 'words'"),
        ([user({"type": "image", "url": "no.png"})], "^mme, row 3: image 'no.png' does not exist"),
        ([user(text("\ud800"))], "text of mme, row 3 is not valid UTF-8"),
        ([], "got none$"),
        ([{"role": "tool", "content": "a"}], "message 1 has the role 'tool'"),
        ([user(text("a")), {"role": "system", "content": "b"}], "got user, system$"),
        ([user(text("a")), {"role": "assistant", "content": "b"}], "got user, assistant$"),
    ],
)
def test_what_the_model_cannot_read_is_refused_with_its_row(messages, message):
    with pytest.raises(DataError, match=message):
        read(*messages)


def test_a_base_model_gets_one_message():
    row = read(user(IMAGE, text("a")), continues_text=True)
    assert len(row.turns) == 1
    with pytest.raises(DataError, match=r"has 2 messages \(system, user\), and a base model"):
        read({"role": "system", "content": "b"}, user(text("a")), continues_text=True)
