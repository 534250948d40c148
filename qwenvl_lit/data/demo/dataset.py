"""The embedded demo dataset: questions about drawn scenes, written once as files like those of real datasets. All follows from a seed."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from qwenvl_lit.data.demo.scenes import PLACES, SIDE_PX, Scene, Thing, scenes
from qwenvl_lit.data.demo.sprites import CLASSES, NEW_CLASSES
from qwenvl_lit.grounding import tags_from_object, to_frame
from qwenvl_lit.types import Box, DataError, GroundedObject

Task = Literal["caption", "grounded", "find", "name", "count", "left", "right"]

# How often training asks what. To look a name up in an image ("find") takes longest to learn.
TASKS: dict[Task, float] = {
    "caption": 1.5,
    "grounded": 2,
    "find": 1.5,
    "left": 0.75,
    "right": 0.75,
    "count": 0.75,
    "name": 0.5,
}
IMAGE_PREFIX = "Picture 1: "
VERSION = 1  # of the files below; raise it when their content changes, so that folders written before are written anew
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question and its answer. The k-th `<ref-object>` stands for the k-th of `things`, and so does the k-th `<bbox>`."""

    task: Task
    question: str
    answer: str
    things: tuple[Thing, ...] = ()


def with_article(name: str) -> str:
    """
    >>> with_article("apple")
    'an apple'
    """
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption(things: Sequence[Thing]) -> str:
    """Left to right.

    >>> caption([Thing(0, 0, 24, "car"), Thing(32, 8, 24, "umbrella")])
    'a car and an umbrella'
    """
    return " and ".join(with_article(thing.name) for thing in things)


def tasks_of(scene: Scene) -> tuple[Task, ...]:
    """What can be asked: left and right need two things."""
    return tuple(task for task in TASKS if len(scene.things) == 2 or task not in ("left", "right"))


def ask(scene: Scene, task: Task, rng: random.Random) -> Exchange:
    """One question; `rng` chooses the thing and the wording where there is a choice."""
    things = scene.things
    thing = rng.choice(things)
    match task:
        case "caption":
            return Exchange(task, "Describe the picture.", caption(things))
        case "grounded":
            return Exchange(
                task, "Describe with boxes.", "<ref-object><bbox>" * len(things), things
            )
        case "find":
            return Exchange(
                task,
                rng.choice(("Find <ref-object>", f"Where is the {thing.name}?")),
                "<bbox>",
                (thing,),
            )
        case "name":
            return Exchange(task, "What is at <bbox>?", "<ref-object>", (thing,))
        case "count":
            return Exchange(task, "How many objects?", str(len(things)))
        case "left":
            return Exchange(task, "What is on the left?", things[0].name)
        case "right":
            return Exchange(task, "What is on the right?", things[-1].name)


def sentences() -> Iterator[str]:
    """Every text that can occur: prompts, answers, labels, and what stands between box tags. For learning a small vocabulary."""
    names = (*CLASSES, *NEW_CLASSES)
    yield from (IMAGE_PREFIX, "1", "Find ", "What is at ", "?", *names, *map(with_article, names))
    yield from (f"Where is the {name}?" for name in names)
    for left, right in permutations(names, 2):
        scene = Scene((Thing(0, 0, 24, left), Thing(40, 0, 24, right)))
        for task in ("caption", "grounded", "count", "left", "right"):
            exchange = ask(scene, task, random.Random(0))
            yield from (text for text in (exchange.question, exchange.answer) if "<" not in text)
    for x, y, size in PLACES:
        box = to_frame(Box(x0=x, y0=y, x1=x + size, y1=y + size), "grid", size=(SIDE_PX, SIDE_PX))
        yield from (
            text
            for text in tags_from_object(GroundedObject(boxes=(box,)), ())
            if isinstance(text, str)
        )


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
    """Write the demo dataset into `folder`, or keep what is there if it is the same; returns the folder. It appears complete or not at all.
    `download`, which other datasets ask before they fetch anything, changes nothing here.

    - `images/*.png`, shared by all files below;
    - `train_single.jsonl`: the curriculum, captions with and without boxes of `single` images of one thing;
    - `train.jsonl`: `train` images with two questions each, as one conversation;
    - `validation.jsonl`, `test.jsonl`, `unseen_pairs.jsonl`: every question about so many images, one a row, named in the column `task`;
    - `new_classes_train.jsonl`, `new_classes_test.jsonl`: the same with `NEW_CLASSES`, `new_classes` images and an eighth of that;
    - `coco/annotations/{captions,instances}_{train,test}.json`: the same images as COCO describes them, with `images/` as image folder;
    - `vqa_train.jsonl`, `vqa_test.jsonl`: the counting and left/right questions as VQA sets are published.

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
    manifest = {"version": VERSION, "seed": seed, **sizes}
    found = _manifest_of(folder)
    if found == manifest:
        return folder
    if found is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{folder} exists and is not a demo dataset; choose another folder or remove it"
        )
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    replaced = folder.with_name(f"{beside.name}.replaced")
    try:
        _write_files(beside, sizes, seed)
        (beside / MANIFEST).write_text(json.dumps(manifest))
        if found is not None:  # other sizes, or an older version
            folder.rename(replaced)
        beside.rename(folder)
    except OSError:
        if _manifest_of(folder) != manifest:  # else another process was first
            raise
    finally:
        for remains in (beside, replaced):
            shutil.rmtree(remains, ignore_errors=True)
    return folder


def _manifest_of(folder: Path) -> dict[str, int] | None:
    file = folder / MANIFEST
    return json.loads(file.read_text()) if file.exists() else None


def _write_files(folder: Path, sizes: dict[str, int], seed: int) -> None:
    plan = {
        "train_single": (scenes("train", sizes["single"], seed, pairs=0), _first_lesson),
        "train": (scenes("train", sizes["train"], seed), _lesson),
        "validation": (scenes("validation", sizes["validation"], seed), _exam),
        "test": (scenes("test", sizes["test"], seed), _exam),
        "unseen_pairs": (scenes("unseen_pairs", sizes["unseen_pairs"], seed), _exam),
        "new_classes_train": (
            scenes("train", sizes["new_classes"], seed, classes=NEW_CLASSES),
            _lesson,
        ),
        "new_classes_test": (
            scenes("test", sizes["new_classes"] // 8, seed, classes=NEW_CLASSES),
            _exam,
        ),
    }
    (folder / "images").mkdir(parents=True)
    (folder / "coco" / "annotations").mkdir(parents=True)
    for name, (drawn, rows_of) in plan.items():
        rng = random.Random(f"{name} {seed}")
        shown = {f"{name}_{number:05}": scene for number, scene in enumerate(drawn)}
        for stem, scene in shown.items():
            (folder / "images" / f"{stem}.png").write_bytes(_png(scene.draw()))
        _write_lines(
            folder / f"{name}.jsonl",
            (row for stem, scene in shown.items() for row in rows_of(stem, scene, rng)),
        )
        if name in ("train", "test"):
            answers = 10 if name == "test" else 1  # as published sets have them
            _write_lines(
                folder / f"vqa_{name}.jsonl",
                (row for stem, scene in shown.items() for row in _vqa_rows(stem, scene, answers)),
            )
            for kind, content in _coco(shown).items():
                (folder / "coco" / "annotations" / f"{kind}_{name}.json").write_text(
                    json.dumps(content)
                )


def _write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    with file.open("w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def _png(image: Image.Image) -> bytes:
    """An RGB image as PNG; takes 0.16 ms where Pillow's writer, which tries line filters, takes 0.28 ms and no fewer bytes."""
    pixels, line = image.tobytes(), 3 * image.width
    lines = b"".join(b"\0" + pixels[start : start + line] for start in range(0, len(pixels), line))
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", *image.size, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(lines, 1),
        b"IEND": b"",
    }
    sealed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(sealed)


def _first_lesson(stem: str, scene: Scene, rng: random.Random) -> Iterator[dict[str, Any]]:
    """One thing by its name, or by name and place."""
    yield chat_row(stem, stem, [ask(scene, rng.choice(("caption", "grounded")), rng)])


def _lesson(stem: str, scene: Scene, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Two different questions in one conversation, drawn by the weights of `TASKS`."""
    drawn = sorted(
        tasks_of(scene), key=lambda task: rng.random() ** (1 / TASKS[task]), reverse=True
    )
    given_away = (
        "grounded" if drawn.index("find") < drawn.index("grounded") else "find"
    )  # the box would stand in the text before
    exchanges = [ask(scene, task, rng) for task in drawn if task != given_away][:2]
    # A box without a phrase comes last: before others it would leave the two kinds of placeholders out of step.
    yield chat_row(
        stem,
        stem,
        sorted(
            exchanges,
            key=lambda e: "<bbox>" in e.answer and "<ref-object>" not in e.question + e.answer,
        ),
    )


def _exam(stem: str, scene: Scene, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Every question, each in a row of its own, so that each has a score."""
    for task in tasks_of(scene):
        yield chat_row(f"{stem}_{task}", stem, [ask(scene, task, rng)])


def chat_row(name: str, stem: str, exchanges: Sequence[Exchange]) -> dict[str, Any]:
    """A row in the chat layout of Qwen-VL, about the image `images/<stem>.png`."""
    turns = [
        turn
        for e in exchanges
        for turn in (
            {"from": "user", "value": e.question},
            {"from": "assistant", "value": e.answer},
        )
    ]
    turns[0]["value"] = f"{IMAGE_PREFIX}<img>images/{stem}.png</img>\n{turns[0]['value']}"
    row = {
        "id": name,
        "task": "+".join(exchange.task for exchange in exchanges),
        "conversations": turns,
    }
    things = [thing for exchange in exchanges for thing in exchange.things]
    if things:
        row["objects"] = [
            {"caption": thing.name, "bbox": thing.box_px, "bbox_type": "real", "image": 0}
            for thing in things
        ]
    return row


def _vqa_rows(stem: str, scene: Scene, answers: int) -> Iterator[dict[str, Any]]:
    for task in tasks_of(scene):
        if task in ("count", "left", "right"):
            exchange = ask(scene, task, random.Random(0))
            answer = (
                {"answer": exchange.answer}
                if answers == 1
                else {"answers": [exchange.answer] * answers}
            )
            yield {
                "question_id": f"{stem}_{task}",
                "image": f"images/{stem}.png",
                "question": exchange.question,
                **answer,
                "task": task,
            }


def _coco(shown: Mapping[str, Scene]) -> dict[str, dict[str, Any]]:
    """Captions and instances, numbered from 1 as COCO's are."""
    images, captions, boxes = [], [], []
    for number, (stem, scene) in enumerate(shown.items(), 1):
        images.append(
            {"id": number, "file_name": f"{stem}.png", "width": SIDE_PX, "height": SIDE_PX}
        )
        captions.append({"id": number, "image_id": number, "caption": caption(scene.things)})
        for thing in scene.things:
            place = {
                "bbox": [thing.x, thing.y, thing.size, thing.size],
                "area": thing.size**2,
                "iscrowd": 0,
            }
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": number,
                    "category_id": CLASSES.index(thing.name) + 1,
                    **place,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
    return {
        "captions": {"images": images, "annotations": captions},
        "instances": {"images": images, "annotations": boxes, "categories": categories},
    }
