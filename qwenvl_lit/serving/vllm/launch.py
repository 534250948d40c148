"""Arguments and environment for vLLM's own server, with its unsafe defaults set right."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_lit.bounds import check_number
from qwenvl_lit.extras import require
from qwenvl_lit.runs.run import SETTINGS, Run
from qwenvl_lit.serving.vllm.adapters import adapter_arguments, adapter_folder, common_system
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from qwenvl_lit.serving.settings import ServeSettings

PACKAGE = __name__.rpartition(".")[0]
MAX_BODY = "QWENVL_LIT_MAX_BODY_BYTES"  # the environment variable that `BodyLimit` reads
# vLLM takes an empty list of domains for all of them. No host has this name (RFC 2606).
NO_DOMAINS = ("none.invalid",)
SERVED = "served"  # ends the name of a folder that a run is exported to
NOT_IN_VLLM = ("queue", "body_s")  # settings of our own server
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmSettings:
    """What `vllm` in `conf/serve.yaml` describes.

    Raises:
        ValueError: names the key, what it may be and what it is.
    """

    tensor_parallel_size: int = 1  # GPUs that share each layer
    pipeline_parallel_size: int = 1  # GPUs that share the layers
    data_parallel_size: int = 1  # copies of the model
    gpu_memory_utilization: float | None = None  # None: vLLM's default
    arguments: Sequence[str] = ()  # further arguments of `vllm serve`

    def __post_init__(self):
        for name in PARALLEL:
            check_number(f"vllm.{name}", getattr(self, name), least=1, whole=True)
        share = self.gpu_memory_utilization
        check_number("vllm.gpu_memory_utilization", share, above=0, most=1, optional=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A command, for `os.execvpe`."""

    arguments: list[str]
    environment: dict[str, str]

    def run(self) -> None:
        """Replaces this process by the server."""
        os.execvpe(self.arguments[0], self.arguments, self.environment)


def launch(
    model: str | Path,
    settings: VllmSettings,
    server: ServeSettings,
    *,
    keys: Sequence[str] = (),
    adapters: Mapping[str, str | Path] | None = None,
    name: str | None = None,
    dtype: str | None = None,
    system: str | None = None,
) -> Launch:
    """Returns the command that serves a model.

    Args:
        model: the folder of a full model, or a name on the hub; see `served_folder`.
        keys: at most one, which clients send.
        adapters: runs, or adapter folders of peft, by the name that clients ask for.
        name: what clients call the model, unless `serve.name` says so; None: its folder's.
        dtype: of the weights; None: that of the model's config.json, in half precision at most.
        system: the system message of requests without one; None: the model's.

    Raises:
        DataError: an adapter cannot be served.
        ValueError: vLLM is not installed, there are several keys, or a setting of the server has no
            counterpart in vLLM.
    """
    require("vllm", "engine=vllm")
    for key in NOT_IN_VLLM:
        default = type(server).__dataclass_fields__[key].default
        if getattr(server, key) != default:
            raise ValueError(f"engine=vllm has no serve.{key}; leave it out")
    if len(keys) > 1:
        raise ValueError(
            f"engine=vllm takes one key, and serve.keys has {len(keys)}: keep one in the file, or "
            f"put a proxy in front that knows them all"
        )
    name = server.name or name or Path(str(model)).name
    arguments = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    arguments += ["--served-model-name", name, "--host", server.host, "--port", str(server.port)]
    arguments += ["--limit-mm-per-prompt", json.dumps({"image": server.max_images})]
    arguments += ["--allowed-media-domains", *(server.allowed_hosts or NO_DOMAINS)]
    arguments += ["--middleware", f"{PACKAGE}.body_limit.BodyLimit"]
    options: dict[str, Any] = {name: getattr(settings, name) for name in PARALLEL}
    options = {name: value for name, value in options.items() if value > 1}
    options["gpu_memory_utilization"] = settings.gpu_memory_utilization
    options["max_num_seqs"] = None if server.rows == "auto" else server.rows
    options["max_model_len"] = None if server.context == "auto" else server.context
    options["shutdown_timeout"] = math.ceil(server.grace_s)
    options["dtype"] = dtype
    for option, value in options.items():
        if value is not None:
            arguments += [f"--{option.replace('_', '-')}", str(value)]
    folders = {key: adapter_folder(path) for key, path in (adapters or {}).items()}
    if folders:
        system = common_system(Path(model), folders, system)
        arguments += adapter_arguments(folders)
    if system is not None:
        arguments += ["--additional-config", json.dumps({"qwenvl_lit": {"system": system}})]
    return Launch(
        arguments=[*arguments, *settings.arguments], environment=_environment(server, keys)
    )


def _environment(server: ServeSettings, keys: Sequence[str]) -> dict[str, str]:
    """Returns the environment. A key among the arguments would be visible to all users."""
    environment = {
        "VLLM_NO_USAGE_STATS": "1",  # the environment may say otherwise
        **os.environ,
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "VLLM_MAX_IMAGE_PIXELS": str(server.max_image_pixels),
        "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": str(math.ceil(server.max_image_mb)),
        "VLLM_IMAGE_FETCH_TIMEOUT": str(math.ceil(server.image_s)),
        "VLLM_MEDIA_LOADING_THREAD_COUNT": str(server.workers),
        "VLLM_MAX_N_SEQUENCES": str(server.max_choices),
        MAX_BODY: str(server.max_body_bytes),
    }
    if keys:
        environment["VLLM_API_KEY"] = keys[0]
    return environment


def served_folder(ckpt: str, run: Run, cache: Path, *, overrides: Sequence[str] = ()) -> Path:
    """Returns the full model that `ckpt` names. A run or an adapter is exported first.

    The export of a run is beside its checkpoint, that of an adapter folder in the cache. It is used
    again while the checkpoint is unchanged.

    Args:
        overrides: arguments of the command line for `export`, such as `model.path=FOLDER`.

    Raises:
        DataError: the export failed; it has printed why.
    """
    if run.checkpoint is None:
        return Path(ckpt).expanduser()
    checkpoint = run.checkpoint.resolve()
    out = checkpoint.with_name(f"{checkpoint.stem}_{SERVED}")
    if run.folder is None:
        key = hashlib.sha256(f"{checkpoint} {overrides}".encode()).hexdigest()[:16]
        out = cache / SERVED / key
    settings = out / SETTINGS
    if settings.exists() and settings.stat().st_mtime > checkpoint.stat().st_mtime:
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "qwenvl_lit.export", f"ckpt={ckpt}", f"out={out}"]
    options = ["overwrite=true", "compare=none", *overrides]
    if subprocess.run([*command, *options]).returncode:
        raise DataError(f"{ckpt} could not be exported for vLLM; the reason is above")
    return out
