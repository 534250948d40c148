"""COCO 2014: reads its captions as conversations and fetches its files."""

from __future__ import annotations

import fnmatch
import json
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwenvl_lit.data.download.archives import Archive, ensure_unpacked
from qwenvl_lit.data.readers.files import check_is_file
from qwenvl_lit.data.readers.prompts import CAPTION_PROMPT, fill_prompt
from qwenvl_lit.data.readers.rows import DEFAULT, ReadOptions, image_from
from qwenvl_lit.data.readers.scanning import not_utf8
from qwenvl_lit.data.readers.sources import open_source
from qwenvl_lit.types import Conversation, DataError, Turn

ARCHIVES = (
    Archive(
        url="http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
        size=252_872_794,
        checksum="md5:0a379cfc70b0e71301e0f377548639bd",
        members=("annotations/captions_train2014.json", "annotations/captions_val2014.json"),
    ),
    Archive(
        url="http://images.cocodataset.org/zips/train2014.zip",
        size=13_510_573_713,
        checksum="md5:0da8c0bd3d6becc4dcb32757491aca88",
        members=("train2014",),
    ),
    Archive(
        url="http://images.cocodataset.org/zips/val2014.zip",
        size=6_645_013_297,
        checksum="md5:a3d79f5ed8d289b7a7554ce06a5782b3",
        members=("val2014",),
    ),
)


def fetch_coco(
    root: str | Path,
    download: bool = True,
    *,
    files: Sequence[str],
    folder: str = "",
    needs: Sequence[str] = (),
) -> None:
    """Fetches those of `files` that `folder` within `root` lacks; existing files are kept.

    Args:
        files: members of `ARCHIVES`.
        needs: files that `root` must also hold and that cannot be fetched. They are checked before
            gigabytes are downloaded.

    Raises:
        DataError: as `ensure_unpacked`; or no archive has one of `files`, or `needs` are missing.
    """
    check_needs(root, needs)
    known = [name for archive in ARCHIVES for name in archive.members]
    unknown = set(files).difference(known)
    if unknown:
        raise DataError(
            f"no archive has {', '.join(sorted(unknown))}; known are {', '.join(known)}"
        )
    archives = []
    for archive in ARCHIVES:
        members = tuple(name for name in archive.members if name in files)
        if members:
            archives.append(replace(archive, members=members))
    ensure_unpacked(archives, Path(root) / folder, download=download)


def check_needs(root: str | Path, needs: Sequence[str]) -> None:
    """Raises a DataError unless `root` holds the files `needs`, which are not fetched."""
    absent = [name for name in needs if not (Path(root) / name).exists()]
    if absent:
        raise DataError(
            f"{root} lacks {', '.join(absent)}, which is not fetched; the head of the dataset's "
            f"yaml in conf/data says where it is"
        )


def read_coco_captions(
    source: str,
    read_options: ReadOptions = DEFAULT,
    *,
    images: str = "",
    every_caption_of: str = "",
) -> Sequence[Conversation]:
    """Returns the rows of files in COCO's format, one for each image.

    The first caption of an image is the answer, and all its captions are references.

    Args:
        source: as in `read_rows`.
        images: folder of the images within `read_options.root`; `{split}` in it stands for
            `val2014` of `COCO_val2014_000000000042.jpg`.
        every_caption_of: a glob of file names; in these files every caption is the answer of a row
            of its own.
    """

    def read(file: Path) -> CocoCaptions:
        every_caption = fnmatch.fnmatchcase(file.name, every_caption_of)
        return CocoCaptions(file, read_options, images=images, every_caption=every_caption)

    return open_source(source, read_options, read)


class CocoCaptions(Sequence[Conversation]):
    """The rows of one file.

    Images without captions are left out; if no image has captions, each is a row without an answer.
    The id of the image is the row's id; with `every_caption` it is followed by `-1`, `-2`, ...

    Raises:
        DataError: the file is not in COCO's format, or the image of a row does not exist.
    """

    def __init__(
        self,
        file: Path,
        read_options: ReadOptions = DEFAULT,
        *,
        images: str = "",
        every_caption: bool = False,
    ):
        self.file = file
        self.read_options = read_options
        self.images = images
        self.every_caption = every_caption
        self._prompt = read_options.prompt or CAPTION_PROMPT
        fill_prompt(self._prompt, image="")  # check it now
        content = read_json(
            file, only("images", "annotations", "id", "file_name", "image", "image_id", "caption")
        )
        try:
            names, captions = _names_and_captions(content)
        except (KeyError, TypeError, AttributeError, UnicodeError) as error:
            raise DataError(
                f"{file} is not in COCO's format: {error!r:.200}; expected "
                f"{{images: [{{id, file_name}}], annotations: [{{image_id, caption}}]}}"
            ) from None
        if not names:
            raise DataError(f"{file} names no images")
        image_ids = [image_id for image_id in names if captions[image_id]] or list(names)
        self._images = [(key, names[key], tuple(captions[key])) for key in image_ids]
        # For each row: its image and which of the captions is its answer.
        self._image_indices = array("L")
        self._answer_indices = array("L")
        for image_index, (_, _, texts) in enumerate(self._images):
            rows = max(1, len(texts)) if every_caption else 1
            self._image_indices.extend([image_index] * rows)
            self._answer_indices.extend(range(rows))

    def __len__(self) -> int:
        return len(self._image_indices)

    def __getitem__(self, index: int) -> Conversation:
        index = range(len(self))[index]
        image_id, name, captions = self._images[self._image_indices[index]]
        answer_index = self._answer_indices[index]
        row_id = f"{image_id}-{answer_index + 1}" if self.every_caption else str(image_id)
        root = self.read_options.root or self.file.parent
        try:
            image = image_from(_path_within(self.images, name), root, self.read_options)
        except DataError as error:
            raise error.in_row(str(self.file), row_id) from None
        turns = [Turn(role="user", parts=fill_prompt(self._prompt, image=image))]
        if captions:
            turns.append(Turn(role="assistant", parts=(captions[answer_index],)))
        return Conversation(
            id=row_id,
            turns=tuple(turns),
            references=captions,
            index=index,
            where=str(self.file),
        )


def _names_and_captions(content: dict[str, Any]) -> tuple[dict[Any, str], dict[Any, list[str]]]:
    """Returns the file name and the captions of each image, by its id."""
    names = {}
    if "images" in content:
        for image in content["images"]:
            names[image["id"]] = image.get("file_name") or image["image"]
        annotations = content.get("annotations", ())
        captioned = [(annotation["image_id"], annotation["caption"]) for annotation in annotations]
    else:  # each caption names its image
        annotations = content["annotations"]
        captioned = [(annotation["image"], annotation["caption"]) for annotation in annotations]
        names = {name: name for name, _ in captioned}
    captions: dict[Any, list[str]] = {image_id: [] for image_id in names}
    for image_id, caption in captioned:
        captions[image_id].append(caption)
    check_texts(names.values())
    check_texts(caption for _, caption in captioned)
    return names, captions


def _path_within(folder: str, name: str) -> str:
    if "{split}" in folder:
        parsed = re.fullmatch(r"COCO_(\w+)_\d+\.\w+", name)
        if not parsed:
            raise DataError(
                f"file {name!r} names no split as COCO_val2014_000000000042.jpg does; "
                f"give `images` without {{split}}"
            )
        folder = folder.replace("{split}", parsed.group(1))
    return f"{folder}/{name}" if folder else name


def read_json(file: Path, convert: Callable[[dict[str, Any]], Any]) -> Any:
    """Returns the content of a JSON file.

    Args:
        convert: replaces each object as soon as it is read, so that a large file never is in memory
            with all its keys.

    Raises:
        DataError: the file cannot be read, or is not JSON.
    """
    check_is_file(file)
    try:
        return json.loads(file.read_bytes(), object_hook=convert)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; check the path") from None
    except RecursionError:
        raise DataError(f"{file} is not JSON: it is nested too deeply") from None
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise not_utf8(file, error).in_row(f"{file}:{line}") from None
    except ValueError as error:  # not JSON, or a number of more than 4300 digits
        raise DataError(f"{file} is not JSON: {error}") from None


def only(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """For `read_json`: drops all other keys of objects."""
    return lambda entry: {key: entry[key] for key in keys if key in entry}


def check_texts(texts: Iterable[Any]) -> None:
    r"""Raises an error unless all `texts` can be encoded.

    Raises:
        AttributeError: a value is not text.
        UnicodeError: a text contains half of a surrogate pair, such as a lone \ud800, which no
            tokenizer accepts.
    """
    for text in texts:
        text.encode()
