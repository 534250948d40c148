"""Datasets of the Hugging Face hub: finds the files of a split, and downloads them to its cache.

This is not `datasets` because that decodes and copies all columns before the first row is read.
"""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from qwenvl_lit.data.download.files import check_free_space, format_bytes, why_offline
from qwenvl_lit.terminal import counted, printable
from qwenvl_lit.types import DataError

PREFIX = "hf://"
FORM = "hf://OWNER/NAME:SPLIT, hf://OWNER/NAME:CONFIG/SPLIT or hf://OWNER/NAME/FILES"
CONVERTED = "refs/convert/parquet"  # branch of a repository for the hub's own copy as parquet
CARD = "README.md"
DEFAULT = "default"  # the name of the only config of a repository

_ADDRESS = re.compile(
    r"hf://(?:datasets/)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/\w+/[^/:]+|[^/:]+))?"
    r"(?:/(?P<files>.+)|:(?:(?P<config>[^/:]+)/)?(?P<split>[^/:]+))?"
)
_SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-(?P<shards>\d{5})(?:-[0-9a-f]+)?")
_SPLITS = {  # words in the names of files -> split, as `datasets` has them
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# By config: the files of each split.
Splits = dict[str, dict[str, list[str]]]
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class HubDataset:
    """Files of a dataset: those of a split, or those that match the pattern `files`."""

    name: str  # OWNER/NAME
    revision: str | None = None  # a branch, a tag or a commit; None: main
    files: str | None = None
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.name}{revision}"


def parse_address(address: str) -> HubDataset:
    """Returns what an address names.

    >>> parse_address("hf://lmms-lab/ChartQA@refs/pr/1:en/test").split
    'test'

    Raises:
        DataError: it is no address of a dataset.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise DataError(f"{address[:200]!r} is no dataset of the hub; expected {FORM}")
    dataset = HubDataset(**match.groupdict())
    if dataset.revision == "~parquet":  # as in the addresses of `HfFileSystem`
        return replace(dataset, revision=CONVERTED)
    return dataset


@lru_cache(maxsize=256)
def hub_files(address: str, download: bool = True) -> list[Path]:
    """Returns the files of a dataset in the hub's cache, after downloading those that are missing.

    Files that are not parquet are taken only if the address names them. If a repository has no
    parquet files, they are those of the hub's own copy, `CONVERTED`.

    Args:
        download: if false, or if downloads are off, only the cache is used.

    Raises:
        DataError: there is no such dataset or split, the hub refuses it or cannot be reached, or
            files are missing.
    """
    dataset = parse_address(address)
    reason = why_offline(download)
    if reason:
        return _cached_files(dataset, reason)
    try:
        return _fetched_files(dataset)
    except _UnreachableError as error:
        try:
            files = _cached_files(dataset, str(error))
        except DataError:
            raise DataError(str(error)) from None
        log.warning("%s; the copy in the cache is used", error)
        return files


class _UnreachableError(Exception):
    """The hub does not answer; the cache may have the files."""


class _NoParquetError(Exception):
    """A repository has no parquet files."""


def _fetched_files(dataset: HubDataset) -> list[Path]:
    try:
        return _fetched_from(dataset)
    except _NoParquetError as error:
        if dataset.revision is not None or dataset.files is not None:
            raise DataError(str(error)) from None
    try:
        return _fetched_from(replace(dataset, revision=CONVERTED))
    except (DataError, _NoParquetError) as error:
        raise DataError(
            f"{dataset} has no parquet files, and the hub has made none ({CONVERTED}): {error}; "
            f"download it, and give its files"
        ) from None


def _fetched_from(dataset: HubDataset) -> list[Path]:
    from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache

    with _hub_errors(dataset):
        info = HfApi().dataset_info(dataset.name, revision=dataset.revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    card = info.card_data.to_dict() if info.card_data else {}
    chosen = _chosen(dataset, list(sizes), card)
    where = {"repo_type": "dataset", "revision": info.sha}
    missing = []
    for name in chosen:
        if not isinstance(try_to_load_from_cache(dataset.name, name, **where), str):
            missing.append(name)
    size = sum(sizes[name] for name in missing)
    if missing:
        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        check_free_space(cache, size)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            count, amount = counted(len(missing), "file"), format_bytes(size)
            log.warning("%s: downloading %s (%s) to %s", dataset, count, amount, cache)
    # The revision is passed on as it was given: the cache then knows it, too.
    with _hub_errors(dataset):
        folder = snapshot_download(
            dataset.name,
            repo_type="dataset",
            revision=dataset.revision,
            allow_patterns=[*map(glob.escape, chosen), CARD],
        )
    return [Path(folder, name) for name in chosen]


def _cached_files(dataset: HubDataset, reason: str) -> list[Path]:
    from huggingface_hub import constants

    problem = f"{dataset} is not in {constants.HF_HUB_CACHE}"
    revisions = [dataset.revision]
    if dataset.revision is None and dataset.files is None:
        revisions.append(CONVERTED)
    for revision in revisions:
        folder = _snapshot(dataset.name, revision)
        if folder is None:
            continue
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        try:
            chosen = _chosen(dataset, sorted(names), _card(folder))
            _check_complete(chosen)
            return [folder / name for name in chosen]
        except (_NoParquetError, DataError) as error:
            problem = f"{error} in {folder}"
    raise DataError(
        f"{problem}, and {reason}. This fetches it:  hf download --repo-type dataset {dataset.name}"
    )


def _snapshot(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    # The pattern of no file: which files the folder has is checked afterwards.
    options = {"repo_type": "dataset", "local_files_only": True, "allow_patterns": ["/"]}
    try:
        return Path(snapshot_download(name, revision=revision, **options))
    except (FileNotFoundError, HFValidationError):  # LocalEntryNotFoundError is the former
        return None


def _card(folder: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    try:
        return metadata_load(folder / CARD) or {}
    except (OSError, ValueError) as error:
        log.debug("%s: %s", folder, error)
        return {}


@contextmanager
def _hub_errors(dataset: HubDataset) -> Iterator[None]:
    """Turns the errors of huggingface_hub about `dataset` into errors of one line."""
    from huggingface_hub import constants, errors

    # The first base class is the error of the HTTP client that huggingface_hub uses.
    network = (*errors.HfHubHTTPError.__bases__, OSError)
    page = f"{constants.ENDPOINT}/datasets/{dataset.name}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError:
        raise DataError(
            f"{dataset} is gated: accept its conditions at {page}, and {login}"
        ) from None
    except errors.RevisionNotFoundError:
        raise DataError(f"{dataset} has no revision {dataset.revision or 'main'}") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise DataError(
            f"{dataset} does not exist, or is private: check the name at {page}, or {login}"
        ) from None
    except network as error:
        reason = printable(str(error).strip().partition("\n")[0]) or type(error).__name__
        advice = "try again later"
        if not isinstance(error, errors.HfHubHTTPError):  # there is no answer
            advice = "check the network connection or a proxy, or try again later"
        raise _UnreachableError(
            f"{dataset} cannot be fetched from {constants.ENDPOINT}: {reason}; {advice}"
        ) from None


def _chosen(dataset: HubDataset, names: Sequence[str], card: Mapping[str, Any]) -> list[str]:
    """Returns the files that `dataset` means, of the files `names` of its repository.

    Raises:
        DataError: no file has that name, there is no such config or split, or it is not said which.
        _NoParquetError: there are no parquet files to find a split in.
    """
    if dataset.files is not None:
        found = _matching(names, dataset.files)
        if not found:
            raise DataError(f"{dataset} has no file {dataset.files}")
        return found
    tables = [name for name in names if name.lower().endswith(".parquet")]
    if not tables:
        raise _NoParquetError(f"{dataset} has no parquet files")
    splits = _splits_of_card(card, tables) or _splits_by_name(tables)
    config = _choice(dataset, "config", dataset.config, splits)
    found = splits[config]
    split = _choice(dataset, "split", dataset.split, found, config)
    if any("/partial-" in f"/{name}" for name in found[split]):
        raise DataError(
            f"{dataset}: the hub's copy as parquet has only the beginning of {config}/{split}; "
            f"download the dataset, and give its files"
        )
    return sorted(found[split])


def _choice(
    dataset: HubDataset, kind: str, chosen: str | None, found: Mapping[str, Any], config: str = ""
) -> str:
    if chosen is None and len(found) == 1:
        return next(iter(found))
    if chosen is None and kind == "config" and DEFAULT in found:
        return DEFAULT
    if chosen in found:
        return chosen
    first = next(iter(found))
    example = f"{dataset}:{config}/{first}" if dataset.config else f"{dataset}:{first}"
    if kind == "config":
        example = f"{dataset}:{first}/{dataset.split or 'SPLIT'}"
    problem = f"has several {kind}s" if chosen is None else f"has no {kind} {chosen!r}"
    raise DataError(f"{dataset} {problem}: {', '.join(sorted(found))}; write {example}")


def _splits_of_card(card: Mapping[str, Any], names: Sequence[str]) -> Splits:
    """Returns the parquet files of the configs that the card of a repository lists."""
    splits: Splits = {}
    configs = card.get("configs")
    for config in configs if isinstance(configs, list) else []:
        if not isinstance(config, dict):
            continue
        folder = str(config.get("data_dir") or "")
        for split, pattern in _data_files(config.get("data_files")):
            files = _matching(names, str(PurePosixPath(folder, pattern)))
            if files:
                by_split = splits.setdefault(str(config.get("config_name", DEFAULT)), {})
                by_split.setdefault(split, []).extend(files)
    return splits


def _data_files(entry: Any) -> Iterator[tuple[str, str]]:
    """Yields split and pattern of what a card says under `data_files`, in any of its forms."""
    if isinstance(entry, str):
        yield "train", entry
    elif isinstance(entry, dict) and "split" in entry:
        paths = entry.get("path")
        for path in paths if isinstance(paths, list) else [paths]:
            yield str(entry["split"]), str(path)
    elif isinstance(entry, dict):
        for split, paths in entry.items():
            yield from _data_files({"split": split, "path": paths})
    elif isinstance(entry, list):
        for each in entry:
            yield from _data_files(each)


def _splits_by_name(names: Sequence[str]) -> Splits:
    """Returns the files of each split by their names, as `datasets` reads them."""
    splits: Splits = {}
    for name in names:
        path = PurePosixPath(name)
        folders = list(path.parent.parts)
        shard = _SHARD.fullmatch(path.stem)
        split = shard["split"] if shard else _split_in(path.stem)
        if split is None and folders and _split_in(folders[-1]):
            partial = "partial-" if folders[-1].startswith("partial-") else ""
            split = folders.pop().removeprefix(partial)
            split = _SPLITS.get(split, split)
        if folders[:1] == ["data"]:
            folders.pop(0)
        config = "/".join(folders) or DEFAULT
        splits.setdefault(config, {}).setdefault(split or "train", []).append(name)
    return splits


def _split_in(name: str) -> str | None:
    """Returns the split that a word in a name means.

    >>> _split_in("my-dev-0001")
    'validation'
    """
    for word in re.split(r"[^a-z]+", name.lower()):
        if word in _SPLITS:
            return _SPLITS[word]
    return None


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    """Returns the names that match a pattern, in which `**/` also stands for no folder."""
    matching = set(fnmatch.filter(names, pattern))
    matching.update(fnmatch.filter(names, pattern.replace("**/", "")))
    return sorted(matching)


def _check_complete(names: Sequence[str]) -> None:
    """Raises a DataError if shards are missing whose names say how many there are."""
    shards: dict[tuple[str, str], int] = {}
    for name in names:
        if shard := _SHARD.fullmatch(name.removesuffix(".parquet")):
            key = (shard["split"], shard["shards"])
            shards[key] = shards.get(key, 0) + 1
    for (stem, count), found in shards.items():
        if found < int(count):
            raise DataError(f"{stem} has only {found} of {int(count)} files")
