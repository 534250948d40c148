"""Splits captions into words as the COCO caption tools do.

These tools call Stanford's PTBTokenizer 3.4.1 (`-lowerCase`), which requires Java, and then drop
punctuation. The rules of this module were derived from the output of PTBTokenizer for 114,000 words
with and without a full stop, for contractions, numbers and quotes, and for sentences made of them.
Two differences are known, both rare in captions:

- PTBTokenizer keeps a tag with attributes, a fraction with a space, and a telephone number with a
  space as one token each.
- If a caption ends in a single letter and a full stop, PTBTokenizer joins the two or splits them
  depending on the caption in the next line.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

# Tokens that the COCO tools drop. They keep `!!`, `?!` and brackets.
_DROPPED_TOKENS = "'' ' `` ` \" . ? ! , : - -- --- ---- ... ;"
_DROPPED = frozenset(_DROPPED_TOKENS.split())
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_REPLACEMENTS = {
    **dict.fromkeys("’‘‛", "'"),
    **dict.fromkeys("“”«»`", '"'),
    **dict.fromkeys("‒–—―", " -- "),
    "…": " ... ",
    "½": " 1/2 ",
    "¼": " 1/4 ",
    "¾": " 3/4 ",
    "⅓": " 1/3 ",
    "⅔": " 2/3 ",
    "£": "#",  # as in the Penn Treebank
    "€": "$",
    "¢": " cents ",
    "\u200b": " ",
    **dict.fromkeys("\u00ad\ufe0f「」『』", ""),
}
_REPLACED_CHARACTERS = str.maketrans(_REPLACEMENTS)
_DELETED = re.compile("[\U00010000-\U0010ffff]")  # mainly emoji

# Abbreviations that keep their full stop in upper and lower case.
_ABBREVIATIONS = """
adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bancorp bldg blvd brig bros calif capt
cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept dr drs elec ens esq est etc ext feb
fla fri ft gen gov govs hon inc ind insp intl jan jos jr jul jun kan kans ky lieut lt ltd maj mar md
messrs mich minn mlle mme mo mon mont mr mrs ms msgr mt natl neb nev nov oct okla penn pfc ph plc
pres prof profs pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel
tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo
"""
# Abbreviations that keep their full stop only in the spelling given here.
_CASED_ABBREVIATIONS = """
Ark ARK Bhd BHD Del DEL Det DET Ga GA Ill ILL La LA Mass MASS mfg Mfg Miss MISS Mtg Ore ORE Pa PA
pte Pte pty Pty Tex TEX Wash WASH
"""
# Abbreviations that keep their full stop only before a number.
_NUMBERED_ABBREVIATIONS = "art ca fig figs no nos op pp prop"
# If one of these words follows a single letter and a full stop, the full stop ends a sentence.
_SENTENCE_STARTS = """
A About According After An As At But Earlier He Her Here However If In It Last Many More Now Once
One Other Our She Since So Some Such That The Their Then There These They This We What When While
Yet You
"""


def _any_of(words: str) -> str:
    return "|".join(words.split())


def _combining_marks() -> str:
    """Returns the vowel signs and accents of Unicode."""
    signs = map(chr, range(0x300, 0xFE00))
    return "".join(sign for sign in signs if unicodedata.category(sign)[0] == "M")


_W = rf"(?:[^\W_²³¹⁰-₟]|[{_combining_marks()}])"  # a letter, a combining mark or a digit
_HYPHEN = "[-‐‑_/]"
_STOP_INSIDE = rf"(?<=[A-Za-z])[.!?](?=[A-Za-z]){_W}+"  # the.dog
_COMPOUND = (  # words and numbers joined by hyphens, such as t-shirt, or a single one
    rf"(?:[^\W\d_]{_W}*(?:{_HYPHEN}{_W}+|{_STOP_INSIDE})*|{_W}+(?:{_HYPHEN}{_W}+)*)"
)
_ABBREVIATION = (
    rf"(?:(?i:{_any_of(_ABBREVIATIONS)})|{_any_of(_CASED_ABBREVIATIONS)}"
    rf"|(?i:{_any_of(_NUMBERED_ABBREVIATIONS)})(?=\.\s*\d))\.(?!-?[A-Za-z])"
)
_INITIAL = (  # a single letter with a full stop
    rf"[A-Za-z]\.(?!{_W}*[A-Za-z])"
    rf"(?!\s+(?:(?:{_any_of(_SENTENCE_STARTS)})(?![\w'])|M[rs]\.\s))"
)
_TOKEN_PATTERNS = (  # the first pattern that matches determines the token
    r"(?!(?i:cannot|gonna|gotta|wanna|lemme|gimme)\b)[A-Za-z]+(?=[\s,;]|$)",  # fast, most words
    r"</?[A-Za-z!?][^<>\s]*>",
    r"(?i:https?)://[^\s\"<>]*[^\s\"<>.,;:!?()']",
    rf"{_W}[\w.+-]*@{_W}[\w-]*(?:\.{_W}[\w-]*)*",
    r"[#@][A-Za-z_]\w*",
    r"(?i:can(?=not\b)|gon(?=na\b)|got(?=ta\b)|wan(?=na\b)|lem(?=me\b)|gim(?=me\b)"
    r"|'t(?=is\b|was\b))",
    rf"[A-Za-z]+?(?=[nN]'[tT](?!{_W}))|[nN]'[tT](?!{_W})",
    rf"'(?i:s|m|d|ll|re|ve)(?!{_W})",
    rf"'[nN]'|'(?i:em|till?|cause|n|\d\ds|\d\d(?!'))(?!{_W})",
    rf"(?i:[odl]'[a-z]{_W}*(?:-{_W}+)*|[dl]'|ma'am|hallowe'en|ne'er|e'er|li'l|nat'l|s'mores|ol'"
    r"|y'(?=[a-z]))",
    rf"[A-Za-z](?:\.[A-Za-z])+\.?(?!{_W})|(?i:ph\.d)\b\.?",
    _ABBREVIATION,
    _INITIAL,
    rf"[-+]?\d*(?:[.,:]\d+)+(?:-[A-Za-z]{_W}*)*|[-+]\d+(?:[-/]\d+)*(?!{_W})",
    r"[A-Z]+(?:&[A-Z]+)+|[Cc](?:\+\+|#)|[A-Z]{1,2}\$",
    rf"{_COMPOUND}\.(?=[,;:])",  # PTBTokenizer keeps this full stop with the word
    _COMPOUND,
    rf"[:;=][-o]?(?:[()]|[DPO](?!{_W}))|\^_\^",
    r"[!?]+|\.{3,}|-{2,}|\*+|_+|'+",
    r"\S",
)
_TOKEN = re.compile(rf"\s*({'|'.join(_TOKEN_PATTERNS)})")
_CONTRACTED = "cannot gonna gotta wanna lemme gimme"
# Words that `_splits_at_spaces` must leave to the patterns although they consist of letters.
_SPECIAL = frozenset(f"{_CONTRACTED} {_ABBREVIATIONS} {_CASED_ABBREVIATIONS}".lower().split())


@lru_cache(maxsize=1 << 14)  # several metrics split the same captions
def ptb_words(caption: str) -> tuple[str, ...]:
    """Returns the words of a caption in lower case, without punctuation.

    >>> " ".join(ptb_words('A "man" isn\\'t riding (his) horse.'))
    "a man is n't riding -lrb- his -rrb- horse"
    """
    words = caption.rstrip().removesuffix(".").lower().split()
    if _splits_at_spaces(words):
        return tuple(words)
    text = caption.replace("&amp;", "&").translate(_REPLACED_CHARACTERS)
    words = []
    for token in _TOKEN.findall(_DELETED.sub("", text)):
        token = _BRACKETS.get(token, token)
        if token not in _DROPPED and not token.startswith(("...", "''")):
            words.append(_lower(token))
    return tuple(words)


def _splits_at_spaces(words: list[str]) -> bool:
    """Returns whether the patterns, which take ten times as long, would find exactly these words.

    This is true for most captions: letters only, without abbreviations and contractions.
    """
    if not words or len(words[-1]) <= 1:
        return False
    letters = "".join(words)
    return letters.isascii() and letters.isalpha() and _SPECIAL.isdisjoint(words)


def _lower(token: str) -> str:
    """Converts a token to lower case, and replaces the bracket of a smiley by its name."""
    if token[0] in ":;=" and token[-1] in "()":
        token = token[:-1] + _BRACKETS[token[-1]]
    return token.lower()
