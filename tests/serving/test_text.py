from hypothesis import given, settings
from hypothesis import strategies as st
from serving.served import PROCESSOR, ids_of

from qwenvl_lit.serving.text import AnswerText


def decode(ids):
    return PROCESSOR.tokenizer.decode(ids, skip_special=True, keep=PROCESSOR.shown_ids)


def pieces(text: str, *stops: str) -> tuple[list[str], AnswerText]:
    answer = AnswerText(decode, stops)
    arrived = []
    for token_id in ids_of(text):
        arrived.append(answer.add([token_id]))
        if answer.stopped:
            break
    return [*arrived, answer.end()], answer


def test_a_piece_never_ends_within_a_character():
    arrived, answer = pieces("猫 é 🐕!")
    assert answer.text == "".join(arrived) == "猫 é 🐕!"
    assert "\ufffd" not in "".join(arrived)


def test_white_space_at_both_ends_is_left_out_and_kept_within():
    arrived, answer = pieces(" \n a  b \n")
    assert answer.text == "a  b"
    assert arrived[-1] == ""


def test_an_answer_that_ends_within_a_character_shows_that():
    answer = AnswerText(decode)
    [*ids, _] = ids_of("猫")
    assert answer.add(ids) == ""
    assert answer.end() == "\ufffd"


def test_text_before_a_stop_string_is_the_answer():
    arrived, answer = pieces("one two three", "two")
    assert (answer.text, answer.stopped) == ("one", True)
    assert "".join(arrived) == "one"


def test_what_only_begins_a_stop_string_is_given_out_later():
    arrived, answer = pieces("aab aac", "aad")
    assert (answer.text, answer.stopped) == ("aab aac", False)
    assert "".join(arrived) == "aab aac"


def test_the_first_of_several_stop_strings_counts():
    assert pieces("a\n\nb. c", ".", "\n\n")[1].text == "a"
    assert pieces("\nb", "\n")[1].text == ""


@settings(deadline=None)
@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_pieces_together_are_the_text_up_to_the_first_stop(text, stops):
    whole = decode(ids_of(text))
    starts = [whole.find(stop) for stop in stops if stop in whole]
    expected = whole[: min(starts, default=None)].strip()
    arrived, answer = pieces(text, *stops)
    assert answer.text == "".join(arrived) == expected
