"""Row groups of parquet files, unpacked so that a single row of them can be read.

A page of a parquet file can only be decompressed as a whole, often with all images of its row
group, and training reads rows in random order. So each row group is decompressed once, into files
in the cache: the text of all of them into one file of small batches (`arrow_rows`), when the file
is opened; images as they are, when a row first needs them. Then an image costs as much as one in a
file of its own.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from qwenvl_lit.atomic import disk_errors, write_to_cache
from qwenvl_lit.data.expansion import check_expansion
from qwenvl_lit.data.readers.arrow_rows import ArrowRows, write_arrow_rows
from qwenvl_lit.data.readers.columns import Columns, ImageColumn, columns_of, plain_schema
from qwenvl_lit.images import StoredImage
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_VERSION = 2  # of the unpacked files
_TEXT = "text.bin"
_BATCH_ROWS = 1024
_BATCH_BYTES = 16 << 20
_OPEN_GROUPS = 256  # row groups of images whose places a process remembers
_IN_MEMORY = 256 << 20  # bytes of images that the cache has no space for


@dataclass(frozen=True, slots=True)
class ParquetSource:
    """One version of a parquet file, and the folder of its unpacked row groups."""

    file: Path
    version: tuple[int, int]
    folder: Path


@dataclass(frozen=True, slots=True)
class CellImage(StoredImage):
    """An image in a cell of a parquet file; its bytes are read when they are needed."""

    source: ParquetSource
    column: ImageColumn
    row: int  # in the file, from 0
    position: int | None  # in the list of the cell
    path: str = ""  # that the row gives the image

    @property
    def name(self) -> str:
        """The file, the row counted from 1, the column and the path that the row names."""
        index = "" if self.position is None else f"[{self.position}]"
        path = f": {self.path}" if self.path else ""
        return f"{self.source.file}:{self.row + 1} ({self.column.name}{index}{path})"

    def content(self) -> bytes:
        group, row = _located(self.source, self.column, self.row)
        content = group.content(row, self.position or 0)
        assert content is not None  # a cell without bytes has no `CellImage`
        return content


def unpacked(file: Path, version: tuple[int, int], cache: Path | None) -> ParquetSource:
    """Returns the source of a parquet file, whose text is unpacked.

    It is unpacked into a temporary folder if there is no `cache` or it cannot be written to.

    Raises:
        DataError: the file has no rows, cannot be read, or expands to far more than its size.
    """
    identity = f"{_VERSION} {file.resolve()} {version}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    if cache is not None:
        source = ParquetSource(file, version, cache / "parquet" / name)
        _check_size(source)
        target = source.folder / _TEXT
        if target.exists() or write_to_cache(target, partial(_write_text, source)):
            return source
    with disk_errors(Path(tempfile.gettempdir()), "free disk space there, or set TMPDIR"):
        folder = Path(tempfile.mkdtemp(prefix="qwenvl_lit_"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        source = ParquetSource(file, version, folder)
        _check_size(source)
        _write_text(source, folder / _TEXT)
    return source


@lru_cache(maxsize=16)
def opened(source: ParquetSource) -> pq.ParquetFile:
    """Opens a parquet file once a process. Reads give their position, so forks may share it."""
    import pyarrow.parquet as pq

    with reading(str(source.file)):
        status = source.file.stat()
        if (status.st_size, status.st_mtime_ns) != source.version:
            raise DataError(f"{source.file} has changed since it was opened; start again")
        return pq.ParquetFile(source.file, memory_map=False, pre_buffer=False, buffer_size=1 << 20)


@lru_cache(maxsize=1024)
def columns_read(source: ParquetSource) -> Columns:
    return columns_of(opened(source), str(source.file))


@lru_cache(maxsize=1024)
def group_ends(source: ParquetSource) -> np.ndarray:
    """Returns for each row group the number of rows up to its end, int64."""
    metadata = opened(source).metadata
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return np.cumsum(rows, dtype=np.int64)


def text_of_row(source: ParquetSource, row: int) -> dict[str, Any]:
    """Returns the values of a row but the bytes of its images.

    Raises:
        DataError: text is not UTF-8; names the column.
    """
    with reading(str(source.folder / _TEXT)):
        batch, index = _text(source).locate(row)
    values = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = column[index].as_py()
        except UnicodeDecodeError as error:
            raise DataError(
                f"column {name!r} is not UTF-8: {error.reason} 0x{error.object[error.start]:02x}; "
                f"write it as UTF-8"
            ) from None
    return values


def image_in(
    source: ParquetSource, column: ImageColumn, row: int, position: int | None, path: str = ""
) -> CellImage | None:
    """Returns an image of a row; None if the cell has no bytes there."""
    if not _has_all_bytes(source, column, _group_of(source, row)):
        group, row_in_group = _located(source, column, row)
        if not group.has_bytes(row_in_group, position or 0):
            return None
    return CellImage(source, column, row, position, path)


def list_length(source: ParquetSource, column: ImageColumn, row: int) -> int | None:
    """Returns the number of images of a row in a column of lists; None if the cell is null."""
    group = _group_of(source, row)
    chunk = _chunk(source, column.leaf, group)
    if _has_all_bytes(source, column, group) and chunk.num_values == _rows_of(source, group):
        return 1
    images, row_in_group = _located(source, column, row)
    count = int(images.counts[row_in_group])
    return None if count < 0 else count


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns the errors of reading a parquet file into a `DataError` that says `what` it is."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, MemoryError, RecursionError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"{what} cannot be read: {reason}; fetch or write it again") from None


def _check_size(source: ParquetSource) -> None:
    metadata = opened(source).metadata
    if not metadata.num_rows:
        raise DataError(f"{source.file} has no rows")
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    expanded = sum(group.total_byte_size for group in groups)
    check_expansion(source.file, source.version[0], expanded)


def _write_text(source: ParquetSource, target: Path) -> None:
    write_arrow_rows(target, _text_batches(source))


def _text_batches(source: ParquetSource) -> Iterator[pa.RecordBatch]:
    metadata = opened(source).metadata
    size, names = source.version[0], columns_read(source).text
    expanded = 0
    for group in range(metadata.num_row_groups):
        for batch in _batches(source, names, group, _BATCH_ROWS):
            expanded += batch.nbytes
            check_expansion(source.file, size, expanded)
            yield batch


def _image_batches(
    source: ParquetSource, column: ImageColumn, group: int
) -> Iterator[pa.RecordBatch]:
    chunk = _chunk(source, column.leaf, group)
    rows = _rows_of(source, group)
    count = _BATCH_BYTES * rows // max(1, chunk.total_uncompressed_size)
    compressed = min(chunk.total_compressed_size, source.version[0])
    expanded = 0
    for batch in _batches(source, (column.leaf,), group, min(max(1, count), _BATCH_ROWS)):
        expanded += batch.nbytes
        check_expansion(source.file, compressed, expanded)
        yield batch


def _batches(
    source: ParquetSource, names: tuple[str, ...], group: int, size: int
) -> Iterator[pa.RecordBatch]:
    """Yields columns of a row group as plain types, `size` rows at a time."""
    where = f"{source.file} (row group {group + 1})"
    rows = 0
    with reading(where):
        options = {"row_groups": [group], "columns": list(names), "use_threads": False}
        batches = opened(source).iter_batches(batch_size=size, **options)
    while True:
        with reading(where):
            batch = next(batches, None)
            if batch is None:
                break
            batch.validate()
            schema = plain_schema(batch.schema)
            if schema != batch.schema:
                batch = batch.cast(schema)
        rows += batch.num_rows
        yield batch
    if rows != _rows_of(source, group):
        raise DataError(
            f"{where} has {rows} rows, but the file declares {_rows_of(source, group)}; "
            f"fetch or write it again"
        )


@lru_cache(maxsize=256)
def _text(source: ParquetSource) -> ArrowRows:
    with reading(str(source.folder / _TEXT)):
        return ArrowRows(source.folder / _TEXT)


class _ImageGroup:
    """The images of one column of a row group, in a file of the cache or in memory.

    The file has the bytes of all images, then the number of images of each cell and the size of
    each image, both int64 and -1 for null, and at its end how many these are.

    Raises:
        ValueError, OSError: the file is not there, or damaged.
    """

    def __init__(self, file: Path | None, memory: bytes = b""):
        self._file = file
        self.memory = memory  # instead of the file
        size = file.stat().st_size if file else len(memory)
        cells, images = self._numbers(size - 16, 2)
        end = size - 8 * (2 + cells + images)
        self.counts = self._numbers(end, cells)
        self._sizes = self._numbers(end + 8 * cells, images)
        self._first = np.cumsum(np.append(0, self.counts.clip(0)))  # images before each cell
        self._starts = np.cumsum(np.append(0, self._sizes.clip(0)))
        if self._starts[-1] != end or self._first[-1] != images:
            raise ValueError(f"{file} is damaged")

    def has_bytes(self, row: int, position: int) -> bool:
        return self.counts[row] > position and self._sizes[self._first[row] + position] >= 0

    def content(self, row: int, position: int) -> bytes | None:
        """Returns the bytes of an image, if it has some."""
        if not self.has_bytes(row, position):
            return None
        image = self._first[row] + position
        return self._read(int(self._starts[image]), int(self._sizes[image]))

    def _numbers(self, start: int, count: int) -> np.ndarray:
        return np.frombuffer(self._read(max(0, start), 8 * count), np.int64, count)

    def _read(self, start: int, size: int) -> bytes:
        if self._file is None:
            return self.memory[start : start + size]
        with self._file.open("rb", buffering=0) as stream:
            return os.pread(stream.fileno(), size, start)


def _write_images(stream: BinaryIO, batches: Iterable[pa.RecordBatch], column: ImageColumn) -> None:
    """Writes the file of an `_ImageGroup`."""
    import pyarrow.compute as pc

    counts, sizes = [], []
    for batch in batches:
        values = batch.column(0)
        counts.append(np.ones(len(values), np.int64))
        if column.is_list:
            lengths = pc.list_value_length(values).fill_null(-1)
            counts[-1] = lengths.to_numpy().astype(np.int64)
            values = values.flatten()
        if column.is_struct:
            [values] = values.flatten()
        sizes.append(pc.binary_length(values).fill_null(-1).to_numpy().astype(np.int64))
        for value in values:
            if value.is_valid:
                stream.write(value.as_buffer())
    numbers = [*counts, *sizes, np.array([sum(map(len, counts)), sum(map(len, sizes))])]
    stream.write(np.concatenate(numbers).astype(np.int64).tobytes())


_open_groups: OrderedDict[tuple[ParquetSource, str, int], _ImageGroup] = OrderedDict()


def _located(source: ParquetSource, column: ImageColumn, row: int) -> tuple[_ImageGroup, int]:
    """Returns the images of the row group of a row, and the index of the row in it.

    The row groups that were used last stay open.
    """
    group = _group_of(source, row)
    key = (source, column.leaf, group)
    found = _open_groups.get(key)
    if found is None:
        found = _open_groups[key] = _open_images(source, column, group)
        memory = sum(len(images.memory) for images in _open_groups.values())
        while len(_open_groups) > 1 and (len(_open_groups) > _OPEN_GROUPS or memory > _IN_MEMORY):
            _, closed = _open_groups.popitem(last=False)
            memory -= len(closed.memory)
    _open_groups.move_to_end(key)
    return found, row - _start_of(source, group)


def _open_images(source: ParquetSource, column: ImageColumn, group: int) -> _ImageGroup:
    number = columns_read(source).images.index(column)
    target = source.folder / f"images-{number}-{group}.bin"
    try:
        return _ImageGroup(target)
    except (OSError, ValueError):
        pass  # it is not there yet, or damaged

    def write(file: Path) -> None:
        with file.open("wb") as stream:
            _write_images(stream, _image_batches(source, column, group), column)

    if write_to_cache(target, write):
        return _ImageGroup(target)
    memory = io.BytesIO()
    _write_images(memory, _image_batches(source, column, group), column)
    return _ImageGroup(None, memory.getvalue())


@lru_cache(maxsize=1 << 16)
def _has_all_bytes(source: ParquetSource, column: ImageColumn, group: int) -> bool:
    """Tells whether the statistics show that no image of a row group lacks its bytes.

    Nulls count as such wherever they are: cells, entries of lists and empty lists.
    """
    statistics = _chunk(source, column.leaf, group).statistics
    if statistics is None or not statistics.has_null_count:
        return False
    if not column.has_text:
        return statistics.null_count == 0
    start = _start_of(source, group)
    absent = 0
    for cells in _text(source).columns(column.name, start, start + _rows_of(source, group)):
        absent += cells.null_count
        if column.is_list:
            lengths = np.diff(cells.offsets.to_numpy())
            absent += int((lengths[cells.is_valid().to_numpy(zero_copy_only=False)] == 0).sum())
            absent += cells.flatten().null_count
    return statistics.null_count == absent


def _chunk(source: ParquetSource, leaf: str, group: int) -> pq.ColumnChunkMetaData:
    row_group = opened(source).metadata.row_group(group)
    return row_group.column(_leaf_index(source, leaf))


@lru_cache(maxsize=1024)
def _leaf_index(source: ParquetSource, leaf: str) -> int:
    schema = opened(source).schema
    return next(index for index in range(len(schema)) if schema.column(index).path == leaf)


def _group_of(source: ParquetSource, row: int) -> int:
    return int(np.searchsorted(group_ends(source), row, side="right"))


def _start_of(source: ParquetSource, group: int) -> int:
    return int(group_ends(source)[group - 1]) if group else 0


def _rows_of(source: ParquetSource, group: int) -> int:
    return int(group_ends(source)[group]) - _start_of(source, group)
