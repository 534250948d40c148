"""Captions to words as the COCO caption tools do, which call Stanford's PTBTokenizer 3.4.1 (`-lowerCase`) and drop punctuation.

Written from what that program answers, in Java's absence: 114,000 words with and without a full stop, contractions, numbers, quotes, and
sentences made of them. Known to differ, all of it rare in captions: a tag with attributes stays one token there, a fraction or telephone
number with a space in it too, and whether the full stop after a single letter at the very end belongs to it depends there on the caption
of the next line.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_DROPPED = frozenset(
    ("''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "---", "----", "...", ";")
)  # `!!`, `?!` and brackets stay, as there
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SPELLED = {
    **dict.fromkeys("’‘‛", "'"),
    **dict.fromkeys("“”«»`", '"'),
    **dict.fromkeys("‒–—―", " -- "),
    "…": " ... ",
    "½": " 1/2 ",
    "¼": " 1/4 ",
    "¾": " 3/4 ",
    "⅓": " 1/3 ",
    "⅔": " 2/3 ",
    "£": "#",  # as the Penn Treebank writes it
    "€": "$",
    "¢": " cents ",
    "\u200b": " ",
    **dict.fromkeys("\u00ad\ufe0f「」『』", ""),
}
_SPELL = str.maketrans(_SPELLED)
_UNKNOWN = re.compile("[\U00010000-\U0010ffff]")  # emoji and the like vanish

# Words whose full stop belongs to them: in any case, as they stand, and before a number.
_ABBREVIATIONS = """
adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bancorp bldg blvd brig bros calif capt cf cie cmdr co col colo comdr conn
corp cos cpl ct dak dec dept dr drs elec ens esq est etc ext feb fla fri ft gen gov govs hon inc ind insp intl jan jos jr jul jun kan kans
ky lieut lt ltd maj mar md messrs mich minn mlle mme mo mon mont mr mrs ms msgr mt natl neb nev nov oct okla penn pfc ph plc pres prof
profs pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs treas tue tues univ va vs vt wed
wis wisc wm wyo
"""
_CASED = "Ark ARK Bhd BHD Del DEL Det DET Ga GA Ill ILL La LA Mass MASS mfg Mfg Miss MISS Mtg Ore ORE Pa PA pte Pte pty Pty Tex TEX Wash WASH"
_NUMBERED = "art ca fig figs no nos op pp prop"
_STARTERS = """
A About According After An As At But Earlier He Her Here However If In It Last Many More Now Once One Other Our She Since So Some Such That
The Their Then There These They This We What When While Yet You
"""  # of sentences: before these, the full stop after a single letter ends one


def _any(words: str) -> str:
    return "|".join(words.split())


_MARKS = "".join(
    sign for sign in map(chr, range(0x300, 0xFE00)) if unicodedata.category(sign)[0] == "M"
)  # vowel signs, accents
_W = rf"(?:[^\W_²³¹⁰-₟]|[{_MARKS}])"  # a letter with what is written around it, or a digit
_HYPHEN = "[-‐‑_/]"
_JOINED = rf"(?:[^\W\d_]{_W}*(?:{_HYPHEN}{_W}+|(?<=[A-Za-z])[.!?](?=[A-Za-z]){_W}+)*|{_W}+(?:{_HYPHEN}{_W}+)*)"  # t-shirt, the.dog
_KINDS = (
    r"(?!(?i:cannot|gonna|gotta|wanna|lemme|gimme)\b)[A-Za-z]+(?=[\s,;]|$)",  # most words, fast
    r"</?[A-Za-z!?][^<>\s]*>",
    r"(?i:https?)://[^\s\"<>]*[^\s\"<>.,;:!?()']",
    rf"{_W}[\w.+-]*@{_W}[\w-]*(?:\.{_W}[\w-]*)*",
    r"[#@][A-Za-z_]\w*",
    r"(?i:can(?=not\b)|gon(?=na\b)|got(?=ta\b)|wan(?=na\b)|lem(?=me\b)|gim(?=me\b)|'t(?=is\b|was\b))",
    rf"[A-Za-z]+?(?=[nN]'[tT](?!{_W}))|[nN]'[tT](?!{_W})",
    rf"'(?i:s|m|d|ll|re|ve)(?!{_W})",
    rf"'[nN]'|'(?i:em|till?|cause|n|\d\ds|\d\d(?!'))(?!{_W})",
    rf"(?i:[odl]'[a-z]{_W}*(?:-{_W}+)*|[dl]'|ma'am|hallowe'en|ne'er|e'er|li'l|nat'l|s'mores|ol'|y'(?=[a-z]))",
    rf"[A-Za-z](?:\.[A-Za-z])+\.?(?!{_W})|(?i:ph\.d)\b\.?",
    rf"(?:(?i:{_any(_ABBREVIATIONS)})|{_any(_CASED)}|(?i:{_any(_NUMBERED)})(?=\.\s*\d))\.(?!-?[A-Za-z])",
    rf"[A-Za-z]\.(?!{_W}*[A-Za-z])(?!\s+(?:(?:{_any(_STARTERS)})(?![\w'])|M[rs]\.\s))",
    rf"[-+]?\d*(?:[.,:]\d+)+(?:-[A-Za-z]{_W}*)*|[-+]\d+(?:[-/]\d+)*(?!{_W})",
    r"[A-Z]+(?:&[A-Z]+)+|[Cc](?:\+\+|#)|[A-Z]{1,2}\$",
    rf"{_JOINED}\.(?=[,;:])",  # as it is, so there
    _JOINED,
    rf"[:;=][-o]?(?:[()]|[DPO](?!{_W}))|\^_\^",
    r"[!?]+|\.{3,}|-{2,}|\*+|_+|'+",
    r"\S",
)  # of tokens; the first that fits
_SPECIAL = frozenset(
    f"cannot gonna gotta wanna lemme gimme {_ABBREVIATIONS} {_CASED}".lower().split()
)
_TOKEN = re.compile(rf"\s*({'|'.join(_KINDS)})")


@lru_cache(maxsize=1 << 14)  # several metrics ask for the same captions, one after the other
def ptb_words(caption: str) -> tuple[str, ...]:
    """The words of a caption, lower-cased, without punctuation.

    >>> " ".join(ptb_words('A "man" isn\\'t riding (his) horse.'))
    "a man is n't riding -lrb- his -rrb- horse"
    """
    plain = caption.rstrip().removesuffix(".").lower().split()
    if (
        plain and len(plain[-1]) > 1 and _letters("".join(plain)) and _SPECIAL.isdisjoint(plain)
    ):  # as most are: ten times faster
        return tuple(plain)
    text = caption.replace("&amp;", "&").translate(_SPELL)
    tokens = (_BRACKETS.get(token, token) for token in _TOKEN.findall(_UNKNOWN.sub("", text)))
    return tuple(
        _lowered(token)
        for token in tokens
        if token not in _DROPPED and not token.startswith(("...", "''"))
    )


def _letters(text: str) -> bool:
    return text.isascii() and text.isalpha()


def _lowered(token: str) -> str:
    if token[0] in ":;=" and token[-1] in "()":  # a smiley: brackets are spelled in it too
        token = token[:-1] + _BRACKETS[token[-1]]
    return token.lower()
