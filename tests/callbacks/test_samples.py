from PIL import Image
from toy_task import ToyData, ToyTask, conversation, trainer

from qwenvl_lit.callbacks.samples import (
    CELL_PX,
    MARGIN_PX,
    MAX_LINES,
    TEXT_PX,
    SampleVisualiser,
    _wrap,
    contact_sheet,
)
from qwenvl_lit.rendering import fonts
from qwenvl_lit.rendering.fonts import font_for
from qwenvl_lit.types import Conversation, Prediction, Turn


def prediction(index: int, text: str = "yes") -> Prediction:
    return Prediction(conversation=conversation(index), text=text, parts=(), reference="yes")


def test_each_validation_writes_a_sheet_named_by_its_step(tmp_path):
    data = ToyData([conversation(i, says="yes") for i in range(6)])
    trainer(tmp_path, SampleVisualiser(count=3), max_epochs=2).fit(ToyTask(), data)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "step_000003.png",
        "step_000006.png",
    ]
    width, _ = Image.open(tmp_path / "samples/step_000003.png").size
    assert width == 3 * (CELL_PX + MARGIN_PX) + MARGIN_PX


def test_a_sanity_check_and_a_validation_without_answers_write_no_sheet(tmp_path):
    class Silent(ToyTask):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return None

    data = ToyData([conversation(i, says="yes") for i in range(2)])
    trainer(tmp_path / "a", SampleVisualiser(), max_epochs=1).fit(Silent(), data)
    trainer(
        tmp_path / "b",
        SampleVisualiser(),
        max_epochs=1,
        num_sanity_val_steps=2,
        limit_train_batches=0,
    ).fit(ToyTask(), data)
    assert not list(tmp_path.rglob("*.png"))


def test_sheets_have_four_columns_and_grow_downwards():
    predictions = [prediction(i) for i in range(5)]
    one, four, five = (contact_sheet(predictions[:count]) for count in (1, 4, 5))
    assert one.width == CELL_PX + 2 * MARGIN_PX
    assert five.width == four.width == 4 * CELL_PX + 5 * MARGIN_PX
    assert five.height > four.height == one.height


def test_long_texts_are_truncated():
    short, long, endless = (
        contact_sheet([prediction(0, text)]) for text in ("yes", "word " * 60, "x" * 5000)
    )
    assert short.height < long.height == endless.height


def test_no_line_is_wider_than_its_cell():
    for text in ("word " * 600, "مرحبا بالعالم " * 150, "x" * 2000, "\n".join("abcdefgh")):
        lines = _wrap(text, font_for(text, TEXT_PX))
        assert len(lines) == MAX_LINES
        assert lines[-1].endswith("...")
        assert max(map(font_for(text, TEXT_PX).getlength, lines)) <= CELL_PX


def test_lines_break_between_objects():
    objects = [f"<ref>{name}</ref><box>(0,499),(374,874)</box>" for name in ("house", "moon")]
    text = f"Answer: {''.join(objects)}"
    assert _wrap(text, font_for(text, TEXT_PX)) == ["Answer:", *objects]


def test_characters_without_a_font_are_codes_not_empty_boxes(monkeypatch):
    monkeypatch.setattr(fonts, "missing_characters", lambda text: "狗" if "狗" in text else "")
    drawn, codes = (contact_sheet([prediction(0, text)]) for text in ("a 狗", "a \\u72d7"))
    assert drawn.tobytes() == codes.tobytes()


def test_a_conversation_without_image_and_expected_answer_has_a_cell():
    row = Conversation(id="a", turns=(Turn(role="user", parts=("Who are you?",)),))
    sheet = contact_sheet([Prediction(conversation=row, text="", parts=())])
    assert sheet.width == CELL_PX + 2 * MARGIN_PX
