"""Finds a font that has the characters of a text, among the fonts of this machine."""

from __future__ import annotations

import logging
import unicodedata
from functools import cache, lru_cache
from pathlib import Path

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

from qwenvl_lit.terminal import printable

log = logging.getLogger(__name__)

# The first word of a character's Unicode name -> the font to install, and its Debian package.
CJK_SCRIPTS = ("BOPOMOFO", "CJK", "FULLWIDTH", "HANGUL", "HIRAGANA", "IDEOGRAPHIC", "KATAKANA")
FONTS_OF_SCRIPTS = {
    **dict.fromkeys(CJK_SCRIPTS, ("Noto Sans CJK", "fonts-noto-cjk")),
    "EMOJI": ("Noto Emoji, without colors", "fonts-noto-extra"),
}
STYLES = ("bold", "italic", "oblique", "black", "light", "thin", "condensed", "mono", "serif")
# Characters that draw nothing, or change the one before them.
INVISIBLE = ("Cc", "Cf", "Mn", "Me", "Zs", "Zl", "Zp")


def font_for(text: str, size_px: int) -> ImageFont.FreeTypeFont:
    """Returns a font that has all characters of `text`, or else most of them.

    Text in ASCII is written in Pillow's own font. Other fonts are matplotlib's and those that are
    installed now: the list that matplotlib keeps lacks fonts that were installed after it.
    """
    return _font(_best_file(text)[0], size_px)


def missing_characters(text: str) -> str:
    """Returns the characters of `text` that no font can write together with the rest.

    A message, once for each script, says which font to install.
    """
    missing = _best_file(text)[1]
    for character in missing:
        _warn_once(character)
    return missing


def writable(text: str) -> str:
    """Returns one line in which escape sequences stand for characters that cannot be drawn.

    >>> writable("a\\x00 b")
    'a\\\\x00 b'
    """
    text = printable(text)
    escapes = {ord(character): ascii(character)[1:-1] for character in missing_characters(text)}
    return text.translate(escapes)


def shortened(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> str:
    """Returns `text`, or its start and "..." if it is wider than `width_px`."""
    if font.getlength(text) <= width_px:
        return text
    end = fitting_characters(text, font, width_px - font.getlength("..."))
    return text[:end].rstrip() + "..."


def fitting_characters(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> int:
    """Returns how many characters at the start of `text` fit into a width, at least 1."""
    fits, too_many = 1, len(text) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if font.getlength(text[:middle]) <= width_px:
            fits = middle
        else:
            too_many = middle
    return fits


@lru_cache(maxsize=64)
def _font(file: str | None, size_px: int) -> ImageFont.FreeTypeFont:
    if file is not None:
        return ImageFont.truetype(file, size_px)
    default = ImageFont.load_default(size_px)
    assert isinstance(default, ImageFont.FreeTypeFont)  # all Pillow wheels include FreeType
    return default


@lru_cache(maxsize=4096)
def _best_file(text: str) -> tuple[str | None, str]:
    """Returns the file of the best font for a text, None for Pillow's, and what the font lacks."""
    missing = {character for character in text if not character.isascii()}
    missing = set(filter(_is_visible, missing))
    needed = set(filter(_is_visible, text))
    best = None
    for file in _files():
        if not missing:
            break
        lacking = {character for character in needed if ord(character) not in _characters(file)}
        if len(lacking) < len(missing) and _can_be_scaled(file):
            best, missing = file, lacking
    return best, "".join(character for character in text if character in missing)


def _can_be_scaled(file: str) -> bool:
    """Returns whether a font has outlines. Colored emoji are images of one size."""
    try:
        ImageFont.truetype(file, 16)
    except OSError:
        return False
    return True


def _is_visible(character: str) -> bool:
    return unicodedata.category(character) not in INVISIBLE


@cache
def _files() -> tuple[str, ...]:
    """Returns the files of all fonts, matplotlib's DejaVu first, plain styles before others."""
    own = font_manager.findfont("DejaVu Sans")
    installed = sorted(font_manager.findSystemFonts(), key=_order)
    return (own, *installed)


def _order(file: str) -> tuple[int, bool, str]:
    name = Path(file).name.lower()
    styles = sum(style in name for style in STYLES)
    return styles, not name.startswith("noto"), name


@lru_cache(maxsize=1024)
def _characters(file: str) -> frozenset[int]:
    """Returns the code points that a font has; none if the file is not a font that can be read."""
    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def _script(character: str) -> str:
    if unicodedata.category(character) == "So":
        return "EMOJI"
    return unicodedata.name(character, "unknown").partition(" ")[0]


_warned: set[str] = set()  # scripts; a message about each is logged once


def _warn_once(character: str) -> None:
    script = _script(character)
    if script in _warned:
        return
    _warned.add(script)
    default = (f"Noto Sans {script.title()}", "fonts-noto-core")
    name, package = FONTS_OF_SCRIPTS.get(script, default)
    log.warning(
        "no installed font has %s (%s): images show an escape sequence or a number instead; "
        "install a font, for example %s (Debian: %s). Reports show the labels as text",
        *(character, unicodedata.name(character, "unknown").lower(), name, package),
    )
