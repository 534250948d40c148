import base64
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.grounding import tags_from_object
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTokenizer
from qwenvl_lit.types import (
    BadImage,
    Box,
    DataError,
    Dropped,
    GroundedObject,
    ImageSource,
    Quad,
)

DOG = {"caption": "the dog", "bbox": [10, 20, 300, 400], "bbox_type": "real", "image": 0}


def pixel_box(*values):
    return Box(x0=values[0], y0=values[1], x1=values[2], y1=values[3])


def grid_box(*values):
    return Box(x0=values[0], y0=values[1], x1=values[2], y1=values[3], frame="grid")


# Images


def test_image_tags_become_images(folder, parts_of):
    a, b = ImageSource(folder / "a.png"), ImageSource(folder / "b.png")
    assert parts_of("<image>Look<image>here")[0] == (a, "Look", b, "here")


def test_images_without_tags_are_put_before_the_first_question(folder, parts_of):
    a, b = ImageSource(folder / "a.png"), ImageSource(folder / "b.png")
    assert parts_of("Compare.")[0] == (a, b, "Compare.")


def test_tags_in_the_address_of_an_image_are_part_of_the_address(folder, read_row):
    name = "a<img><bbox>.png"
    (folder / "a.png").rename(folder / name)
    row = read_row({"image": name, "question": "Why?"})
    assert row.turns[0].parts == (ImageSource(folder / name), "Why? Answer:")


def test_a_single_image_may_be_named_image(folder, read_row):
    row = {
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>What?"},
            {"from": "gpt", "value": "This."},
        ],
    }
    assert read_row(row).turns[0].parts == (ImageSource(folder / "a.png"), "What?")


def test_images_are_looked_up_in_root_or_beside_the_file(folder, read_row):
    inner = folder / "inner"
    inner.mkdir()
    (inner / "rows.jsonl").write_text(json.dumps({"query": "<img>a.png</img>"}))
    assert read_rows("inner/rows.jsonl", ReadOptions(root=folder))[0].images == (
        ImageSource(folder / "a.png"),
    )
    assert read_rows(str(inner / "rows.jsonl"), ReadOptions(root=folder))[0].images == (
        ImageSource(folder / "a.png"),
    )
    with pytest.raises(DataError, match=r"inner/a\.png does not exist"):
        read_rows(str(inner / "rows.jsonl"))[0]
    assert read_row({"query": f"<img>{folder / 'b.png'}</img>"}, root=Path("/nowhere")).images == (
        ImageSource(folder / "b.png"),
    )


def test_an_image_is_measured_again_when_its_file_has_changed(folder, read_row):
    row = {"query": "<img>a.png</img>Find <bbox>", "objects": [DOG]}
    assert read_row(row).images[0].size == (640, 480)
    Image.new("RGB", (700, 500)).save(folder / "a.png")
    assert read_row(row).images[0].size == (700, 500)


# Grounding


def test_placeholders_become_objects_in_pixels(parts_of):
    box = pixel_box(10, 20, 300, 400)
    assert parts_of("<image>Find <ref-object>", "<bbox>", [DOG], ["a.png"]) == (
        (
            *parts_of("", images=["a.png"])[0],
            "Find ",
            GroundedObject(label="the dog"),
        ),
        (GroundedObject(boxes=(box,)),),
    )
    assert parts_of("x", "A <ref-object><bbox>.", [DOG])[1] == (
        "A ",
        GroundedObject(label="the dog", boxes=(box,)),
        ".",
    )


@pytest.mark.parametrize(
    ("kind", "values", "frame"),
    [
        ("real", [10.5, 20, 300, 400], "pixel"),
        ("norm_1000", [1, 2, 998, 999], "grid"),
        ("norm_1", [0, 0.25, 0.5, 1.0], "unit"),
    ],
)
def test_boxes_keep_the_frame_they_were_measured_in(parts_of, kind, values, frame):
    expected = Box(x0=values[0], y0=values[1], x1=values[2], y1=values[3], frame=frame)
    assert parts_of("x", "<bbox>", [DOG | {"bbox": values, "bbox_type": kind}])[1] == (
        GroundedObject(boxes=(expected,)),
    )


def test_objects_may_be_json_text_of_captions_and_boxes_on_the_grid(parts_of):
    text = '[["dog", [10, 20, 30, 40]], ["cat", [1, 2, 998, 999]]]'
    assert parts_of("Find <ref-object> and <ref-object>", "<bbox> <bbox>", text)[1] == (
        GroundedObject(boxes=(grid_box(10, 20, 30, 40),)),
        " ",
        GroundedObject(boxes=(grid_box(1, 2, 998, 999),)),
    )


def test_an_object_may_have_several_boxes_and_be_in_another_image(parts_of):
    people = {
        "caption": "people",
        "bbox": [[5, 6, 70, 80], [0, 0, 333, 517]],
        "bbox_type": "real",
        "image": 1,
    }
    boxes = (pixel_box(5, 6, 70, 80), pixel_box(0, 0, 333, 517))
    assert parts_of("x", "<ref-object><bbox>", [people])[1] == (
        GroundedObject(label="people", boxes=boxes, image=1),
    )


def test_the_two_kinds_of_placeholders_are_counted_apart_over_all_turns(read_row):
    cat = {"caption": "cat", "bbox": [50, 60, 70, 80], "bbox_type": "real"}
    row = read_row(
        {
            "query": "What about <bbox>?",
            "response": "<ref-object>",
            "history": [["<image>Find <ref-object>", "<bbox>"]],
            "images": ["a.png"],
            "objects": [DOG, cat],
        }
    )
    objects = [
        part for turn in row.turns for part in turn.parts if isinstance(part, GroundedObject)
    ]
    assert [(obj.label, [box.x0 for box in obj.boxes]) for obj in objects] == [
        ("the dog", []),
        (None, [10]),
        (None, [50]),
        ("cat", []),
    ]


def test_direct_markup_is_on_the_grid_in_the_last_image_before_it(parts_of):
    _, answer = parts_of(
        "x",
        "See <ref>a cat</ref><box>(1,2),(3,4)</box><box>(0,0),(999,999)</box> "
        "<quad>(1,1),(9,1),(9,9),(1,9)</quad>!",
    )
    cat = GroundedObject(
        label="a cat", boxes=(grid_box(1, 2, 3, 4), grid_box(0, 0, 999, 999)), image=1
    )
    sign = GroundedObject(
        boxes=(Quad(points=((1, 1), (9, 1), (9, 9), (1, 9)), frame="grid"),), image=1
    )
    assert answer == ("See ", cat, " ", sign, "!")
    question, _ = parts_of("<image><box>(1,2),(3,4)</box><image>", "no")
    assert GroundedObject(boxes=(grid_box(1, 2, 3, 4),), image=0) in question


def test_boxes_right_behind_an_object_are_its_boxes_unless_in_another_image(parts_of):
    first, second = DOG, {"caption": "b", "bbox": [1, 2, 3, 4], "bbox_type": "real", "image": 1}
    assert parts_of("x", "<bbox><bbox>", [first, first])[1] == (
        GroundedObject(boxes=(pixel_box(10, 20, 300, 400),) * 2),
    )
    assert len(parts_of("x", "<bbox><bbox>", [first, second])[1]) == 2


@pytest.mark.parametrize("as_text", [False, True])
def test_objects_may_be_the_lists_of_ms_swift_3(folder, parts_of, as_text):
    objects = {
        "ref": ["shape"],
        "bbox": [[20, 20, 80, 70], [120, 30, 180, 80]],
        "image_id": [0, 1],
    }
    objects = json.dumps(objects) if as_text else objects
    question, answer = parts_of("Find <ref-object>", "<bbox> <bbox>", objects)
    assert question[-1] == GroundedObject(label="shape")
    assert answer == (
        GroundedObject(boxes=(pixel_box(20, 20, 80, 70),)),
        " ",
        GroundedObject(boxes=(pixel_box(120, 30, 180, 80),), image=1),
    )


def test_boxes_of_ms_swift_3_may_be_fractions_of_the_image(parts_of):
    objects = {"ref": ["a"], "bbox": [[0, 0.25, 0.5, 1.0]], "bbox_type": "norm1"}
    box = Box(x0=0, y0=0.25, x1=0.5, y1=1.0, frame="unit")
    assert parts_of("x", "<ref-object><bbox>", objects)[1] == (
        GroundedObject(label="a", boxes=(box,)),
    )


@pytest.mark.parametrize("objects", [{}, {"ref": [], "bbox": []}])
def test_lists_of_ms_swift_3_may_be_empty(read_row, objects):
    row = {"query": "Hello", "response": "Hi"}
    assert read_row({**row, "objects": objects}) == read_row(row)


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_text_is_no_value_in_json_as_in_csv(folder, read_row, empty):
    keys = ("images", "history", "objects", "system", "id")
    row = read_row({"query": "Hello", "response": "Hi", **dict.fromkeys(keys, empty)})
    assert row == read_row({"query": "Hello", "response": "Hi"})
    row = read_row({"image": "a.png", "question": "Why?", "choices": empty, "answers": empty})
    assert row.answer is None


# What is not read


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "a", "videos": ["a.mp4"]}, "`videos`, ['a.mp4'], which is not read. Only"),
        ({"query": "a", "audios": "a.wav"}, "`audios`, 'a.wav', which is not read. Only"),
        ({"query": "a", "tools": [{"name": "f"}]}, "`tools`"),
        ({"query": "a", "response": "b", "rejected_response": "c"}, "`rejected_response`, 'c'"),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "`rejected`, 'c'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]},
            "turn 1 has an item of the type 'video'; only text and images are read",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "turn 1 has an item of the type 'input_audio'",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "loss": False},
                ]
            },
            "turn 2 has `loss`, False, which is not read (weights of turns)",
        ),
        ({"query": "a", "loss": False}, "the row has `loss`, False, which is not read (weights"),
        ({"query": "a", "weight": "0.5"}, "the row has `weight`, '0.5'"),
        ({"query": "a", "loss_scale": 0}, "the row has `loss_scale`, 0"),
        ({"query": "<video>What?"}, "<video> in a question stands for a video"),
        ({"query": "<audio>a.wav</audio>What?"}, "<audio> in a question"),
        ({"query": "<|vision_start|><|image_pad|>What?"}, "<|vision_start|> in a question"),
    ],
)
def test_what_other_stacks_read_is_refused_by_name(read_row, row, message):
    with pytest.raises(DataError) as error:
        read_row(row)
    assert message in str(error.value)


def test_empty_keys_and_default_weights_of_turns_are_not_refused(read_row):
    messages = [
        {"role": "user", "content": "a", "loss": False},
        {"role": "assistant", "content": "<video> is a tag", "loss": True, "weight": 1},
    ]
    row = {"messages": messages, "videos": [], "audios": None, "tools": "", "rejected": None}
    assert read_row(row).turns[1].parts == ("<video> is a tag",)
    for default in (True, 1, 1.0, "1", "1.0", "True", "true", "", None):
        assert read_row({"query": "a", "loss": default, "weight": default}).turns
    assert read_row({"query": "<video>?"}, markup="none").turns[0].parts == ("<video>?",)


# Errors


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"query": "Find <ref-object>", "response": "<bbox>"},
            "1 <ref-object> and 1 <bbox> for 0 `objects`",
        ),
        (
            {"query": "Find <ref-object><ref-object>", "objects": [DOG]},
            "2 <ref-object> and 0 <bbox> for 1 `objects`",
        ),
        ({"query": "Nothing", "objects": [DOG]}, "0 <ref-object> and 0 <bbox> for 1 `objects`"),
        (
            {"query": "<bbox>", "objects": [DOG | {"image": 1}]},
            "object 1 ('the dog') is in `image` 1, counted from 0, but the row has 1",
        ),
        ({"query": "<bbox>", "objects": [DOG | {"image": -1}]}, "is in `image` -1"),
        (
            {"query": "<bbox>", "objects": [DOG | {"bbox": [300, 20, 10, 400]}]},
            "corners in the wrong order; the top left one comes first",
        ),
        (
            {"query": "<bbox>", "objects": [DOG | {"bbox": [10, 400, 300, 20]}]},
            "corners in the wrong order",
        ),
        (
            {"query": "<bbox>", "objects": [DOG | {"bbox": [10, 20, 641, 400]}]},
            "not within its image, which has 640 x 480 pixels; correct it, or choose",
        ),
        (
            {"query": "<bbox>", "objects": [DOG | {"bbox": [300, 200, 90, 60]}]},
            "`bbox` is [left, top, right, bottom]: is this one x, y, width, height, as in COCO?",
        ),
        (
            {"query": "<bbox>", "objects": [DOG | {"bbox": [-1, 20, 64, 400]}]},
            "not within its image",
        ),
        (
            {"query": "<bbox>", "objects": [DOG | {"bbox_type": "norm_1"}]},
            "not within its image, (0, 0) to (1, 1)",
        ),
        (
            {
                "query": "<bbox>",
                "objects": [DOG | {"bbox": [0, 0, 1000, 9], "bbox_type": "norm_1000"}],
            },
            "(0, 0) to (999, 999) in its frame; data.on_bad_box=repair writes 1000 as 999",
        ),
        ({"query": "<box>(1,2),(3,1000)</box>"}, "data.on_bad_box=repair writes 1000 as 999"),
        (
            {
                "query": "<bbox>",
                "objects": [DOG | {"bbox": [1.5, 2, 3, 4], "bbox_type": "norm_1000"}],
            },
            "has fractions on the grid of 0..999; "
            "correct it, or choose data.on_bad_box=keep, repair or drop",
        ),
        (
            {"query": "<bbox>", "objects": [DOG | {"bbox": [1, 2, 3]}]},
            "the [x, y] of a point, or a list of these, got [1, 2, 3]",
        ),
        (
            {"query": "<bbox>", "objects": [DOG | {"bbox": [1, 2, 3, 10**400]}]},
            "`bbox` must be [x1, y1, x2, y2]",
        ),
        ({"query": "<bbox>", "objects": [DOG | {"bbox": None}]}, "`bbox` must be [x1, y1, x2, y2]"),
        (
            {"query": "<bbox>", "objects": [DOG | {"bbox_type": "pixels"}]},
            "`bbox_type` must be real (pixels), norm_1000 (0..999) or norm_1 (0..1), got 'pixels'",
        ),
        (
            {"query": "<bbox>", "objects": [{"caption": "a", "bbox": [1, 2, 3, 4]}]},
            "norm_1000 (0..999) or norm_1 (0..1), which is missing",
        ),
        (
            {"query": "<bbox>", "objects": [DOG | {"bbox_type": "norm1"}]},
            "norm_1 (0..1), got 'norm1'; did you mean norm_1?",
        ),
        (
            {"query": "<bbox>", "objects": [DOG | {"bbox_type": "Norm-1000"}]},
            "got 'Norm-1000'; did you mean norm_1000?",
        ),
        (
            {"query": "<bbox>", "objects": [{"caption": "a", "box": [1, 2, 3, 4]}]},
            "object 1 has the key 'box'; did you mean `bbox`?",
        ),
        ({"query": "<bbox>", "objects": ["dog"]}, "bbox_type: real, norm_1000 or norm_1, image}"),
        ({"query": "<ref-object>", "objects": [DOG | {"caption": None}]}, "without `caption`"),
        ({"query": "<ref-object>", "objects": {"bbox": [[1, 2, 3, 4]]}}, "an entry in `ref`"),
        ({"query": "<bbox>", "objects": "dog"}, "`objects` must be a list, or a list as JSON text"),
        ({"query": "<bbox>", "objects": {"ref": "a dog"}}, "`objects` must be a list"),
        ({"query": "<bbox>", "objects": {"ref": "dog"}}, "or as in ms-swift 3"),
        ({"query": "<bbox>", "objects": {"ref": ["a"], "labels": []}}, "or as in ms-swift 3"),
        (
            {"query": "<bbox>", "objects": {"ref": ["a"], "bbox": []}},
            "a <bbox> stands for an object without `bbox`",
        ),
        (
            {"query": "<ref-object>", "objects": {"bbox": [[1, 2, 3, 4]]}},
            "a <ref-object> stands for an object without `caption`",
        ),
        ({"query": "<bbox>", "objects": {"bbox": [[1, 2, 3]]}}, "`bbox` must be [x1, y1, x2, y2]"),
        (
            {"query": "<bbox>", "objects": {"bbox": [[1, 2, 3, 4]], "image_id": [7]}},
            "is in `image` 7, counted from 0",
        ),
        (
            {"query": "<box>(1.5,2),(3,4)</box>"},
            "text: box [[1.5, 2], [3, 4]] has fractions on the grid",
        ),
        ({"query": "<box>(1,2),(3)</box>"}, "cannot read '<box>(1,2),(3)</box>'"),
        ({"query": "a</ref>"}, "cannot read '</ref>'"),
        ({"query": "<img>a.png"}, "cannot read '<img>a.png'"),
        ({"query": "<box>(9,2),(3,4)</box>"}, "corners in the wrong order"),
        ({"query": "<box>(1,2),(3,1000)</box>"}, "not within its image"),
        ({"query": "<quad>(1,1),(9,1),(9,9),(1,1999)</quad>"}, "not within its image"),
        (
            {"query": "<box>(1,2),(3,4)</box>", "images": []},
            "keep such boxes, data.on_bad_box=keep, or leave their rows out, data.on_bad_box=drop",
        ),
        ({"query": "<image><image>"}, "2 <image> tags for 1 `images`"),
        ({"query": "<image>", "images": None}, "1 <image> tags for 0 `images`"),
        (
            {"query": "<img>c.png</img>"},
            "c.png does not exist; check the path, `data.root` and `data.path_map`",
        ),
        (
            {"query": "<img>https://host/a.png</img>"},
            "is remote, and there is no folder to keep it in; set data.cache",
        ),
        ({"query": "<img>ftp://host/a.png</img>"}, "download it and give its path"),
        ({"query": "<img>data:image/svg+xml,%3Csvg/%3E</img>"}, "download it and give its path"),
        ({"query": "<img>data:image/png;base64,AAA</img>"}, "is not base64"),
        ({"query": "<img>data:image/png;base64,狗</img>"}, "is not base64"),
        ({"query": "<img>data:image/png;base64,</img>"}, "given as base64, but empty"),
        ({"query": 7}, "`query` must be text, got 7"),
        (
            {"query": "x", "images": [7]},
            "an image must be a path, an address or base64 text, got 7",
        ),
        ({"query": "x", "image": "a.png"}, "either `image` or `images`"),
        ({"query": "x", "id": [7]}, "an id must be text or a number"),
        ({"query": "x \ud800"}, "text contains half of a surrogate pair, '\\ud800'"),
        (
            {"query": "<ref-object>", "objects": [DOG | {"caption": "x \udfff"}]},
            "text contains half of a surrogate pair",
        ),
        ({"query": "x", "history": [["a"]]}, "`history` must be a list of [question, answer]"),
        ({"conversations": []}, "no turn"),
        (
            {"conversations": [{"from": "bot", "value": "a"}]},
            "turn 1 has the role 'bot'; it must be",
        ),
        ({"messages": [{"role": "userr", "content": "a"}]}, "gpt; did you mean user?"),
        ({"messages": [{"content": "a"}]}, "turn 1 has no role; it must be one of system, user"),
        ({"messages": [{"role": "user"}]}, "turn 1 has no content; it must be text, or a list"),
        ({"messages": [{"role": "user", "content": {}}]}, "turn 1 has the content {}; it must be"),
        ({"messages": ["a"]}, 'turn 1 must be {"from": role, "value": text} or {"role"'),
        (
            {"conversations": [{"from": "assistant", "value": "a"}]},
            "turns must go user, assistant, user",
        ),
        ({"conversations": [{"from": "user", "value": "a"}] * 2}, "got user, user"),
        ({"image": "a.png", "question": "Why?", "answers": [1]}, "answers must be text, got [1]"),
        (
            {"image": "a.png", "question": "Why?", "answers": "red"},
            "JSON text, got 'red'; a single answer may stand in `answer`",
        ),
        (
            {"image": "a.png", "question": "Why?", "answers": "5"},
            "`answers` must be a list, got 5; a single answer may stand in `answer`",
        ),
        ({"image": "a.png", "question": "Why?", "answers": "[a]"}, "got '[a]'; it is not JSON: "),
        ({"query": "<img>../</img>"}, " is a folder; give the path of a file"),
        ({"query": "x<image>", "images": [" a.png"]}, "its path ' a.png' has blanks around it"),
        (
            {"image": "a.png", "sent": "dog", "bbox": "1 2"},
            "`bbox` must be [x1, y1, x2, y2], the [x, y] of a point, or a list of these, got '1 2'",
        ),
    ],
)
def test_an_error_names_file_line_and_id_and_says_what_is_wrong(folder, row, message):
    if "query" in row:
        row = {"images": ["a.png"]} | row
    (folder / "rows.jsonl").write_text("\n" + json.dumps({"id": "r7"} | row))
    with pytest.raises(DataError) as error:
        read_rows(str(folder / "rows.jsonl"))[0]
    name = row.get("id", "r7") if isinstance(row.get("id", "r7"), str) else "rows.jsonl:2"
    assert str(error.value).startswith(f"{folder / 'rows.jsonl'}:2: row {name!r}: ")
    assert message in str(error.value)


def test_text_with_a_less_than_sign_is_left_alone(parts_of):
    text = "if a<b and <b>bold</b> then <imgx> or <boxes>, <|im_start|>system"
    assert parts_of("x", text)[1] == (text,)


# Images that are not files here


def test_a_row_may_contain_an_image_as_base64(folder, read_row):
    content = (folder / "a.png").read_bytes()
    text = base64.b64encode(content).decode()
    for address in (f"data:image/png;base64,{text}", text, text[:60] + "\n" + text[60:]):
        row = read_row({"query": f"<img>{address}</img>Find <bbox>", "objects": [DOG]})
        assert row.images == (ImageSource(content),)
        assert row.images[0].size == (640, 480)


def test_addresses_of_another_machine_are_mapped(folder, read_row):
    path_map = {
        "/data": "/nowhere",
        "/data/coco/": str(folder),
        "D:\\coco": f"{folder}/",
        "https://host/coco": str(folder),
    }
    for address in ("/data/coco/a.png", "D:\\coco\\a.png", "https://host/coco/a.png"):
        assert read_row({"query": f"<img>{address}</img>"}, path_map=path_map).images == (
            ImageSource(folder / "a.png"),
        )
    assert read_row({"query": "<img>data/a.png</img>"}, path_map={"data": ""}).images == (
        ImageSource(folder / "a.png"),
    )
    with pytest.raises(DataError, match=r"/data/coconut/a\.png does not exist"):
        read_row({"query": "<img>/data/coconut/a.png</img>"}, path_map={"/data/coco": str(folder)})


def test_a_remote_image_is_fetched_when_it_is_opened(folder, read_row):
    row = read_row(
        {"query": "<img>https://host.invalid/a.png</img>", "response": "x"},
        cache=folder / "cache",
        download=False,
    )
    assert row.images[0].name == "https://host.invalid/a.png"
    with pytest.raises(DataError, match=r"https://host\.invalid/a\.png is not in .*images"):
        row.images[0].open()


# Wrong boxes


def boxes_of(row):
    return [(box.x0, box.y0, box.x1, box.y1) for part in row.answer.parts for box in part.boxes]


@pytest.mark.parametrize(
    ("kind", "written", "repaired"),
    [
        ("real", [300, 400, 10, 20], (10, 20, 300, 400)),
        ("real", [-13, -5.5, 740, 530], (0, 0, 640, 480)),
        ("norm_1000", [1.5, 2.9, 998.2, 999], (2, 3, 998, 999)),
        ("norm_1000", [0, 1200, 1000, 3], (0, 3, 999, 999)),
        ("norm_1", [-0.2, 0.5, 1.3, 0.25], (0, 0.25, 1, 0.5)),
    ],
)
def test_a_wrong_box_is_kept_repaired_or_dropped_with_its_row(read_row, kind, written, repaired):
    row = {
        "query": "Find <ref-object>",
        "response": "<bbox>",
        "images": ["a.png"],
        "objects": [DOG | {"bbox": written, "bbox_type": kind}],
    }
    with pytest.raises(
        DataError,
        match=r"rows\.jsonl:1: row .*"
        r"correct it, or choose data\.on_bad_box=keep, repair or drop",
    ):
        read_row(row)
    kept = read_row(row, on_bad_box="keep")
    assert boxes_of(kept) == [tuple(written)]
    assert len(kept.notes) == 1
    assert kept.notes[0].endswith("kept as it is")
    repaired_row = read_row(row, on_bad_box="repair")
    assert boxes_of(repaired_row) == [repaired]
    assert len(repaired_row.notes) == 1
    assert "repaired to" in repaired_row.notes[0]
    with pytest.raises(Dropped, match=r"rows\.jsonl:1: row .*object 1 \('the dog'\): box "):
        read_row(row, on_bad_box="drop")


def test_wrong_boxes_in_the_text_are_handled_like_those_of_objects(read_row):
    row = {
        "query": "<img>a.png</img>Where?",
        "response": "<box>(9,2.5),(3,1004)</box><quad>(1,1),(9,1),(9,9),(1,1000)</quad>",
    }
    assert [
        box.frame for part in read_row(row, on_bad_box="keep").answer.parts for box in part.boxes
    ] == ["grid", "grid"]
    answer = read_row(row, on_bad_box="repair").answer.parts[0]
    assert "".join(
        tag if isinstance(tag, str) else tag.value for tag in tags_from_object(answer, ())
    ) == ("<box>(3,2),(9,999)</box><quad>(1,1),(9,1),(9,9),(1,999)</quad>")
    with pytest.raises(Dropped, match="text: box"):
        read_row(row, on_bad_box="drop")


def test_fractions_in_markup_are_not_repaired_to_a_corner_of_the_image(read_row):
    row = {"query": "<img>a.png</img>Where?", "response": "<box>(0.1,0.2),(0.5,0.6)</box>"}
    for on_bad_box in ("error", "repair"):
        with pytest.raises(DataError, match="has fractions on the grid"):
            read_row(row, on_bad_box=on_bad_box)
    with pytest.raises(DataError, match="multiply fractions of the image by 1000"):
        read_row(row, on_bad_box="repair")


FRACTIONS = [0.1, 0.2, 0.5, 1]


@pytest.mark.parametrize(
    "row",
    [
        {"objects": {"ref": ["it"], "bbox": [[0, 0, 1, 1], FRACTIONS]}},
        {"objects": [DOG | {"bbox": [[0, 0, 1, 1], FRACTIONS]}]},
        {"image": "a.png", "sent": "it", "bbox": FRACTIONS},
    ],
)
def test_boxes_that_are_fractions_of_an_image_are_no_pixels(read_row, row):
    if "objects" in row:
        boxes = 2 if isinstance(row["objects"], dict) else 1
        row |= {"query": "<ref-object>", "response": "<bbox>" * boxes, "images": ["a.png"]}
    message = (
        r"object [12] \(.*\): box \[\[0.1, 0.2\], \[0.5, 1\]\] is read as pixels of an image of "
        "640 x 480, and all boxes of the row are within 0..1"
    )
    advice = '; if they are fractions .* of `objects` needs "bbox_type": "norm_1"'
    for on_bad_box in ("error", "repair"):
        with pytest.raises(DataError, match=message + advice):
            read_row(row, on_bad_box=on_bad_box)
    with pytest.raises(Dropped, match=message):
        read_row(row, on_bad_box="drop")
    [note] = read_row(row, on_bad_box="keep").notes
    assert note.endswith("within 0..1; kept as it is")


@pytest.mark.parametrize(
    ("boxes", "size"),
    [
        ([[0, 0, 1, 1]], (640, 480)),  # a pixel
        ([FRACTIONS, [0.5, 0.5, 30, 40]], (640, 480)),
        ([FRACTIONS], (4, 3)),
    ],
)
def test_small_boxes_may_be_pixels(folder, read_row, boxes, size):
    Image.new("RGB", size).save(folder / "small.png")
    objects = [DOG | {"bbox": boxes}]
    row = {"query": "<ref-object>", "response": "<bbox>", "images": ["small.png"]}
    assert len(boxes_of(read_row(row | {"objects": objects}))) == len(boxes)


def test_an_unknown_on_bad_box_is_refused():
    with pytest.raises(
        DataError, match="on_bad_box must be one of error, keep, repair, drop, got 'mend'"
    ):
        ReadOptions(on_bad_box="mend")


def test_valid_boxes_leave_no_notes(read_row):
    row = {
        "query": "<img>a.png</img>Where?",
        "response": "<box>(9,2),(9,4)</box><bbox>",
        "objects": [DOG],
    }
    for on_bad_box in ("error", "keep", "repair", "drop"):
        assert read_row(row, on_bad_box=on_bad_box).notes == ()


@pytest.mark.parametrize(
    "row",
    [
        {"query": "<bbox>", "images": ["a.png"], "objects": [DOG | {"bbox": [700, 20, 800, 40]}]},
        {"query": "<bbox>", "images": ["a.png"], "objects": [DOG | {"bbox_type": "norm_1"}]},
        {"query": "<bbox>", "images": ["a.png"], "objects": [DOG | {"bbox": [1, 2, 3]}]},
        {"query": "<bbox>", "images": ["a.png"], "objects": [DOG | {"image": 1}]},
        {"query": "<bbox><bbox>", "images": ["a.png"], "objects": [DOG]},
        {"query": "<box>(1,2),(3</box>", "images": ["a.png"]},
        {"query": "nothing", "images": ["a.png"], "objects": [DOG]},
        {"query": "<box>(1,2),(3,4)</box>"},
    ],
)
def test_a_row_that_cannot_be_repaired_is_refused_or_dropped(read_row, row):
    with pytest.raises(DataError):
        read_row(row, on_bad_box="repair")
    with pytest.raises(Dropped):
        read_row(row, on_bad_box="drop")


def test_a_missing_or_broken_image_raises_bad_image(folder, read_row):
    (folder / "broken.png").write_bytes(b"x")
    for row in (
        {"query": "<img>none.png</img>"},
        {"query": "<img>broken.png</img><bbox>", "objects": [DOG]},
    ):
        with pytest.raises(BadImage, match=r"rows\.jsonl:1: row .*\.png"):
            read_row(row, on_bad_box="drop")


# Rows written for ms-swift

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "golden" / "grounding" / "swift_objects.json").read_text()
)
REFUSED = {  # ms-swift writes these unchecked
    "real_outside": "not within its image",
    "real_inverted": "corners in the wrong order",
    "norm_1000_float": "fractions on the grid",
    "norm_1000_over": "not within its image",
    "norm_1_outside": "not within its image",
    "objects_unused": "0 <ref-object> and 0 <bbox>",
    "too_few_objects": "2 <ref-object> and 1 <bbox> for 1",  # an IndexError there
    "empty_objects": "1 <ref-object> and 1 <bbox> for 0",
}


@pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda case: f"{case['name']} {case['objects_form']}"
)
def test_rows_of_ms_swift_become_the_text_it_writes(tmp_path, case):
    (tmp_path / "img").mkdir()
    for name, size in GOLDEN["image_sizes"].items():
        Image.new("1", size).save(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text(json.dumps(case["example"]))
    rows, kept = (
        read_rows("rows.jsonl", ReadOptions(root=tmp_path, on_bad_box=choice))
        for choice in ("error", "keep")
    )
    if case["name"] in REFUSED:
        with pytest.raises(DataError) as error:
            rows[0]
        assert REFUSED[case["name"]] in str(error.value)
        if "text" not in case:
            with pytest.raises(DataError):
                kept[0]
            return
        assert kept[0].notes
    else:
        assert kept[0] == rows[0]
    processor = QwenVLProcessor(QwenTokenizer(TINY_VOCABULARY), tokens_per_image=1, image_size=4)
    text = processor.text(processor.encode(kept[0]).input_ids.tolist())
    written = case.get("text", text)  # without text: forms that ms-swift itself cannot read
    assert text == re.sub(r"<img>.*?</img>", "<img></img>", written)


# Multiple choice


QUIZ = {"image": "a.png", "question": "Which?", "choices": ["red", "green"]}


@pytest.mark.parametrize("answer", [1, "1", " 1 "])
def test_the_right_choice_may_be_a_number_or_the_text_of_a_cell(read_row, answer):
    row = read_row({**QUIZ, "choices": '["red", "green"]', "answer": answer})
    assert row.answer.parts == ("B",)
    assert row.options == ("A", "B")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("2", "must be the index of the right choice, 0 to 1, got '2'"),
        ("green", "must be the index of the right choice, 0 to 1, got 'green'"),
        ("-1", "got '-1'"),
        ("\u0661", "must be the index"),  # another script's digit
        (True, "got True"),
    ],
)
def test_an_answer_that_is_no_index_is_refused(read_row, answer, message):
    with pytest.raises(DataError, match=message):
        read_row({**QUIZ, "answer": answer})


def test_an_index_in_text_that_is_also_a_choice_is_refused(read_row):
    numbers = {**QUIZ, "choices": ["1", "2", "3"]}
    message = "'1' is the index of '2', and is a choice itself; write the index as a number, in a j"
    with pytest.raises(DataError, match=message):
        read_row({**numbers, "answer": "1"})
    assert read_row({**numbers, "answer": 1}).answer.parts == ("B",)
    assert read_row({**numbers, "choices": ["0", "1"], "answer": "1"}).answer.parts == ("B",)


# Misspelled keys


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"query": "a", "Images": ["a.png"]},
            "the key 'Images' is not read; did you mean `images`",
        ),
        ({"query": "a", " response": "b"}, "the key ' response' is not read; did you mean `resp"),
        ({"image": "a.png", "question": "a", "Answers": ["b"]}, "'Answers' is not read; did you m"),
        ({"image": "a.png", "question": "a", "questionId": 1}, "did you mean `question_id`?"),
        (
            {"image": "a.png", "sent": "a", "box": [1, 2, 3, 4]},
            "'box' is not known; did you mean `bb",
        ),
        ({"messagse": []}, "the key 'messagse' is not known; did you mean `messages`?"),
        (
            {"conversation": [{"from": "user", "value": "a"}]},
            "as number 1; did you mean the key `conversations`?",
        ),
        ({"conversations": [{"human": "a"}]}, "did you mean the key `conversation`?"),
    ],
)
def test_a_key_that_is_nearly_known_is_refused_with_the_known_one(read_row, row, message):
    with pytest.raises(DataError) as error:
        read_row(row)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("query", "message"),
    [("<image>Where?", "1 <image> tags for 0 `images`"), ("<bbox>", "the row has 0 images")],
)
def test_an_error_names_the_misspelled_key_that_causes_it(read_row, query, message):
    objects = [DOG] if "<bbox>" in query else []
    with pytest.raises(DataError) as error:
        read_row({"query": query, "response": "b", "imgaes": ["a.png"], "objects": objects})
    assert message in str(error.value)
    assert str(error.value).endswith("; the key 'imgaes' is not read; did you mean `images`?")


def test_a_missing_image_is_shown_with_the_folder_of_its_path(folder, monkeypatch):
    monkeypatch.chdir(folder)
    Path("rows.jsonl").write_text('{"query": "a", "response": "b", "images": ["./img/no.png"]}')
    message = f"image img/no.png does not exist, relative to {folder}; check the path"
    with pytest.raises(DataError, match=re.escape(message)):
        read_rows("rows.jsonl")[0]


def test_a_key_that_may_be_a_misspelling_or_a_column_is_noted(read_row):
    row = read_row({"query": "a", "response": "b", "imgaes": "x", "ID": 7})
    assert row.notes == (
        "the key 'ID' is not read; did you mean `id`?",
        "the key 'imgaes' is not read; did you mean `images`?",
    )
    assert row.columns == {"imgaes": "x", "ID": "7"}


@pytest.mark.parametrize("value", ["img/s00.PNG", ["a.png", "b.jpeg"]])
def test_a_column_with_the_path_of_an_image_is_noted_if_the_row_has_none(read_row, value):
    row = {"query": "What?", "response": "It", "image_path": value}
    [note] = read_row(row).notes
    assert note.startswith("the row has no image, and its key 'image_path', which is not read, has")
    assert note.endswith("did you mean `images`?")
    assert read_row(row | {"images": ["a.png"]}).notes == ()
    assert read_row(row | {"image_path": "a note about a.png and more"}).notes == ()


def test_a_file_that_the_text_of_a_row_without_image_names_is_noted(read_row):
    [note] = read_row({"query": "What is in `a.png`?"}).notes
    assert "its text names the file 'a.png'" in note
    assert "write <img>a.png</img>" in note
    assert read_row({"query": "What is in nothing.png?"}).notes == ()
    assert read_row({"query": "<img>b.png</img>What is in a.png?"}).notes == ()


def test_columns_of_ones_own_are_not_noted(read_row):
    own = dict.fromkeys(("task", "image_id", "image2", "category", "respondent", "objective"), "x")
    row = read_row({"query": "a", "response": "b", "images": ["a.png"], "Image": None, **own})
    assert row.notes == ()
    both = read_row({"image": "a.png", "question": "a", "answer": "b", "Answer": "c"})
    assert both.notes == ()
