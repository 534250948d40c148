import json
import random

import pytest
from PIL import Image, ImageChops

from qwenvl_lit.data.demo.dataset import TASKS, ask, chat_row, sentences, tasks_of, write_demo
from qwenvl_lit.data.demo.scenes import PLACES, Scene, Thing, reserved_corners, scenes, split_of
from qwenvl_lit.data.demo.sprites import CLASSES, NEW_CLASSES, draw_sprite
from qwenvl_lit.data.readers.coco import read_coco_captions
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.types import DataError, GroundedObject

CAR, TREE = Thing(0, 16, 24, "car"), Thing(32, 8, 32, "tree")
SIZES = {
    "train": 60,
    "single": 20,
    "validation": 4,
    "test": 8,
    "unseen_pairs": 4,
    "new_classes": 16,
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("data") / "demo", **SIZES)


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def pairs_of(scene):
    return {(thing.name, (thing.x, thing.y)) for thing in scene.things}


def test_there_are_sixteen_classes_and_four_new_ones():
    assert len(set(CLASSES)) == 16
    assert len(set(NEW_CLASSES) - set(CLASSES)) == 4


@pytest.mark.parametrize("name", [*CLASSES, *NEW_CLASSES])
def test_a_thing_fills_its_box_to_the_pixel(name):
    thing = Thing(8, 24, 32, name)
    scene = Scene((thing,), background=(240, 240, 240))
    changed = ImageChops.difference(scene.draw(), Image.new("RGB", (64, 64), scene.background))
    assert changed.getbbox() == thing.box_px == (8, 24, 40, 56)


def test_a_image_for_people_is_the_same_one_larger():
    scene = Scene((CAR, TREE))
    small, large = scene.draw(), scene.draw(scale=4)
    assert (small.size, large.size) == ((64, 64), (256, 256))
    difference = ImageChops.difference(large.resize((64, 64), Image.Resampling.BOX), small)
    assert max(high for _, high in difference.getextrema()) < 40  # outlines are sharper


def test_no_two_classes_look_alike():
    images = {name: draw_sprite(name, 24) for name in (*CLASSES, *NEW_CLASSES)}
    for first in images:
        for second in images:
            if first < second:
                difference = ImageChops.difference(
                    images[first].convert("RGB"), images[second].convert("RGB")
                )
                assert sum(difference.convert("L").tobytes()) / 24**2 > 20, (first, second)


def test_things_stand_on_the_grid_of_patches_apart_and_left_to_right():
    for scene in scenes("train", 500, seed=3):
        for thing in scene.things:
            assert (thing.x, thing.y, thing.size) in PLACES
            assert all(value % 8 == 0 and 0 <= value <= 64 for value in thing.box_px)
        if len(scene.things) == 2:
            left, right = scene.things
            assert left.x + left.size <= right.x
            assert left.name != right.name


def test_scenes_follow_from_the_seed():
    assert list(scenes("train", 20, seed=1)) == list(scenes("train", 20, seed=1))
    assert list(scenes("train", 20, seed=1)) != list(scenes("train", 20, seed=2))


@pytest.mark.parametrize(
    ("things", "split"),
    [
        ([Thing(0, 0, 24, "car")], "train"),
        ([Thing(24, 32, 24, "car")], "validation"),
        ([Thing(0, 8, 24, "car")], "test"),
        ([Thing(8, 24, 24, "car")], "unseen_pairs"),
        ([Thing(8, 24, 24, "car"), Thing(40, 0, 24, "tree")], "unseen_pairs"),
    ],
)
def test_which_split_may_show_a_scene_never_changes(things, split):
    assert split_of(things) == split


def test_no_content_is_in_two_splits():
    seen = {
        split: {scene.things for seed in (0, 1) for scene in scenes(split, 300, seed)}
        for split in ("train", "validation", "test")
    }
    seen["train"] |= {scene.things for scene in scenes("train", 2000, pairs=0)}
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]
    assert all(any(len(things) == 1 for things in split) for split in seen.values())


def test_unseen_pairs_show_a_class_where_no_other_split_does():
    reserved = {(name, corner) for name in CLASSES for corner in reserved_corners(name)}
    assert len(reserved) == 2 * 16
    for split in ("train", "validation", "test"):
        assert not reserved & {pair for scene in scenes(split, 500) for pair in pairs_of(scene)}
    assert all(reserved & pairs_of(scene) for scene in scenes("unseen_pairs", 200))


def test_every_class_is_at_every_other_place_in_training():
    shown = {pair for scene in scenes("train", 20_000, pairs=1) for pair in pairs_of(scene)}
    assert len(shown) == 16 * (36 - 2)


@pytest.mark.parametrize(
    ("task", "question", "answer", "things"),
    [
        ("caption", "Describe the picture.", "a car and a tree", ()),
        ("grounded", "Describe with boxes.", "<ref-object><bbox><ref-object><bbox>", (CAR, TREE)),
        ("count", "How many objects?", "2", ()),
        ("left", "What is on the left?", "car", ()),
        ("right", "What is on the right?", "tree", ()),
    ],
)
def test_questions_with_one_wording(task, question, answer, things):
    exchange = ask(Scene((CAR, TREE)), task, random.Random(0))
    assert (exchange.question, exchange.answer, exchange.things) == (question, answer, things)


def test_a_thing_is_sought_in_two_wordings_and_named_by_its_box():
    scene = Scene((CAR,))
    asked = {ask(scene, "find", random.Random(seed)) for seed in range(20)}
    assert {(e.question, e.answer, e.things) for e in asked} == {
        ("Find <ref-object>", "<bbox>", (CAR,)),
        ("Where is the car?", "<bbox>", (CAR,)),
    }
    named = ask(scene, "name", random.Random(0))
    assert (named.question, named.answer, named.things) == (
        "What is at <bbox>?",
        "<ref-object>",
        (CAR,),
    )


def test_left_and_right_are_asked_of_two_things_only():
    assert tasks_of(Scene((CAR,))) == ("caption", "grounded", "find", "count", "name")
    assert set(tasks_of(Scene((CAR, TREE)))) == set(TASKS)


def test_a_row_is_in_the_chat_layout_of_qwen_vl():
    scene = Scene((CAR, TREE))
    assert chat_row(
        "7", "x", [ask(scene, "grounded", random.Random(0)), ask(scene, "count", random.Random(0))]
    ) == {
        "id": "7",
        "task": "grounded+count",
        "conversations": [
            {"from": "user", "value": "Picture 1: <img>images/x.png</img>\nDescribe with boxes."},
            {"from": "assistant", "value": "<ref-object><bbox><ref-object><bbox>"},
            {"from": "user", "value": "How many objects?"},
            {"from": "assistant", "value": "2"},
        ],
        "objects": [
            {"caption": "car", "bbox": (0, 16, 24, 40), "bbox_type": "real", "image": 0},
            {"caption": "tree", "bbox": (32, 8, 64, 40), "bbox_type": "real", "image": 0},
        ],
    }


def test_training_rows_ask_two_questions_and_tests_one(demo):
    tasks = [row["task"].split("+") for row in rows_of(demo / "train.jsonl")]
    assert all(len(set(asked)) == len(asked) == 2 for asked in tasks)
    assert not any({"find", "grounded"} <= set(asked) for asked in tasks), (
        "one would give the other's answer away"
    )
    assert {task for asked in tasks for task in asked} == set(TASKS)
    for name in ("validation", "test", "unseen_pairs", "new_classes_test"):
        rows = rows_of(demo / f"{name}.jsonl")
        assert all(len(row["conversations"]) == 2 for row in rows)
        assert {row["task"] for row in rows} <= set(TASKS)


def test_single_objects_are_captioned_first(demo):
    rows = rows_of(demo / "train_single.jsonl")
    assert len(rows) == 20
    assert {row["task"] for row in rows} == {"caption", "grounded"}
    assert all(" and " not in row["conversations"][1]["value"] for row in rows)
    assert all(len(row.get("objects", [])) <= 1 for row in rows)


def test_new_classes_are_in_their_own_files_only(demo):
    texts = {file.stem: file.read_text() for file in demo.glob("*.jsonl")}
    for name, text in texts.items():
        old, new = (
            any(f'"{label}"' in text or f" {label}" in text for label in labels)
            for labels in (CLASSES, NEW_CLASSES)
        )
        assert (old, new) == (not name.startswith("new_classes"), name.startswith("new_classes"))


def test_written_rows_are_read_with_the_boxes_that_were_drawn(demo):
    drawn = list(scenes("test", SIZES["test"]))
    asked = [
        row
        for row in read_rows("test.jsonl", ReadOptions(root=demo))
        if row.columns["task"] == "grounded"
    ]
    assert len(asked) == len(drawn)
    for row, scene in zip(asked, drawn, strict=True):
        assert row.images[0].open().tobytes() == scene.draw().tobytes()
        boxes = [
            (thing.label, *((box.x0, box.y0, box.x1, box.y1) for box in thing.boxes))
            for thing in row.answer.parts
        ]
        assert boxes == [(thing.name, thing.box_px) for thing in scene.things]


def test_every_training_row_can_be_read(demo):
    for name in (
        "train_single",
        "train",
        "validation",
        "unseen_pairs",
        "new_classes_train",
        "new_classes_test",
        "vqa_train",
        "vqa_test",
    ):
        assert all(row.answer for row in read_rows(f"{name}.jsonl", ReadOptions(root=demo))), name


def test_coco_and_vqa_files_say_the_same_as_the_chat_file(demo):
    chat = {
        (row.images[0].name, row.columns["task"]): row.answer.parts
        for row in read_rows("test.jsonl", ReadOptions(root=demo))
    }
    captions = read_coco_captions(
        "coco/annotations/captions_test.json", ReadOptions(root=demo), images="images"
    )
    assert [row.answer.parts for row in captions] == [
        chat[row.images[0].name, "caption"] for row in captions
    ]
    for row in read_rows("vqa_test.jsonl", ReadOptions(root=demo)):
        assert row.answer.parts == chat[row.images[0].name, row.columns["task"]]
        assert row.references == row.answer.parts * 10
    instances = json.loads((demo / "coco/annotations/instances_test.json").read_text())
    names = {category["id"]: category["name"] for category in instances["categories"]}
    first = next(scenes("test", 1)).things[0]
    assert names[instances["annotations"][0]["category_id"]] == first.name
    assert instances["annotations"][0]["bbox"] == [first.x, first.y, first.size, first.size]


def test_sentences_hold_every_text_that_is_written(demo):
    known = set(sentences())
    for file in demo.glob("[!v]*.jsonl"):
        for row in read_rows(str(file)):
            for part in (part for turn in row.turns for part in turn.parts):
                text = (
                    part.label
                    if isinstance(part, GroundedObject)
                    else part
                    if isinstance(part, str)
                    else None
                )
                assert text is None or text.removeprefix("\n") in known, text
    assert "(124,249),(499,624)" in known  # of a thing at (8, 16), 24 pixels large


def test_the_same_folder_is_kept_and_another_size_written_anew(tmp_path):
    sizes = dict.fromkeys(SIZES, 1)
    folder = write_demo(tmp_path / "demo", **sizes)
    content = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    marked = folder / "mark"
    marked.touch()
    write_demo(folder, **sizes)
    assert marked.exists()
    write_demo(folder, **sizes | {"test": 2})
    assert not marked.exists()
    assert (folder / "images/test_00001.png").exists()
    write_demo(folder, **sizes)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == content
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_of_somebody_else_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not a demo dataset"):
        write_demo(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failure_leaves_nothing_half_written(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_demo(tmp_path / "demo", **SIZES | {"seed": object()})
    assert not list(tmp_path.iterdir())
