"""Arguments and environment for vLLM's own server, with its unsafe defaults set right."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn

from qwenvl_lit.extras import require
from qwenvl_lit.runs.run import SETTINGS, Run
from qwenvl_lit.serving.auth import VARIABLE
from qwenvl_lit.serving.vllm.adapters import (
    adapter_arguments,
    common_system,
    model_settings,
    warn_of_other_bases,
)
from qwenvl_lit.settings import check_settings
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from qwenvl_lit.serving.settings import ServeSettings

PACKAGE = __name__.rpartition(".")[0]
# Environment variables that `RequestGate` reads, beside the one that names the file of keys
MAX_BODY = "QWENVL_LIT_MAX_BODY_BYTES"
BODY_SECONDS = "QWENVL_LIT_BODY_SECONDS"
VLLM_KEY = "VLLM_API_KEY"  # of vLLM itself
# vLLM takes an empty list of domains for all of them. No host has this name (RFC 2606).
NO_DOMAINS = ("none.invalid",)
SERVED = "served"  # ends the name of a folder that a run is exported to
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
    arguments: Sequence[str | int | float] = ()  # further arguments of `vllm serve`

    def __post_init__(self):
        check_settings("vllm", {item.name: getattr(self, item.name) for item in fields(self)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A command, for `os.execvpe`."""

    arguments: list[str]
    environment: dict[str, str]

    def shown(self) -> str:
        """Returns the command as a shell takes it, with the variables that it sets."""
        variables = []
        for name, value in self.environment.items():
            if os.environ.get(name) != value:
                variables.append(f"{name}={shlex.quote(value)}")
        return " ".join([*variables, shlex.join(self.arguments)])

    def run(self) -> NoReturn:
        """Replaces this process by the server."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.execvpe(self.arguments[0], self.arguments, self.environment)


def launch(
    model: str | Path,
    settings: VllmSettings,
    server: ServeSettings,
    *,
    adapters: Mapping[str, Path] | None = None,
    source: str | None = None,
    prompting: Mapping[str, Any] | None = None,
    name: str | None = None,
    dtype: str | None = None,
    system: str | None = None,
    generation: Mapping[str, Any] | None = None,
) -> Launch:
    """Returns the command that serves a model.

    Args:
        model: the folder of a full model, or a name on the hub; see `served_folder`.
        adapters: folders, from `adapter_folder`, by the name that clients ask for.
        source: the name by which adapters may know the model; None: `model`.
        prompting: settings of `model` that determine prompts; None: those in its folder.
        name: what clients call the model, unless `serve.name` says so; None: its folder's.
        dtype: of the weights; None: that of the model's config.json, in half precision at most.
        system: the system message of requests without one; None: the model's.
        generation: defaults of requests, by the names of vLLM; None: the model's.

    Raises:
        DataError: the adapters do not go together.
        ValueError: vLLM is not installed, or `serve.queue` is set, which it does not have.
    """
    check_queue(server)
    require("vllm", "engine=vllm")
    folder = Path(model).expanduser()
    if folder.is_dir():  # another process may start the command elsewhere
        model = folder.absolute()
    name = server.name or name or folder.name
    adapters = adapters or {}
    if name in adapters:
        raise DataError(f"adapters: {name} is the name of the model already; choose another one")
    arguments = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    arguments += ["--served-model-name", name, "--host", server.host, "--port", str(server.port)]
    arguments += ["--limit-mm-per-prompt", json.dumps({"image": server.max_images})]
    arguments += ["--allowed-media-domains", *(server.allowed_hosts or NO_DOMAINS)]
    arguments += ["--middleware", f"{PACKAGE}.gate.RequestGate"]
    arguments += ["--allowed-origins", "[]"]  # pages of other sites may not ask from a browser
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
    if adapters:
        warn_of_other_bases(source or model, adapters)
        if prompting is None:
            prompting = model_settings(Path(model))
        system = common_system(prompting, adapters, system)
        arguments += adapter_arguments(adapters)
    if generation is not None:
        arguments += ["--override-generation-config", json.dumps(generation)]
    if system is not None:
        arguments += ["--additional-config", json.dumps({"qwenvl_lit": {"system": system}})]
    arguments += map(str, settings.arguments)
    return Launch(arguments=arguments, environment=_environment(server))


def check_queue(server: ServeSettings) -> None:
    """Raises a ValueError if `serve.queue` is set, which vLLM does not have."""
    if server.queue != type(server)().queue:
        raise ValueError(
            "engine=vllm has no serve.queue: vLLM lets all requests wait; leave it out, and limit "
            "connections in a proxy"
        )


def _environment(server: ServeSettings) -> dict[str, str]:
    """Returns the environment. Keys stay in their file: arguments are visible to all users."""
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
        BODY_SECONDS: str(server.body_s),
    }
    for name in (VARIABLE, VLLM_KEY):  # `serve.keys` counts alone
        environment.pop(name, None)
    if server.keys is not None:
        environment[VARIABLE] = str(Path(server.keys).expanduser().absolute())
    return environment


def served_folder(ckpt: str, run: Run, cache: Path, *, overrides: Sequence[str] = ()) -> Path:
    """Returns the full model that `ckpt` names, or the folder that a run is exported to.

    That of a run is beside its checkpoint, that of an adapter folder in the cache.

    Args:
        overrides: arguments of the command line that change the export, such as
            `model.path=FOLDER`. Each set of them has an export of its own.
    """
    if run.checkpoint is None:
        return Path(ckpt).expanduser()
    checkpoint = run.checkpoint.resolve()
    if run.folder is None:
        return cache.expanduser() / SERVED / _digest(str(checkpoint), *overrides)
    name = f"{checkpoint.stem}_{SERVED}"
    if overrides:
        name += f"_{_digest(*overrides)}"
    return checkpoint.with_name(name)


def export(
    checkpoint: Path,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    trust: bool = False,
    verify: bool = True,
) -> None:
    """Exports a checkpoint for vLLM, unless that has been done since it was written.

    Args:
        out: from `served_folder`.
        overrides: as for `served_folder`.
        trust, verify: as for `find_run`.

    Raises:
        DataError: the export failed; it has printed why.
    """
    settings = out / SETTINGS
    if settings.exists() and settings.stat().st_mtime > checkpoint.stat().st_mtime:
        return
    print(f"Exporting {checkpoint} to {out} for vLLM", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    options = ["overwrite=true", "compare=none", f"trust={trust}", f"verify={verify}", *overrides]
    arguments = [f"ckpt={checkpoint}", f"out={out}", *options]
    with TemporaryDirectory() as folder:
        # Of the export's own run folder nothing is needed.
        command = [sys.executable, "-m", "qwenvl_lit.export", f"hydra.run.dir={folder}", *arguments]
        status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if status:
        raise DataError(f"{checkpoint} could not be exported for vLLM; the reason is above")


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
