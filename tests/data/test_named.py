"""Every dataset of conf/data, from its yaml to its rows, on small files as they are published."""

import json
import pickle
from pathlib import Path

import pytest
from commands import compose_config, output_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwenvl_lit import build
from qwenvl_lit.data.mixture import DatasetSpec
from qwenvl_lit.data.readers.coco import read_coco_captions
from qwenvl_lit.data.readers.refcoco import read_refcoco
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.vqa import read_vqa
from qwenvl_lit.types import Box, DataError, GroundedObject, ImageSource

TRAIN, VAL = "COCO_train2014_000000000009.jpg", "COCO_val2014_000000000042.jpg"
CAPTIONS = "Describe the image in English:"
FROM_SWIFT = "\nplease describe the image."
BOX = GroundedObject(boxes=(Box(x0=10, y0=20, x1=40, y1=60),))
RED = GroundedObject(label="man in red")


def write(file: Path, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        file.write_text(json.dumps(content))


def captions(*images, key="file_name"):
    """Two captions for each image."""
    annotations = [
        {"id": 10 * image_id + k, "image_id": image_id, "caption": f"{text} {image_id}"}
        for image_id, _ in images
        for k, text in enumerate(("one", "two"))
    ]
    return {
        "info": {},
        "images": [{"id": image_id, key: name} for image_id, name in images],
        "annotations": annotations,
    }


def referring_line():
    """RefCOCO in a jsonl file of Qwen-VL's evaluation."""
    return [
        {
            "image": f"data/coco/train2014/{TRAIN}",
            "sent": "man in red",
            "bbox": [10, 20, 40, 60],
            "height": 80,
            "width": 100,
        }
    ]


def referring_pickle():
    """RefCOCO in the published pickle file."""
    sentences = [{"sent_id": 1, "sent": "man in red"}, {"sent_id": 2, "sent": "left"}]
    return pickle.dumps(
        [{"ref_id": 1, "ann_id": 5, "image_id": 9, "split": "train", "sentences": sentences}],
        protocol=2,
    )


def questions(split: str, image_id: int):
    return {
        "data_subtype": split,
        "questions": [{"question_id": 7, "image_id": image_id, "question": "How many?"}],
    }


def answers(question_id: int):
    texts = ["2"] * 6 + ["two"] * 4
    given = [{"answer": text, "answer_id": number} for number, text in enumerate(texts, 1)]
    return {
        "annotations": [
            {"question_id": question_id, "answers": given, "multiple_choice_answer": "2"}
        ]
    }


def vqa_lines(image: str, answer, rows: int = 1):
    """Rows of a jsonl file of Qwen-VL's evaluation."""
    return [
        {"image": image, "question": "How many?", "question_id": question_id, "answer": answer}
        for question_id in range(7, 7 + rows)
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All datasets in one folder."""
    root = tmp_path_factory.mktemp("data")
    for image in (
        f"coco/train2014/{TRAIN}",
        f"coco/val2014/{VAL}",
        "textvqa/train_images/a.jpg",
        "docvqa/val/documents/a.png",
    ):
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 80)).save(root / image)
    instances = {
        "images": [{"id": 9, "file_name": TRAIN}],
        "annotations": [{"id": 5, "image_id": 9, "bbox": [10, 20, 30, 40]}],
    }
    image = f"data/coco/train2014/{TRAIN}"
    files = {
        "coco/annotations/captions_train2014.json": captions((9, TRAIN)),
        "coco/annotations/captions_val2014.json": captions((42, VAL), (43, VAL)),
        "vqav2/v2_OpenEnded_mscoco_train2014_questions.json": questions("train2014", 9),
        "vqav2/v2_OpenEnded_mscoco_val2014_questions.json": questions("val2014", 42),
        "vqav2/v2_mscoco_train2014_annotations.json": answers(7),
        "vqav2/v2_mscoco_val2014_annotations.json": answers(7),
        "textvqa/textvqa_train.jsonl": vqa_lines("data/textvqa/train_images/a.jpg", "2"),
        "textvqa/textvqa_val.jsonl": vqa_lines("data/textvqa/train_images/a.jpg", "2"),
        "textvqa/textvqa_train_annotations.json": answers(7),
        "textvqa/textvqa_val_annotations.json": answers(7),
        "docvqa/train.jsonl": vqa_lines("data/docvqa/val/documents/a.png", ["2", "2 "]),
        "docvqa/val.jsonl": vqa_lines("data/docvqa/val/documents/a.png", ["2", "2 "]),
        "chartqa/train_human.jsonl": vqa_lines(image, "2", rows=2),
        "chartqa/train_augmented.jsonl": vqa_lines(image, "2", rows=2),
        "chartqa/test_human.jsonl": vqa_lines(image, "2"),
        "chartqa/test_augmented.jsonl": vqa_lines(image, "2"),
        "flickr30k/flickr30k_karpathy_train.json": captions((1, image), (2, image), key="image"),
        "flickr30k/flickr30k_karpathy_test.json": captions((1, image), key="image"),
        "nocaps/nocaps_val.json": captions((1, image), key="image"),
    }
    for name, refs, splits in (
        ("refcoco", "unc", "val testA testB"),
        ("refcoco+", "unc", "val testA testB"),
        ("refcocog", "umd", "val test"),
    ):
        files[f"{name}/instances.json"] = instances
        files[f"{name}/refs({refs}).p"] = referring_pickle()
        files |= {f"{name}/{name}_{split}.jsonl": referring_line() for split in splits.split()}
    for name, content in files.items():
        write(root / name, content)
    return root


def dataset(name: str, root: Path, *options: str) -> DatasetSpec:
    """The dataset that `data=name` chooses."""
    places = [f"data.root={root}", "paths.run=.", "data.split_file=null", "data.cache=null"]
    config = compose_config("train", f"data={name}", *places, *options)
    return build.data(config, processor=None).datasets[""]


REFERRED = {"question": (RED,), "answer": (BOX,), "references": ()}
VQA = {
    "question": ("How many?", " Answer:"),
    "answer": ("2",),
    "references": ("2",) * 6 + ("two",) * 4,
}
CAPTION = {"question": (CAPTIONS,), "answer": ("one 1",), "references": ("one 1", "two 1")}
# Rows for training and for validation, rows of the test sets, the first row of the last test set.
SETS = {
    "coco_en_mini": (1, 1, {}, {}),
    "coco_en": (
        2,
        405,
        {"test": 2},
        {"question": (FROM_SWIFT,), "answer": ("one 42",), "references": ("one 42", "two 42")},
    ),
    "refcoco": (2, 400, {"val": 1, "testA": 1, "testB": 1}, REFERRED),
    "refcoco_plus": (2, 400, {"val": 1, "testA": 1, "testB": 1}, REFERRED),
    "refcocog": (2, 400, {"val": 1, "test": 1}, REFERRED),
    "vqav2": (1, 500, {"val": 1}, VQA),
    "textvqa": (1, 500, {"val": 1}, VQA | {"question": ("How many? Answer:",)}),
    "docvqa": (
        1,
        500,
        {"val": 1},
        {"question": ("How many? Answer:",), "answer": ("2",), "references": ("2", "2 ")},
    ),
    "chartqa": (
        3,
        1,
        {"human": 1, "augmented": 1},
        {"question": ("How many? Answer:",), "answer": ("2",), "references": ("2",)},
    ),
    "flickr30k": (1, 1, {"test": 1}, CAPTION),
    "nocaps": (0, 0, {"val": 1}, CAPTION),
}


@pytest.mark.parametrize("name", SETS)
def test_a_named_dataset_reads_the_published_files(root, name):
    training_rows, validation_rows, tests, first = SETS[name]
    folder = root / "coco" if name.startswith("coco") else root
    options = ["data.download=false"]
    if name in ("chartqa", "flickr30k"):
        options.append("data.validation=1")  # 1 % of so few rows is none
    source = dataset(name, folder, *options)
    source.prepare_files()  # no file is missing, so nothing is fetched
    training = source.open_training()
    assert sum(map(len, training.stages)) == training_rows
    assert len(training.validation) == validation_rows
    for rows in (*training.stages, training.validation):
        assert all(row.images and row.answer for row in rows)
    sets = source.open_tests()
    assert {test: len(rows) for test, rows in sets.items()} == tests
    if tests:
        row = list(sets.values())[-1][0]
        parts = row.turns[0].parts
        assert {
            "question": parts[parts.index(row.images[0]) + 1 :],
            "answer": row.answer.parts,
            "references": row.references,
        } == first


def test_the_mini_set_asks_and_answers_as_ms_swift_does(root):
    row = (
        dataset("coco_en_mini", root / "coco", "data.validation=null").open_training().stages[0][0]
    )
    assert row.turns[0].parts == ("Picture 1:", row.images[0], FROM_SWIFT)
    assert row.answer.parts == ("one 42",)
    assert row.images[0].source == root / "coco/val2014" / VAL


@pytest.mark.parametrize("name", ["coco_en_mini", "coco_en", "refcoco", "vqav2"])
def test_missing_files_are_listed_before_anything_is_read(tmp_path, name):
    with pytest.raises(DataError, match=r"lacks .*, (and downloads are off|which is not fetched)"):
        dataset(name, tmp_path, "data.download=false").prepare_files()
    assert list(tmp_path.iterdir()) == []


def test_training_on_the_mini_set_is_one_command(root, tmp_path):
    overrides = [
        "model=qwen_vl_tiny",
        "data=coco_en_mini",
        f"data.root={root / 'coco'}",
        "data.num_workers=0",
        "trainer=smoke",
        "trainer.max_steps=1",
        f"hydra.run.dir={tmp_path}",
        f"paths.cache={tmp_path}",
    ]
    output_of(tmp_path, "train", *overrides)
    assert json.loads((tmp_path / "split.json").read_text())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


def paths_in(content, path=()):
    """Paths to all values in a JSON document."""
    yield path
    if isinstance(content, dict):
        items = content.items()
    else:
        items = enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from paths_in(value, (*path, key))


def changed(content, path, value):
    if not path:
        return value
    copy = content.copy()
    copy[path[0]] = changed(content[path[0]], path[1:], value)
    return copy


FILES = {
    "coco/annotations/captions_val2014.json": captions((42, VAL), (43, VAL)),
    "vqav2/v2_OpenEnded_mscoco_val2014_questions.json": questions("val2014", 42),
    "vqav2/v2_mscoco_val2014_annotations.json": answers(7),
    "refcoco/instances.json": {
        "images": [{"id": 9, "file_name": TRAIN}],
        "annotations": [{"id": 5, "image_id": 9, "bbox": [10, 20, 30, 40]}],
    },
    "refcoco/refs(unc).p": pickle.loads(referring_pickle()),
}
READ = {
    "coco": lambda folder, read_options: read_coco_captions(
        f"{folder}/coco/annotations/captions_val2014.json", read_options, images="coco/val2014"
    ),
    "vqav2": lambda folder, read_options: read_vqa(
        f"{folder}/vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        read_options,
        image="coco/val2014/" + VAL,
    ),
    "refcoco": lambda folder, read_options: read_refcoco(
        f"{folder}/refcoco/refs(unc).p:train", read_options, images="coco/train2014"
    ),
}


@pytest.mark.parametrize("name", FILES)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_file_with_one_wrong_value_is_read_or_refused(root, tmp_path, name, data):
    content = FILES[name]
    path = data.draw(st.sampled_from(list(paths_in(content))))
    wrong = changed(content, path, data.draw(JSON))
    for other in FILES:
        if other.split("/")[0] == name.split("/")[0]:
            write(tmp_path / other, (root / other).read_bytes())
    write(tmp_path / name, pickle.dumps(wrong) if name.endswith(".p") else wrong)
    rows, message = [], None
    try:
        rows = list(READ[name.split("/")[0]](tmp_path, ReadOptions(root=root)))
    except DataError as error:
        message = str(error)
    assert message is None or str((tmp_path / name).parent) in message
    for row in rows:
        assert all(isinstance(reference, str) for reference in row.references)
        for turn in row.turns:
            for part in turn.parts:
                assert isinstance(part, str | ImageSource | GroundedObject)
