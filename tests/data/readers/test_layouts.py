import json

import pytest
from PIL import Image

from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.types import Box, Conversation, DataError, GroundedObject, ImageSource, Turn


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
            Turn(
                role="user",
                parts=("Picture 1: ", ImageSource(folder / "a.png"), "\nWhat is  it?\t"),
            ),
            Turn(role="assistant", parts=("A 狗 \n",)),
            Turn(role="user", parts=("Sure?",)),
            Turn(role="assistant", parts=()),
        ),
        columns={"task": "chat", "score": "0.5"},
    )


def test_a_question_with_its_history(folder, read_row):
    row = {
        "query": "And now?",
        "response": "Now too.",
        "history": [["<img>a.png</img>Day?", "Night."]],
        "system": "Be brief.",
    }
    assert read_row(row) == Conversation(
        id="rows.jsonl:1",
        turns=(
            Turn(role="system", parts=("Be brief.",)),
            Turn(role="user", parts=(ImageSource(folder / "a.png"), "Day?")),
            Turn(role="assistant", parts=("Night.",)),
            Turn(role="user", parts=("And now?",)),
            Turn(role="assistant", parts=("Now too.",)),
        ),
    )


def test_a_question_without_an_answer_is_a_prompt(read_row):
    assert read_row(
        {"query": "Hello", "response": None, "system": None, "history": None}
    ).turns == (Turn(role="user", parts=("Hello",)),)


def test_roles_may_be_called_human_and_gpt(read_row):
    row = read_row(
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    )
    assert [turn.role for turn in row.turns] == ["user", "assistant"]


def test_a_vqa_row_is_asked_by_the_prompt_and_answered_by_the_majority(folder, read_row):
    row = {
        "question_id": 17,
        "image": "a.png",
        "question": "What {color}?",
        "answers": ["red", {"answer": "blue"}, "blue"],
        "set": "val",
    }
    assert read_row(row) == Conversation(
        id="17",
        turns=(
            Turn(role="user", parts=(ImageSource(folder / "a.png"), "What {color}? Answer:")),
            Turn(role="assistant", parts=("blue",)),
        ),
        references=("red", "blue", "blue"),
        columns={"set": "val"},
    )
    chat = read_row(
        {"image": "a.png", "question": "Why?", "answer": "so"},
        prompt="Picture 1: {image}\n{question}",
    )
    assert chat.turns[0].parts == ("Picture 1: ", ImageSource(folder / "a.png"), "\nWhy?")
    assert chat.references == ("so",)
    assert read_row({"image": "a.png", "question": "Why?"}).answer is None


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Color?"}]},
        {"conversations": [{"from": "user", "value": "Color?"}]},
        {"conversation": [{"human": "Color?"}]},
        {"query": "Color?"},
        {"instruction": "Color?"},
    ],
)
def test_chats_may_have_several_accepted_answers(read_row, row):
    read = read_row(row | {"answers": ["navy", "blue", "blue"]})
    assert read.prompt().turns == read_row(row).turns
    assert read.answer.parts == ("blue",)
    assert read.references == ("navy", "blue", "blue")


def test_the_answer_of_a_chat_is_one_of_its_accepted_answers(read_row):
    row = {"query": "Color?", "response": "blue"}
    assert read_row(row | {"answers": ["blue", "navy"]}).references == ("blue", "navy")
    read = read_row(row | {"answers": ["navy"]})
    assert read.references == ("blue", "navy")
    assert read.answer.parts == ("blue",)
    assert read_row(row | {"answers": "[]"}).references == ()
    with pytest.raises(DataError, match=r"answers must be text, got \[1\]"):
        read_row(row | {"answers": [1]})
    [note] = read_row(row | {"references": ["navy"]}).notes
    assert note == "the key 'references' is not read; did you mean `answers`?"


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("messages", ("role", "content")),
        ("conversations", ("from", "value")),
        ("conversation", ("human", "assistant")),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_turns_may_be_a_mapping_of_lists(read_row, key, names, as_text):
    turns = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    if key == "conversation":
        turns = [("q", "a"), ("r", "b")]
    records = [{**dict(zip(names, turn, strict=True)), "loss": None} for turn in turns]
    lists = {name: [turn[name] for turn in records] for name in (*names, "loss")}
    row = read_row({key: json.dumps(lists) if as_text else lists})
    assert row == read_row({key: records})
    assert [turn.parts for turn in row.turns] == [("q",), ("a",), ("r",), ("b",)]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ({"role": ["user"], "content": ["a", "b"]}, r"which has lists of \[1, 2\] values"),
        ({"role": "user", "content": "a"}, "which has no lists"),
        ({}, "which has lists of \\[\\] values"),
        ({"role": ["user", "assistant"], "content": ["a", None]}, "turn 2 has no content"),
    ],
)
def test_a_mapping_of_turns_that_is_not_clear_is_refused(read_row, messages, message):
    with pytest.raises(DataError, match=message):
        read_row({"messages": messages})


def test_texts_of_a_content_are_not_joined(read_row):
    turns = [
        {"role": "user", "content": ["Color?"]},
        {"role": "assistant", "content": ["blue", "BLUE"]},
    ]
    message = "turn 2 has two texts in a row, 'blue' and 'BLUE'; .* in the row's key `answers`"
    with pytest.raises(DataError, match=message):
        read_row({"messages": turns})
    turns[1]["content"] = ["blue"]
    assert read_row({"messages": turns}).answer.parts == ("blue",)


def test_a_row_in_another_layout_than_the_first_is_refused(folder):
    (folder / "rows.jsonl").write_text(
        '{"query": "a"}\n{"id": 3, "conversations": []}\n{"query": "c"\n'
    )
    rows = read_rows(str(folder / "rows.jsonl"))
    with pytest.raises(
        DataError,
        match=r"rows\.jsonl:2: row '3': is in the layout `conversations`, "
        r"but the first .* in `query`; its keys are \['id', 'conv",
    ):
        rows[1]
    with pytest.raises(DataError, match=r"rows\.jsonl:3: not JSON"):
        rows[2]


GUY = (
    r'"objects": "[{\"caption\": \"guy in red\", \"bbox\": [138, 136, 235, 359], '
    r'\"bbox_type\": \"real\", \"image\": 0}]"'
)
GUY_BOX = GroundedObject(boxes=(Box(x0=138, y0=136, x1=235, y1=359),))
GUY_LABEL = GroundedObject(label="guy in red")
MAN = GroundedObject(label="the man")
MAN_BOX = GroundedObject(boxes=(Box(x0=200, y0=200, x1=600, y1=600, frame="grid"),))


@pytest.mark.parametrize(
    ("line", "question", "answer"),
    [
        (
            '{"query": "Find <bbox>", "response": "<ref-object>", "images": ["a.png"], '
            + GUY
            + " }",
            ["Find ", GUY_BOX],
            [GUY_LABEL],
        ),
        (
            '{"query": "Find <ref-object>", "response": "<bbox>", "images": ["a.png"], '
            + GUY
            + " }",
            ["Find ", GUY_LABEL],
            [GUY_BOX],
        ),
        (
            '{"query": "<img>a.png</img>Find <bbox>", "response": "<ref-object>", ' + GUY + " }",
            ["Find ", GUY_BOX],
            [GUY_LABEL],
        ),
        (
            '{"query": "<img>a.png</img>Find <ref-object>", "response": "<bbox>", ' + GUY + " }",
            ["Find ", GUY_LABEL],
            [GUY_BOX],
        ),
        (
            '{"query": "<img>a.png</img>Find <ref>the man</ref>", '
            '"response": "<box>(200,200),(600,600)</box>"}',
            ["Find ", MAN],
            [MAN_BOX],
        ),
    ],
)
def test_grounded_rows_of_ms_swift(folder, line, question, answer):
    (folder / "rows.jsonl").write_text(line)
    row = read_rows(str(folder / "rows.jsonl"))[0]
    assert [list(turn.parts) for turn in row.turns] == [
        [ImageSource(folder / "a.png"), *question],
        answer,
    ]


def test_chats_of_the_published_model(folder):
    for name in ("p1", "p2", "p3", "p"):
        Image.new("1", (4, 4)).save(folder / name, format="png")
    (folder / "text.json").write_text(
        '[{"conversations": [{"from": "user", "value": "AAAAA"}, '
        '{"from": "assistant", "value": "BBBBB"}, {"from": "user", "value": "CCCCC"}, '
        '{"from": "assistant", "value": "DDDDD"}]}]'
    )
    assert [turn.parts for turn in read_rows("text.json", ReadOptions(root=folder))[0].turns] == [
        ("AAAAA",),
        ("BBBBB",),
        ("CCCCC",),
        ("DDDDD",),
    ]
    (folder / "images.json").write_text(
        r'[{"conversations": [{"from": "user", "value": "Picture 1:<img>p1</img>\n'
        r'Picture 2:<img>p2</img>\nPicture 3:<img>p3</img>\naaaaa"}, '
        r'{"from": "assistant", "value": "bbbbb"}, '
        r'{"from": "user", "value": "Picture 1:<img>p</img>\nccccc"}, '
        r'{"from": "assistant", "value": "ddddd"}]}]'
    )
    p1, p2, p3, p = (ImageSource(folder / name) for name in ("p1", "p2", "p3", "p"))
    assert [turn.parts for turn in read_rows("images.json", ReadOptions(root=folder))[0].turns] == [
        ("Picture 1:", p1, "\nPicture 2:", p2, "\nPicture 3:", p3, "\naaaaa"),
        ("bbbbb",),
        ("Picture 1:", p, "\nccccc"),
        ("ddddd",),
    ]


def turns_of(row):
    return [(turn.role, *turn.parts) for turn in row.turns]


def test_messages_hold_text_or_a_list_of_texts_and_images(folder, read_row):
    a, b = ImageSource(folder / "a.png"), ImageSource(folder / "b.png")
    content = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "and "},
        {"type": "image_url", "image_url": {"url": f"file://{folder}/b.png"}},
        {"type": "text", "text": "differ"},
        "?",
    ]
    row = {
        "messages": [
            {"role": "system", "content": "Brief."},
            {"role": "user", "content": content},
            {"role": "assistant", "content": "Yes"},
        ]
    }
    assert turns_of(read_row(row)) == [
        ("system", "Brief."),
        ("user", a, "and ", b, "differ?"),
        ("assistant", "Yes"),
    ]
    row = {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "text": None, "image": None},
                    {"text": "What?"},
                    {"image": "b.png"},
                ],
            }
        ],
        "images": ["a.png"],
    }
    assert turns_of(read_row(row)) == [("user", a, "What?", b)]


def test_instructions_with_their_input(read_row):
    row = {
        "instruction": "Add.",
        "input": "1 2",
        "output": "3",
        "history": [["Hello", "Hi"]],
        "system": "s",
    }
    assert turns_of(read_row(row)) == [
        ("system", "s"),
        ("user", "Hello"),
        ("assistant", "Hi"),
        ("user", "Add.\n1 2"),
        ("assistant", "3"),
    ]
    assert turns_of(read_row({"instruction": "Add.", "input": "", "output": "3"})) == [
        ("user", "Add."),
        ("assistant", "3"),
    ]


def test_a_conversation_as_pairs(read_row):
    row = {"system": "s", "conversation": [{"human": "a", "assistant": "b"}, {"human": "c"}]}
    assert turns_of(read_row(row)) == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]
    with pytest.raises(DataError, match=r"got \{'human': 'a'\} as number 1"):
        read_row({"conversation": [{"human": "a"}, {"human": "c"}]})


@pytest.mark.parametrize("key", ["text", "response"])
def test_plain_text_is_the_answer_to_an_empty_question(folder, read_row, key):
    row = read_row({key: "<img>a.png</img>A dog."})
    assert turns_of(row) == [("user",), ("assistant", ImageSource(folder / "a.png"), "A dog.")]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"conversations": [{"from": "user", "value": "a"}]}, "conversations"),
        ({"messages": [{"role": "user", "content": "a"}], "query": None}, "messages"),
        ({"query": "a", "response": "b", "text": "a further column"}, "query"),
        ({"instruction": "a"}, "instruction"),
        ({"conversation": [{"human": "a"}]}, "conversation"),
        ({"image": "a.png", "question": "a"}, "vqa"),
        ({"text": "a"}, "text"),
        ({"response": "a"}, "response"),
    ],
)
def test_the_keys_of_a_row_decide_its_layout(folder, row, name):
    (folder / "rows.jsonl").write_text(json.dumps(row))
    rows = read_rows(str(folder / "rows.jsonl"))
    assert rows.layout.name == name
    assert rows[0].turns


@pytest.mark.parametrize(
    "images",
    ["a.png", ["a.png"], '["a.png"]', [{"path": "a.png"}], {"url": "a.png"}],
    ids=["path", "list", "json", "mapping", "url"],
)
def test_the_forms_in_which_images_are_listed(folder, read_row, images):
    for key in ("image", "images"):
        assert read_row({"query": "x", key: images}).images == (ImageSource(folder / "a.png"),)


def test_a_cell_of_a_table_holds_lists_as_json(folder):
    (folder / "rows.csv").write_text(
        "id,query,response,history,images,objects,note\n"
        '7,"Say ""<bbox>"",\nplease","<ref-object>","[[""a"", ""b""]]",a.png,'
        '"[{""caption"": ""dog"", ""bbox"": [1, 2, 3, 4], ""bbox_type"": ""real"", ""image"": 0}]",'
        "kept\n"
        "8,c,,,,,\n"
    )
    first, second = read_rows("rows.csv", ReadOptions(root=folder))
    assert turns_of(first)[:2] == [
        ("user", ImageSource(folder / "a.png"), "a"),
        ("assistant", "b"),
    ]
    assert turns_of(first)[2][1:] == (
        'Say "',
        GroundedObject(boxes=(Box(x0=1, y0=2, x1=3, y1=4),)),
        '",\nplease',
    )
    assert (first.id, first.columns) == ("7", {"note": "kept"})
    assert turns_of(second) == [("user", "c")]


def test_the_box_of_a_table_is_json_text(folder):
    (folder / "rows.csv").write_text('image,sent,bbox\na.png,dog,"[1, 2, 30, 30]"\n')
    [_, answer] = read_rows(str(folder / "rows.csv"))[0].turns
    assert answer.parts[0].boxes == (Box(x0=1, y0=2, x1=30, y1=30, frame="pixel"),)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image,question\na.png,\n", "`question` has no value, and the layout `vqa` needs one"),
        ("image,question\n,Why?\n", "`image` has no value, and the layout `vqa` needs one"),
        ('query\n""\n', "`query` has no value, and the layout `query` needs one"),
        ("Image,question\na.png,Why?\n", "the key 'Image' is not known; did you mean `image`?"),
        (
            "id, image,question\n1,a.png,Why?\n",
            "the key ' image' is not known; did you mean `image`?",
        ),
        ("id|image\n1|a.png\n", "the only key is 'id|image'; if it is the header of a table"),
        ("id,name\n1,a\n", "keys ['id', 'name'] fit no known layout. Known, "),
    ],
)
def test_a_table_without_a_layout_is_told_the_nearest_reason(folder, table, message):
    (folder / "rows.csv").write_text(table)
    with pytest.raises(DataError) as error:
        read_rows(str(folder / "rows.csv"))
    assert str(error.value).startswith(f"{folder / 'rows.csv'}:2: {message}")
