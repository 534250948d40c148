from dataclasses import replace

from PIL import Image
from toy_task import ToyData, ToyTask, conversation, grounded, trainer

from qwenvl_lit.callbacks.boxes import BoxDrawer
from qwenvl_lit.rendering.text import images_with_boxes
from qwenvl_lit.types import Conversation, ImageSource, Prediction, Turn


def test_the_first_images_of_each_set_are_drawn(tmp_path):
    sets = {
        "easy": [conversation(i, says="yes") for i in range(5)],
        "hard": [conversation(0, says="no")],
    }
    trainer(tmp_path, BoxDrawer(limit=3)).test(ToyTask(), ToyData(test=sets), verbose=False)
    drawn = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert drawn == [
        "boxes/easy/000000.png",
        "boxes/easy/000001.png",
        "boxes/easy/000002.png",
        "boxes/hard/000000.png",
    ]
    assert Image.open(tmp_path / drawn[0]).size == (320, 320)


def test_the_limit_counts_from_zero_in_each_run_of_a_trainer(tmp_path):
    drawer, data = BoxDrawer(limit=1), ToyData(test={"easy": [conversation(0, says="yes")]})
    trainer(tmp_path / "a", drawer).test(ToyTask(), data, verbose=False)
    trainer(tmp_path / "b", drawer).predict(ToyTask(), data, return_predictions=False)
    assert (tmp_path / "b/boxes/easy/000000.png").exists()


def test_only_images_with_boxes_are_drawn():
    images = tuple(ImageSource(Image.new("RGB", (8, 8))) for _ in range(3))
    obj = grounded("a", 0, 0, 4, 4)
    turns = (
        Turn(role="user", parts=images),
        Turn(role="assistant", parts=(replace(obj, image=1),)),
    )
    row = Conversation(id="a", turns=turns)

    def boxed(row: Conversation, *parts) -> list[int]:
        return images_with_boxes(Prediction(conversation=row, text="", parts=parts))

    assert boxed(row) == [1]
    assert boxed(row, replace(obj, image=2), "text") == [1, 2]
    assert boxed(row.prompt(), "text") == []
