import json
from dataclasses import replace

import pytest
from PIL import Image
from toy_task import ToyData, ToyTask, conversation, grounded, trainer

from qwenvl_lit.callbacks.predictions import PredictionWriter, prediction_row
from qwenvl_lit.data.predictions import merge_rank_files
from qwenvl_lit.rendering.text import prompt_text
from qwenvl_lit.types import (
    Box,
    Conversation,
    GroundedObject,
    ImageSource,
    Point,
    Prediction,
    Turn,
)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def write_rank_file(path, rows) -> None:
    lines = []
    for set_name, index in rows:
        row = {"set": set_name, "index": index, "id": f"{set_name}{index}"}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))


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
    prediction = Prediction(
        conversation=row, text="<ref>dog</ref>...", parts=("a ", dog), reference="x"
    )
    assert prediction_row(prediction, "val") == {
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


def test_a_box_without_an_image_is_in_the_frame_of_the_answer_and_names_none():
    row = Conversation(id="a", turns=(Turn(role="user", parts=("Where?",)),))
    dog = GroundedObject(label="dog", boxes=(Box(x0=1, y0=2, x1=3, y1=4, frame="grid"),))
    click = GroundedObject(boxes=(Point(x=0.17, y=0.06, frame="unit"),))
    written = prediction_row(Prediction(conversation=row, text="", parts=(dog, click)), "val")
    assert written["objects"] == [
        {"label": "dog", "boxes": [[1, 2, 3, 4]], "image": None, "frame": "grid"},
        {"label": None, "boxes": [[0.17, 0.06]], "image": None, "frame": "unit"},
    ]


def test_thoughts_are_written_only_where_there_are_any():
    row = Conversation(id="a", turns=(Turn(role="user", parts=("Why?",)),))
    prediction = Prediction(conversation=row, text="So.", parts=("So.",))
    assert "thoughts" not in prediction_row(prediction, "val")
    thinking = prediction_row(replace(prediction, thoughts="hm"), "val")
    assert (thinking["prediction"], thinking["thoughts"]) == ("So.", "hm")


def test_the_prompt_of_several_turns_names_the_speakers():
    texts = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "What is in it?"),
        ("assistant", "A dog"),
    ]
    turns = tuple(Turn(role=role, parts=(text,)) for role, text in texts)
    prompt = prompt_text(Conversation(id="a", turns=turns))
    assert prompt == "system: Be brief.\nuser: Hi\nassistant: Hello\nuser: What is in it?"
    single = Turn(role="user", parts=("Where is ", grounded("it", 1, 2, 3, 4)))
    assert prompt_text(Conversation(id="a", turns=(single,))) == "Where is it (1, 2, 3, 4)"


def test_files_of_ranks_merge_in_dataset_order_without_repeats(tmp_path):
    target = tmp_path / "p.jsonl"
    ranks = [tmp_path / "p.rank0.jsonl", tmp_path / "p.rank1.jsonl"]
    write_rank_file(ranks[0], [("easy", 2), ("easy", 0), ("hard", 0)])
    write_rank_file(ranks[1], [("easy", 1), ("easy", 0), ("hard", 1)])
    assert merge_rank_files(ranks, target) == 5
    assert [row["id"] for row in read(target)] == ["easy0", "easy1", "easy2", "hard0", "hard1"]
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_missing_file_of_a_rank_is_an_error_and_nothing_is_lost(tmp_path):
    rank0 = tmp_path / "p.rank0.jsonl"
    rank0.write_text('{"set": "a", "index": 0}\n')
    with pytest.raises(FileNotFoundError):
        merge_rank_files([rank0, tmp_path / "p.rank1.jsonl"], tmp_path / "p.jsonl")
    assert rank0.exists()


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
    text = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    assert "不" in text, "not escaped"
    assert rows[0]["images"] == ["<Image>"]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_the_file_may_have_another_name(tmp_path):
    data = ToyData(test={"question": [conversation(0, says="yes")]})
    trainer(tmp_path, PredictionWriter("answers.jsonl")).predict(
        ToyTask(), data, return_predictions=False
    )
    assert [row["set"] for row in read(tmp_path / "answers.jsonl")] == ["question"]


def test_an_interrupted_test_leaves_its_answers(tmp_path):
    class Fails(ToyTask):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 1:
                raise RuntimeError("out of memory")
            return super().test_step(batch, batch_idx, dataloader_idx)

    data = ToyData(test={"easy": [conversation(i, says="yes") for i in range(4)]})
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(tmp_path, PredictionWriter()).test(Fails(), data, verbose=False)
    assert [row["index"] for row in read(tmp_path / "predictions.rank0.jsonl")] == [0, 1]
