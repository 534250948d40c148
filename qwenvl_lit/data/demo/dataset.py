"""The embedded demo dataset: questions about drawn scenes, in the formats of published datasets.

It is written to files once, and a seed determines all of it.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

from qwenvl_lit.atomic import atomic_folder, disk_errors, write_text
from qwenvl_lit.bounds import check_number
from qwenvl_lit.data.demo.scenes import PLACEMENTS, SIDE_PX, Scene, SceneObject, scenes
from qwenvl_lit.data.demo.sprites import CLASSES, NEW_CLASSES
from qwenvl_lit.grounding import tags_from_object, to_frame
from qwenvl_lit.locks import ProcessLock
from qwenvl_lit.stored_files import read_json_object
from qwenvl_lit.types import Box, DataError, GroundedObject

Task = Literal["caption", "grounded", "find", "name", "count", "left", "right"]

# How often training asks each question. Finding a name in an image takes longest to learn.
TASKS: dict[Task, float] = {
    "caption": 1.5,
    "grounded": 2,
    "find": 1.5,
    "left": 0.75,
    "right": 0.75,
    "count": 0.75,
    "name": 0.5,
}
PAIR_TASKS = ("left", "right")  # questions about scenes with two objects
VQA_TASKS = ("count", "left", "right")  # questions in the files in VQA's style
IMAGE_PREFIX = "Picture 1: "
# Of the files. Raise it when their content changes, so that existing folders are written again.
VERSION = 1
MANIFEST = "manifest.json"

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question and its answer.

    The k-th `<ref-object>` stands for the k-th of `objects`, and so does the k-th `<bbox>`.
    """

    task: Task
    question: str
    answer: str
    objects: tuple[SceneObject, ...] = ()

    @property
    def has_only_box(self) -> bool:
        """Tells whether it has the box of an object without its label."""
        return "<bbox>" in self.answer and "<ref-object>" not in self.question + self.answer


def with_article(name: str) -> str:
    """Returns a name after "a" or "an".

    >>> with_article("apple")
    'an apple'
    """
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption(objects: Sequence[SceneObject]) -> str:
    """Describes objects in their order, which is from left to right.

    >>> caption([SceneObject(0, 0, 24, "car"), SceneObject(32, 8, 24, "umbrella")])
    'a car and an umbrella'
    """
    return " and ".join(with_article(obj.name) for obj in objects)


def tasks_of(scene: Scene) -> tuple[Task, ...]:
    """Returns the questions that can be asked about a scene."""
    if len(scene.objects) == 2:
        return tuple(TASKS)
    return tuple(task for task in TASKS if task not in PAIR_TASKS)


def ask(scene: Scene, task: Task, rng: random.Random) -> Exchange:
    """Returns one question; `rng` chooses the object and the wording where there is a choice."""
    objects = scene.objects
    obj = rng.choice(objects)
    match task:
        case "caption":
            return Exchange(task, "Describe the picture.", caption(objects))
        case "grounded":
            answer = "<ref-object><bbox>" * len(objects)
            return Exchange(task, "Describe with boxes.", answer, objects)
        case "find":
            question = rng.choice(("Find <ref-object>", f"Where is the {obj.name}?"))
            return Exchange(task, question, "<bbox>", (obj,))
        case "name":
            return Exchange(task, "What is at <bbox>?", "<ref-object>", (obj,))
        case "count":
            return Exchange(task, "How many objects?", str(len(objects)))
        case "left":
            return Exchange(task, "What is on the left?", objects[0].name)
        case "right":
            return Exchange(task, "What is on the right?", objects[-1].name)


def sentences() -> Iterator[str]:
    """Yields every text of the dataset: prompts, answers, labels, and coordinates between tags.

    A small vocabulary is learned from it.
    """
    names = (*CLASSES, *NEW_CLASSES)
    yield from (IMAGE_PREFIX, "1", "Find ", "What is at ", "?", *names, *map(with_article, names))
    for name in names:
        yield f"Where is the {name}?"
    for left, right in permutations(names, 2):
        scene = Scene((SceneObject(0, 0, 24, left), SceneObject(40, 0, 24, right)))
        for task in ("caption", "grounded", "count", "left", "right"):
            exchange = ask(scene, task, random.Random(0))
            for text in (exchange.question, exchange.answer):
                if "<" not in text:
                    yield text
    for x, y, size in PLACEMENTS:
        box = to_frame(Box(x0=x, y0=y, x1=x + size, y1=y + size), "grid", size=(SIDE_PX, SIDE_PX))
        for tag in tags_from_object(GroundedObject(boxes=(box,)), ()):
            if isinstance(tag, str):
                yield tag


def write_demo(
    folder: str | Path,
    download: bool = True,
    *,
    seed: int = 0,
    train: int = 4800,
    single: int = 1200,
    validation: int = 60,
    test: int = 400,
    unseen_pairs: int = 100,
    new_classes: int = 200,
) -> Path:
    """Writes the demo dataset into `folder` and returns it.

    A folder that holds the same dataset is kept; one with another version or other sizes is
    replaced. The folder appears complete or not at all. Several processes may call this at once.

    - `images/*.png`: the images of all files below.
    - `train_single.jsonl`: a curriculum of `single` images of one object, captioned with or without
      a box.
    - `train.jsonl`: `train` images with two questions each, as one conversation.
    - `validation.jsonl`, `test.jsonl`, `unseen_pairs.jsonl`: every question about that many images,
      one a row. The column `task` names the question.
    - `new_classes_train.jsonl`, `new_classes_test.jsonl`: `new_classes` images of `NEW_CLASSES` to
      train on, and an eighth of that to test.
    - `coco/annotations/{captions,instances}_{train,test}.json`: the same images in COCO's format,
      with `images/` as the folder of images.
    - `vqa_train.jsonl`, `vqa_test.jsonl`: the counting and left/right questions, in the style of
      VQA datasets.

    Args:
        download: without effect; the functions that prepare other datasets have it.

    Raises:
        DataError: the folder holds something else.
    """
    folder = Path(folder)
    sizes = {
        "train": train,
        "single": single,
        "validation": validation,
        "test": test,
        "unseen_pairs": unseen_pairs,
        "new_classes": new_classes,
    }
    for name, count in sizes.items():
        check_number(f"data.prepare.{name}", count, least=0, most=10**6, whole=True)
    manifest = {"version": VERSION, "seed": seed, **sizes}
    written = _manifest_of(folder)
    if written == manifest:
        return folder
    if written is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{folder} exists and is not a demo dataset; choose another folder or remove it"
        )
    advice = (
        "free disk space there, or choose another folder with data.root=, or paths.cache= for all"
    )
    with disk_errors(folder, advice):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = ProcessLock(folder.with_name(f".{folder.name}.lock"))
        while not lock.acquire():
            time.sleep(0.1)
        try:
            if _manifest_of(folder) != manifest:  # another process may have written it meanwhile
                with atomic_folder(folder) as unfinished:
                    _write_files(unfinished, sizes, seed)
                    write_text(unfinished / MANIFEST, json.dumps(manifest))
        finally:
            lock.release()
    return folder


def _manifest_of(folder: Path) -> dict[str, int] | None:
    """Reads what is in the folder; None if it does not say."""
    try:
        return read_json_object(folder / MANIFEST)
    except DataError:
        return None


def _write_files(folder: Path, sizes: Mapping[str, int], seed: int) -> None:
    new = sizes["new_classes"]
    plan: dict[str, tuple[Iterator[Scene], Callable[..., Iterator[Row]]]] = {
        "train_single": (scenes("train", sizes["single"], seed, pairs=0), _curriculum_rows),
        "train": (scenes("train", sizes["train"], seed), _training_rows),
        "validation": (scenes("validation", sizes["validation"], seed), _test_rows),
        "test": (scenes("test", sizes["test"], seed), _test_rows),
        "unseen_pairs": (scenes("unseen_pairs", sizes["unseen_pairs"], seed), _test_rows),
        "new_classes_train": (scenes("train", new, seed, classes=NEW_CLASSES), _training_rows),
        "new_classes_test": (scenes("test", new // 8, seed, classes=NEW_CLASSES), _test_rows),
    }
    (folder / "images").mkdir(parents=True)
    (folder / "coco" / "annotations").mkdir(parents=True)
    for name, (drawn, rows_of) in plan.items():
        by_stem = {f"{name}_{number:05}": scene for number, scene in enumerate(drawn)}
        for stem, scene in by_stem.items():
            scene.draw().save(folder / "images" / f"{stem}.png", compress_level=1)
        rng = random.Random(f"{name} {seed}")
        rows: list[Row] = []
        for stem, scene in by_stem.items():
            rows += rows_of(stem, scene, rng)
        _write_lines(folder / f"{name}.jsonl", rows)
        if name in ("train", "test"):
            _write_lines(folder / f"vqa_{name}.jsonl", _vqa_rows(by_stem, test=name == "test"))
            for kind, content in _coco(by_stem).items():
                file = folder / "coco" / "annotations" / f"{kind}_{name}.json"
                file.write_text(json.dumps(content))


def _write_lines(file: Path, rows: Iterable[Row]) -> None:
    with file.open("w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def _curriculum_rows(stem: str, scene: Scene, rng: random.Random) -> Iterator[Row]:
    """Yields one row: a caption with or without boxes."""
    task: Task = rng.choice(("caption", "grounded"))
    yield chat_row(stem, stem, [ask(scene, task, rng)])


def _training_rows(stem: str, scene: Scene, rng: random.Random) -> Iterator[Row]:
    """Yields one row: two different questions, drawn with the weights `TASKS`."""
    # The largest u ** (1 / weight) of uniform u are a weighted sample without replacement.
    drawn = sorted(
        tasks_of(scene), key=lambda task: rng.random() ** (1 / TASKS[task]), reverse=True
    )
    # Only the first of these two is asked: the box in its text would answer the other one.
    excluded = "grounded" if drawn.index("find") < drawn.index("grounded") else "find"
    exchanges = [ask(scene, task, rng) for task in drawn if task != excluded][:2]
    # A box without a label comes last: `<ref-object>` and `<bbox>` are counted apart, and after it
    # the k-th of each would no longer belong to the same object.
    yield chat_row(stem, stem, sorted(exchanges, key=lambda exchange: exchange.has_only_box))


def _test_rows(stem: str, scene: Scene, rng: random.Random) -> Iterator[Row]:
    """Yields a row for every question, so that each has a score."""
    for task in tasks_of(scene):
        yield chat_row(f"{stem}_{task}", stem, [ask(scene, task, rng)])


def chat_row(name: str, stem: str, exchanges: Sequence[Exchange]) -> Row:
    """Returns a row in the layout `conversations`, about the image `images/<stem>.png`."""
    turns = []
    objects = []
    for exchange in exchanges:
        turns.append({"from": "user", "value": exchange.question})
        turns.append({"from": "assistant", "value": exchange.answer})
        for obj in exchange.objects:
            objects.append(
                {"caption": obj.name, "bbox": obj.box_px, "bbox_type": "real", "image": 0}
            )
    turns[0]["value"] = f"{IMAGE_PREFIX}<img>images/{stem}.png</img>\n{turns[0]['value']}"
    row: Row = {
        "id": name,
        "task": "+".join(exchange.task for exchange in exchanges),
        "conversations": turns,
    }
    if objects:
        row["objects"] = objects
    return row


def _vqa_rows(by_stem: Mapping[str, Scene], *, test: bool) -> Iterator[Row]:
    """Yields rows in the layout `vqa`, with ten answers in test files, as VQA datasets have."""
    for stem, scene in by_stem.items():
        for task in tasks_of(scene):
            if task not in VQA_TASKS:
                continue
            exchange = ask(scene, task, random.Random(0))
            row: Row = {
                "question_id": f"{stem}_{task}",
                "image": f"images/{stem}.png",
                "question": exchange.question,
            }
            if test:
                row["answers"] = [exchange.answer] * 10
            else:
                row["answer"] = exchange.answer
            row["task"] = task
            yield row


def _coco(by_stem: Mapping[str, Scene]) -> dict[str, Row]:
    """Returns captions and instances in COCO's format, with ids from 1 on."""
    images, captions, boxes = [], [], []
    for number, (stem, scene) in enumerate(by_stem.items(), 1):
        images.append(
            {"id": number, "file_name": f"{stem}.png", "width": SIDE_PX, "height": SIDE_PX}
        )
        captions.append({"id": number, "image_id": number, "caption": caption(scene.objects)})
        for obj in scene.objects:
            annotation = {
                "id": len(boxes) + 1,
                "image_id": number,
                "category_id": CLASSES.index(obj.name) + 1,
                "bbox": [obj.x, obj.y, obj.size, obj.size],
                "area": obj.size**2,
                "iscrowd": 0,
            }
            boxes.append(annotation)
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
    return {
        "captions": {"images": images, "annotations": captions},
        "instances": {"images": images, "annotations": boxes, "categories": categories},
    }
