import re
from pathlib import Path

import pytest
from html_tags import EVIL, Tags
from PIL import Image

from qwenvl_lit.data.inspection import inspect
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTokenizer
from qwenvl_lit.reports.data_page import examples, write_page
from qwenvl_lit.types import Box, Conversation, DataError, GroundedObject, ImageSource, Turn

PROCESSOR = QwenVLProcessor(QwenTokenizer(TINY_VOCABULARY), tokens_per_image=16, image_size=32)
GREY = ImageSource(Image.new("RGB", (400, 400), "grey"))


def row(row_id: str, *question, answer=("red",)) -> Conversation:
    turns = (Turn(role="user", parts=question), Turn(role="assistant", parts=answer))
    return Conversation(id=row_id, turns=turns, where=f"a.jsonl:{row_id}")


class RowsWithErrors(list):
    """Rows of which each None cannot be read."""

    def __getitem__(self, index):
        if isinstance(index, int) and super().__getitem__(index) is None:
            raise DataError(f"a.jsonl:{index + 1}: {EVIL}")
        return super().__getitem__(index)


def page_of(folder: Path, sets, prompts=(), count=10) -> str:
    inspection = inspect(sets, PROCESSOR, prompts=prompts)
    shown = examples(inspection, sets, PROCESSOR, count=count)
    write_page(inspection, shown, folder / "report.html", title="Data <here>")
    return (folder / "report.html").read_text(encoding="utf-8")


def test_supervised_text_is_marked_and_boxes_are_drawn(tmp_path):
    box = GroundedObject(label="it", boxes=(Box(x0=100, y0=100, x1=300, y1=300),))
    rows = [row("7", GREY, "Find it", answer=(box,))]
    inspection = inspect({"train": rows}, PROCESSOR)
    [example] = examples(inspection, {"train": rows}, PROCESSOR)
    assert [text for text, supervised in example.runs if supervised] == [
        "<ref>it</ref><box>(249,249),(749,749)</box><|im_end|>"
    ]
    assert example.reference is None
    [image] = example.images
    assert image.getpixel((100, 200)) != image.getpixel((200, 200)) == (128, 128, 128)
    page = page_of(tmp_path, {"train": rows})
    assert (
        '<span class="supervised">&lt;ref&gt;it&lt;/ref&gt;'
        "&lt;box&gt;(249,249),(749,749)&lt;/box&gt;&lt;|im_end|&gt;</span>"
    ) in page
    assert "a.jsonl:7" in page
    assert "No errors." in page


def test_labels_of_boxes_are_html_text_in_any_script(tmp_path):
    box = GroundedObject(label="<สุนัข>", boxes=(Box(x0=100, y0=100, x1=300, y1=300),))
    page = page_of(tmp_path, {"train": [row("7", GREY, "Find it", answer=(box,))]})
    assert re.search(r'<p class="labels predicted">(1: )?&lt;สุนัข&gt;</p>', page)


def test_a_prompt_is_shown_with_its_expected_answer(tmp_path):
    rows = [row("1", GREY, "Colour?", answer=("grey",))]
    inspection = inspect({"test": rows}, PROCESSOR, prompts=["test"])
    [example] = examples(inspection, {"test": rows}, PROCESSOR)
    assert example.reference == "grey"
    assert [supervised for _, supervised in example.runs] == [False]
    assert "Expected" in page_of(tmp_path, {"test": rows}, prompts=["test"])


def test_examples_come_from_all_sets_and_from_usable_rows_only():
    usable = [row(str(n), f"{n}?") for n in range(20)]
    sets = {
        "train": RowsWithErrors([None, *usable, None]),
        "test": [row("a", "A?"), row("b", "B?")],
    }
    inspection = inspect(sets, PROCESSOR)
    shown = examples(inspection, sets, PROCESSOR, count=10, seed=1)
    assert [example.set_name for example in shown] == ["train"] * 8 + ["test"] * 2
    assert len({example.conversation.id for example in shown}) == 10
    assert shown == examples(inspection, sets, PROCESSOR, count=10, seed=1)
    assert len(examples(inspection, sets, PROCESSOR, count=100)) == 22


def test_text_of_the_data_never_becomes_markup(tmp_path):
    sets = {EVIL: RowsWithErrors([row(EVIL, EVIL, answer=(EVIL,)), None])}
    page = Tags(page_of(tmp_path, sets))
    assert not page.names() & {"script", "img", "link", "iframe"}
    assert not [name for name in page.attribute_names() if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 4  # set, id, question and answer, error
    assert "Data <here>" in page.text
    assert "1 error:" in page.text


def test_the_page_loads_nothing_from_elsewhere(tmp_path):
    page = page_of(tmp_path, {"train": [row(str(n), GREY, "?" * n) for n in range(1, 40)]})
    assert set(re.findall(r"(?:src|href)=\"(\w+:)", page)) == {"data:"}
    assert "url(" not in page
    assert page.count("<svg") == 1
    assert page.count("data:image/jpeg;base64,") == 10


@pytest.mark.parametrize("count", [0, 3])
def test_the_page_shows_as_many_examples_as_asked_for(tmp_path, count):
    page = page_of(tmp_path, {"train": [row(str(n), f"{n}?") for n in range(5)]}, count=count)
    assert page.count('<section class="example">') == count
