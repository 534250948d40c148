import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from qwenvl_lit.data.rows import Reading
from qwenvl_lit.data.sources import FileRows, read_rows, take
from qwenvl_lit.grounding import tags_from_object
from qwenvl_lit.types import Box, Conversation, DataError, GroundedObject, Picture, Quad, Turn

DOG = {"caption": "the dog", "bbox": [10, 20, 300, 400], "bbox_type": "real", "image": 0}


@pytest.fixture
def folder(tmp_path):
    """With pictures a.png of 640 x 480 and b.png of 333 x 517 pixels."""
    Image.new("RGB", (640, 480)).save(tmp_path / "a.png")
    Image.new("RGB", (333, 517)).save(tmp_path / "b.png")
    return tmp_path


@pytest.fixture
def read_row(folder):
    def read(row, **options):
        (folder / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
        return read_rows(str(folder / "rows.jsonl"), Reading(**options))[0]

    return read


@pytest.fixture
def parts_of(read_row):
    """The parts of a question with pictures a.png and b.png and the answer to it."""

    def read(query, response="yes", objects=(), images=("a.png", "b.png")):
        row = read_row({"query": query, "response": response, "images": list(images), "objects": objects})
        return tuple(turn.parts for turn in row.turns)

    return read


def pixel_box(*values):
    return Box(x0=values[0], y0=values[1], x1=values[2], y1=values[3])


def grid_box(*values):
    return Box(x0=values[0], y0=values[1], x1=values[2], y1=values[3], frame="grid")


# Layouts


def test_a_conversation_in_the_layout_of_qwen_vl(folder, read_row):
    row = {
        "id": "identity_0",
        "task": "chat",
        "score": 0.5,
        "tags": ["not", "plain"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "user", "value": "Picture 1: <img>a.png</img>\nWhat is  it?\t"},
            {"from": "assistant", "value": "A 狗 \n"},
            {"from": "user", "value": "Sure?"},
            {"from": "assistant", "value": ""},
        ],
    }
    assert read_row(row) == Conversation(
        id="identity_0",
        turns=(
            Turn(role="system", parts=("Be brief.",)),
            Turn(role="user", parts=("Picture 1: ", Picture(folder / "a.png"), "\nWhat is  it?\t")),
            Turn(role="assistant", parts=("A 狗 \n",)),
            Turn(role="user", parts=("Sure?",)),
            Turn(role="assistant", parts=()),
        ),
        columns={"task": "chat", "score": "0.5"},
    )


def test_a_question_with_its_history(folder, read_row):
    row = {"query": "And now?", "response": "Now too.", "history": [["<img>a.png</img>Day?", "Night."]], "system": ""}
    assert read_row(row) == Conversation(
        id="rows.jsonl:1",
        turns=(
            Turn(role="system", parts=()),  # an empty system message, which is not the same as none
            Turn(role="user", parts=(Picture(folder / "a.png"), "Day?")),
            Turn(role="assistant", parts=("Night.",)),
            Turn(role="user", parts=("And now?",)),
            Turn(role="assistant", parts=("Now too.",)),
        ),
    )


def test_a_question_without_an_answer_is_a_prompt(read_row):
    assert read_row({"query": "Hello", "response": None, "system": None, "history": None}).turns == (Turn(role="user", parts=("Hello",)),)


def test_roles_may_be_called_human_and_gpt(read_row):
    row = read_row({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    assert [turn.role for turn in row.turns] == ["user", "assistant"]


def test_a_vqa_row_is_asked_by_the_prompt_and_answered_by_the_majority(folder, read_row):
    row = {"question_id": 17, "image": "a.png", "question": "What {color}?", "answers": ["red", {"answer": "blue"}, "blue"], "set": "val"}
    assert read_row(row) == Conversation(
        id="17",
        turns=(Turn(role="user", parts=(Picture(folder / "a.png"), "What {color}? Answer:")), Turn(role="assistant", parts=("blue",))),
        references=("red", "blue", "blue"),
        columns={"set": "val"},
    )
    chat = read_row({"image": "a.png", "question": "Why?", "answer": "so"}, prompt="Picture 1: {picture}\n{question}")
    assert chat.turns[0].parts == ("Picture 1: ", Picture(folder / "a.png"), "\nWhy?")
    assert chat.references == ("so",)
    assert read_row({"image": "a.png", "question": "Why?"}).answer is None


def test_a_file_may_be_an_array_with_its_own_line_breaks(folder):
    text = '\ufeff [\n{"query": "狗", "response": "1"},\n\n {"query": "b",\n "response": "2"} , {"query": "c", "response": "]"}\n]\n'
    (folder / "rows.json").write_text(text, encoding="utf-8")
    rows = read_rows("rows.json", Reading(root=folder))
    assert [row.turns[0].parts + row.turns[1].parts for row in rows] == [("狗", "1"), ("b", "2"), ("c", "]")]
    assert [row.id for row in rows] == ["rows.json:2", "rows.json:4", "rows.json:5"]
    assert [row.index for row in rows] == [0, 1, 2]


def test_blank_lines_are_passed_over_and_counted(folder):
    (folder / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"query": "a"}\r\n\r\n  \n{"query": "b"}')
    assert [row.id for row in read_rows(str(folder / "rows.jsonl"))] == ["rows.jsonl:1", "rows.jsonl:4"]


def test_rows_are_read_like_any_sequence_and_in_other_processes(folder):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"query": letter}) for letter in "abc"))
    rows = FileRows(folder / "rows.jsonl")
    assert [row.turns[0].parts[0] for row in rows] == list("abc")
    assert rows[-1] == rows[2]
    with pytest.raises(IndexError):
        rows[3]
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)


# Pictures


def test_image_tags_become_numbered_pictures(folder, parts_of):
    a, b = Picture(folder / "a.png"), Picture(folder / "b.png")
    assert parts_of("<image>Look<image>here")[0] == ("Picture 1: ", a, "\nLookPicture 2: ", b, "\nhere")


def test_pictures_without_tags_stand_before_the_first_question(folder, parts_of):
    a, b = Picture(folder / "a.png"), Picture(folder / "b.png")
    assert parts_of("Compare.")[0] == ("Picture 1: ", a, "\nPicture 2: ", b, "\nCompare.")


def test_a_single_picture_may_be_named_image(folder, read_row):
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "This."}]}
    assert read_row(row).turns[0].parts == ("Picture 1: ", Picture(folder / "a.png"), "\nWhat?")


def test_pictures_are_looked_up_in_root_or_beside_the_file(folder, read_row):
    inner = folder / "inner"
    inner.mkdir()
    (inner / "rows.jsonl").write_text(json.dumps({"query": "<img>a.png</img>"}))
    assert read_rows("inner/rows.jsonl", Reading(root=folder))[0].pictures == (Picture(folder / "a.png"),)
    assert read_rows(str(inner / "rows.jsonl"), Reading(root=folder))[0].pictures == (Picture(folder / "a.png"),)
    with pytest.raises(DataError, match=r"inner/a\.png does not exist"):
        read_rows(str(inner / "rows.jsonl"))[0]
    assert read_row({"query": f"<img>{folder / 'b.png'}</img>"}, root=Path("/nowhere")).pictures == (Picture(folder / "b.png"),)


# Grounding


def test_placeholders_become_objects_in_pixels(parts_of):
    box = pixel_box(10, 20, 300, 400)
    assert parts_of("<image>Find <ref-object>", "<bbox>", [DOG], ["a.png"]) == (
        ("Picture 1: ", *parts_of("", images=["a.png"])[0][1:2], "\nFind ", GroundedObject(label="the dog")),
        (GroundedObject(boxes=(box,)),),
    )
    assert parts_of("x", "A <ref-object><bbox>.", [DOG])[1] == ("A ", GroundedObject(label="the dog", boxes=(box,)), ".")


@pytest.mark.parametrize(
    ("kind", "values", "frame"),
    [("real", [10.5, 20, 300, 400], "pixel"), ("norm_1000", [1, 2, 998, 999], "grid"), ("norm_1", [0, 0.25, 0.5, 1.0], "unit")],
)
def test_boxes_keep_the_frame_they_were_measured_in(parts_of, kind, values, frame):
    expected = Box(x0=values[0], y0=values[1], x1=values[2], y1=values[3], frame=frame)
    assert parts_of("x", "<bbox>", [DOG | {"bbox": values, "bbox_type": kind}])[1] == (GroundedObject(boxes=(expected,)),)


def test_objects_may_be_json_text_of_captions_and_boxes_on_the_grid(parts_of):
    text = '[["dog", [10, 20, 30, 40]], ["cat", [1, 2, 998, 999]]]'
    assert parts_of("Find <ref-object> and <ref-object>", "<bbox> <bbox>", text)[1] == (
        GroundedObject(boxes=(grid_box(10, 20, 30, 40),)),
        " ",
        GroundedObject(boxes=(grid_box(1, 2, 998, 999),)),
    )


def test_an_object_may_have_several_boxes_and_be_in_another_picture(parts_of):
    people = {"caption": "people", "bbox": [[5, 6, 70, 80], [0, 0, 333, 517]], "bbox_type": "real", "image": 1}
    boxes = (pixel_box(5, 6, 70, 80), pixel_box(0, 0, 333, 517))
    assert parts_of("x", "<ref-object><bbox>", [people])[1] == (GroundedObject(label="people", boxes=boxes, picture=1),)


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
    things = [part for turn in row.turns for part in turn.parts if isinstance(part, GroundedObject)]
    assert [(thing.label, [box.x0 for box in thing.boxes]) for thing in things] == [
        ("the dog", []),
        (None, [10]),
        (None, [50]),
        ("cat", []),
    ]


def test_direct_markup_is_on_the_grid_in_the_last_picture_before_it(parts_of):
    _, answer = parts_of("x", "See <ref>a cat</ref><box>(1,2),(3,4)</box><box>(0,0),(999,999)</box> <quad>(1,1),(9,1),(9,9),(1,9)</quad>!")
    cat = GroundedObject(label="a cat", boxes=(grid_box(1, 2, 3, 4), grid_box(0, 0, 999, 999)), picture=1)
    sign = GroundedObject(boxes=(Quad(points=((1, 1), (9, 1), (9, 9), (1, 9)), frame="grid"),), picture=1)
    assert answer == ("See ", cat, " ", sign, "!")
    question, _ = parts_of("<image><box>(1,2),(3,4)</box><image>", "no")
    assert GroundedObject(boxes=(grid_box(1, 2, 3, 4),), picture=0) in question


def test_boxes_right_behind_an_object_are_its_boxes_unless_in_another_picture(parts_of):
    first, second = DOG, {"caption": "b", "bbox": [1, 2, 3, 4], "bbox_type": "real", "image": 1}
    assert parts_of("x", "<bbox><bbox>", [first, first])[1] == (GroundedObject(boxes=(pixel_box(10, 20, 300, 400),) * 2),)
    assert len(parts_of("x", "<bbox><bbox>", [first, second])[1]) == 2


# Faults


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "Find <ref-object>", "response": "<bbox>"}, "1 <ref-object> and 1 <bbox> for 0 `objects`"),
        ({"query": "Find <ref-object><ref-object>", "objects": [DOG]}, "2 <ref-object> and 0 <bbox> for 1 `objects`"),
        ({"query": "Nothing", "objects": [DOG]}, "0 <ref-object> and 0 <bbox> for 1 `objects`"),
        ({"query": "<bbox>", "objects": [DOG | {"image": 1}]}, "object 1 ('the dog') is in `image` 1, counted from 0, but the row has 1"),
        ({"query": "<bbox>", "objects": [DOG | {"image": -1}]}, "is in `image` -1"),
        ({"query": "<bbox>", "objects": [DOG | {"bbox": [300, 20, 10, 400]}]}, "corners in the wrong order; the top left one comes first"),
        ({"query": "<bbox>", "objects": [DOG | {"bbox": [10, 400, 300, 20]}]}, "corners in the wrong order"),
        ({"query": "<bbox>", "objects": [DOG | {"bbox": [10, 20, 641, 400]}]}, "not within its picture, (0, 0) to (640, 480)"),
        ({"query": "<bbox>", "objects": [DOG | {"bbox": [-1, 20, 64, 400]}]}, "not within its picture"),
        ({"query": "<bbox>", "objects": [DOG | {"bbox_type": "norm_1"}]}, "not within its picture, (0, 0) to (1, 1)"),
        ({"query": "<bbox>", "objects": [DOG | {"bbox": [0, 0, 1000, 9], "bbox_type": "norm_1000"}]}, "(0, 0) to (999, 999)"),
        (
            {"query": "<bbox>", "objects": [DOG | {"bbox": [1.5, 2, 3, 4], "bbox_type": "norm_1000"}]},
            "has fractions on the grid of 0..999; correct it, or choose what becomes of such boxes by data.on_bad_box",
        ),
        ({"query": "<bbox>", "objects": [DOG | {"bbox": [1, 2, 3]}]}, "`bbox` is [x1, y1, x2, y2] or a list of such, got [1, 2, 3]"),
        ({"query": "<bbox>", "objects": [DOG | {"bbox": [1, 2, 3, 10**400]}]}, "`bbox` is [x1, y1, x2, y2]"),
        ({"query": "<bbox>", "objects": [DOG | {"bbox": None}]}, "`bbox` is [x1, y1, x2, y2]"),
        ({"query": "<bbox>", "objects": [DOG | {"bbox_type": "pixels"}]}, "bbox_type: real, norm_1000 or norm_1"),
        ({"query": "<bbox>", "objects": [{"caption": "a", "bbox": [1, 2, 3, 4]}]}, "bbox_type: real, norm_1000 or norm_1"),
        ({"query": "<ref-object>", "objects": [DOG | {"caption": None}]}, "without `caption`"),
        ({"query": "<bbox>", "objects": "dog"}, "`objects` is a list, or a list as JSON text"),
        ({"query": "<bbox>", "objects": {"ref": []}}, "`objects` is a list"),
        ({"query": "<box>(1.5,2),(3,4)</box>"}, "text: box [[1.5, 2], [3, 4]] has fractions on the grid"),
        ({"query": "<box>(1,2),(3)</box>"}, "cannot read '<box>(1,2),(3)</box>'"),
        ({"query": "a</ref>"}, "cannot read '</ref>'"),
        ({"query": "<img>a.png"}, "cannot read '<img>a.png'"),
        ({"query": "<box>(9,2),(3,4)</box>"}, "corners in the wrong order"),
        ({"query": "<box>(1,2),(3,1000)</box>"}, "not within its picture"),
        ({"query": "<quad>(1,1),(9,1),(9,9),(1,1999)</quad>"}, "not within its picture"),
        ({"query": "<box>(1,2),(3,4)</box>", "images": []}, "a box but no picture"),
        ({"query": "<image><image>"}, "2 <image> tags for 1 `images`"),
        ({"query": "<image>", "images": None}, "1 <image> tags for 0 `images`"),
        ({"query": "<img>c.png</img>"}, "c.png does not exist; check the path, `data.root` and `data.path_map`"),
        ({"query": "<img>https://host/a.png</img>"}, "is remote, and there is no folder to keep it in; set data.cache"),
        ({"query": "<img>ftp://host/a.png</img>"}, "download it and give its path"),
        ({"query": "<img>data:image/svg+xml,%3Csvg/%3E</img>"}, "download it and give its path"),
        ({"query": "<img>data:image/png;base64,AAA</img>"}, "is not base64"),
        ({"query": "<img>data:image/png;base64,</img>"}, "given as base64, but empty"),
        ({"query": 7}, "`query` is text, got 7"),
        ({"query": "x", "images": [7]}, "a picture is a path, an address or base64 text, got 7"),
        ({"query": "x", "image": "a.png"}, "either `image` or `images`"),
        ({"query": "x", "id": [7]}, "an id is text or a number"),
        ({"query": "x \ud800"}, "text holds half a character, '\\ud800'"),
        ({"query": "<ref-object>", "objects": [DOG | {"caption": "x \udfff"}]}, "text holds half a character"),
        ({"query": "x", "history": [["a"]]}, "`history` is a list of [question, answer]"),
        ({"conversations": []}, "no turn"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "turn 1 is"),
        ({"conversations": [{"from": "assistant", "value": "a"}]}, "turns go user, assistant, user"),
        ({"conversations": [{"from": "user", "value": "a"}] * 2}, "got user, user"),
        ({"image": "a.png", "question": "Why?", "answers": [1]}, "answers are text, got (1,)"),
    ],
)
def test_a_fault_names_file_line_and_id_and_says_what_is_wrong(folder, row, message):
    if "query" in row:
        row = {"images": ["a.png"]} | row
    (folder / "rows.jsonl").write_text("\n" + json.dumps({"id": "r7"} | row))
    with pytest.raises(DataError) as fault:
        read_rows(str(folder / "rows.jsonl"))[0]
    name = row.get("id", "r7") if isinstance(row.get("id", "r7"), str) else "rows.jsonl:2"
    assert str(fault.value).startswith(f"{folder / 'rows.jsonl'}:2: row {name!r}: ")
    assert message in str(fault.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n \n", "has no rows"),
        ("[]", "has no rows"),
        ("query,response\na,b\n", ":1: not JSON"),
        ('[{"query": "a"}\n {"query": "b"}]', ":2: not JSON"),
        ('[{"query": "a"},\n {"query": }]', ":2: not JSON"),
        ('[{"query": "a"}', ":1: not JSON"),
        ("[1]", ":1: a row is a JSON object, got int"),
        (
            '{"prompt": "a"}',
            ":1: keys ['prompt'] fit no known layout. Known, optional keys in brackets: conversations [system, images, image",
        ),
        ('{"query": "a", "conversations": []}', "fit several layouts"),
    ],
)
def test_a_file_without_usable_rows_is_refused_when_it_is_opened(folder, content, message):
    (folder / "rows.json").write_text(content)
    with pytest.raises(DataError) as fault:
        read_rows(str(folder / "rows.json"))
    assert str(fault.value).startswith(str(folder / "rows.json"))
    assert message in str(fault.value)


def test_a_row_of_another_layout_than_the_first_is_a_fault(folder):
    (folder / "rows.jsonl").write_text('{"query": "a"}\n{"id": 3, "conversations": []}\n{"query": "c"\n')
    rows = read_rows(str(folder / "rows.jsonl"))
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2: row '3': is in the layout `conversations`, the first .* in `query`; its keys are \['id', 'conv"
    ):
        rows[1]
    with pytest.raises(DataError, match=r"rows\.jsonl:3: not JSON"):
        rows[2]


def test_text_in_another_encoding_is_a_fault(folder):
    (folder / "rows.json").write_bytes('[{"query": "é"}]'.encode("latin-1"))
    with pytest.raises(DataError, match="save it as UTF-8"):
        read_rows(str(folder / "rows.json"))
    (folder / "rows.jsonl").write_bytes('{"query": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: not UTF-8"):
        read_rows(str(folder / "rows.jsonl"))


def test_text_with_a_less_than_sign_is_left_alone(parts_of):
    text = "if a<b and <b>bold</b> then <imgx> or <boxes>, <|im_start|>system"
    assert parts_of("x", text)[1] == (text,)


# Which rows


def test_a_glob_reads_its_files_by_name_one_after_the_other(folder):
    for name in "ba":
        (folder / f"{name}.jsonl").write_text(json.dumps({"query": name}))
    (folder / "[x].jsonl").write_text(json.dumps({"query": "x"}))
    assert [row.turns[0].parts[0] for row in read_rows("?.jsonl", Reading(root=folder))] == ["a", "b"]
    assert read_rows("[x].jsonl", Reading(root=folder))[0].turns[0].parts == ("x",)  # a file of that very name
    with pytest.raises(DataError, match="no file"):
        read_rows("*.csv", Reading(root=folder))
    with pytest.raises(DataError, match="check the path"):
        read_rows(str(folder / "none.jsonl"))
    with pytest.raises(DataError, match=r"cannot be read: .* check the path"):
        read_rows(str(folder))


def test_a_source_may_say_how_many_rows_it_gives(folder):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"query": letter}) for letter in "abcdefgh"))

    def letters(source, **options):
        return "".join(row.turns[0].parts[0] for row in read_rows(source, Reading(root=folder, **options)))

    assert letters("rows.jsonl#8") == "abcdefgh"
    assert letters("rows.jsonl#19")[:16] == "abcdefgh" * 2
    some = letters("rows.jsonl#3", seed=1)
    assert len(set(some)) == 3
    assert some == letters("rows.jsonl#3", seed=1) != letters("rows.jsonl#3", seed=2)


def test_take_of_nothing_is_nothing():
    assert list(take("abc", 0)) == []


# ms-swift, whose files these are

GOLDEN = json.loads((Path(__file__).parent / "golden" / "grounding" / "swift_objects.json").read_text())
REFUSED = {  # written by ms-swift as they come
    "real_outside": "not within its picture",
    "real_inverted": "corners in the wrong order",
    "norm_1000_float": "fractions on the grid",
    "norm_1000_over": "not within its picture",
    "norm_1_outside": "not within its picture",
    "objects_unused": "0 <ref-object> and 0 <bbox>",
    "too_few_objects": "2 <ref-object> and 1 <bbox> for 1",  # an IndexError there
    "empty_objects": "1 <ref-object> and 1 <bbox> for 0",
}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['name']} {case['objects_form']}")
def test_rows_of_ms_swift_become_the_text_it_writes(tmp_path, case):
    (tmp_path / "img").mkdir()
    for name, size in GOLDEN["image_sizes"].items():
        Image.new("1", size).save(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text(json.dumps(case["example"]))
    rows = read_rows("rows.jsonl", Reading(root=tmp_path))
    if case["name"] in REFUSED:
        with pytest.raises(DataError) as fault:
            rows[0]
        assert REFUSED[case["name"]] in str(fault.value)
    else:
        text = chat_text(rows[0], tmp_path)
        assert text == case.get("text", text)  # without text: forms that ms-swift itself cannot read


def chat_text(row, root):
    def texts(part):
        if isinstance(part, Picture):
            return [f"<img>{part.source.relative_to(root).as_posix()}</img>"]
        tags = [part] if isinstance(part, str) else tags_from_object(part, row.pictures)
        return [tag if isinstance(tag, str) else tag.value for tag in tags]

    turns = (Turn(role="system", parts=("You are a helpful assistant.",)), *row.turns)
    return "\n".join(f"<|im_start|>{t.role}\n{''.join(text for part in t.parts for text in texts(part))}<|im_end|>" for t in turns)
