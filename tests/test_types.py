import io
import math

import pytest
from PIL import Image

from qwenvl_lit import types
from qwenvl_lit.types import BadPicture, Box, Conversation, DataError, Picture, Quad, Turn


@pytest.fixture
def picture_file(tmp_path):
    file = tmp_path / "a.png"
    Image.new("L", (5, 3), 7).save(file)
    return file


def test_boxes_need_finite_numbers():
    with pytest.raises(DataError, match="finite"):
        Box(x0=0, y0=0, x1=math.nan, y1=1)
    with pytest.raises(DataError, match="four points"):
        Quad(points=((0, 0), (1, 1)))


def test_a_picture_is_one_from_file_bytes_or_memory(picture_file):
    content = picture_file.read_bytes()
    for source in (picture_file, content, Image.open(io.BytesIO(content))):
        picture = Picture(source)
        assert picture.size == (5, 3)
        assert picture.open().mode == "L"
        assert picture.open().getpixel((0, 0)) == 7


def test_equal_pictures_have_equal_keys(picture_file, tmp_path):
    copy = tmp_path / "b.png"
    copy.write_bytes(picture_file.read_bytes())
    assert Picture(copy).key == Picture(picture_file).key == Picture(copy.read_bytes()).key
    assert Picture(Image.new("L", (5, 3), 7)).key == Picture(Image.new("L", (5, 3), 7)).key
    assert Picture(Image.new("L", (5, 3), 7)).key != Picture(Image.new("L", (3, 5), 7)).key
    red, blue = (Image.new("RGB", (5, 3), colour).quantize(2) for colour in ("red", "blue"))
    assert red.tobytes() == blue.tobytes()  # of an image with a palette, the numbers alone do not tell
    assert Picture(red).key != Picture(blue).key


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"not a picture"])
def test_a_broken_picture_is_named(content, tmp_path):
    file = tmp_path / "broken.png"
    file.write_bytes(content)
    for use in (lambda: Picture(file).open(), lambda: Picture(file).size):
        with pytest.raises(DataError, match=r"broken\.png cannot be read"):
            use()


def test_half_a_picture_is_not_shown(picture_file):
    Image.effect_noise((64, 64), 50).save(picture_file)
    picture_file.write_bytes(picture_file.read_bytes()[:1000])
    with pytest.raises(BadPicture, match="cannot be read"):
        Picture(picture_file).open()


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(BadPicture, match=r"none\.png does not exist"):
        Picture(tmp_path / "none.png").open()
    with pytest.raises(BadPicture, match=r"none\.png cannot be read: .*check the path"):
        _ = Picture(tmp_path / "none.png").key


def test_the_prompt_is_everything_before_the_answer():
    ask, answer = Turn(role="user", parts=("2+2?",)), Turn(role="assistant", parts=("4",))
    conversation = Conversation(id="x", turns=(ask, answer))
    assert conversation.answer == answer
    assert conversation.prompt().turns == (ask,)
    assert conversation.prompt().answer is None
    assert conversation.prompt().prompt() == conversation.prompt()


def test_a_picture_may_be_brought_when_it_is_first_opened(picture_file):
    class Lent:
        name = "lent"

        def path(self):
            return picture_file

    assert Picture(Lent()).size == (5, 3)
    assert Picture(Lent()).key == Picture(picture_file).key
    assert Picture(Lent()).name == "lent"


def test_a_picture_that_cannot_be_brought_is_a_bad_one():
    class Lost:
        name = "lost"

        def path(self):
            raise DataError("nobody has it")

    with pytest.raises(BadPicture, match="nobody has it"):
        _ = Picture(Lost()).size


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(picture_file, monkeypatch):
    monkeypatch.setattr(types, "MAX_PICTURE_PIXELS", 14)
    with pytest.raises(DataError, match=r"a\.png cannot be read as an image: 5 x 3 pixels, more than 14"):
        Picture(picture_file).open()
