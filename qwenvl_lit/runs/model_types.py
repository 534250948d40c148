"""Recognizes models by their `config.json` or their name, and names the recipe of each.

A recipe is a file of conf/model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qwenvl_lit.models.quantized_files import check_not_gguf, read_gptq
from qwenvl_lit.runs.config_folder import config_folder
from qwenvl_lit.stored_files import read_json_object
from qwenvl_lit.types import DataError
from qwenvl_lit.value_types import brief

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
QWEN_VL = "qwen"  # the model_type of Qwen-VL, and of a config.json that names none
QWEN = "qwen without `visual`"  # the language model alone, which has the same model_type
# Models that are read: kind, which is the model_type of config.json -> name
READ = {
    QWEN_VL: "Qwen-VL",
    QWEN: "Qwen",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
}
# Width of the language model -> recipe. A model of another size has the recipe of the nearest one.
WIDTHS = {
    QWEN: {2048: "qwen_1_8b", 4096: "qwen_7b", 5120: "qwen_14b"},
    "qwen2_5_vl": {2048: "qwen2_5_vl_3b", 3584: "qwen2_5_vl_7b"},
    "qwen3_vl": {2048: "qwen3_vl_2b", 2560: "qwen3_vl_4b", 4096: "qwen3_vl_8b"},
}
EXAMPLES = {
    QWEN_VL: "qwen_vl_chat",
    QWEN: "qwen_7b_chat",
    "qwen2_5_vl": "qwen2_5_vl_7b",
    "qwen3_vl": "qwen3_vl_8b",
}
# Relatives that are not read: model_type -> name
NOT_READ = {
    "qwen2_vl": "Qwen2-VL",
    "qwen3_vl_moe": "Qwen3-VL with experts (MoE)",
    "qwen3_5": "Qwen3.5",
    "qwen3_5_moe": "Qwen3.5 with experts (MoE)",
    "qwen2_5_omni": "Qwen2.5-Omni",
    "qwen3_omni_moe": "Qwen3-Omni",
    "qwen2_audio": "Qwen2-Audio",
    "qwen3_asr": "Qwen3-ASR",
    "qwen2": "Qwen2, which has no vision tower",
    "qwen3": "Qwen3, which has no vision tower",
    "colqwen2": "ColQwen2",
    "monkey": "Monkey, whose vision tower has adapters for parts of an image",
    "qwen_audio": "Qwen-Audio",
}
QWEN_IN_NAME = re.compile(r"_qwen_(1_8|7|14|72)b_")  # in `_words` of a name
# Names of published models, as in the last part of a hub name
PUBLISHED = re.compile(
    r"qwen-vl(-chat(-int4)?)?|qwen-(1_8b|7b|14b|72b)(-chat)?|qwen2\.5-vl-\d+b-instruct"
    r"|qwen3-vl-\d+b-(instruct|thinking)"
)
FOUR_BIT_COPY = re.compile(r"(-unsloth)?-bnb-4bit$")  # others' copies of published models
SEECLICK = "_seeclick_"  # in `_words` of a name
# Ends of the names of quantized models, such as Qwen3-VL-8B-Instruct-FP8
QUANTIZED = re.compile(
    r"([-.](unsloth|bnb|awq|gptq|gguf|mlx|fp8|dynamic|nvfp4|quantized|w4a16|w8a8|w8a16|q\d\w*"
    r"|(int)?[2-8]-?(bits?)?))+$",
    re.IGNORECASE,
)
BILLIONS = re.compile(r"_(\d+)b_")  # of parameters
EXPERTS = re.compile(r"_a\d+b_")


def recipe_of(path: str) -> str:
    """Returns the recipe for the model at `path`, a folder or a name on the hub.

    Its config.json decides, if it is in the folder or in the hub's cache, and otherwise its name.
    An unknown name is taken to be of a model that was trained from Qwen-VL-Chat.

    Raises:
        DataError: the model is not one of those that are read.
    """
    model_type = model_type_of(path) or QWEN_VL
    if model_type == QWEN_VL:
        if SEECLICK in _words(path):
            return "seeclick"
        return "qwen_vl" if _continues_text(path) else "qwen_vl_chat"
    file = _stored_file(path, CONFIG)
    if file is None:
        return recipe_named(path) or _nearest(WIDTHS[model_type], None)
    recipe = _nearest(WIDTHS[model_type], _width(read_json_object(file)))
    if model_type == QWEN and not _continues_text(path):
        return f"{recipe}_chat"
    return recipe


def recipe_named(name: str) -> str | None:
    """Returns the recipe of a model whose name has its kind and size; None for other names.

    >>> recipe_named("qwen2.5-vl-32b-instruct")
    'qwen2_5_vl_7b'
    """
    words = _words(name)
    if qwen := QWEN_IN_NAME.search(words):
        size = "14" if qwen[1] == "72" else qwen[1]
        return f"qwen_{size}b" if _continues_text(name) else f"qwen_{size}b_chat"
    billions = BILLIONS.search(words)
    for model_type, widths in WIDTHS.items():
        if billions and f"_{model_type}_" in words:
            sizes = {int(re.sub(r".*_(\d+)b", r"\1", recipe)): recipe for recipe in widths.values()}
            return _nearest(sizes, int(billions[1]))
    return None


def model_type_of(path: str) -> str | None:
    """Returns the kind of the model at `path`, one of `READ`; None if it cannot be recognized.

    Raises:
        DataError: the model, or the quantization of its weights, is not one of those that are read.
    """
    refuse_gguf(path)
    file = _stored_file(path, CONFIG)
    if file is not None:
        settings = read_json_object(file)
        found = settings.get("model_type", QWEN_VL)
        if found == QWEN_VL and "audio" in settings:
            raise DataError(
                f"{file}: models with `audio`, such as Qwen-Audio, are not read; {_listed()}"
            )
        if found == QWEN_VL and "model_type" in settings and settings.get("visual") is None:
            found = QWEN
        if not isinstance(found, str) or found not in READ:
            known = NOT_READ.get(found) if isinstance(found, str) else None
            name = f" ({known})" if known else ""
            raise DataError(
                f"{file}: models of model_type {brief(found)}{name} are not read; {_listed()}"
            )
        read_gptq(file.parent, _instead(path, found), settings)
        return found
    if Path(path).expanduser().exists():
        return None
    words = _words(path)
    with_experts = EXPERTS.search(words)
    for model_type in WIDTHS:
        if f"_{model_type}_" in words and not with_experts:
            return model_type
    if "_qwen_vl_" in words:
        return QWEN_VL
    if QWEN_IN_NAME.search(words):
        return QWEN
    if path.lower().startswith("qwen/"):
        raise DataError(f"{path} is not read; {_listed()}")
    return None


def refuse_gguf(path: str) -> None:
    """Raises a DataError if `path` is a GGUF file, or a folder with one."""
    check_not_gguf(path, _instead(path))


def published_name(path: str) -> str | None:
    """Returns the name on the hub of a published model, by the last part of a copy's name.

    >>> published_name("~/.cache/modelscope/hub/Qwen/Qwen2___5-VL-7B-Instruct")
    'Qwen/Qwen2.5-VL-7B-Instruct'
    """
    name = Path(path).name.lower().replace("___", ".")  # ms-swift's cache has no dots in names
    name = FOUR_BIT_COPY.sub("", name)
    if not PUBLISHED.fullmatch(name):
        return None
    words = []
    for word in name.split("-"):
        is_upper = re.fullmatch(r"vl|[\d_]+b", word)
        words.append(word.upper() if is_upper else word[0].upper() + word[1:])
    return "Qwen/" + "-".join(words)


def model_arguments(path: str) -> str:
    """Returns the arguments that choose the model at `path`.

    >>> model_arguments("Qwen/Qwen-VL")
    'model=qwen_vl'

    Raises:
        DataError: the model is not one of those that are read.
    """
    recipe = recipe_of(path)
    if recipe_settings(recipe).get("path") == path:
        return f"model={recipe}"
    return f"model={recipe} model.path={path}"


def model_name(model: Mapping[str, Any]) -> str:
    """Returns the name of the kind of model that a config describes, such as Qwen3-VL.

    >>> model_name({"path": "Qwen/Qwen3-VL-8B-Instruct"})
    'Qwen3-VL'
    """
    target = model.get("_target_")
    if target is not None and target not in _own_targets():
        return str(target).rpartition(".")[2].removesuffix("Family")
    path, config = model.get("path"), model.get("config") or {}
    found = config.get("model_type")
    if isinstance(path, str):
        found = model_type_of(path)
    if found in READ:
        return READ[found]
    names = []
    for model_type, name in READ.items():
        recipes = map(recipe_settings, _recipes(model_type))
        if target is None or target in [recipe.get("_target_") for recipe in recipes]:
            names.append(name)
    return names[0] if target is None else " or ".join(names)


def check_model_path(model: Mapping[str, Any], choice: str | None = None) -> None:
    """Raises a DataError if `model.path` is of another model than the recipe is for.

    Args:
        model: the config of the model. A class of the user is not checked.
        choice: the file of conf/model that it comes from, if known.
    """
    path = model.get("path")
    if not isinstance(path, str) or model.get("_target_") not in _own_targets():
        return
    found = model_type_of(path)
    if found is None:
        return
    recipe = recipe_of(path)
    chosen = next((name for name in READ if choice in _recipes(name)), None)
    same_class = recipe_settings(recipe).get("_target_") == model["_target_"]
    if not same_class or chosen not in (None, found):
        at_fault = f"model={choice}" if chosen else "the chosen model"
        raise DataError(
            f"model.path={path} is of {READ[found]}, and {at_fault} is of another kind; "
            f"for this path: {model_arguments(path)}"
        )


@cache
def recipe_settings(recipe: str) -> Mapping[str, Any]:
    """Returns what a file of conf/model and its defaults in the same folder set; {} without it."""
    file = config_folder() / "model" / f"{recipe}.yaml"
    if not file.exists():
        return {}
    node = OmegaConf.to_container(OmegaConf.load(file))
    settings: dict[str, Any] = {}
    for default in node.pop("defaults", ()):
        if isinstance(default, str) and default != "_self_":
            settings |= recipe_settings(default)
    return {**settings, **node}


@cache
def _own_targets() -> frozenset[str]:
    names = [file.stem for file in (config_folder() / "model").glob("*.yaml")]
    return frozenset(str(recipe_settings(name).get("_target_")) for name in names)


def _recipes(model_type: str) -> tuple[str, ...]:
    """The files of conf/model for a model_type."""
    patterns = {QWEN_VL: "qwen_vl*", QWEN: "qwen_[!v]*"}
    pattern = patterns.get(model_type, f"{model_type}*")
    return tuple(file.stem for file in (config_folder() / "model").glob(f"{pattern}.yaml"))


def is_hub_name(path: str) -> bool:
    """Whether `path` may be a name on the hub: it is no file or folder here."""
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None
    return is_name and not Path(path).expanduser().exists()


def cached_folder(name: str) -> Path | None:
    """Returns the folder of a model in the hub's cache; None if its config.json is not there."""
    file = _stored_file(name, CONFIG)
    return file.parent if file else None


def fetch_descriptions(name: str, files: Iterable[str]) -> Path | None:
    """Fetches config.json, generation_config.json and other small files of a model on the hub.

    Returns their folder; None if they cannot be fetched. The reason is not reported here but by the
    family, which fetches the weights from the same place.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        for file in (CONFIG, GENERATION_CONFIG, *files):
            with suppress(EntryNotFoundError):
                hf_hub_download(name, file)
    except (*HfHubHTTPError.__bases__, HFValidationError, OSError):
        return None
    return cached_folder(name)


def _stored_file(path: str, name: str) -> Path | None:
    """A file of a folder, or of a hub name in the hub's cache; None if it is not there."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).exists() else None
    if not is_hub_name(path):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, name)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _words(path: str) -> str:
    """The last part of a path in lower case, with _ around each word: Qwen2.5-VL is _qwen2_5_vl_.

    The model_types that config.json has are written in this way.
    """
    name = re.sub(r"[^a-z0-9]+", "_", Path(path).name.lower())
    return f"_{name}_"


def _width(settings: Mapping[str, Any]) -> int | None:
    """The width of the language model; older files have it at the top level."""
    text = settings.get("text_config")
    width = (text if isinstance(text, Mapping) else settings).get("hidden_size")
    return width if type(width) is int and width > 0 else None


def _nearest(recipes: Mapping[int, str], size: int | None) -> str:
    """The recipe of the nearest size; for an unknown size that of the largest one."""
    if not size:
        return recipes[max(recipes)]
    return recipes[min(recipes, key=lambda known: abs(math.log(known / size)))]


def _instead(path: str, model_type: str = QWEN_VL) -> str:
    """Names the model to take in place of the quantized one at `path`, for messages."""
    original = published_name(QUANTIZED.sub("", Path(path).name))
    return original or f"such as {recipe_settings(EXAMPLES[model_type])['path']}"


def _continues_text(path: str) -> bool:
    """Whether a Qwen or Qwen-VL is a base model, which continues text without chat markup."""
    file = _stored_file(path, GENERATION_CONFIG)
    if file is not None:
        return read_json_object(file).get("chat_format") == "raw"
    return re.fullmatch(r"qwen[-_](vl|[\d._]+b)", Path(path).name.lower()) is not None


def _listed() -> str:
    names = [f"{name} ({model_type})" for model_type, name in READ.items()]
    return f"those of {', '.join(names[:-1])} and {names[-1]} are"
