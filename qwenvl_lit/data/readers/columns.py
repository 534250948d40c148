"""Columns of parquet files: which are read, which hold images, and as which values.

pyarrow is an optional package, so it is imported where it is used.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenvl_lit.data.readers.keys import UNREAD_KEYS
from qwenvl_lit.data.readers.layouts import LAYOUTS, TEXT_LAYOUTS
from qwenvl_lit.data.readers.spelling import is_same
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_KNOWN = {"id", *UNREAD_KEYS}  # names of columns that have a meaning
for _layout in LAYOUTS + TEXT_LAYOUTS:
    _KNOWN.update(_layout.required, _layout.optional)
_KINDS_OF_LIST = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")


@dataclass(frozen=True, slots=True)
class ImageColumn:
    """A column of images as bytes, of `{bytes, path}` structs, or of lists of either."""

    name: str
    leaf: str  # path of the bytes in the schema of parquet, for example "image.bytes"
    is_list: bool
    is_struct: bool
    has_text: bool  # the structs have further fields, such as the path


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a file that are read."""

    text: tuple[str, ...]  # paths of leaves: all but the bytes of images
    images: tuple[ImageColumn, ...]


def columns_of(file: pq.ParquetFile, where: str) -> Columns:
    """Returns the columns of a parquet file that are read.

    Lists of numbers that no layout reads, such as embeddings, are left out.

    Args:
        where: names the file in messages.

    Raises:
        DataError: a name occurs twice, or a column that a layout reads has a type that is not read.
    """
    schema = file.schema_arrow
    repeated = sorted(name for name, count in Counter(schema.names).items() if count > 1)
    if repeated:
        raise DataError(f"{where}: columns {repeated} are repeated; rename them")
    leaves = [file.schema.column(index).path for index in range(len(file.schema))]
    text: list[str] = []
    images: list[ImageColumn] = []
    for field in schema:
        own = [leaf for leaf in leaves if leaf == field.name or leaf.startswith(f"{field.name}.")]
        image = _image_column(field, own)
        if image is not None:
            images.append(image)
            text += [leaf for leaf in own if leaf != image.leaf]
        elif field.name in _KNOWN and plain_type(field.type) is None:
            raise DataError(
                f"{where}: column {field.name!r} has the type {field.type}, which is not read; "
                f"write it as text, numbers, lists or structs"
            )
        elif _is_read(field):
            text += own
    return Columns(tuple(text), tuple(images))


def _is_read(field: pa.Field) -> bool:
    if plain_type(field.type) is None:
        return False
    return not _is_numbers(field.type) or any(is_same(field.name, name) for name in _KNOWN)


def _is_numbers(kind: pa.DataType) -> bool:
    """Tells whether a type is a list, possibly of lists, of numbers."""
    import pyarrow as pa

    if not _is_list(kind):
        return False
    values = kind.value_type
    return pa.types.is_floating(values) or pa.types.is_integer(values) or _is_numbers(values)


def _image_column(field: pa.Field, leaves: list[str]) -> ImageColumn | None:
    is_list = _is_list(field.type)
    kind = field.type.value_type if is_list else field.type
    if _is_bytes(kind):
        return ImageColumn(field.name, leaves[0], is_list, is_struct=False, has_text=False)
    if not _is_struct(kind):
        return None
    names = [child.name for child in kind]
    if names.count("bytes") != 1 or not _is_bytes(kind.field("bytes").type):
        return None
    others = [child.type for child in kind if child.name != "bytes"]
    if any(plain_type(other) is None or other.num_fields for other in others):
        return None
    [leaf] = [leaf for leaf in leaves if leaf.endswith(".bytes")]
    return ImageColumn(field.name, leaf, is_list, is_struct=True, has_text=bool(others))


def plain_type(kind: pa.DataType) -> pa.DataType | None:
    """Returns the type as which values are read; None if they are not read.

    Text, numbers, lists and structs are those of JSON. Dates, times and decimals become text.
    """
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if types.is_temporal(kind) or types.is_decimal(kind):
        return pa.string()
    if types.is_float16(kind):
        return pa.float32()
    if _is_list(kind):
        values = plain_type(kind.value_type)
        return None if values is None else pa.list_(values)
    if _is_struct(kind):
        fields = [(child.name, plain_type(child.type)) for child in kind]
        names = {name for name, _ in fields}
        if len(names) < len(fields) or any(child is None for _, child in fields):
            return None
        return pa.struct(fields)
    is_number = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
    is_read = is_number or types.is_null(kind) or _is_bytes(kind) or _is_text(kind)
    return kind if is_read else None


def plain_schema(schema: pa.Schema) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([(field.name, plain_type(field.type)) for field in schema])


def json_value(value: Any) -> Any:
    """Returns a value as JSON would have it, for which columns fill up missing keys with null."""
    if isinstance(value, dict):
        return {key: json_value(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return list(map(json_value, value))
    return value


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return any(getattr(pa.types, f"is_{name}")(kind) for name in _KINDS_OF_LIST)


def _is_struct(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind) and kind.num_fields > 0


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    types = pa.types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
