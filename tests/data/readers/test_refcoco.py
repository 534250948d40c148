import json
import os
import pickle
from functools import partial

import pytest
from PIL import Image

from qwenvl_lit.data.mixture import DatasetSpec
from qwenvl_lit.data.readers.refcoco import read_plain_pickle, read_refcoco
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTokenizer
from qwenvl_lit.types import Box, Conversation, DataError, GroundedObject, ImageSource, Turn

NAME = "COCO_train2014_000000581857.jpg"
INSTANCES = {
    "images": [{"id": 581857, "file_name": NAME, "height": 480, "width": 640, "license": 1}],
    "annotations": [
        {
            "id": 1719310,
            "image_id": 581857,
            "bbox": [103.93, 299.99, 134.22, 177.42],
            "segmentation": [[1.0, 2.0]],
            "category_id": 1,
        },
        {"id": 22, "image_id": 581857, "bbox": [379.81, 0.0, 260.19, 480.0], "category_id": 1},
        {"id": 23, "image_id": 581857, "category_id": 1},
    ],
    "categories": [],
}
REFS = [
    {
        "ref_id": 0,
        "ann_id": 1719310,
        "image_id": 581857,
        "category_id": 1,
        "split": "train",
        "file_name": "COCO_train2014_000000581857_16.jpg",
        "sent_ids": [0, 1],
        "sentences": [
            {
                "sent_id": 0,
                "sent": "the lady with the blue shirt",
                "raw": "THE LADY",
                "tokens": ["the"],
            },
            {"sent_id": 1, "sent": "lady <box>", "raw": "", "tokens": []},
        ],
    },
    {
        "ref_id": 7,
        "ann_id": 22,
        "image_id": 581857,
        "split": "testA",
        "sentences": [{"sent_id": 9, "sent": "right"}],
    },
]


@pytest.fixture
def root(tmp_path):
    """A folder with the published files."""
    (tmp_path / "coco/train2014").mkdir(parents=True)
    Image.new("RGB", (640, 480)).save(tmp_path / "coco/train2014" / NAME)
    (tmp_path / "refcoco").mkdir()
    (tmp_path / "refcoco/instances.json").write_text(json.dumps(INSTANCES))
    (tmp_path / "refcoco/refs(unc).p").write_bytes(pickle.dumps(REFS, protocol=2))
    return tmp_path


def read(root, source="refcoco/refs(unc).p:train", **options):
    return read_refcoco(source, ReadOptions(root=root, **options), images="coco/train2014")


def test_each_sentence_of_a_split_is_answered_by_its_box(root):
    rows = read(root)
    assert len(rows) == 2
    assert rows[0] == Conversation(
        id="0",
        turns=(
            Turn(
                role="user",
                parts=(
                    ImageSource(root / "coco/train2014" / NAME),
                    GroundedObject(label="the lady with the blue shirt"),
                ),
            ),
            Turn(
                role="assistant",
                parts=(GroundedObject(boxes=(Box(x0=103.93, y0=299.99, x1=238.15, y1=477.41),)),),
            ),
        ),
    )
    assert rows[1].turns[0].parts[1] == GroundedObject(label="lady <box>")  # a phrase is no markup
    assert [row.index for row in pickle.loads(pickle.dumps(rows))] == [0, 1]


def test_a_box_that_touches_the_edge_is_within_its_image(root):
    (answer,) = read(root, "refcoco/refs(unc).p:testA")[0].answer.parts
    assert answer.boxes == (
        Box(x0=379.81, y0=0, x1=640, y1=480),
    )  # 379.81 + 260.19 is a little more than 640 in floating point


def test_a_source_can_take_some_rows_of_a_split(root):
    assert len(read(root, "refcoco/refs(unc).p:train#1")) == 1
    assert len(read(root, "refcoco/refs(unc).p:train#5")) == 5


def test_the_prompt_can_be_changed(root):
    row = read(root, prompt="{image}Where is {question}?")[0]
    assert row.turns[0].parts[1:] == (
        "Where is ",
        GroundedObject(label="the lady with the blue shirt"),
        "?",
    )
    with pytest.raises(DataError, match=r"must contain \{image\} and \{question\} exactly once"):
        read(root, prompt="{image}Where?")


def test_an_unknown_split_is_refused_with_the_known_ones(root):
    with pytest.raises(DataError, match=r"refs\(unc\).p has no split 'test'; it has testA, train"):
        read(root, "refcoco/refs(unc).p:test")


def test_cached_lengths_belong_to_one_split(root):
    processor = QwenVLProcessor(QwenTokenizer(TINY_VOCABULARY), tokens_per_image=2, image_size=8)
    refs = [
        REFS[0] | {"sentences": REFS[0]["sentences"][:1]},
        REFS[1],
    ]  # a sentence each, of different lengths
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))

    def length(split):
        source = DatasetSpec(
            read=partial(read_refcoco, images="coco/train2014"),
            root=root,
            cache=root,
            train=f"refcoco/refs(unc).p:{split}",
        )
        ((length,), *_) = source.measure(source.open_training(), processor, workers=1).lengths
        return length

    assert length("train") > length("testA") > 0
    (root / "refcoco/instances.json").write_text(
        json.dumps(INSTANCES).replace("379.81", "9.81")
    )  # its box is a digit shorter
    assert length("testA") == processor.length(read(root, "refcoco/refs(unc).p:testA")[0])[0]


def test_errors_of_a_missing_image_or_bad_box_name_the_sentence(root):
    (root / "coco/train2014" / NAME).rename(root / "a.jpg")
    with pytest.raises(
        DataError, match=r"refs\(unc\).p: row '1': image .*581857.jpg does not exist"
    ):
        read(root)[1]
    Image.new("RGB", (640, 300)).save(root / "coco/train2014" / NAME)
    os.utime(root / "coco/train2014" / NAME, (1, 1))
    with pytest.raises(
        DataError,
        match=r"refs\(unc\).p: row '0': object 1 .*the lady.*box .* is not within its image",
    ):
        read(root)[0]


def test_files_that_do_not_belong_together_are_refused(root):
    (root / "refcoco/instances.json").write_text(
        json.dumps({"images": INSTANCES["images"], "annotations": []})
    )
    with pytest.raises(
        DataError,
        match=r"refs\(unc\).p and instances.json are not in the published format: "
        r"KeyError\(1719310\)",
    ):
        read(root)
    (root / "refcoco/instances.json").unlink()
    with pytest.raises(DataError, match=r"instances.json cannot be read: No such file"):
        read(root)


def test_a_pickle_of_python_2_is_read(tmp_path):
    file = tmp_path / "refs.p"
    file.write_bytes(
        b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xc3\\xa9'\np3\nsS'id'\np4\nL7L\nsa."
    )  # protocol 0, byte strings, a long
    assert read_plain_pickle(file) == [{"sent": "café", "id": 7}]


class Evil:
    def __reduce__(self):
        return os.system, ("echo not plain",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Evil()),
        pickle.dumps({"a": Box}),
        b"cos\nsystem\n(S'true'\ntR.",
        pickle.dumps(REFS)[:40],
        b"",
        b"\x80\xff",
        b"<html>",
    ],
)
def test_a_pickle_of_anything_but_plain_values_is_refused(tmp_path, content):
    (tmp_path / "refs.p").write_bytes(content)
    with pytest.raises(DataError, match=r"refs.p is not the published pickle file"):
        read_plain_pickle(tmp_path / "refs.p")


def test_the_files_of_the_evaluation_name_their_images(root):
    line = {
        "image": f"data/coco/train2014/{NAME}",
        "sent": "lady in <ref>blue</ref>",
        "bbox": [103.93, 299.99, 238.15, 477.41],
    }
    (root / "refcoco/refcoco_val.jsonl").write_text(
        json.dumps(line | {"height": 480, "width": 640}) + "\n"
    )
    (row,) = read(root, "refcoco/refcoco_val.jsonl", path_map={"data": "."})
    assert row.turns == (
        Turn(
            role="user",
            parts=(
                ImageSource(root / "coco/train2014" / NAME),
                GroundedObject(label="lady in <ref>blue</ref>"),
            ),
        ),
        Turn(
            role="assistant",
            parts=(GroundedObject(boxes=(Box(x0=103.93, y0=299.99, x1=238.15, y1=477.41),)),),
        ),
    )
    assert row.columns == {}
