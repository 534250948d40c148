"""COCO 2014: its captions as conversations, its files from the web."""

from __future__ import annotations

import fnmatch
import json
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwenvl_lit.data.download.archives import Archive, provide
from qwenvl_lit.data.readers.prompts import CAPTION_PROMPT, ask
from qwenvl_lit.data.readers.rows import DEFAULT, ReadOptions, image_from
from qwenvl_lit.data.readers.sources import open_source
from qwenvl_lit.types import Conversation, DataError, Turn

ARCHIVES = (
    Archive(
        url="http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
        size=252_872_794,
        checksum="md5:0a379cfc70b0e71301e0f377548639bd",
        gives=("annotations/captions_train2014.json", "annotations/captions_val2014.json"),
    ),
    Archive(
        url="http://images.cocodataset.org/zips/train2014.zip",
        size=13_510_573_713,
        checksum="md5:0da8c0bd3d6becc4dcb32757491aca88",
        gives=("train2014",),
    ),
    Archive(
        url="http://images.cocodataset.org/zips/val2014.zip",
        size=6_645_013_297,
        checksum="md5:a3d79f5ed8d289b7a7554ce06a5782b3",
        gives=("val2014",),
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
    """See that `folder` within `root` holds `files`, of what `ARCHIVES` give; what is there is used as it is.

    Args:
        needs: what `root` must hold besides, and cannot be fetched: it is looked for before gigabytes are.

    Raises:
        DataError: as `provide`, none of the archives gives one of `files`, or something that is needed is missing.
    """
    if absent := [name for name in needs if not (Path(root) / name).exists()]:
        raise DataError(
            f"{root} lacks {', '.join(absent)}, which is not fetched; the head of the dataset's yaml in conf/data says where it is"
        )
    given = [name for archive in ARCHIVES for name in archive.gives]
    if unknown := set(files).difference(given):
        raise DataError(
            f"no archive gives {', '.join(sorted(unknown))}; known are {', '.join(given)}"
        )
    needed = [
        replace(archive, gives=tuple(name for name in archive.gives if name in files))
        for archive in ARCHIVES
    ]
    provide(
        [archive for archive in needed if archive.gives], Path(root) / folder, download=download
    )


def read_coco_captions(
    source: str,
    read_options: ReadOptions = DEFAULT,
    *,
    images: str = "",
    every_caption_of: str = "",
) -> Sequence[Conversation]:
    """Captions in COCO's format: an image a row, its first caption the answer, all its captions the references.

    Args:
        source: as in `read_rows`.
        images: folder of the images within `read_options.root`; `{split}` in it stands for `val2014` of `COCO_val2014_000000000042.jpg`.
        every_caption_of: names of files (`*` for anything) of which every caption is the answer of a row of its own.
    """

    def read(file: Path) -> CocoCaptions:
        return CocoCaptions(
            file,
            read_options,
            images=images,
            every_caption=fnmatch.fnmatchcase(file.name, every_caption_of),
        )

    return open_source(source, read_options, read)


class CocoCaptions(Sequence[Conversation]):
    """The rows of one file.

    Images without captions are left out; in a file without any caption all are prompts. The image's number is the row's id; with
    `every_caption`, `-1`, `-2`, ... follow it.

    Raises:
        DataError: the file is not in COCO's format, or a row's image does not exist.
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
        ask(self._prompt, image="")  # a prompt without its place is told before anything is read
        content = read_json(
            file, only("images", "annotations", "id", "file_name", "image", "image_id", "caption")
        )
        try:
            if "images" in content:
                names = {
                    image["id"]: image.get("file_name") or image["image"]
                    for image in content["images"]
                }
                said = [
                    (each["image_id"], each["caption"]) for each in content.get("annotations", ())
                ]
            else:  # each caption names its image
                said = [(each["image"], each["caption"]) for each in content["annotations"]]
                names = {name: name for name, _ in said}
            captions: dict[Any, list[str]] = {number: [] for number in names}
            for number, caption in said:
                captions[number].append(caption)
            check_texts(names.values())
            check_texts(caption for _, caption in said)
        except (KeyError, TypeError, AttributeError, UnicodeError) as fault:
            raise DataError(
                f"{file} is not in COCO's format: {fault!r}; expected {{images: [{{id, file_name}}], annotations: [{{image_id, caption}}]}}"
            ) from None
        if not names:
            raise DataError(f"{file} names no images")
        shown = [number for number in names if captions[number]] or list(names)
        self._images = [(number, names[number], tuple(captions[number])) for number in shown]
        counts = [max(1, len(texts)) if every_caption else 1 for _, _, texts in self._images]
        self._places = array(
            "L", (place for place, count in enumerate(counts) for _ in range(count))
        )
        self._answers = array("L", (number for count in counts for number in range(count)))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> Conversation:
        place = range(len(self))[place]
        number, name, captions = self._images[self._places[place]]
        answer = self._answers[place]
        id = f"{number}-{answer + 1}" if self.every_caption else str(number)
        try:
            image = image_from(
                _within(self.images, name),
                self.read_options.root or self.file.parent,
                self.read_options,
            )
            turns = [Turn(role="user", parts=ask(self._prompt, image=image))]
        except DataError as fault:
            raise type(fault)(f"{self.file}: image {id}: {fault}") from None
        if captions:
            turns.append(Turn(role="assistant", parts=(captions[answer],)))
        return Conversation(
            id=id, turns=tuple(turns), references=captions, index=place, where=str(self.file)
        )


def _within(images: str, name: str) -> str:
    if "{split}" in images:
        found = re.fullmatch(r"COCO_(\w+)_\d+\.\w+", name)
        if not found:
            raise DataError(
                f"file {name!r} names no split as COCO_val2014_000000000042.jpg does; give `images` without {{split}}"
            )
        images = images.replace("{split}", found.group(1))
    return f"{images}/{name}" if images else name


def read_json(file: Path, each: Callable[[dict[str, Any]], Any]) -> Any:
    """The content of a JSON file, every object in it replaced by what `each` makes of it as soon as it is read.

    Raises:
        DataError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(file.read_bytes(), object_hook=each)
    except OSError as fault:
        raise DataError(f"{file} cannot be read: {fault.strerror}; check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise DataError(f"{file} is not JSON: {fault}") from None


def only(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """For `read_json`: objects with only these of their keys."""
    return lambda found: {key: found[key] for key in keys if key in found}


def check_texts(texts: Iterable[Any]) -> None:
    r"""
    Raises:
        AttributeError: one is no text.
        UnicodeError: one has half a character, such as \ud800 alone, which no tokenizer takes.
    """
    for text in texts:
        text.encode()
