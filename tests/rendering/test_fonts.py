"""Labels in any script. The fonts of the machine are replaced by ones that the tests make."""

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image
from toy_task import grounded

from qwenvl_lit.rendering import fonts
from qwenvl_lit.rendering.drawing import draw_objects, label_list
from qwenvl_lit.rendering.fonts import font_for, missing_characters, shortened, writable

CACHES = (fonts._files, fonts._best_file, fonts._characters, fonts._font)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The folder of the installed fonts, empty at first."""
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: map(str, tmp_path.glob("*.ttf")))
    monkeypatch.setattr(fonts, "_warned", set())
    for cache in CACHES:
        cache.cache_clear()
    yield tmp_path
    for cache in CACHES:
        cache.cache_clear()


def write_font(file, characters: str) -> None:
    """Writes a font in which every character is a square."""
    characters = "".join(dict.fromkeys(characters))
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(point)
    pen.closePath()
    names = [".notdef", *(f"u{ord(character):04X}" for character in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(dict(zip(map(ord, characters), names[1:], strict=True)))
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": file.stem, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800)
    builder.setupPost()
    builder.save(file)


def test_ascii_is_written_in_pillows_font_and_other_letters_in_a_font_that_has_them(installed):
    assert font_for("a dog", 16).getname()[0] == "Aileron"
    for text in ("café", "собака", "σκύλος", "Łódź"):
        assert font_for(text, 16).getname()[0] == "DejaVu Sans"
        assert missing_characters(text) == ""


@pytest.mark.parametrize("text", ["这只狗", "สุนัข", "개 고양이", "dog 🐶", "คน and 狗"])
def test_a_font_is_chosen_by_its_characters_whatever_its_name(installed, text):
    write_font(installed / "a_part.ttf", text[0])
    write_font(installed / "b_all.ttf", text)
    write_font(installed / "c_bold.ttf", text)
    assert missing_characters(text) == ""
    assert font_for(text, 20).getname()[0] == "b_all"


def test_a_label_without_a_font_is_a_number_and_one_message_names_the_font(installed, caplog):
    labels = ("这只狗", "这只猫", "สุนัข", "🐶", "dog")
    objects = [grounded(label, 5, 5, 300, 300) for label in labels]
    assert label_list(objects) == ["1: 这只狗", "2: 这只猫", "3: สุนัข", "4: 🐶", "dog"]
    image = Image.new("RGB", (400, 400))
    as_numbers = [grounded(str(number), 5, 5, 300, 300) for number in (1, 2, 3, 4)]
    drawn = draw_objects(image, objects)
    assert (np.asarray(drawn) == np.asarray(draw_objects(image, [*as_numbers, objects[-1]]))).all()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert "Noto Sans CJK (Debian: fonts-noto-cjk)" in messages[0]
    assert "Noto Sans Thai (Debian: fonts-noto-core)" in messages[1]
    assert "Noto Emoji" in messages[2]


def test_an_escape_sequence_stands_for_what_no_font_can_draw(installed, caplog):
    assert writable("狗 and café 🐶") == "\\u72d7 and café \\U0001f436"
    assert writable("a\tb \ud800") == "a\\tb \\ud800"
    assert len(caplog.records) == 2  # on Chinese and on emoji
    write_font(installed / "a.ttf", "狗 and")
    for cache in CACHES:
        cache.cache_clear()
    assert writable("狗 and") == "狗 and"


@pytest.mark.parametrize("width", [30, 100, 333])
def test_a_text_is_shortened_to_a_width(width):
    text, font = "many words of one text " * 9, font_for("", 16)
    short = shortened(text, font, width)
    assert short.endswith("...")
    assert text.startswith(short[:-3])
    assert width - 25 < font.getlength(short) <= width
    assert shortened("a", font, width) == "a"


def test_a_broken_font_is_not_chosen(installed):
    (installed / "a.ttf").write_bytes(b"no font")
    write_font(installed / "b.ttf", "狗")
    assert font_for("狗", 16).getname()[0] == "b"
