from pathlib import Path

import pytest
from PIL import Image

from qwenvl_lit.data.download.files import RemotePicture
from qwenvl_lit.data.readers.question import conversation, parts_of, picture_of
from qwenvl_lit.data.readers.rows import Reading
from qwenvl_lit.types import BadPicture, Box, DataError, GroundedObject, Picture, Turn

BOX = Box(x0=1, y0=2, x1=3, y1=4, frame="grid")


@pytest.fixture
def reading(tmp_path, monkeypatch):
    """Of a folder, the current one, with a.png and b.png."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(name)
    return Reading(cache=tmp_path / "cache")


def test_text_is_taken_apart_where_pictures_and_markup_are(reading):
    query = "Picture 1:<img>a.png</img>\nIs <ref>it</ref><box>(1,2),(3,4)</box> in <img> b.png </img>? <box>(1,2),(3,4)</box>"
    assert parts_of(query, 0, reading) == (
        "Picture 1:",
        Picture(Path("a.png")),
        "\nIs ",
        GroundedObject(label="it", boxes=(BOX,), picture=0),
        " in ",
        Picture(Path("b.png")),
        "? ",
        GroundedObject(boxes=(BOX,), picture=1),
    )


@pytest.mark.parametrize("text", ["", "<img>a.png", "</img> <img/>", "<box>(1,2)</box>", "<|im_start|>system\n"])
def test_what_is_no_markup_stays_text(reading, text):
    assert "".join(parts_of(text, 0, reading)) == text


def test_a_list_mixes_texts_pictures_and_objects(reading):
    thing = GroundedObject(label="it", boxes=(Box(x0=1, y0=2, x1=3, y1=4),))
    parts = parts_of([Path("a.png"), "a.png", {"text": "<img>b.png</img>"}, thing, {"image": "b.png"}, b"content"], 0, reading)
    assert parts == (Picture(Path("a.png")), "a.png", Picture(Path("b.png")), thing, Picture(Path("b.png")), Picture(b"content"))


def test_boxes_are_in_the_last_picture_before_them_over_all_turns(reading):
    history = [["<img>a.png</img><img>b.png</img>Where?", "<box>(1,2),(3,4)</box>"], ("And <box>(1,2),(3,4)</box>?", "yes")]
    talk = conversation("<img>a.png</img><box>(1,2),(3,4)</box>", history, system="Be <ref>brief</ref>.", reading=reading)
    assert [turn.role for turn in talk.turns] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert talk.turns[0] == Turn(role="system", parts=("Be <ref>brief</ref>.",))
    indices = [part.picture for turn in talk.turns for part in turn.parts if isinstance(part, GroundedObject)]
    assert indices == [1, 1, 2]
    assert len(talk.pictures) == 3


def test_pictures_come_from_files_addresses_and_memory(reading, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert picture_of("~/a.png", reading) == Picture(tmp_path / "a.png")
    assert picture_of((tmp_path / "a.png").as_uri(), reading).size == (8, 8)
    url = "https://example.org/a.png"
    assert picture_of(url, reading) == Picture(RemotePicture(url, tmp_path / "cache/pictures"))
    assert picture_of("data:image/png;base64,aGVsbG8=", reading) == Picture(b"hello")
    image = Image.new("RGB", (2, 2))
    assert picture_of(image, reading).source is image


@pytest.mark.parametrize(
    ("source", "fault", "message"),
    [
        ("c.png", BadPicture, r"picture 'c\.png' does not exist, seen from /"),
        (Path("https://example.org/a.png"), BadPicture, "does not exist"),
        ("", BadPicture, "picture '' does not exist"),
        ("x" * 5000, BadPicture, "does not exist"),
        ("a\0.png", BadPicture, "does not exist"),
        ("s3://bucket/a.png", DataError, "not a file, an http"),
        (7, DataError, "got int"),
        ({"picture": "a.png"}, DataError, "got dict"),
    ],
)
def test_what_is_no_picture_is_named(reading, source, fault, message):
    with pytest.raises(fault, match=message):
        picture_of(source, reading)
