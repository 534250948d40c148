"""Words of captions; every pair was produced by Stanford's PTBTokenizer 3.4.1."""

import pytest

from qwenvl_lit.metrics.ptb import ptb_words

PAIRS = {
    "A man, riding a horse!": "a man riding a horse",
    "a dog etc.": "a dog etc.",
    "Mr. Smith and Mrs. Jones on St. Mark's St.": "mr. smith and mrs. jones on st. mark 's st.",
    "A man at 5 p.m. walks": "a man at 5 p.m. walks",
    "a flag of the U.S.": "a flag of the u.s.",
    "No. 5 train, no. five": "no. 5 train no five",
    "a a. The": "a a the",
    "a J. Rowling and vitamin c.": "a j. rowling and vitamin c.",
    "an Ore. mine of iron ore.": "an ore. mine of iron ore",
    "the dog., then": "the dog. then",
    "cannot can't won't I'm you're he's": "can not ca n't wo n't i 'm you 're he 's",
    "they've we'd she'll o'clock": "they 've we 'd she 'll o'clock",
    "gonna gotta wanna lemme gimme dunno 'tis 'twas d'ye": (
        "gon na got ta wan na lem me gim me dunno 't is 't was d'ye"
    ),
    "GONNA, Cannots": "gon na cannots",
    "couldn't've I'd've DON'T don't-know": "could n't 've i 'd 've do n't do n't know",
    "It's the dogs' bowl and the boy's toy": "it 's the dogs bowl and the boy 's toy",
    "rock 'n' roll rock'n'roll": "rock 'n' roll rock 'n' roll",
    "y'all y'know ya'll": "y' all y' know ya 'll",
    "'em 'til 'cause 'bout ol' goin' '80s '80's": "'em 'til 'cause bout ol' goin '80s 80 's",
    "O'Neill's McDonald's ma'am li'l s'mores": "o'neill 's mcdonald 's ma'am li'l s'mores",
    "an old-fashioned 3-year-old t-shirt, x-ray.": "an old-fashioned 3-year-old t-shirt x-ray",
    "-start end- mid - dash -- a--b ----- x": "start end mid dash a b ----- x",
    "4x4 truck, 10,000 people, 3.5 miles 1/2 eaten .5 -5 1+1": (
        "4x4 truck 10,000 people 3.5 miles 1/2 eaten .5 -5 1 +1"
    ),
    "10:30am 10:30 am 10am 5'8 6'2\" 1,000-foot 3.5mm": (
        "10:30 am 10:30 am 10am 5 8 6 2 1,000-foot 3.5 mm"
    ),
    "$5.00 bill and 50% off #1 fan #one £5 €10 5¢ US$5": (
        "$ 5.00 bill and 50 % off # 1 fan #one # 5 $ 10 5 cents us$ 5"
    ),
    "AT&T sign & R&B a&b &amp; B&w": "at&t sign & r&b a & b & b & w",
    "\"quoted text\" 'single' ``back'' “curly” ‘curly’ it’s don’t": (
        "quoted text single back curly curly it 's do n't"
    ),
    'The (big) "dog" -- it\'s 3.5 years-old...': "the -lrb- big -rrb- dog it 's 3.5 years-old",
    "word(s) [bracket] {brace} <b>tag</b> <unk>": (
        "word -lrb- s -rrb- -lsb- bracket -rsb- -lcb- brace -rcb- <b> tag </b> <unk>"
    ),
    "http://www.foo.com/bar www.foo.com. me@foo.com #hashtag @user": (
        "http://www.foo.com/bar www.foo.com me@foo.com #hashtag @user"
    ),
    ":) :-) ;-) :D a:b a : b": ":-rrb- :--rrb- ;--rrb- :d a b a b",
    "and/or w/ w/o his/her's": "and/or w / w/o his/her 's",
    "star*star ** under_score a_ C++ c# ~ ^ a|b": "star * star ** under_score a _ c++ c# ~ ^ a | b",
    "hey!! what?! no? yes! ... .. hello!World the dog.The cat": (
        "hey !! what ?! no yes hello!world the dog.the cat"
    ),
    "wait — dash – en-dash a–b 5—6": "wait dash en-dash a b 5 6",
    "½ cup 1½ 5° 5×5 m²": "1/2 cup 1 1/2 5 ° 5 × 5 m ²",
    "café naïve Ünïcode résumé’s": "café naïve ünïcode résumé 's",
    "日本語テキスト 你好，世界！": "日本語テキスト 你好 ， 世界 ！",
    "एक आदमी घोड़े पर सवार है।": "एक आदमी घोड़े पर सवार है ।",
    "мужчина едет. رجل يركب": "мужчина едет رجل يركب",
    "man😀 😀😀 ❤️ ★": "man ❤ ★",
    "  line\nbreak\there  ": "line break here",
    "": "",
    " . ": "",
}


@pytest.mark.parametrize(("caption", "words"), PAIRS.items(), ids=range(len(PAIRS)))
def test_captions_are_split_as_the_coco_tools_do(caption, words):
    assert " ".join(ptb_words(caption)) == words


@pytest.mark.parametrize("last", ["dog", "dogs", "c", "Ave", "ore", "no", "etc"])
def test_the_fast_path_for_plain_captions_gives_the_same_words(last):
    """The comma disables the fast path."""
    assert ptb_words(f"The man sees a {last}.") == ptb_words(f"The man, sees a {last}.")
