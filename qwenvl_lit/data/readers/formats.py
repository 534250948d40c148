"""Recognizes the format of a file by its name and its first bytes."""

from __future__ import annotations

from pathlib import Path

from qwenvl_lit.types import DataError

READ = "json, jsonl, csv and tsv files are read, each also as .gz, and parquet files"

GZIP = b"\x1f\x8b"  # the first bytes of a file
_EXCEL = "save the sheet as csv in UTF-8"
_UNPACK = "unpack it"
# First bytes of files that are not read, what the file is, and what to do.
_OTHERS = (
    (b"PAR1", "a compressed parquet file", "decompress it"),  # others are not opened as text
    (b"PARE", "an encrypted parquet file", "decrypt it"),
    (b"ARROW1", "an Arrow file", "convert it to jsonl"),
    (b"PK\x03\x04", "an Excel file (xlsx) or another zip archive", f"{_EXCEL}, or {_UNPACK}"),
    (b"\xd0\xcf\x11\xe0", "an Excel file (xls)", _EXCEL),
    (b"SQLite format 3", "a SQLite database", "export the table as csv"),
    (GZIP, "compressed with gzip", "let its name end in .gz"),
    (b"BZh", "compressed with bzip2", _UNPACK),
    (b"\xfd7zXZ", "compressed with xz", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", _UNPACK),
    (b"\xff\xfe", "text in UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "save it as UTF-8"),
    (b"<!doctype html", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
)


def check_is_read(file: Path, start: bytes) -> None:
    """Raises an error if the first bytes of a file are those of a format that is not read.

    Raises:
        DataError: names the format and what to do.
    """
    for magic, kind, advice in _OTHERS:
        if start.startswith(magic) or start[: len(magic)].lower() == magic:
            raise DataError(f"{file} is {kind}; {READ}; {advice}")


def delimiters(file: Path) -> str:
    """Returns the characters that may separate the cells of a file; "" if it is no table.

    In a `.csv` file the first of them counts that splits the header line. Spreadsheets write a
    semicolon where the comma is the decimal point.
    """
    name = file.name.lower().removesuffix(".gz")
    if name.endswith(".tsv"):
        return "\t"
    return ",;\t" if name.endswith(".csv") else ""
