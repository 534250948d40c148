import io
import os
import random
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import ExifTags, Image

from qwenvl_lit import images
from qwenvl_lit.types import BadImage, ImageSource


def encoded(image_format, mode="RGB", size=(40, 30), **options):
    file = io.BytesIO()
    noise = Image.effect_noise(size, 60).convert(mode)
    noise.save(file, image_format, **options)
    return file.getvalue()


def png(*chunks):
    """A PNG file of these (kind, content) chunks."""
    file = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        checksum = zlib.crc32(kind + content)
        file += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    return file


def header(width, height):
    return (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def rows(width, height):
    return (b"IDAT", zlib.compress((b"\0" + b"\7" * 3 * width) * height))


def message(content):
    """The one line that both ways to read a broken image raise."""
    image = ImageSource(content)
    with pytest.raises(BadImage) as opened:
        image.open()
    assert "\n" not in str(opened.value)
    return str(opened.value)


@pytest.mark.parametrize("image_format", images.readable_formats())
def test_the_formats_of_the_list_are_read(image_format):
    image = ImageSource(encoded(image_format))
    assert image.size == image.open().size == (40, 30)


def test_a_jpeg_of_several_images_is_read():
    content = encoded("MPO", append_images=[Image.new("RGB", (40, 30))], save_all=True)
    assert ImageSource(content).open().size == (40, 30)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (encoded("EPS"), "EPS"),
        (encoded("PDF"), "PDF"),
        (encoded("ICO"), "ICO"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00heicmif1", "HEIC"),
        (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"8BPS\0\1", "PSD"),
    ],
)
def test_another_format_is_named_and_not_read(content, name, monkeypatch):
    started = []
    monkeypatch.setattr(os, "system", started.append)
    monkeypatch.setattr("subprocess.check_call", lambda *command, **_: started.append(command))
    assert f"format {name} is not read; convert it to PNG or JPEG" in message(content)
    with pytest.raises(BadImage, match="is not read; convert it"):
        _ = ImageSource(content).size
    assert not started


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty; fetch it again"),
        (bytes(5000), "the file begins with 1024 zero bytes; fetch it again"),
        (b"\n<!DOCTYPE html><html>", "it is a web page (HTML), not an image; correct its address"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
            "it is a pointer of git-lfs, not the image; run `git lfs pull`",
        ),
        (b"\x1b[2Jhello\n", r"its format is unknown; it begins with b'\x1b[2Jhello\n'; fetch it"),
        (encoded("JPEG")[:700], "; fetch it again"),
        (encoded("PNG")[:700], "; fetch it again"),
        (encoded("TIFF", compression="tiff_lzw")[:400], "; fetch it again"),
        (encoded("WEBP")[:300], "; fetch it again"),
        (encoded("GIF")[:500], "; fetch it again"),
    ],
)
def test_a_file_that_is_no_whole_image_is_named_with_what_to_do(content, reason):
    assert reason in message(content)


def test_the_same_is_said_of_a_truncated_avif():
    if "AVIF" not in images.readable_formats():
        pytest.skip("this Pillow reads no AVIF")
    content = encoded("AVIF", size=(200, 200))
    for length in (100, 200, 400, len(content) // 2, len(content) - 1):
        assert "fetch it again" in message(content[:length])


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"tEXt", b"iTXt"])
@pytest.mark.parametrize("is_last", [False, True])
def test_a_png_with_large_text_is_read_without_it(kind, is_last, tmp_path):
    note = b"note\0\0"
    content = {
        b"zTXt": note + zlib.compress(bytes(3_000_000)),
        b"iCCP": note + zlib.compress(bytes(3_000_000)),
        b"tEXt": b"note\0" + bytes(70_000_000),
        b"iTXt": b"note\0\1\0\0\0" + zlib.compress(bytes(3_000_000)),
    }
    text = (kind, content[kind])
    chunks = [rows(4, 3), text] if is_last else [text, rows(4, 3)]
    image = ImageSource(png(header(4, 3), *chunks, (b"IEND", b"")))
    assert image.size == image.open().size == (4, 3)
    assert image.open().getpixel((3, 2)) == (7, 7, 7)
    (tmp_path / "a.png").write_bytes(image.source)
    assert ImageSource(tmp_path / "a.png").open().getpixel((0, 0)) == (7, 7, 7)


def test_a_broken_png_with_large_text_is_still_broken():
    text = (b"zTXt", b"note\0\0" + zlib.compress(bytes(3_000_000)))
    content = png(header(4, 3), text, rows(4, 3))
    assert "fetch it again" in message(content[:-20])


APPLY = images.ImageOptions(exif="apply")
SCALE = images.ImageOptions(deep="scale")


def rotated(image_format, orientation):
    """An image whose left half is white, with an EXIF orientation."""
    image = Image.new("RGB", (40, 20))
    image.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    image.save(file, image_format, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "size", "white"),
    [
        (1, (40, 20), (5, 5)),
        (3, (40, 20), (35, 15)),
        (6, (20, 40), (15, 5)),
        (8, (20, 40), (5, 35)),
    ],
)
def test_exif_rotation_is_applied_on_request_only(image_format, orientation, size, white):
    content = rotated(image_format, orientation)
    stored, applied = ImageSource(content), ImageSource(content, APPLY)
    assert stored.size == stored.open().size == (40, 20)
    assert min(stored.open().getpixel((5, 5))) > 200
    assert stored.header.orientation == orientation
    assert applied.size == applied.open().size == size
    assert min(applied.open().getpixel(white)) > 200
    assert stored.key != applied.key  # caches of features tell them apart


def test_a_pillow_image_is_rotated_as_its_file_would_be():
    image = Image.open(io.BytesIO(rotated("JPEG", 6)))
    assert ImageSource(image, APPLY).size == ImageSource(image, APPLY).open().size == (20, 40)
    assert ImageSource(image).size == (40, 20)


def test_a_tiff_is_rotated_once_because_pillow_does_it():
    for options in (images.AS_STORED, APPLY):
        image = ImageSource(rotated("TIFF", 6), options)
        assert image.size == image.open().size == (20, 40)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0"]
)
def test_a_broken_exif_block_says_nothing(exif):
    content = encoded("JPEG", exif=exif)
    for options in (images.AS_STORED, APPLY):
        image = ImageSource(content, options)
        assert image.size == image.open().size == (40, 30)
        assert image.header.orientation == 1


@pytest.mark.parametrize(
    ("values", "dtype", "image_format", "stored", "scaled"),
    [
        ([0, 1000, 4000], "uint16", "PNG", [0, 255, 255], [0, 64, 255]),
        ([0, 1000, 4000], "uint16", "TIFF", [0, 255, 255], [0, 64, 255]),
        ([-100, 0, 100], "int32", "TIFF", [0, 0, 100], [0, 128, 255]),
        ([0.0, 0.2, 1.0], "float32", "TIFF", [0, 0, 1], [0, 51, 255]),
        ([0.0, float("nan"), float("inf")], "float32", "TIFF", [0, 0, 255], [0, 0, 0]),
        ([7, 7, 7], "uint16", "PNG", [7, 7, 7], [0, 0, 0]),
    ],
)
def test_values_of_more_than_8_bits_are_scaled_on_request_only(
    values, dtype, image_format, stored, scaled
):
    file = io.BytesIO()
    Image.fromarray(np.array([values], dtype)).save(file, image_format)
    for options, expected in ((images.AS_STORED, stored), (SCALE, scaled)):
        image = ImageSource(file.getvalue(), options)
        assert image.header.is_deep
        pixels = np.asarray(image.open().convert("RGB"))[0, :, 0].tolist()
        assert pixels == expected
    assert not ImageSource(encoded("PNG")).header.is_deep


def test_an_image_of_8_bits_is_not_scaled():
    content = encoded("PNG")
    assert ImageSource(content, SCALE).open().tobytes() == ImageSource(content).open().tobytes()


def test_the_values_of_image_options_are_checked():
    with pytest.raises(ValueError, match=r"data\.exif must be ignore or apply, got 'yes'"):
        images.ImageOptions(exif="yes")
    with pytest.raises(ValueError, match=r"data\.on_deep_image must be keep or scale, got True"):
        images.ImageOptions(deep=True)


@pytest.mark.parametrize("size", [(1, 99_000_000), (99_000_000, 1)])
def test_a_side_has_a_limit_because_resizing_needs_memory_for_it(size):
    content = png(header(*size), (b"IDAT", b""), (b"IEND", b""))
    assert "a side is longer than 100000; cut it into parts, or scale it down" in message(content)
    with pytest.raises(BadImage, match="a side is longer"):
        _ = ImageSource(content).size
    with pytest.raises(BadImage, match="a side is longer"):
        ImageSource(Image.new("1", (1, 100_001))).open()


@pytest.mark.parametrize("size", [(10_001, 10_000), (60_000, 60_000)])
def test_an_image_of_too_many_pixels_is_not_decoded(size):
    content = png(header(*size), (b"IDAT", b""), (b"IEND", b""))
    assert "scale it down" in message(content)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("decode failed\nbadly"), KeyError(7), TypeError("x")]
)
def test_whatever_pillow_raises_is_one_bad_image(error, monkeypatch):
    def fail(*_):
        raise error

    content = encoded("PNG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    assert message(content).startswith("image <bytes> cannot be read as an image: ")


def test_a_lazy_pillow_image_that_is_truncated_is_a_bad_image():
    lazy = Image.open(io.BytesIO(encoded("PNG")[:700]))
    for use in (ImageSource(lazy).open, lambda: ImageSource(lazy).key):
        with pytest.raises(BadImage, match="fetch it again"):
            use()


def test_a_folder_and_a_pipe_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for use in (lambda image: image.open(), lambda image: image.size, lambda image: image.key):
        with pytest.raises(BadImage, match=r"pipe\.png .*a device or a pipe, not a file"):
            use(ImageSource(tmp_path / "pipe.png"))
        with pytest.raises(BadImage, match="it is a folder, not a file; correct the path"):
            use(ImageSource(tmp_path))


@pytest.mark.filterwarnings("ignore")  # Pillow's, about their metadata
@pytest.mark.parametrize("image_format", images.readable_formats())
def test_damaged_files_raise_nothing_but_bad_image(image_format):
    content, dice = encoded(image_format), random.Random(0)
    for _ in range(60):
        damaged = bytearray(content[: dice.choice([len(content), dice.randrange(len(content))])])
        for _ in range(dice.randrange(1, 9)):
            if damaged:
                damaged[dice.randrange(min(len(damaged), 400))] = dice.randrange(256)
        with suppress(BadImage):
            image = ImageSource(bytes(damaged))
            assert image.open().size == image.size
