import io
import math
import pickle

import pytest
from PIL import Image

from qwenvl_lit import images
from qwenvl_lit.types import BadImage, Box, Conversation, DataError, ImageSource, Quad, Turn


@pytest.fixture
def image_file(tmp_path):
    file = tmp_path / "a.png"
    Image.new("L", (5, 3), 7).save(file)
    return file


def test_boxes_need_finite_numbers():
    with pytest.raises(DataError, match="finite"):
        Box(x0=0, y0=0, x1=math.nan, y1=1)
    with pytest.raises(DataError, match="four points"):
        Quad(points=((0, 0), (1, 1)))


def test_an_image_opens_from_a_file_bytes_or_memory(image_file):
    content = image_file.read_bytes()
    for source in (image_file, content, Image.open(io.BytesIO(content))):
        image = ImageSource(source)
        assert image.size == (5, 3)
        assert image.open().mode == "L"
        assert image.open().getpixel((0, 0)) == 7


def test_equal_images_have_equal_keys(image_file, tmp_path):
    copy = tmp_path / "b.png"
    copy.write_bytes(image_file.read_bytes())
    key = ImageSource(image_file).key
    assert ImageSource(copy).key == ImageSource(copy.read_bytes()).key == key
    assert ImageSource(Image.new("L", (5, 3), 7)).key == ImageSource(Image.new("L", (5, 3), 7)).key
    assert ImageSource(Image.new("L", (5, 3), 7)).key != ImageSource(Image.new("L", (3, 5), 7)).key
    red, blue = (Image.new("RGB", (5, 3), colour).quantize(2) for colour in ("red", "blue"))
    assert red.tobytes() == blue.tobytes(), "both hold palette index 0 only"
    assert ImageSource(red).key != ImageSource(blue).key


def test_a_key_is_computed_once_and_sent_to_other_processes(image_file):
    source = ImageSource(image_file)
    key = source.key
    image_file.unlink()
    assert source.key == key
    assert pickle.loads(pickle.dumps(source)).key == key
    assert source == ImageSource(image_file)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"not an image"])
def test_the_error_about_a_broken_image_names_it(content, tmp_path):
    file = tmp_path / "broken.png"
    file.write_bytes(content)
    for use in (lambda: ImageSource(file).open(), lambda: ImageSource(file).size):
        with pytest.raises(DataError, match=r"broken\.png cannot be read"):
            use()


def test_a_truncated_image_is_refused(image_file):
    Image.effect_noise((64, 64), 50).save(image_file)
    image_file.write_bytes(image_file.read_bytes()[:1000])
    with pytest.raises(BadImage, match="cannot be read"):
        ImageSource(image_file).open()


def test_the_error_about_a_missing_image_names_it(tmp_path):
    with pytest.raises(BadImage, match=r"none\.png does not exist"):
        ImageSource(tmp_path / "none.png").open()
    with pytest.raises(BadImage, match=r"none\.png does not exist; check the path"):
        _ = ImageSource(tmp_path / "none.png").key


def test_the_prompt_is_everything_before_the_answer():
    ask, answer = Turn(role="user", parts=("2+2?",)), Turn(role="assistant", parts=("4",))
    conversation = Conversation(id="x", turns=(ask, answer))
    assert conversation.answer == answer
    assert conversation.prompt().turns == (ask,)
    assert conversation.prompt().answer is None
    assert conversation.prompt().prompt() == conversation.prompt()


def test_a_remote_image_is_downloaded_when_it_is_first_opened(image_file):
    class Remote:
        name = "remote"

        def path(self):
            return image_file

    assert ImageSource(Remote()).size == (5, 3)
    assert ImageSource(Remote()).key == ImageSource(image_file).key
    assert ImageSource(Remote()).name == "remote"


def test_an_image_that_cannot_be_downloaded_is_a_bad_image():
    class Unreachable:
        name = "unreachable"

        def path(self):
            raise DataError("no server has it")

    with pytest.raises(BadImage, match="no server has it"):
        _ = ImageSource(Unreachable()).size


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(image_file, monkeypatch):
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 14)
    with pytest.raises(
        DataError, match=r"a\.png cannot be read as an image: 5 x 3 pixels, more than 14"
    ):
        ImageSource(image_file).open()


def test_text_is_the_path_of_an_image(image_file, monkeypatch):
    assert ImageSource(str(image_file)) == ImageSource(image_file)
    assert ImageSource(str(image_file)).name == str(image_file)
    monkeypatch.setenv("HOME", str(image_file.parent))
    assert ImageSource("~/a.png").open().size == (5, 3)
    with pytest.raises(DataError, match=r"'https://x.org/a.png' is an address.*RemoteImage"):
        ImageSource("https://x.org/a.png")
