"""Rows of parquet files are those of jsonl, with images in their cells."""

import datetime
import decimal
import io
import json
import multiprocessing
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import tiny_family

from qwenvl_lit.data import expansion
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.findings import record
from qwenvl_lit.data.inspection import inspect
from qwenvl_lit.data.readers import parquet, row_groups
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.data.survey import Finding, measure_lengths
from qwenvl_lit.types import BadImage, DataError, micro_batches_of

LAYOUTS = {
    "conversations": {
        "id": "x",
        "conversations": [
            {"from": "user", "value": "Picture 1: <img>a.png</img>\nFind <ref>it</ref>"},
            {"from": "assistant", "value": "<box>(200,200),(600,600)</box>"},
        ],
        "images": ["a.png"],
    },
    "messages": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
        ],
    },
    "messages as lists": {
        "messages": {"role": ["user", "assistant"], "content": ["<image>What?", "A dog."]},
        "images": ["a.png"],
    },
    "query": {
        "query": "Find <ref-object>",
        "response": "<bbox>",
        "images": ["a.png"],
        "history": [["Hello", "Hi!"]],
        "system": "Be brief.",
        "objects": [
            {"caption": "guy in red", "bbox": [1, 2, 3, 4], "bbox_type": "real", "image": 0}
        ],
    },
    "swift 3": {
        "query": "Find <ref-object>",
        "response": "<bbox>",
        "images": ["b.png", "a.png"],
        "objects": {"ref": ["guy"], "bbox": [[1, 2, 3, 4]], "image_id": [1]},
    },
    "instruction": {"instruction": "Add.", "input": "1 2", "output": "3", "level": 2.5},
    "conversation": {"conversation": [{"human": "Hello", "assistant": "Hi!"}], "images": []},
    "vqa": {"image": "a.png", "question": "How many?", "answers": ["2", "two"], "question_id": 7},
    "choices": {"image": "a.png", "question": "Which?", "choices": ["u", "v"], "answer": 1},
    "referring": {"image": "a.png", "sent": "the man", "bbox": [1, 2, 3, 4]},
    "text": {"text": "<img>a.png</img>A text.", "images": ["a.png"], "split": "easy"},
}


def png(value=0, size=(8, 6)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (value, 2 * value, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for value, name in enumerate(("a.png", "b.png"), 1):
        (tmp_path / name).write_bytes(png(value))
    return tmp_path


def embedded(value, folder):
    """Returns a row whose paths of images are structs with their bytes."""
    if isinstance(value, dict):
        return {
            key: [stored(path, folder) for path in each]
            if key == "images"
            else stored(each, folder)
            if key == "image"
            else embedded(each, folder)
            for key, each in value.items()
        }
    return [embedded(each, folder) for each in value] if isinstance(value, list) else value


def stored(path, folder):
    if not isinstance(path, str):
        return path
    return {"bytes": (folder / path).read_bytes(), "path": path}


def write(file, rows, **options):
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    pq.write_table(table, file, **{"row_group_size": 2, **options})
    return file


def facts(row):
    turns = []
    for turn in row.turns:
        parts = [getattr(part, "key", part) for part in turn.parts]
        turns.append((turn.role, parts))
    name = row.id.replace(".parquet", ".jsonl")
    return name, turns, row.references, row.options, row.columns, row.index, row.notes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_as_from_jsonl(folder, layout):
    row = LAYOUTS[layout]
    (folder / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    write(folder / "rows.parquet", [embedded(row, folder)] * 3)
    from_jsonl = list(map(facts, read_rows(str(folder / "rows.jsonl"))))
    (folder / "a.png").unlink()  # the bytes are read from the cells
    assert list(map(facts, read_rows(str(folder / "rows.parquet")))) == from_jsonl


STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
A, B = png(1), png(2)
FORMS = {
    "bytes": (pa.binary(), [A, None, B], [[A], [], [B]]),
    "large bytes": (pa.large_binary(), [A, B, B], [[A], [B], [B]]),
    "structs": (
        STRUCT,
        [{"bytes": A, "path": "x.png"}, {"bytes": None, "path": "b.png"}, None],
        [[A], [B], []],
    ),
    "structs of bytes": (
        pa.struct({"bytes": pa.binary()}),
        [{"bytes": A}, None, None],
        [[A], [], []],
    ),
    "neither bytes nor path": (STRUCT, [{"bytes": None, "path": None}, None, None], [[], [], []]),
    "lists of bytes": (pa.list_(pa.binary()), [[A, B], [], None], [[A, B], [], []]),
    "one in each list": (pa.large_list(pa.binary()), [[A], [B], [A]], [[A], [B], [A]]),
    "lists of structs": (
        pa.list_(STRUCT),
        [[{"bytes": A, "path": None}, {"bytes": B, "path": None}], [], None],
        [[A, B], [], []],
    ),
    "lists of bytes and paths": (
        pa.list_(STRUCT),
        [[{"bytes": A, "path": "x"}, {"bytes": None, "path": "b.png"}], [], None],
        [[A, B], [], []],
    ),
    "lists of one length": (
        pa.list_(pa.binary(), 2),
        [[A, B], [B, A], [A, A]],
        [[A, B], [B, A], [A, A]],
    ),
    "paths": (pa.string(), ["a.png", None, "b.png"], [[A], [], [B]]),
    "lists of paths": (pa.list_(pa.string()), [["a.png", "b.png"], [], None], [[A, B], [], []]),
    "names": (pa.dictionary(pa.int32(), pa.string()), ["a.png", None, "b.png"], [[A], [], [B]]),
}


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_images_may_be_bytes_structs_paths_or_lists_of_them(folder, form, statistics):
    kind, cells, expected = FORMS[form]
    table = pa.table({"query": ["q"] * 3, "images": pa.array(cells, kind)})
    write(folder / "rows.parquet", table, write_statistics=statistics)
    rows = read_rows(str(folder / "rows.parquet"))
    assert [[image._content() for image in row.images] for row in rows] == expected


def test_an_image_is_named_by_file_row_column_and_path(folder):
    cells = [[{"bytes": A, "path": "x.png"}, {"bytes": B, "path": None}]] * 3
    table = pa.table({"query": ["q"] * 3, "images": pa.array(cells, pa.list_(STRUCT))})
    file = write(folder / "rows.parquet", table)
    names = [image.name for image in read_rows(str(file))[2].images]
    assert names == [f"{file}:3 (images[0]: x.png)", f"{file}:3 (images[1])"]


def test_further_columns_are_text_and_embeddings_are_not_read(folder):
    table = pa.table(
        {
            "query": ["q"],
            "when": pa.array([datetime.datetime(2026, 11, 30, 12)], pa.timestamp("ns", "UTC")),
            "price": pa.array([decimal.Decimal("1.50")], pa.decimal128(9, 2)),
            "half": pa.array(np.array([1.5], np.float16)),
            "set": pa.array(["easy"]).dictionary_encode(),
            "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())),
            "embedding": [[1.0, 2.0]],
            "thumbnail": [b"not read"],
        }
    )
    row = read_rows(str(write(folder / "rows.parquet", table)))[0]
    assert row.columns == {
        "when": "2026-11-30 12:00:00.000000000Z",
        "price": "1.50",
        "half": "1.5",
        "set": "easy",
    }


def test_only_images_that_are_opened_are_unpacked_and_each_row_group_once(folder, monkeypatch):
    rows = [{"query": "q", "image": {"bytes": png(k), "path": None}} for k in range(6)]
    for row in rows:
        row["response"] = "a"
    file = write(folder / "rows.parquet", rows)
    read = []
    batches = row_groups._batches

    def counted(source, names, group, size):
        read.append((names, group))
        return batches(source, names, group, size)

    monkeypatch.setattr(row_groups, "_batches", counted)
    opened = read_rows(str(file), ReadOptions(cache=folder / "cache"))
    measure_lengths(opened, tiny_family().processor(), workers=1, cache=None, identity=None)
    text = [(("query", "image.path", "response"), group) for group in range(3)]
    assert read == text
    for _ in range(2):
        assert [opened[k].images[0]._content() for k in (5, 2, 4)] == [png(5), png(2), png(4)]
    assert read == [*text, (("image.bytes",), 2), (("image.bytes",), 1)]
    again = read_rows(str(file), ReadOptions(cache=folder / "cache"))
    assert again[3].images[0]._content() == png(3)
    assert len(read) == 5


def test_without_space_in_the_cache_the_last_row_groups_stay_in_memory(folder, monkeypatch):
    rows = [{"image": png(k), "question": "q"} for k in range(6)]
    file = write(folder / "rows.parquet", rows)
    monkeypatch.setattr(row_groups, "write_to_cache", lambda *_: False)
    monkeypatch.setattr(row_groups, "_IN_MEMORY", 500)
    monkeypatch.setattr(row_groups, "_open_groups", type(row_groups._open_groups)())
    opened = read_rows(str(file), ReadOptions(cache=folder / "cache"))
    assert [row.images[0]._content() for row in opened] == [png(k) for k in range(6)]
    assert sum(len(group.memory) for group in row_groups._open_groups.values()) <= 500
    assert not (folder / "cache").exists()


def test_a_damaged_file_of_the_cache_is_made_again(folder):
    file = write(folder / "rows.parquet", [{"image": A, "question": "q"}])
    rows = read_rows(str(file), ReadOptions(cache=folder / "cache"))
    rows[0].images[0].open()
    [unpacked] = (folder / "cache").rglob("images*")
    unpacked.write_bytes(b"")
    row_groups._open_groups.clear()
    assert rows[0].images[0]._content() == A


def test_text_that_was_unpacked_and_then_damaged_is_named(folder):
    table = pa.table({"query": [f"{k}" * 1000 for k in range(3)]})
    file = write(folder / "rows.parquet", table)
    read_rows(str(file), ReadOptions(cache=folder / "cache"))
    [unpacked] = (folder / "cache").rglob("text*")
    for content in (b"", b"\xff" * 100, b"\x7f" * 100, unpacked.read_bytes()[:-1]):
        unpacked.write_bytes(content)
        row_groups._text.cache_clear()
        with pytest.raises(DataError, match=r"text.bin cannot be read: it is damaged; "):
            read_rows(str(file), ReadOptions(cache=folder / "cache"))


def test_rows_of_any_size_are_unpacked_in_small_batches(folder):
    texts = ["q" * (300_000 if k == 70 else k % 7) for k in range(1000)]
    table = pa.table({"query": texts, "image": [png(k) for k in range(1000)]})
    file = write(folder / "rows.parquet", table, row_group_size=600)
    rows = read_rows(str(file))
    assert ["".join(row.turns[0].parts[1:]) for row in rows] == texts
    text = row_groups._text(rows._rows._source)
    sizes = np.diff(text._starts)
    assert len(sizes) < 100
    assert sorted(sizes)[-2] < 70_000 < sizes.max() < 310_000


def test_rows_can_be_sent_to_another_process(folder):
    file = write(folder / "rows.parquet", [{"image": png(k), "question": "q"} for k in range(20)])
    rows = read_rows(str(file), ReadOptions(cache=folder / "cache"))
    sent = pickle.dumps(rows)
    assert len(sent) < 5000
    assert len(pickle.dumps(rows[0])) < 1000
    assert [facts(row) for row in pickle.loads(sent)] == [facts(row) for row in rows]


def not_utf8(folder):
    text = pa.StringArray.from_buffers(
        2, pa.py_buffer(np.array([0, 1, 3], np.int32)), pa.py_buffer(b"q\xe9t")
    )
    return pa.table({"query": text})


def layout_of_row_3(folder):
    return [{"query": "q", "text": None}] * 2 + [{"query": None, "text": "t"}]


@pytest.mark.parametrize(
    ("rows", "index", "message"),
    [
        (not_utf8, 1, r"{file} (row 2, row group 1): column 'query' is not UTF-8: "),
        (
            layout_of_row_3,
            2,
            r"{file} (row 3, row group 2): row 'rows.parquet:3': is in the layout",
        ),
        ([{"query": "q", "images": [None]}], 0, "an image must be a path, an address or base64"),
        ([{"query": 1}], 0, "`query` must be text, got 1"),
        ([{"query": b"q"}], 0, "`query` must be text, got "),
        ([{"image": None, "question": "q"}], 0, "`image` has no value"),
        ([{"query": "q", "audio": {"bytes": b"", "path": "a"}}], 0, "the row has `audio`"),
        ([{"query": "q", "images": ["none.png"]}], 0, "none.png does not exist"),
    ],
)
def test_a_bad_cell_is_refused_with_file_row_and_row_group(folder, rows, index, message):
    file = write(folder / "rows.parquet", rows(folder) if callable(rows) else rows)
    with pytest.raises(DataError) as error:
        read_rows(str(file))[index]
    assert message.format(file=file) in str(error.value)
    assert str(error.value).startswith(f"{file} (row {index + 1}, row group ")
    assert "\n" not in str(error.value)


def damaged(content, at):
    return content[:at] + bytes([content[at] ^ 0xFF]) * 40 + content[at + 40 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-9], "is not a complete parquet file: its end is missing"),
        (lambda content: b"", "is empty; expected a parquet file"),
        (lambda content: b"<html>", "is a web page"),
        (lambda content: b'{"query": "q"}\n', "is not a parquet file: it begins with"),
        (lambda content: b"PAR1PAR1", "cannot be read: "),
        (lambda content: damaged(content, len(content) - 100), "cannot be read: "),
        (lambda content: damaged(content, 4), "(row group 1) cannot be read: "),
    ],
)
def test_a_damaged_file_is_named_in_one_line(folder, change, message):
    file = write(folder / "rows.parquet", [{"query": "q" * 50}] * 3, compression="zstd")
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(DataError) as error:
        read_rows(str(file))
    assert str(error.value).startswith(f"{file} ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"query": pa.array([], pa.string())}), "has no rows"),
        (pa.Table.from_arrays([pa.array(["q"])] * 2, ["query", "query"]), "are repeated"),
        (
            pa.table({"messages": pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string()))}),
            "column 'messages' has the type map<string, string",
        ),
        (pa.table({"a": ["q"]}), "(row 1, row group 1): keys ['a'] fit no known layout"),
    ],
)
def test_a_file_without_rows_to_read_is_refused(folder, table, message):
    file = write(folder / "rows.parquet", table)
    with pytest.raises(DataError) as error:
        read_rows(str(file))
    assert str(error.value).startswith(str(file))
    assert message in str(error.value)


def test_a_file_that_expands_too_much_is_refused(folder, monkeypatch):
    monkeypatch.setattr(expansion, "ALWAYS_ALLOWED", 100_000)
    table = pa.table({"query": ["q" * 10_000] * 200})  # one value, and 200 indices
    file = write(folder / "rows.parquet", table, row_group_size=200)
    with pytest.raises(DataError, match=r"rows.parquet expands to .* bytes or more"):
        read_rows(str(file))


def test_without_pyarrow_the_extra_is_named(folder, monkeypatch):
    file = write(folder / "rows.parquet", [{"query": "q"}])
    monkeypatch.setattr(parquet, "find_spec", lambda package: None)
    with pytest.raises(DataError, match=r"pyarrow.* pip install -e '\.\[parquet\]'"):
        read_rows(str(file))


def test_the_name_of_a_file_does_not_matter(folder):
    file = write(folder / "rows.parquet", [{"query": "q"}]).rename(folder / "rows.pq")
    assert read_rows(str(file))[0].turns[0].parts == ("q",)


def broken_data(folder, **options):
    cells = [A, b"no image", None, b"", A, A]
    table = pa.table({"query": list("qrstuv"), "response": list("abcdef"), "image": cells})
    write(folder / "rows.parquet", table)
    return DataModule(
        processor=tiny_family().processor(),
        read=read_rows,
        root=folder,
        cache=folder / "cache",
        train="rows.parquet",
        validation=None,
        **options,
    )


def test_broken_images_stop_the_loader_or_are_dropped_as_those_of_files(folder):
    data = broken_data(folder)
    data.setup("fit")
    with pytest.raises(BadImage, match=r"\(row [24], row group [12]\).*data.on_bad_image=drop"):
        list(data.train_dataloader())
    data = broken_data(folder, on_bad_image="drop", max_bad_fraction=0.5)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert sorted(row.id for batch in batches for row in batch.conversations) == [
        f"rows.parquet:{row}" for row in (1, 3, 5, 6)
    ]
    dropped = sorted(str(reason) for batch in batches for reason in batch.dropped)
    assert ["rows.parquet:2 (image)" in dropped[0], "the file is empty" in dropped[1]] == [True] * 2


def test_damaged_pages_of_images_are_bad_images(folder):
    rows = [{"query": "q", "image": bytes([k]) * 3000} for k in range(4)]
    file = write(folder / "rows.parquet", rows, use_dictionary=False, compression="snappy")
    place = pq.ParquetFile(file).metadata.row_group(1).column(1).data_page_offset
    file.write_bytes(damaged(file.read_bytes(), place))
    opened = read_rows(str(file))
    assert opened[1].images[0]._content() == bytes([1]) * 3000
    with pytest.raises(BadImage, match=r"rows.parquet \(row group 2\) cannot be read: "):
        opened[2].images[0].open()


def test_inspection_finds_the_same_as_in_jsonl(folder):
    rows = [{"image": "a.png", "question": "q?", "answer": "a"}] * 2
    rows += [{"image": "b.png", "question": "q?", "answer": ""}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(folder / "rows.parquet", [embedded(row, folder) for row in rows])
    found = []
    for name in ("rows.jsonl", "rows.parquet"):
        sets = {"train": read_rows(str(folder / name)), "test": read_rows(str(folder / name))}
        inspection = inspect(sets, tiny_family().processor())
        found.append(
            [
                (one_set.rows, one_set.boxes, one_set.affected, one_set.lengths.tolist())
                for one_set in inspection.sets
            ]
        )
        overlap = [(one.rows, one.images) for one in inspection.overlaps]
        found[-1].append(overlap)
    assert found[0] == found[1]


def test_a_finding_says_the_row():
    place = "/data/a.parquet (row 17, row group 2)"
    finding = record("train", Finding(kind="error", index=16, id="x", message="m", where=place))
    assert (finding["file"], finding["line"], finding["row"]) == ("/data/a.parquet", None, 17)


def batches_of(folder, name, workers):
    data = DataModule(
        processor=tiny_family().processor(),
        read=read_rows,
        root=folder,
        cache=folder / "cache",
        train=name,
        validation=0.25,
        split_file=folder / f"{name}.json",
        batch_size=3,
        num_workers=workers,
    )
    data.setup("fit")
    loaded = [*data.train_dataloader(), *data.val_dataloader()[0]]
    return [batch for batches in loaded for batch in micro_batches_of(batches)], data


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_and_splits_are_those_of_jsonl(folder, workers):
    rows = []
    for k in range(16):
        (folder / f"{k}.png").write_bytes(png(k, size=(8 + k, 9)))
        images = [f"{k}.png", "a.png"][: k % 3]
        rows.append({"id": k, "query": "q" * k + "<image>" * len(images), "response": str(k)})
        rows[-1]["images"] = images
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pa.Table.from_pylist([embedded(row, folder) for row in rows])
    write(folder / "one.parquet", table.slice(0, 9), row_group_size=4)
    write(folder / "two.parquet", table.slice(9), row_group_size=4)
    expected, jsonl = batches_of(folder, "rows.jsonl", workers)
    batches, data = batches_of(folder, "*.parquet", workers)
    assert [row.id for row in data.validation] == [row.id for row in jsonl.validation]
    assert len(batches) == len(expected)
    for batch, wanted in zip(batches, expected, strict=True):
        assert [row.id for row in batch.conversations] == [row.id for row in wanted.conversations]
        for name in ("input_ids", "labels", "vision_positions", "target_positions"):
            assert torch.equal(getattr(batch, name), getattr(wanted, name)), name
        assert batch.vision.keys() == wanted.vision.keys()
        for name, tensor in batch.vision.items():
            assert torch.equal(tensor, wanted.vision[name]), name


@pytest.mark.slow  # the worker imports torch
def test_a_spawned_worker_reads_rows_and_images(folder):
    file = write(folder / "rows.parquet", [{"image": png(k), "question": "q"} for k in range(3)])
    rows = read_rows(str(file))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(keys_of, (rows,)) == keys_of(rows)


def keys_of(rows):
    return [row.images[0].key for row in rows]
