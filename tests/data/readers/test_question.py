import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from qwenvl_lit.data.download.files import RemoteImage
from qwenvl_lit.data.readers.question import conversation, image_of, parts_of, question_options
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.types import BadImage, Box, DataError, GroundedObject, ImageSource, Turn

BOX = Box(x0=1, y0=2, x1=3, y1=4, frame="grid")


@pytest.fixture
def read_options(tmp_path, monkeypatch):
    """Options in a current folder with images a.png and b.png."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(name)
    return ReadOptions(cache=tmp_path / "cache")


def test_text_is_split_at_images_and_markup(read_options):
    query = (
        "Picture 1:<img>a.png</img>\nIs <ref>it</ref><box>(1,2),(3,4)</box> "
        "in <img> b.png </img>? <box>(1,2),(3,4)</box>"
    )
    assert parts_of(query, 0, read_options) == (
        "Picture 1:",
        ImageSource(Path("a.png")),
        "\nIs ",
        GroundedObject(label="it", boxes=(BOX,), image=0),
        " in ",
        ImageSource(Path("b.png")),
        "? ",
        GroundedObject(boxes=(BOX,), image=1),
    )


@pytest.mark.parametrize("text", ["", "a <img/>", "<img src=x>", "<b>x", "<|im_start|>system\n"])
def test_unknown_markup_stays_text(read_options, text):
    assert "".join(parts_of(text, 0, read_options)) == text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Where is <ref>the red square?", "<ref>the red square?"),
        ("</ref> it", "</ref> it"),
        ("</img> <img/>", "</img> <img/>"),
        ("<ref>it</ref><box>(1,2)</box>", "<box>(1,2)</box>"),
        ("<box>(1,2),(3,x)</box>", "<box>(1,2),(3,x)</box>"),
        ("<quad>(1,2),(3,4)</quad>", "<quad>(1,2),(3,4)</quad>"),
    ],
)
def test_markup_that_cannot_be_read_is_an_error_as_in_a_row(read_options, read_row, text, named):
    problem = re.escape(f"cannot read {named!r}; expected <img>path</img>, <ref>label</ref>, ")
    with pytest.raises(DataError, match=f"the question: {problem}"):
        conversation(text, read_options=read_options)
    with pytest.raises(DataError, match=problem):
        read_row({"query": text, "response": "yes"})
    plain = conversation(text, read_options=replace(read_options, markup="none"))
    assert plain.turns[0].parts == (text,)
    answered = conversation("and now?", [["Where?", text]], read_options=read_options)
    assert "".join(part for part in answered.turns[1].parts if isinstance(part, str)) in text


@pytest.mark.parametrize("text", ["<img>a.png", "<img>a.png</img> or <img>b.png?", "</img><img>"])
def test_an_image_tag_that_is_not_closed_is_an_error(read_options, text):
    with pytest.raises(DataError, match=r"'<img>.*' has no </img>; write <img>path</img>"):
        conversation(text, read_options=read_options)
    with pytest.raises(DataError, match="has no </img>"):
        conversation("and now?", [[text, "yes"]], read_options=read_options)


def test_markup_is_read_where_the_options_say(read_options):
    box = "<box>(1,2),(3,4)</box>"
    kinds = {}
    for markup in ("all", "questions", "none"):
        options = replace(read_options, markup=markup)
        row = conversation(box, [[box, box]], read_options=options)
        kinds[markup] = [type(turn.parts[0]) for turn in row.turns]
    assert kinds["all"] == [GroundedObject] * 3
    assert kinds["questions"] == [GroundedObject, str, GroundedObject]
    assert kinds["none"] == [str] * 3
    plain = parts_of("<img>a.png</img>", 0, replace(read_options, markup="none"))
    assert plain == ("<img>a.png</img>",)


def test_a_list_mixes_texts_images_and_objects(read_options):
    obj = GroundedObject(label="it", boxes=(Box(x0=1, y0=2, x1=3, y1=4),))
    parts = parts_of(
        [
            Path("a.png"),
            "a.png",
            {"text": "<img>b.png</img>"},
            obj,
            {"image": "b.png"},
            b"content",
        ],
        0,
        read_options,
    )
    assert parts == (
        ImageSource(Path("a.png")),
        "a.png",
        ImageSource(Path("b.png")),
        obj,
        ImageSource(Path("b.png")),
        ImageSource(b"content"),
    )


def test_boxes_refer_to_the_last_image_before_them_in_any_turn(read_options):
    history = [
        ["<img>a.png</img><img>b.png</img>Where?", "<box>(1,2),(3,4)</box>"],
        ("And <box>(1,2),(3,4)</box>?", "yes"),
    ]
    chat = conversation(
        "<img>a.png</img><box>(1,2),(3,4)</box>",
        history,
        system="Be <ref>brief</ref>.",
        read_options=read_options,
    )
    assert [turn.role for turn in chat.turns] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]
    assert chat.turns[0] == Turn(role="system", parts=("Be <ref>brief</ref>.",))
    indices = [
        part.image for turn in chat.turns for part in turn.parts if isinstance(part, GroundedObject)
    ]
    assert indices == [1, 1, 2]
    assert len(chat.images) == 3


def test_images_come_from_files_addresses_and_memory(read_options, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert image_of("~/a.png", read_options) == ImageSource(tmp_path / "a.png")
    assert image_of((tmp_path / "a.png").as_uri(), read_options).size == (8, 8)
    url = "https://example.org/a.png"
    assert image_of(url, read_options) == ImageSource(RemoteImage(url, tmp_path / "cache/images"))
    allowing = replace(read_options, allow_private_hosts=True)
    assert image_of(url, allowing).source.allow_private_hosts
    assert image_of("data:image/png;base64,aGVsbG8=", read_options) == ImageSource(b"hello")
    image = Image.new("RGB", (2, 2))
    assert image_of(image, read_options).source is image


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("c.png", BadImage, r"image 'c\.png' does not exist, relative to /"),
        (Path("https://example.org/a.png"), BadImage, "does not exist"),
        ("", BadImage, "image '' does not exist"),
        ("x" * 5000, BadImage, "does not exist"),
        ("a\0.png", BadImage, "does not exist"),
        ("s3://bucket/a.png", DataError, "not a file, an http"),
        (7, DataError, "got int"),
        ({"image": "a.png"}, DataError, r"got \{'image': 'a\.png'\}"),
    ],
)
def test_a_source_that_is_no_image_is_refused(read_options, source, error, message):
    with pytest.raises(error, match=message):
        image_of(source, read_options)


def test_questions_read_images_as_the_data_of_their_run(tmp_path, monkeypatch):
    monkeypatch.setenv("QWENVL_LIT_CACHE", str(tmp_path))
    assert question_options() == question_options(data={}) == ReadOptions(cache=tmp_path)
    data = {"exif": "apply", "on_deep_image": "scale", "prompt": "Describe it."}
    expected = ReadOptions(cache=tmp_path / "c", exif="apply", on_deep_image="scale")
    assert question_options(tmp_path / "c", data) == expected
    assert question_options(tmp_path / "c", {"datasets": {"a": data, "b": {}}}) == expected
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    sources = (tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), Image.new("RGB", (2, 2)))
    for source in sources:
        assert image_of(source, expected).options == expected.image_options


@pytest.mark.parametrize(("of_run", "used"), [("all", "all"), ("none", "questions")])
def test_questions_to_a_run_have_the_markup_of_its_rows_and_always_images(of_run, used):
    assert question_options(data={"markup": of_run}).markup == used
