"""Where tags and markup are read, and where they are text."""

import pytest

from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTokenizer
from qwenvl_lit.types import BadImage, DataError, GroundedObject, ImageSource

WIKI = "Water boils at 100 C.<ref>Handbook, p. 3</ref> See <box>note</box>."
ANSWERS = [
    "Title\n\n![figure 3](<image>)\n\nText.",
    WIKI,
    'Text <img src="x.png" alt="x"> and <img>inner</img>',
    "<ref name=a>Handbook</ref> end <ref>open",
    "<ref-object> <bbox> <quad> <video> <|im_end|>",
]


def row_with(answer, question="<image>Write it down.", images=("a.png",)):
    return {"query": question, "response": answer, "images": list(images)}


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_are_text_where_only_questions_have_markup(folder, read_row, answer):
    row = read_row(row_with(answer), markup="questions")
    image = ImageSource(folder / "a.png")
    assert row.turns[0].parts == (image, "Write it down.")
    assert row.turns[1].parts == (answer,)
    assert row.notes == ()


@pytest.mark.parametrize("answer", ANSWERS)
def test_literal_tags_of_an_answer_return_from_its_tokens(read_row, answer):
    tokenizer = QwenTokenizer(TINY_VOCABULARY)
    processor = QwenVLProcessor(tokenizer, tokens_per_image=4, image_size=32)
    sample = processor.encode(read_row(row_with(answer), markup="questions"))
    supervised = [label for label in sample.labels.tolist() if label >= 0]
    assert supervised[-1] == tokenizer.im_end_id
    assert not set(supervised[:-1]) & set(tokenizer.special.values())
    assert tokenizer.decode(supervised[:-1]) == answer


def test_markup_is_read_in_all_turns_in_questions_or_nowhere(read_row):
    row = {
        "query": "<image><ref>It</ref>?",
        "response": "<box>(1,2),(3,4)</box>",
        "images": ["a.png"],
    }
    kinds = {}
    for markup in ("all", "questions", "none"):
        turns = read_row(row, markup=markup).turns
        kinds[markup] = [[type(part) for part in turn.parts] for turn in turns]
    question = [ImageSource, GroundedObject, str]
    assert kinds["all"] == [question, [GroundedObject]]
    assert kinds["questions"] == [question, [str]]
    assert kinds["none"] == [[ImageSource, str], [str]]


def test_without_markup_images_come_before_the_question(folder, read_row):
    row = read_row(row_with("x", "What does <image> mean in <img>HTML</img>?"), markup="none")
    assert row.turns[0].parts == (
        ImageSource(folder / "a.png"),
        "What does <image> mean in <img>HTML</img>?",
    )


def test_items_of_the_type_image_are_images_without_markup_too(folder, read_row):
    content = [{"type": "text", "text": "<ref>"}, {"type": "image"}]
    row = {"messages": [{"role": "user", "content": content}], "images": ["a.png"]}
    question = read_row(row, markup="none").turns[0].parts
    assert question == ("<ref>", ImageSource(folder / "a.png"))


def test_image_tags_in_answers_are_text_once_questions_have_all_images(folder, read_row):
    row = read_row(row_with("![figure](<image>) <image>"))
    assert row.turns[1].parts == ("![figure](<image>) <image>",)
    assert row.images == (ImageSource(folder / "a.png"),)
    assert row.notes == (
        "2 <image> tags in answers are text, because `images` has no image for them; "
        "data.markup=questions confirms this",
    )


def test_image_tags_in_answers_are_images_while_there_are_some_left(folder, read_row):
    row = read_row(row_with("<image> and <image>", images=("a.png", "b.png")))
    b = ImageSource(folder / "b.png")
    assert row.turns[1].parts == (b, " and <image>")
    assert row.notes[0].startswith("1 <image> tags in answers are text")


def test_images_without_tags_in_questions_come_before_answers_with_more_tags(folder, read_row):
    row = read_row(row_with("<image> <image>", "Write it down."))
    assert row.turns[0].parts[0] == ImageSource(folder / "a.png")
    assert row.turns[1].parts == ("<image> <image>",)
    assert read_row(row_with("<image>", "?", images=())).turns[1].parts == ("<image>",)


def test_an_image_in_an_answer_is_noted(folder, read_row):
    row = read_row(row_with("<image>", "Draw."))
    assert row.turns[1].parts[0] == ImageSource(folder / "a.png")
    assert row.notes == (
        "an <image> tag in an answer is an image; if the answer means this text literally, "
        "set data.markup=questions",
    )


def test_an_image_item_of_an_answer_is_never_text(read_row):
    answer = {"role": "assistant", "content": [{"type": "image"}]}
    messages = [{"role": "user", "content": "<image>"}, answer]
    with pytest.raises(DataError, match="2 <image> tags for 1 `images`"):
        read_row({"messages": messages, "images": ["a.png"]})


def test_a_label_in_an_answer_of_a_row_without_boxes_is_noted(read_row):
    row = read_row(row_with("Water boils.<ref>Handbook, p. 3</ref>"))
    assert row.notes == (
        "the answer has the label 'Handbook, p. 3' in <ref> tokens, "
        "and the row has no box; if the answer means this text literally, "
        "set data.markup=questions",
    )
    for question, answer in (
        ("Find <ref>it</ref>.", "<ref>it</ref><box>(1,2),(3,4)</box>"),
        ("<box>(1,2),(3,4)</box>?", "<ref>it</ref>"),
        ("Find <ref>it</ref>.", "no"),
    ):
        assert read_row(row_with(answer, f"<image>{question}")).notes == ()


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        ("?", WIKI, r"cannot read '<box>note</box>.*set data\.markup=questions"),
        ("?", "<ref>open", r"cannot read '<ref>open'.*set data\.markup=questions"),
        ("?", "<img>inner</img>", r"inner does not exist.*set data\.markup=questions"),
        ("<ref>open", "x", r"cannot read '<ref>open'.*set data\.markup=none"),
        ("<image><image>", "<image>", "3 <image> tags for 1 `images`"),
    ],
)
def test_an_error_in_markup_names_the_way_to_have_it_as_text(read_row, question, answer, message):
    with pytest.raises(DataError, match=message):
        read_row(row_with(answer, question))


def test_a_missing_image_of_an_answer_is_a_bad_image(read_row):
    with pytest.raises(BadImage):
        read_row(row_with("<img>inner</img>"))


def test_an_unknown_markup_is_refused(read_row):
    with pytest.raises(DataError, match="markup must be one of all, questions, none, got 'some'"):
        read_row(row_with("x"), markup="some")


# Images that are named twice


@pytest.mark.parametrize("images", [["a.png", "b.png"], ["./a.png", "b.png"]])
def test_images_that_repeat_those_of_the_text_are_used_once(folder, read_row, images):
    row = read_row(row_with("x", "<img>a.png</img><img>b.png</img>Compare", images))
    assert row.images == (ImageSource(folder / "a.png"), ImageSource(folder / "b.png"))
    assert row.turns[0].parts[-1] == "Compare"


def test_images_that_repeat_those_of_items_are_used_once(folder, read_row):
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    row = read_row({"messages": [{"role": "user", "content": content}], "images": ["a.png"]})
    assert row.turns[0].parts == (ImageSource(folder / "a.png"), "What?")


def test_images_that_repeat_only_some_of_the_text_are_refused(read_row):
    with pytest.raises(DataError, match=r"'a\.png' is in `images` and is named by path in the"):
        read_row(row_with("x", "<img>a.png</img>Compare", ["a.png", "b.png"]))


def test_other_images_are_put_before_those_of_the_text(folder, read_row):
    row = read_row(row_with("x", "<img>b.png</img>Compare", ["a.png"]))
    assert row.images == (ImageSource(folder / "a.png"), ImageSource(folder / "b.png"))
