import json

import pytest
from PIL import Image
from toy_task import ToyData, ToyTask, conversation, grounded, trainer

from qwenvl_lit.callbacks.predictions import PredictionWriter, prediction_row
from qwenvl_lit.data.predictions import merge_rank_files
from qwenvl_lit.rendering.text import prompt_text
from qwenvl_lit.types import Box, Conversation, GroundedObject, ImageSource, Prediction, Turn


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_row_is_plain_data_with_boxes_in_pixels(tmp_path):
    file = tmp_path / "a.png"
    Image.new("RGB", (640, 427)).save(file)
    row = Conversation(
        id="coco/42",
        index=7,
        turns=(
            Turn(
                role="user",
                parts=(ImageSource(file), "Find ", GroundedObject(label="the dog"), "."),
            ),
            Turn(role="assistant", parts=("x",)),
        ),
        references=("a dog", "the dog"),
        columns={"task": "find"},
    )
    dog = GroundedObject(label="dog", boxes=(Box(x0=1, y0=2.004, x1=3.3333, y1=4),))
    assert prediction_row(
        Prediction(conversation=row, text="<ref>dog</ref>...", parts=("a ", dog), reference="x"),
        "val",
    ) == {
        "set": "val",
        "index": 7,
        "id": "coco/42",
        "prompt": f"<img>{file}</img>Find the dog.",
        "images": [str(file)],
        "prediction": "<ref>dog</ref>...",
        "reference": "x",
        "references": ["a dog", "the dog"],
        "objects": [{"label": "dog", "boxes": [[1, 2, 3.33, 4]], "image": 0, "frame": "pixel"}],
        "columns": {"task": "find"},
    }


def test_a_box_without_an_image_is_on_the_grid_and_names_none():
    row = Conversation(id="a", turns=(Turn(role="user", parts=("Where?",)),))
    dog = GroundedObject(label="dog", boxes=(Box(x0=1, y0=2, x1=3, y1=4, frame="grid"),))
    written = prediction_row(Prediction(conversation=row, text="", parts=(dog,)), "val")
    assert written["objects"] == [
        {"label": "dog", "boxes": [[1, 2, 3, 4]], "image": None, "frame": "grid"}
    ]


def test_the_prompt_of_several_turns_names_the_speakers():
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "What is in it?"),
        ("assistant", "A dog"),
    ]
    row = Conversation(id="a", turns=tuple(Turn(role=role, parts=(text,)) for role, text in turns))
    assert prompt_text(row) == "system: Be brief.\nuser: Hi\nassistant: Hello\nuser: What is in it?"
    assert prompt_text(
        Conversation(
            id="a", turns=(Turn(role="user", parts=("Where is ", grounded("it", 1, 2, 3, 4))),)
        )
    ) == ("Where is it (1, 2, 3, 4)")


def test_parts_of_ranks_merge_in_dataset_order_without_repeats(tmp_path):
    rank0, rank1, target = (
        tmp_path / "p.rank0.jsonl",
        tmp_path / "p.rank1.jsonl",
        tmp_path / "p.jsonl",
    )
    rank0.write_text(
        "".join(
            json.dumps({"set": s, "index": i, "id": f"{s}{i}"}) + "\n"
            for s, i in [("easy", 2), ("easy", 0), ("hard", 0)]
        )
    )
    rank1.write_text(
        "".join(
            json.dumps({"set": s, "index": i, "id": f"{s}{i}"}) + "\n"
            for s, i in [("easy", 1), ("easy", 0), ("hard", 1)]
        )
    )
    assert merge_rank_files([rank0, rank1], target) == 5
    assert [row["id"] for row in read(target)] == ["easy0", "easy1", "easy2", "hard0", "hard1"]
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_missing_part_is_an_error_and_loses_nothing(tmp_path):
    part = tmp_path / "p.rank0.jsonl"
    part.write_text('{"set": "a", "index": 0}\n')
    with pytest.raises(FileNotFoundError):
        merge_rank_files([part, tmp_path / "p.rank1.jsonl"], tmp_path / "p.jsonl")
    assert part.exists()


def test_testing_writes_every_set_in_order(tmp_path):
    sets = {
        "easy": [conversation(i, says="yes") for i in range(3)],
        "hard": [conversation(i, says="no, 不") for i in range(2)],
    }
    trainer(tmp_path, PredictionWriter()).test(ToyTask(), ToyData(test=sets), verbose=False)
    rows = read(tmp_path / "predictions.jsonl")
    assert [(row["set"], row["index"], row["prediction"]) for row in rows] == [
        ("easy", 0, "yes"),
        ("easy", 1, "yes"),
        ("easy", 2, "yes"),
        ("hard", 0, "no, 不"),
        ("hard", 1, "no, 不"),
    ]
    assert "不" in (tmp_path / "predictions.jsonl").read_text(
        encoding="utf-8"
    )  # to be read by people
    assert rows[0]["images"] == ["<Image>"]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_predicting_writes_under_another_name_too(tmp_path):
    data = ToyData(test={"question": [conversation(0, says="yes")]})
    trainer(tmp_path, PredictionWriter("answers.jsonl")).predict(
        ToyTask(), data, return_predictions=False
    )
    assert [row["set"] for row in read(tmp_path / "answers.jsonl")] == ["question"]


def test_an_interrupted_test_leaves_what_was_answered(tmp_path):
    class Stops(ToyTask):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 1:
                raise RuntimeError("out of memory")
            return super().test_step(batch, batch_idx, dataloader_idx)

    data = ToyData(test={"easy": [conversation(i, says="yes") for i in range(4)]})
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(tmp_path, PredictionWriter()).test(Stops(), data, verbose=False)
    assert [row["index"] for row in read(tmp_path / "predictions.rank0.jsonl")] == [0, 1]
