import re
from pathlib import Path

import pytest
from html_tags import EVIL, Tags
from PIL import Image

from qwenvl_lit.data.inspection import inspect
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import TINY_VOCABULARY, QwenTokenizer
from qwenvl_lit.reports.data_page import examples, write_page
from qwenvl_lit.types import Box, Conversation, DataError, GroundedObject, ImageSource, Turn

PROCESSOR = QwenVLProcessor(QwenTokenizer(TINY_VOCABULARY), tokens_per_image=16, image_size=32)
GREY = ImageSource(Image.new("RGB", (400, 400), "grey"))


def talk(id: str, *question, answer=("red",)) -> Conversation:
    return Conversation(
        id=id,
        turns=(Turn(role="user", parts=question), Turn(role="assistant", parts=answer)),
        where=f"a.jsonl:{id}",
    )


class Faulty(list):
    def __getitem__(self, place):
        if isinstance(place, int) and super().__getitem__(place) is None:
            raise DataError(f"a.jsonl:{place + 1}: {EVIL}")
        return super().__getitem__(place)


def page_of(folder: Path, sets, prompts=(), count=10) -> str:
    inspection = inspect(sets, PROCESSOR, prompts=prompts)
    write_page(
        inspection,
        examples(inspection, sets, PROCESSOR, count=count),
        folder / "report.html",
        title="Data <here>",
    )
    return (folder / "report.html").read_text(encoding="utf-8")


def test_learned_text_is_marked_and_boxes_are_drawn(tmp_path):
    box = GroundedObject(label="it", boxes=(Box(x0=100, y0=100, x1=300, y1=300),))
    rows = [talk("7", GREY, "Find it", answer=(box,))]
    inspection = inspect({"train": rows}, PROCESSOR)
    [example] = examples(inspection, {"train": rows}, PROCESSOR)
    assert [text for text, learned in example.runs if learned] == [
        "<ref>it</ref><box>(249,249),(749,749)</box><|im_end|>"
    ]
    assert example.expected is None
    [image] = example.images
    assert image.getpixel((100, 200)) != image.getpixel((200, 200)) == (128, 128, 128)
    page = page_of(tmp_path, {"train": rows})
    assert (
        '<span class="learned">&lt;ref&gt;it&lt;/ref&gt;&lt;box&gt;(249,249),(749,749)&lt;/box&gt;&lt;|im_end|&gt;</span>'
        in page
    )
    assert "a.jsonl:7" in page
    assert "No errors." in page


def test_a_prompt_is_shown_with_what_is_expected(tmp_path):
    rows = [talk("1", GREY, "Colour?", answer=("grey",))]
    inspection = inspect({"test": rows}, PROCESSOR, prompts=["test"])
    [example] = examples(inspection, {"test": rows}, PROCESSOR)
    assert example.expected == "grey"
    assert [learned for _, learned in example.runs] == [False]
    assert "Expected" in page_of(tmp_path, {"test": rows}, prompts=["test"])


def test_examples_come_from_all_sets_and_from_usable_rows_only():
    sets = {
        "train": Faulty([None, *(talk(str(n), f"{n}?") for n in range(20)), None]),
        "test": [talk("a", "A?"), talk("b", "B?")],
    }
    inspection = inspect(sets, PROCESSOR)
    shown = examples(inspection, sets, PROCESSOR, count=10, seed=1)
    assert [example.set for example in shown] == ["train"] * 8 + ["test"] * 2
    assert len({example.conversation.id for example in shown}) == 10
    assert shown == examples(inspection, sets, PROCESSOR, count=10, seed=1)
    assert len(examples(inspection, sets, PROCESSOR, count=100)) == 22


def test_nothing_of_the_data_becomes_markup(tmp_path):
    sets = {EVIL: Faulty([talk(EVIL, EVIL, answer=(EVIL,)), None])}
    page = Tags(page_of(tmp_path, sets))
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "link", "iframe")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 4  # set, id, question and answer, error
    assert "Data <here>" in page.text
    assert "1 error:" in page.text


def test_the_page_needs_nothing_else(tmp_path):
    page = page_of(tmp_path, {"train": [talk(str(n), GREY, "?" * n) for n in range(1, 40)]})
    assert set(re.findall(r"(?:src|href)=\"(\w+:)", page)) == {"data:"}
    assert "url(" not in page
    assert page.count("<svg") == 1
    assert page.count("data:image/jpeg;base64,") == 10


@pytest.mark.parametrize("count", [0, 3])
def test_the_number_of_examples_is_a_choice(tmp_path, count):
    page = page_of(tmp_path, {"train": [talk(str(n), f"{n}?") for n in range(5)]}, count=count)
    assert page.count('<section class="example">') == count
