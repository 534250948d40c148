"""Recognizes folders whose weights are quantized, without torch: by their configs and file names.

The weights of GPTQ are read (see `gptq.py`). An error names any other kind, and what to take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenvl_lit.stored_files import read_json_object
from qwenvl_lit.types import DataError
from qwenvl_lit.value_types import brief, matches, type_name

CONFIG = "config.json"
GPTQ_CONFIG = "quantize_config.json"  # of AutoGPTQ, whose config.json may say nothing
MODELOPT_CONFIG = "hf_quant_config.json"
# Names of the methods that transformers writes as `quant_method`, where they are not its own
METHODS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "vptq": "VPTQ",
    "auto-round": "AutoRound",
    "compressed-tensors": "compressed-tensors (llm-compressor)",
    "modelopt": "TensorRT Model Optimizer",
    "exl2": "EXL2",
    "exl3": "EXL3",
}
GPTQ_TYPES: dict[str, Any] = {
    "bits": int,
    "group_size": int,
    "sym": bool | None,
    "desc_act": bool | None,
    "checkpoint_format": str | None,
    "format": str | None,
    "pack_dtype": str | None,
    "dynamic": dict[str, Any] | None,
}
GGUF = "quantized with GGUF, for llama.cpp"
GPTQ_BITS = (2, 4, 8)
GPTQ_FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True, kw_only=True, slots=True)
class GPTQ:
    """How GPTQ quantized the weights of a folder.

    Args:
        file: that says so.
        bits: of a value.
        group_size: consecutive inputs of a layer that share a scale; -1: all of them.
        symmetric: whether all zero points are the middle of the range.
        ordered: whether groups are consecutive inputs, as without `desc_act`.
        offset: added to stored zero points. The format "gptq" stores them less one.
    """

    file: Path
    bits: int
    group_size: int
    symmetric: bool
    ordered: bool
    offset: int


def read_gptq(folder: Path, instead: str, settings: Mapping[str, Any] | None = None) -> GPTQ | None:
    """Returns how GPTQ quantized the weights of a folder; None: they are not quantized.

    Args:
        instead: the model to take in place of one that is not read, for the message.
        settings: the content of `config.json`; None: it is read.

    Raises:
        DataError: the weights are quantized in a way that is not read, or a config is damaged.
    """
    file = folder / CONFIG
    if settings is None:
        settings = read_json_object(file)
    stored = settings.get("quantization_config")
    if not stored:
        stored = settings.get("quantization")  # of MLX
    if not stored and (folder / GPTQ_CONFIG).exists():
        file = folder / GPTQ_CONFIG
        stored = {"quant_method": "gptq", **read_json_object(file)}
    if not stored and (folder / MODELOPT_CONFIG).exists():
        file, stored = folder / MODELOPT_CONFIG, {"quant_method": "modelopt"}
    if not stored:
        return None
    if not isinstance(stored, Mapping):
        raise DataError(f"{file}: quantization_config is {brief(stored)}, expected settings")
    if _method(stored) != "gptq":
        raise not_read(file, _described(stored), instead)
    return _gptq(file, stored, instead)


def check_not_gguf(path: str | Path, instead: str) -> None:
    """Raises a DataError for a GGUF file, or a folder that has no other weights."""
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted(path.iterdir())
        has_others = any(file.suffix in (".safetensors", ".bin") for file in files)
    else:
        files, has_others = [path], not path.exists()
    found = next((file for file in files if file.suffix == ".gguf"), None)
    if found and not has_others:
        raise not_read(found, GGUF, instead)


def not_read(source: Path | str, kind: str, instead: str) -> DataError:
    """Returns the error for weights of a kind that is not read."""
    return DataError(
        f"{source}: the weights are {kind}, which is not read; take the checkpoint that they were "
        f"made from, {instead}, with model.load_in_4bit=true, or train on it with adapter=qlora"
    )


def _method(stored: Mapping[str, Any]) -> str:
    """The method that quantized, in lower case; "" if it is unknown."""
    method = stored.get("quant_method")
    if isinstance(method, str):
        return method.lower()
    if any(stored.get(f"load_in_{bits}bit") for bits in (4, 8)):
        return "bitsandbytes"
    if "desc_act" in stored:
        return "gptq"
    return "mlx" if "group_size" in stored else ""


def _described(stored: Mapping[str, Any]) -> str:
    """Returns a clause such as "quantized with AWQ (4 bits)"."""
    method = _method(stored)
    name = METHODS.get(method, "MLX" if method == "mlx" else method[:40])
    bits = stored.get("bits") or stored.get("w_bit")
    for count in (4, 8):
        if stored.get(f"load_in_{count}bit"):
            bits = count
    clause = f"quantized with {name}" if name else "quantized"
    return f"{clause} ({bits} bits)" if type(bits) is int else clause


def _gptq(file: Path, stored: Mapping[str, Any], instead: str) -> GPTQ:
    for key, expected in GPTQ_TYPES.items():
        if key in stored and not matches(stored[key], expected):
            raise DataError(
                f"{file}: {key} of the quantization is {brief(stored[key])}, expected "
                f"{type_name(expected)}; is the file damaged?"
            )
    if missing := [key for key in ("bits", "group_size") if key not in stored]:
        raise DataError(
            f"{file}: the settings of GPTQ lack {' and '.join(missing)}; fetch the file again"
        )
    bits, group_size = stored["bits"], stored["group_size"]
    format_name = stored.get("checkpoint_format") or stored.get("format") or "gptq"
    reason = ""
    if bits not in GPTQ_BITS:
        reason = f"quantized with GPTQ to {bits} bits"
    elif format_name not in GPTQ_FORMATS:
        reason = f"quantized with GPTQ in the format {brief(format_name)}"
    elif stored.get("pack_dtype") not in (None, "int32"):
        reason = f"quantized with GPTQ and packed into {brief(stored['pack_dtype'])}"
    elif any(not name.startswith("-:") for name in stored.get("dynamic") or ()):
        reason = "quantized with GPTQ and other settings for some layers (dynamic)"
    if reason:
        raise not_read(file, reason, instead)
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise DataError(f"{file}: group_size is {group_size}, expected -1 or a positive number")
    return GPTQ(
        file=file,
        bits=bits,
        group_size=group_size,
        symmetric=bool(stored.get("sym")),
        ordered=not stored.get("desc_act"),
        offset=1 if format_name == "gptq" else 0,
    )
