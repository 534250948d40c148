"""Rows of text in a file of the cache, of which any can be read without the others.

This is not Arrow's own file format mapped into memory, because the pages of a mapping count as
memory of the process and are never given back: random rows of a large file would occupy its size.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

_MOST_ROWS = 256  # of a batch
_MOST_BYTES = 64 << 10  # of a batch with several rows; a batch is read for each random row


class ArrowRows:
    """The rows of a file that `write_arrow_rows` has written. Processes may share it after a fork.

    The file has the schema and then small batches of rows as messages of Arrow, then the starts of
    the batches in the file and in the rows, both int64 with the end of the last batch, and at its
    end how many batches these are.

    Raises:
        pa.ArrowException, OSError: the file is not there, or damaged.
    """

    def __init__(self, file: Path):
        import pyarrow as pa

        self._stream = file.open("rb", buffering=0)
        size = os.fstat(self._stream.fileno()).st_size
        [batches] = self._numbers(size - 8, 1).tolist()
        count = batches + 1
        numbers = size - 8 - 16 * count
        if not 0 < numbers < size - 8:
            raise OSError("it is damaged")
        self._starts = self._numbers(numbers, count)
        self._rows = self._numbers(numbers + 8 * count, count)
        if self._starts[-1] != numbers or self._rows[0]:
            raise OSError("it is damaged")
        self._schema = pa.ipc.read_schema(pa.py_buffer(self._read(0, int(self._starts[0]))))
        self._batch_at = lru_cache(maxsize=4)(self._read_batch)

    def locate(self, row: int) -> tuple[pa.RecordBatch, int]:
        """Returns the batch of a row and its index in it."""
        number = int(np.searchsorted(self._rows, row, side="right")) - 1
        return self._batch_at(number), row - int(self._rows[number])

    def columns(self, name: str, start: int, end: int) -> Iterator[pa.Array]:
        """Yields a column of the rows from `start` to before `end`, in slices."""
        while start < end:
            batch, index = self.locate(start)
            part = batch.column(name).slice(index, end - start)
            yield part
            start += len(part)

    def _read_batch(self, number: int) -> pa.RecordBatch:
        import pyarrow as pa

        start, end = map(int, self._starts[number : number + 2])
        return pa.ipc.read_record_batch(pa.py_buffer(self._read(start, end - start)), self._schema)

    def _numbers(self, start: int, count: int) -> np.ndarray:
        return np.frombuffer(self._read(start, 8 * count), np.int64)

    def _read(self, start: int, size: int) -> bytes:
        content = os.pread(self._stream.fileno(), size, max(0, start))
        if len(content) != size:
            raise OSError("it is damaged")
        return content


def write_arrow_rows(file: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Writes the file of `ArrowRows`. All batches have the same schema, and there is at least one.

    They are split into batches of at most `_MOST_ROWS` rows, and about `_MOST_BYTES` if possible.
    """
    starts, rows = [0], [0]
    with file.open("wb") as stream:
        for batch in batches:
            if not starts[0]:
                starts[0] = stream.write(batch.schema.serialize())
            count = _MOST_BYTES * batch.num_rows // max(1, batch.nbytes)
            count = min(max(1, count), _MOST_ROWS)
            for start in range(0, batch.num_rows, count):
                part = batch.slice(start, count)
                starts.append(starts[-1] + stream.write(part.serialize()))
                rows.append(rows[-1] + part.num_rows)
        numbers = np.array([*starts, *rows, len(rows) - 1], np.int64)
        stream.write(numbers.tobytes())
