"""Finds a vocabulary that is not beside the weights of its model."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HFValidationError

from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.checkpoint_files import NETWORK_ERRORS
from qwenvl_lit.models.qwen_vl.checkpoint import VOCABULARY
from qwenvl_lit.types import DataError


def find_vocabulary(name: str, folder: Path | None = None, *, download: bool = True) -> Path:
    """Returns the file of a vocabulary.

    Args:
        name: a file; a folder or a name on the hub that has a `qwen.tiktoken`; or "tiny".
        folder: of the checkpoint. If it has a `qwen.tiktoken`, that is taken for a name on the hub.
        download: whether it may be fetched from the hub.

    Raises:
        DataError: there is no such file.
    """
    if name == "tiny":
        return TINY_VOCABULARY
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / VOCABULARY
    is_hub_name = name.count("/") == 1 and not path.exists() and not path.parent.exists()
    if not is_hub_name:
        return path
    if folder is not None and (folder / VOCABULARY).exists():
        return folder / VOCABULARY
    try:
        return Path(hf_hub_download(name, VOCABULARY, local_files_only=not download))
    except (*NETWORK_ERRORS, HFValidationError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"model.vocabulary={name} is no file or folder, relative to {Path.cwd()}, and its "
            f"{VOCABULARY} is not in {constants.HF_HUB_CACHE} and cannot be fetched: {reason:.300}"
        ) from error
