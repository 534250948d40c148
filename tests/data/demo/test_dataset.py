import json
import multiprocessing
import random
import time

import pytest
from PIL import Image, ImageChops

from qwenvl_lit.data.demo.dataset import TASKS, ask, chat_row, sentences, tasks_of, write_demo
from qwenvl_lit.data.demo.scenes import (
    PLACEMENTS,
    Scene,
    SceneObject,
    reserved_corners,
    scenes,
    split_of,
)
from qwenvl_lit.data.demo.sprites import CLASSES, NEW_CLASSES, draw_sprite
from qwenvl_lit.data.readers.coco import read_coco_captions
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.types import DataError, GroundedObject

CAR, TREE = SceneObject(0, 16, 24, "car"), SceneObject(32, 8, 32, "tree")
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


def names_and_corners(scene):
    return {(obj.name, (obj.x, obj.y)) for obj in scene.objects}


def test_there_are_sixteen_classes_and_four_new_ones():
    assert len(set(CLASSES)) == 16
    assert len(set(NEW_CLASSES) - set(CLASSES)) == 4


@pytest.mark.parametrize("name", [*CLASSES, *NEW_CLASSES])
def test_an_object_fills_its_box_to_the_pixel(name):
    obj = SceneObject(8, 24, 32, name)
    scene = Scene((obj,), background=(240, 240, 240))
    changed = ImageChops.difference(scene.draw(), Image.new("RGB", (64, 64), scene.background))
    assert changed.getbbox() == obj.box_px == (8, 24, 40, 56)


def test_a_scaled_image_shows_the_same_scene():
    scene = Scene((CAR, TREE))
    small, large = scene.draw(), scene.draw(scale=4)
    assert (small.size, large.size) == ((64, 64), (256, 256))
    difference = ImageChops.difference(large.resize((64, 64), Image.Resampling.BOX), small)
    assert max(high for _, high in difference.getextrema()) < 40  # outlines are sharper


def test_no_two_classes_look_the_same():
    images = {name: draw_sprite(name, 24) for name in (*CLASSES, *NEW_CLASSES)}
    for first in images:
        for second in images:
            if first < second:
                difference = ImageChops.difference(
                    images[first].convert("RGB"), images[second].convert("RGB")
                )
                assert sum(difference.convert("L").tobytes()) / 24**2 > 20, (first, second)


def test_objects_are_aligned_to_patches_and_listed_from_left_to_right():
    for scene in scenes("train", 500, seed=3):
        for obj in scene.objects:
            assert (obj.x, obj.y, obj.size) in PLACEMENTS
            assert all(value % 8 == 0 and 0 <= value <= 64 for value in obj.box_px)
        if len(scene.objects) == 2:
            left, right = scene.objects
            assert left.x + left.size <= right.x
            assert left.name != right.name


def test_the_seed_determines_the_scenes():
    assert list(scenes("train", 20, seed=1)) == list(scenes("train", 20, seed=1))
    assert list(scenes("train", 20, seed=1)) != list(scenes("train", 20, seed=2))


@pytest.mark.parametrize(
    ("objects", "split"),
    [
        ([SceneObject(0, 0, 24, "car")], "train"),
        ([SceneObject(24, 32, 24, "car")], "validation"),
        ([SceneObject(0, 8, 24, "car")], "test"),
        ([SceneObject(8, 24, 24, "car")], "unseen_pairs"),
        ([SceneObject(8, 24, 24, "car"), SceneObject(40, 0, 24, "tree")], "unseen_pairs"),
    ],
)
def test_the_split_of_a_scene_never_changes(objects, split):
    assert split_of(objects) == split


def test_no_objects_are_in_two_splits():
    seen = {
        split: {scene.objects for seed in (0, 1) for scene in scenes(split, 300, seed)}
        for split in ("train", "validation", "test")
    }
    seen["train"] |= {scene.objects for scene in scenes("train", 2000, pairs=0)}
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]
    for contents in seen.values():
        assert any(len(objects) == 1 for objects in contents)


def test_unseen_pairs_show_a_class_where_no_other_split_does():
    reserved = {(name, corner) for name in CLASSES for corner in reserved_corners(name)}
    assert len(reserved) == 2 * 16
    for split in ("train", "validation", "test"):
        for scene in scenes(split, 500):
            assert not reserved & names_and_corners(scene)
    for scene in scenes("unseen_pairs", 200):
        assert reserved & names_and_corners(scene)


def test_every_class_is_at_every_other_corner_in_training():
    shown = set()
    for scene in scenes("train", 20_000, pairs=1):
        shown |= names_and_corners(scene)
    assert len(shown) == 16 * (36 - 2)


@pytest.mark.parametrize(
    ("task", "question", "answer", "objects"),
    [
        ("caption", "Describe the picture.", "a car and a tree", ()),
        ("grounded", "Describe with boxes.", "<ref-object><bbox><ref-object><bbox>", (CAR, TREE)),
        ("count", "How many objects?", "2", ()),
        ("left", "What is on the left?", "car", ()),
        ("right", "What is on the right?", "tree", ()),
    ],
)
def test_questions_with_one_wording(task, question, answer, objects):
    exchange = ask(Scene((CAR, TREE)), task, random.Random(0))
    assert (exchange.question, exchange.answer, exchange.objects) == (question, answer, objects)


def test_finding_has_two_wordings_and_naming_asks_about_a_box():
    scene = Scene((CAR,))
    exchanges = {ask(scene, "find", random.Random(seed)) for seed in range(20)}
    assert {(each.question, each.answer, each.objects) for each in exchanges} == {
        ("Find <ref-object>", "<bbox>", (CAR,)),
        ("Where is the car?", "<bbox>", (CAR,)),
    }
    named = ask(scene, "name", random.Random(0))
    assert (named.question, named.answer, named.objects) == (
        "What is at <bbox>?",
        "<ref-object>",
        (CAR,),
    )


def test_left_and_right_are_asked_about_two_objects_only():
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
    assert all(len(set(pair)) == len(pair) == 2 for pair in tasks)
    # The answer to one of these contains the answer to the other.
    assert not any({"find", "grounded"} <= set(pair) for pair in tasks)
    assert {task for pair in tasks for task in pair} == set(TASKS)
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


def names_any(labels, text):
    return any(f'"{label}"' in text or f" {label}" in text for label in labels)


def test_new_classes_are_in_their_own_files_only(demo):
    texts = {file.stem: file.read_text() for file in demo.glob("*.jsonl")}
    for name, text in texts.items():
        is_new = name.startswith("new_classes")
        assert names_any(CLASSES, text) != is_new
        assert names_any(NEW_CLASSES, text) == is_new


def test_written_rows_have_the_images_and_boxes_that_were_drawn(demo):
    drawn = list(scenes("test", SIZES["test"]))
    rows = read_rows("test.jsonl", ReadOptions(root=demo))
    grounded = [row for row in rows if row.columns["task"] == "grounded"]
    assert len(grounded) == len(drawn)
    for row, scene in zip(grounded, drawn, strict=True):
        assert row.images[0].open().tobytes() == scene.draw().tobytes()
        boxes = [
            (obj.label, *((box.x0, box.y0, box.x1, box.y1) for box in obj.boxes))
            for obj in row.answer.parts
        ]
        assert boxes == [(obj.name, obj.box_px) for obj in scene.objects]


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


def test_coco_and_vqa_files_agree_with_the_chat_file(demo):
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
    first = next(scenes("test", 1)).objects[0]
    assert names[instances["annotations"][0]["category_id"]] == first.name
    assert instances["annotations"][0]["bbox"] == [first.x, first.y, first.size, first.size]


def test_sentences_contain_every_text_that_is_written(demo):
    known = set(sentences())
    for file in demo.glob("[!v]*.jsonl"):
        for row in read_rows(str(file)):
            for part in (part for turn in row.turns for part in turn.parts):
                match part:
                    case str(text) | GroundedObject(label=str(text)):
                        assert text.removeprefix("\n") in known, text
    assert "(124,249),(499,624)" in known  # of an object at (8, 16) with a size of 24 pixels


def test_a_folder_with_the_same_sizes_is_kept_and_another_one_replaced(tmp_path):
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


def test_several_processes_may_write_the_same_folder(tmp_path):
    processes = [
        multiprocessing.get_context("fork").Process(
            target=write_demo, args=(tmp_path / "demo",), kwargs=SIZES
        )
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    assert list(tmp_path.iterdir()) == [tmp_path / "demo"]


def test_a_folder_with_other_files_is_refused_and_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not a demo dataset"):
        write_demo(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_nothing_is_left_after_a_failure(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_demo(tmp_path / "demo", **SIZES | {"seed": object()})
    assert not list(tmp_path.iterdir())


def test_the_next_start_removes_what_a_killed_one_has_left(tmp_path):
    folder = tmp_path / "demo"
    context = multiprocessing.get_context("fork")
    process = context.Process(target=write_demo, args=(folder,), kwargs=SIZES | {"train": 5000})
    process.start()
    while not list(tmp_path.glob(".demo.*.part/*.jsonl")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not folder.exists()
    write_demo(folder, **SIZES)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("manifest", ["", "{", "[1]"])
def test_a_folder_with_a_damaged_manifest_is_refused(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(DataError, match="not a demo dataset"):
        write_demo(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").touch()
    message = (
        r"cache/demo cannot be written: File exists; free disk space there, or .*paths\.cache="
    )
    with pytest.raises(DataError, match=message):
        write_demo(tmp_path / "cache/demo", **SIZES)
