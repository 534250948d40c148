import pytest

from qwenvl_lit.models.chatml import (
    DEFAULT_SYSTEM,
    ChatML,
    Message,
    Piece,
    show,
    truncate_left,
    truncate_right,
    with_system,
)
from qwenvl_lit.types import DataError, Turn

START, END = 1000, 1001


def encode(text: str) -> list[int]:
    """Returns one token a character."""
    return [ord(character) for character in text]


def decode(ids) -> str:
    markers = {START: "[", END: "]"}
    return "".join(markers.get(token_id) or chr(token_id) for token_id in ids)


def message(role: str, text: str) -> Message:
    return Message(role, [Piece(encode(text))])


def written(pieces) -> str:
    return decode(token_id for piece in pieces for token_id in piece.ids)


def supervised(pieces) -> str:
    return written(piece for piece in pieces if piece.supervised)


def turn(role: str, *parts) -> Turn:
    return Turn(role=role, parts=parts)


TALK = [
    message("system", "S"),
    message("user", "q1"),
    message("assistant", "a1"),
    message("user", "q2"),
    message("assistant", "a2"),
]
CHAT = ChatML(encode, start=START, end=END)


def test_nothing_is_written_after_the_last_end_of_turn_token():
    assert (
        written(CHAT.render(TALK))
        == "[system\nS]\n[user\nq1]\n[assistant\na1]\n[user\nq2]\n[assistant\na2]"
    )


def test_answers_and_their_end_of_turn_tokens_are_supervised():
    assert supervised(CHAT.render(TALK)) == "a1]a2]"


@pytest.mark.parametrize("empty", [[], [Piece([])]])
def test_an_empty_answer_is_supervised_only_at_the_end(empty):
    # As in ms-swift 2.6.1: `use_dynamic_eos` looks for supervised tokens before the end of a turn,
    # and the last end-of-turn token is always supervised.
    talk = [
        *(message("user", "q1"), Message("assistant", empty)),
        *(message("user", "q2"), message("assistant", "a2")),
        *(message("user", "q3"), Message("assistant", empty)),
    ]
    assert supervised(CHAT.render(talk)) == "a2]]"
    assert supervised(CHAT.render([*talk, *talk])) == "a2]a2]]"
    assert supervised(CHAT.render([message("user", "q"), message("assistant", " "), *talk])) == (
        " ]a2]]"
    )
    official = ChatML(encode, start=START, end=END, supervise="official")
    assert supervised(official.render(talk)) == "[]\n[]\n[]\n[a2]\n[]\n[]\n"


def test_official_also_supervises_the_markup_of_every_turn():
    official = ChatML(encode, start=START, end=END, supervise="official")
    pieces = list(official.render(TALK))
    assert written(pieces).endswith("a2]\n")
    assert supervised(pieces) == "[]\n[]\n[a1]\n[]\n[a2]\n"


def test_a_prompt_opens_an_answer():
    pieces = list(CHAT.render(TALK[:2], prompt=True))
    assert written(pieces) == "[system\nS]\n[user\nq1]\n[assistant\n"
    assert supervised(pieces) == ""


def test_the_span_of_an_image_is_not_supervised_even_in_an_answer():
    answer = Message("assistant", [Piece(encode("see ")), Piece([7, 8, 9], image=0)])
    pieces = list(CHAT.render([answer]))
    assert supervised(pieces) == "see ]"


def test_a_conversation_without_system_message_gets_one():
    question = turn("user", "q")
    assert with_system([question], None) == (turn("system", DEFAULT_SYSTEM), question)
    assert with_system([question], "Be brief.") == (turn("system", "Be brief."), question)
    assert with_system([question], "") == (turn("system", ""), question)
    own = turn("system", "")
    assert with_system([own, question], "Be brief.") == (own, question)
    with pytest.raises(DataError, match="only come first"):
        with_system([question, turn("system", "late")], None)


def test_the_window_keeps_the_newest_exchanges_that_fit():
    # system: [system\nS] = 10 tokens; an exchange: \n[user\nqN] + \n[assistant\naN] = 10 + 15
    turns = [*TALK[:4]]
    assert CHAT.recent(turns, 36) == turns
    assert CHAT.recent(turns, 35) == [TALK[0], TALK[3]]  # 10 + 25 is not less than 35
    longer = [*TALK, message("user", "q3")]
    assert CHAT.recent(longer, 36) == [TALK[0], *longer[3:]]
    assert CHAT.recent(longer, 61) == longer


def test_the_window_stops_at_the_first_exchange_that_does_not_fit():
    long = [message("user", "q" * 100), message("assistant", "a")]
    talk = [message("system", "S"), *TALK[1:3], *long, *TALK[3:5], message("user", "last")]
    assert CHAT.recent(talk, 80) == [talk[0], *talk[5:]]


def test_the_last_question_and_the_system_message_always_stay():
    assert CHAT.recent(TALK[:4], 1) == [TALK[0], TALK[3]]
    assert CHAT.recent([message("user", "q")], 1) == [message("user", "q")]
    assert CHAT.recent(TALK[1:4], 1) == [TALK[3]]


def test_truncation_on_the_left_keeps_the_last_tokens():
    pieces = [Piece([1, 2, 3]), Piece([4]), Piece([5, 6], supervised=True)]
    assert truncate_left(pieces, 9) == pieces
    assert truncate_left(pieces, 4) == [Piece([3]), Piece([4]), Piece([5, 6], supervised=True)]
    assert truncate_left(pieces, 3) == [Piece([4]), Piece([5, 6], supervised=True)]
    assert truncate_left(pieces, 1) == [Piece([6], supervised=True)]
    assert truncate_left(pieces, 0) == []


def test_truncation_on_the_right_keeps_the_first_tokens():
    pieces = [Piece([1, 2, 3]), Piece([4]), Piece([5, 6], supervised=True)]
    assert truncate_right(pieces, 9) == pieces
    assert truncate_right(pieces, 5) == [*pieces[:2], Piece([5], supervised=True)]
    assert truncate_right(pieces, 4) == pieces[:2]
    assert truncate_right(pieces, 2) == [Piece([1, 2])]
    assert truncate_right(pieces, 0) == []


def test_truncation_never_splits_an_image():
    pieces = [Piece([1]), Piece([2, 3, 4], image=0), Piece([5]), Piece([6])]
    assert truncate_left(pieces, 5) == pieces[1:]
    assert truncate_right(pieces, 4) == pieces[:2]
    for limit in (2, 3, 4):
        assert truncate_left(pieces, limit) == pieces[2:]
        assert truncate_right(pieces, limit - 1) == pieces[:1]


def test_the_system_message_may_be_a_text_empty_or_none():
    question = turn("user", "q")
    assert with_system([question], "S") == (turn("system", "S"), question)
    assert with_system([question], "") == (turn("system", ""), question)
    assert with_system([question], "none") == (question,)
    own = [turn("system", "own"), question]
    assert with_system(own, "none") == tuple(own)


def test_show_colors_supervised_tokens_and_counts_repeated_ones():
    ids = [*encode("q"), *encode("!" * 20), START, *encode("ok"), END]
    labels = [-100] * 22 + ids[22:]
    assert show(ids, labels, decode) == "\x1b[2mq! x 20 [\x1b[0m\x1b[32mok]\x1b[0m"
    assert show([], [], decode) == ""
