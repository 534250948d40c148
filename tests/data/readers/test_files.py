import gzip
import json
import os
import pickle
import random
import re

import pytest

from qwenvl_lit.data import expansion
from qwenvl_lit.data.readers import files, scanning
from qwenvl_lit.data.readers.files import RowFile
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.types import DataError


def queries(file, cache=None):
    return [row["query"] for row in RowFile(file, cache)]


@pytest.fixture
def lines(tmp_path):
    def write(*queries, name="rows.jsonl"):
        (tmp_path / name).write_text("\n".join(json.dumps({"query": query}) for query in queries))
        return tmp_path / name

    return write


def test_a_file_may_be_an_array_with_its_own_line_breaks(folder):
    text = (
        '\ufeff [\n{"query": "狗", "response": "1"},\n\n {"query": "b",\n "response": "2"} ,'
        ' {"query": "c", "response": "]"}\n]\n'
    )
    (folder / "rows.json").write_text(text, encoding="utf-8")
    rows = read_rows("rows.json", ReadOptions(root=folder))
    assert [row.turns[0].parts + row.turns[1].parts for row in rows] == [
        ("狗", "1"),
        ("b", "2"),
        ("c", "]"),
    ]
    assert [row.id for row in rows] == ["rows.json:2", "rows.json:4", "rows.json:5"]
    assert [row.index for row in rows] == [0, 1, 2]


def test_blank_lines_are_skipped_but_counted(folder):
    (folder / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"query": "a"}\r\n\r\n  \n {"query": "b"}')
    assert [row.id for row in read_rows(str(folder / "rows.jsonl"))] == [
        "rows.jsonl:1",
        "rows.jsonl:4",
    ]


def test_cells_of_a_table_may_hold_commas_quotes_and_line_breaks(tmp_path):
    (tmp_path / "rows.csv").write_bytes(
        '\ufeffquery,response\r\n"a, ""狗""\r\n,b",\r\n\r\nc,"d\n"\r\n'.encode()
    )
    rows = RowFile(tmp_path / "rows.csv")
    assert list(rows) == [
        {"query": 'a, "狗"\r\n,b', "response": None},
        {"query": "c", "response": "d\n"},
    ]
    assert [rows.where(index) for index in (0, 1)] == [
        f"{tmp_path}/rows.csv:2",
        f"{tmp_path}/rows.csv:5",
    ]


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("layout", ["array", "pretty", "lines", "spaced"])
def test_rows_are_found_wherever_a_block_of_the_file_ends(tmp_path, monkeypatch, block, layout):
    rng = random.Random(block)
    letters = '狗é[]{},:"\\ \n\té1'
    rows = [
        {
            "q" * rng.randint(1, 5): "".join(rng.choices(letters, k=rng.randint(0, 40))),
            "n": [-1.5e3, {"a": None}],
        }
        for _ in range(30)
    ]
    dumped = [
        json.dumps(row, ensure_ascii=False, indent=2 if layout == "pretty" else None)
        for row in rows
    ]
    text = {
        "array": "[" + ",".join(dumped) + "]",
        "pretty": " [\n" + "\n,\n".join(dumped) + "\n]\n",
        "lines": "\n".join(dumped),
        "spaced": "\n\n  \n".join(dumped) + "\n \n",
    }[layout]
    (tmp_path / "rows").write_text(text, encoding="utf-8")
    for module in (files, scanning):
        monkeypatch.setattr(module, "BLOCK", block)
    file = RowFile(tmp_path / "rows")
    assert list(file) == rows
    lines = text.split("\n")
    for index, row in enumerate(dumped):
        line = int(re.search(r":(\d+)( \(row \d+\))?$", file.where(index))[1])
        assert row.split("\n")[0] in lines[line - 1]


def test_rows_of_an_array_on_one_line_are_told_apart_by_number(tmp_path):
    rows = [{"query": "a"}, {"query": 7}, {"query": "c", "id": "own"}, 8]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    read = read_rows(str(tmp_path / "rows.json"))
    assert [read[0].id, read[2].id] == ["rows.json:1 (row 1)", "own"]
    with pytest.raises(DataError) as error:
        read[1]
    where = f"{tmp_path}/rows.json:1 (row 2)"
    assert str(error.value) == f"{where}: row 'rows.json:1 (row 2)': `query` must be text, got 7"
    with pytest.raises(DataError, match=r"rows\.json:1 \(row 4\): a row must be a JSON object"):
        read[3]


# Other formats


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.tsv", 'query\tresponse\nHi, you\t"yo\tyo"\n'),
        ("rows.csv", 'query;response\nHi, you;"yo\tyo"\n'),
        ("rows.csv", "query\tresponse\nHi, you\tyo;yo\n"),
        ("rows.CSV", 'query,response\n"Hi, you",yo;yo\n'),
        ("rows.csv", '"query;response"\nHi; you\n'),
    ],
)
def test_cells_may_be_separated_by_tabs_or_semicolons(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    [row] = RowFile(tmp_path / name)
    answer = content.split("\n")[1].replace("Hi, you", "").strip(',;\t"')
    if len(row) == 1:
        assert row == {"query;response": "Hi; you"}
    else:
        assert row == {"query": "Hi, you", "response": answer}
    with gzip.open(tmp_path / f"{name}.gz", "wt") as stream:
        stream.write(content)
    assert list(RowFile(tmp_path / f"{name}.gz")) == [row]


def test_a_table_of_one_column_is_separated_by_commas(tmp_path):
    (tmp_path / "rows.csv").write_text("text\na;b\tc\n")
    assert list(RowFile(tmp_path / "rows.csv")) == [{"text": "a;b\tc"}]
    (tmp_path / "rows.csv").write_text("text\na,b\n")
    with pytest.raises(DataError, match="2 cells, but the header names 1 column: "):
        RowFile(tmp_path / "rows.csv")[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1\x15\x04", "is not a complete parquet file: its end is missing"),
        (b"PK\x03\x04\x14", "is an Excel file (xlsx) or another zip archive"),
        (b"\x1f\x8b\x08", "is compressed with gzip; "),
        (b"\x1f\x8b\x08", "let its name end in .gz"),
        (b"\xff\xfeq\x00", "is text in UTF-16; "),
        (b"<!DOCTYPE html>\n", "is a web page"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_files_of_other_formats_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(str(tmp_path / name))
    assert str(error.value).startswith(f"{tmp_path / name} ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "content", ['{\n  "query": "a"\n}', '\n{"query": "a",\n"response": "b"}\n']
)
def test_an_object_over_several_lines_is_named(tmp_path, content):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError, match=r"begins with a JSON object over several lines, but"):
        read_rows(str(tmp_path / "rows.json"))


def test_text_that_is_not_json_is_told_the_formats(tmp_path):
    (tmp_path / "rows.txt").write_text("query: a\n")
    with pytest.raises(DataError, match=r"rows\.txt:1: not JSON: .*; json, jsonl, csv and tsv"):
        read_rows(str(tmp_path / "rows.txt"))


def test_a_cell_may_hold_an_image(tmp_path):
    (tmp_path / "rows.csv").write_text("query,image\na," + "A" * 300_000 + "\n")
    sent = pickle.dumps(RowFile(tmp_path / "rows.csv"))
    assert len(pickle.loads(sent)[0]["image"]) == 300_000


def test_compressed_files_are_read_like_plain_ones(tmp_path):
    for name, text in {
        "a.jsonl": '{"query": "a"}',
        "b.json": '[\n{"query": "b"}]',
        "c.csv": "id,query\n1,c\n",
    }.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    for cache in (None, tmp_path / "cache"):
        assert [
            queries(tmp_path / f"{name}.gz", cache) for name in ("a.jsonl", "b.json", "c.csv")
        ] == [["a"], ["b"], ["c"]]
    assert RowFile(tmp_path / "b.json.gz").where(0) == f"{tmp_path}/b.json.gz:2 (row 1)"


def test_an_index_is_cached_until_the_file_changes(tmp_path, lines, monkeypatch):
    cache, file = tmp_path / "cache", lines("a", "b")
    assert queries(file, cache) == ["a", "b"]
    (index,) = (cache / "indexes").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(files, "find_lines", None)  # not called again
        assert queries(file, cache) == ["a", "b"]
    lines("a", "b", "c")
    assert queries(file, cache) == ["a", "b", "c"]
    assert len(list((cache / "indexes").iterdir())) == 2
    assert index.exists()


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY\x01\x00garbage", None])
def test_a_damaged_index_is_replaced(tmp_path, lines, damage):
    cache, file = tmp_path / "cache", lines("a", "b")
    queries(file, cache)
    (index,) = (cache / "indexes").iterdir()
    content = index.read_bytes()
    index.write_bytes(content[:-8] + b"\xff" * 8 if damage is None else damage)
    assert queries(file, cache) == ["a", "b"]
    assert index.read_bytes() == content


def test_pickled_rows_carry_their_index_and_refuse_a_changed_file(tmp_path, lines, monkeypatch):
    file = lines("a", "b")
    sent = pickle.dumps(RowFile(file))
    monkeypatch.setattr(files, "find_lines", None)
    assert [row["query"] for row in pickle.loads(sent)] == ["a", "b"]
    os.utime(file, (1, 1))
    files._stream.cache_clear()  # as in a process that starts now
    with pytest.raises(DataError, match=r"rows\.jsonl has changed since it was opened"):
        pickle.loads(sent)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n \n", "has no rows"),
        ("[]", "has no rows"),
        ("query,response\na,b\n", ":1: not JSON"),
        ('[{"query": "a"}\n {"query": "b"}]', ":2 (row 1): not JSON"),
        ('[{"query": "a"},\n {"query": }]', ":2 (row 2): not JSON"),
        (
            '[{"query": "a"}',
            ":1 (row 1): not JSON: expected , or ] in the array, got the end of the file",
        ),
        ('[{"query": "a"}]\n x', ":2: not JSON: the array has ended, but 'x' follows"),
        (
            '[{"query": "a"}, \n\n{"query": "' + "b" * 99,
            ":3 (row 2): not JSON: a text is not closed",
        ),
        ("[1]", ":1 (row 1): a row must be a JSON object, got int"),
        (
            '{"prompt": "a"}',
            ":1: keys ['prompt'] fit no known layout. Known, optional keys in brackets: "
            "conversations [system, answers, images, image",
        ),
        ('{"query": "a", "conversations": []}', "fit several layouts (conversations, query)"),
    ],
)
def test_a_file_without_usable_rows_is_refused_when_it_is_opened(folder, content, message):
    (folder / "rows.json").write_text(content)
    with pytest.raises(DataError) as error:
        read_rows(str(folder / "rows.json"))
    assert str(error.value).startswith(str(folder / "rows.json"))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("query,response\n", "has no rows"),
        ("query,query\na,b\n", ":1: columns ['query'] are repeated"),
        ('query,response\n"a"b,c\n', ":2: not CSV"),
        ('query\na\n"b\nc\n', ":3: not CSV: unexpected end of data"),
        ("query,response\na\n", ":2: 1 cell, but the header names 2 columns"),
        ("query\na\rb\n", ":2: not CSV"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path, content, message):
    (tmp_path / "rows.csv").write_bytes(content.encode())
    with pytest.raises(DataError) as error:
        list(RowFile(tmp_path / "rows.csv"))
    assert str(error.value).startswith(f"{tmp_path}/rows.csv")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"query": "a", "id": 1, "id": 2}', "not JSON: key 'id' is repeated"),
        (b'{"query": NaN}', "not JSON: NaN is not a JSON number"),
        (b'{"query": -Infinity}', "not JSON: -Infinity is not a JSON number"),
        (b'{"query": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b'{"query": ' + b"[" * 100_000 + b"}", "not JSON: it is nested too deeply"),
        (b'{"query": "a\x00"}', "not JSON: Invalid control character"),
        (
            b'{"query": "caf\xe9"}',
            'not UTF-8: byte 0xe9 after \'{"query": "caf\'; save it as UTF-8',
        ),
        ('{"query": "a"}'.encode("utf-16"), "not UTF-8"),
        (b'{"query": "a"}{"query": "b"}', "not JSON: another row begins on this line; write"),
        (b'"query"', "a row must be a JSON object, got str"),
        (b'{"query": "a",}', "not JSON: the comma before } must be removed, at column 15"),
        (
            b'{"history": [["a", "b"], ]}',
            "not JSON: the comma before ] must be removed, at column 26",
        ),
        (b'{"query": "a"},', "not JSON: the comma after the row must be removed; lines of a jsonl"),
        (b"{'query': 'a'}", "not JSON: names and texts must stand in double quotes"),
        (b'{"query": None}', "not JSON: None must be written null"),
        (b'{"query": "a\tb"}', "not JSON: a line break or tab within a text must be written as"),
    ],
)
def test_a_line_that_is_not_a_row_is_refused_when_it_is_fetched(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_bytes(b'{"query": "a"}\n' + line.replace(b"\n", b"") + b"\n")
    rows = RowFile(tmp_path / "rows.jsonl")
    assert rows[0] == {"query": "a"}
    with pytest.raises(DataError) as error:
        rows[1]
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:2: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[\n{"query": "a"},\n{"query": "b"},\n]',
            ":4: not JSON: the comma before the end of the array, after row 2, must be removed",
        ),
        (
            '[\n{"query": "a"},\n{"query": "b",},\n]',
            ":3 (row 2): not JSON: the comma before } must be removed, at '},\\n]'",
        ),
        ('[{"query": "a"},]\n', ":1: not JSON: the comma before the end of the array, after row 1"),
    ],
)
def test_a_comma_too_many_in_an_array_is_named(tmp_path, content, message):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError) as error:
        RowFile(tmp_path / "rows.json")
    assert message in str(error.value)


def test_an_array_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "rows.json").write_text('[{"query": "a"},\n' + "[" * 100_000)
    with pytest.raises(DataError, match=r"rows\.json:2 \(row 2\): not JSON: it is nested too"):
        RowFile(tmp_path / "rows.json")


def test_an_incomplete_gzip_file_is_refused(tmp_path, folder):
    packed = gzip.compress(random.Random(0).randbytes(1000))
    for content in (packed[:500], packed[:-2], packed[:200] + b"x" * 100 + packed[300:]):
        (tmp_path / "rows.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"rows\.jsonl\.gz is not a complete gzip file"):
            RowFile(tmp_path / "rows.jsonl.gz", tmp_path / "cache")
    assert not list((tmp_path / "cache" / "indexes").iterdir())


def test_a_file_that_is_not_compressed_is_named_so(tmp_path):
    (tmp_path / "rows.csv.gz").write_text("query\na\n")
    for cache in (tmp_path / "cache", None):
        with pytest.raises(DataError, match=r"rows\.csv\.gz is not compressed.*remove \.gz from"):
            RowFile(tmp_path / "rows.csv.gz", cache)


def test_a_table_of_only_a_header_is_refused_without_a_word_of_json(tmp_path):
    (tmp_path / "rows.csv").write_text("image,question\n")
    with pytest.raises(DataError, match=r"rows\.csv has no rows below its header line$"):
        RowFile(tmp_path / "rows.csv")


def test_a_gzip_file_that_would_fill_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(expansion, "ALWAYS_ALLOWED", 1_000_000)
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"id": 1}' + b" " * 5_000_000 + b"\n"))
    for cache in (tmp_path / "cache", None):
        with pytest.raises(
            DataError, match=r"rows\.jsonl\.gz expands to [\d,]+ bytes or more, over"
        ):
            RowFile(file, cache)
    assert not list((tmp_path / "cache" / "indexes").iterdir())


def test_text_in_another_encoding_is_refused(folder):
    for name, content in {
        "rows.json": '[{"query": "é"}]',
        "rows.jsonl": '{"query": "é"}',
        "rows.csv": "query\né\n",
    }.items():
        (folder / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(
            DataError,
            match=rf"{name}:{2 if name == 'rows.csv' else 1}: not UTF-8: .*save it as UTF-8",
        ):
            read_rows(str(folder / name))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_cache_that_cannot_be_written_is_a_warning_and_the_rows_are_read(tmp_path, name, caplog):
    file, cache = tmp_path / name, tmp_path / "cache"
    content = b'{"id": 1}\n{"id": 2}\n'
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    cache.touch()  # a file in place of the folder
    assert [row["id"] for row in RowFile(file, cache)] == [1, 2]
    assert caplog.records
    for warning in caplog.records:
        assert f"the cache file {cache}/indexes/" in warning.getMessage()
        assert "paths.cache=FOLDER" in warning.getMessage()


def test_an_error_in_json_names_the_line_and_the_column_of_the_file(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"query": "a"}\r\n{"query": "b\r\n')
    with pytest.raises(DataError) as error:
        RowFile(tmp_path / "rows.jsonl")[1]
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:2: not JSON: a text is not closed")
    assert str(error.value).endswith(" at column 13")
    (tmp_path / "rows.json").write_bytes(b'[{"query": "a"},\r\n{"query": "b",\r\n "id": "\t"}]')
    with pytest.raises(
        DataError, match=r"rows\.json:3 \(row 2\): .* a line break or tab .* at '\\t\"}\]'$"
    ):
        RowFile(tmp_path / "rows.json")[1]
    (tmp_path / "open.json").write_bytes(b'[{"query": "a"},\r\n{"query": x}]')
    with pytest.raises(DataError, match=r"open\.json:2 \(row 2\): .*: Expecting value, at 'x}\]'$"):
        RowFile(tmp_path / "open.json")


@pytest.mark.parametrize("encoding", ["latin1", "cp1256"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_file_in_another_encoding_names_the_byte_and_how_to_convert_it(tmp_path, name, encoding):
    text = {"latin1": "né", "cp1256": "nس"}[encoding]
    byte = text.encode(encoding)[1]
    rows = {
        "rows.jsonl": f'{{"query": "a"}}\r\n{{"query": "{text}"}}\r\n',
        "rows.json": f'[{{"query": "a"}},\r\n{{"query": "{text}"}}]',
        "rows.csv": f"query,response\r\n{text},b\r\n",
    }
    (tmp_path / name).write_bytes(rows[name].encode(encoding))
    with pytest.raises(DataError) as error:
        list(RowFile(tmp_path / name))
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/{name}:2: not UTF-8: byte 0x{byte:02x} after ")
    assert "n'; save it as UTF-8. iconv -f ENCODING -t UTF-8 " in message
    assert "codec" not in message
