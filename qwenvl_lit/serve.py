"""`python -m qwenvl_lit.serve`: a model behind OpenAI's API, for programs and for the browser."""

from __future__ import annotations

import gc
import logging
import stat
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_lit.cli.command import command
from qwenvl_lit.cli.vllm_server import (
    adapters_of,
    check_for_vllm,
    chosen_system,
    export_arguments,
    key_of,
    refuse_vllm_settings,
)
from qwenvl_lit.extras import require
from qwenvl_lit.libraries import import_libraries
from qwenvl_lit.terminal import counted
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qwenvl_lit.generation.generation import Generation
    from qwenvl_lit.runs.run import Run
    from qwenvl_lit.serving.settings import ServeSettings
    from qwenvl_lit.serving.vllm.launch import Launch

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Settings of `Generation` that the engine does not have, and their values without effect.
NEUTRAL = {
    "num_beams": (1,),
    "min_new_tokens": (0,),
    "stop_words_ids": ([], ()),
    "logits_processor": (None,),
}
# vLLM's plugin reads stop_words_ids of a folder.
NOT_IN_VLLM = ("num_beams", "min_new_tokens", "logits_processor")

log = logging.getLogger(__name__)


def main(config: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    arguments = HydraConfig.get().overrides.task
    if config.engine == "vllm":
        launch_of(config, arguments).run()
    else:
        refuse_vllm_settings(config, arguments)
        serve_here(config)


def serve_here(config: DictConfig) -> None:
    """Serves with our own engine, in this process."""
    for package in PACKAGES:
        require(package, "serve")
    import_libraries()
    import asyncio

    import torch
    from hydra.utils import instantiate

    from qwenvl_lit import build
    from qwenvl_lit.api import QwenVL
    from qwenvl_lit.data.collate import Pad
    from qwenvl_lit.data.readers.question import question_options
    from qwenvl_lit.generation.continuous import WIDTH_MULTIPLE, ContinuousBatching
    from qwenvl_lit.models.loading import device_named
    from qwenvl_lit.runs.run import find_run
    from qwenvl_lit.serving.app import Application
    from qwenvl_lit.serving.auth import Keys
    from qwenvl_lit.serving.capacity import check_room, with_capacity
    from qwenvl_lit.serving.images import ImageLoader
    from qwenvl_lit.serving.server import bind, serve, url_of
    from qwenvl_lit.serving.service import Model, Service

    build.start(config)
    settings: ServeSettings = instantiate(config.serve, _convert_="all")
    check_generation(build.generation(config))
    bound = bind(settings.host, settings.port)
    keys = Keys(keys_of(settings.keys, host=settings.host))
    run = None
    if config.ckpt:
        run = find_run(config.ckpt, trust=config.trust, verify=config.verify)
    module = build.module(
        config,
        adapted=run is not None,
        trained_checkpoint=run.checkpoint if run else None,
        load_device=device_named(config.device),
    )
    data = run.config.get("data") if run else None
    read_options = question_options(Path(config.paths.cache), data)
    model = QwenVL.from_module(module, read_options=read_options)
    settings = with_capacity(settings, model=model.model, family=model.family)
    processor = model.processor
    check_room(settings, processor)
    collate = Pad(
        pad_id=processor.pad_id,
        collate_vision=processor.collate_vision,
        side="left",
        multiple_of=WIDTH_MULTIPLE,
    )
    try:
        engine = ContinuousBatching(
            model.model,
            model.family,
            processor,
            collate=collate,
            rows=settings.rows,
            slots=settings.context,
            max_waiting=settings.most_answers,
        )
    except torch.OutOfMemoryError:
        raise DataError(
            f"the memory for serve.rows={settings.rows} answers of serve.context="
            f"{settings.context} tokens is not there; set fewer"
        ) from None
    loader = ImageLoader(
        allowed_hosts=settings.allowed_hosts,
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
        seconds=settings.image_s,
        options=read_options.image_options,
    )
    served = Model(
        name=settings.name or model_name(config, run),
        processor=processor,
        generation=model.generation,
        markup_in_answers=read_options.markup == "all",
    )
    application = Application(Service(engine, served, settings, loader), keys)
    engine.start()

    # Otherwise, the collector visits all modules and parameters again and again. No token arrives
    # while it does, for up to half a second.
    gc.collect()
    gc.freeze()

    def announce() -> None:
        url = url_of(bound)
        rows = counted(settings.rows, "answer")
        print(
            f"Serving {served.name}: {rows} at a time, of at most {settings.context} tokens with "
            f"their prompts\n{url} in a browser, {url}/v1 for OpenAI clients",
            flush=True,
        )

    running = serve(application, engine, bound, grace_s=settings.grace_s, on_start=announce)
    asyncio.run(running)


def launch_of(config: DictConfig, arguments: Sequence[str]) -> Launch:
    """Returns the command that starts vLLM's server. A run is exported first, if need be.

    Args:
        arguments: of the command line.

    Raises:
        DataError: the model, an adapter or the address cannot be served.
        ValueError: a setting has no counterpart in vLLM, or vLLM is not installed.
    """
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from qwenvl_lit.build import check_composed_config
    from qwenvl_lit.models.loading import float_dtype
    from qwenvl_lit.runs.run import find_run
    from qwenvl_lit.serving.capacity import check_context
    from qwenvl_lit.serving.server import bind, url_of
    from qwenvl_lit.serving.vllm.adapters import adapter_folder
    from qwenvl_lit.serving.vllm.launch import check_queue, export, launch, served_folder

    check_composed_config(config)
    run = None
    if config.ckpt:
        run = find_run(config.ckpt, trust=config.trust, verify=config.verify)
    checkpoint = run.checkpoint if run else None
    check_for_vllm(config, arguments, is_exported=checkpoint is not None)
    float_dtype(config.model.dtype)
    generation = chosen_generation(config, arguments)
    settings: ServeSettings = instantiate(config.serve, _convert_="all")
    check_queue(settings)
    with bind(settings.host, settings.port) as bound:
        url, port = url_of(bound), bound.getsockname()[1]
    keys_of(settings.keys, host=settings.host)  # vLLM's server reads the file again
    folders = adapters_of(config)
    require("vllm", "engine=vllm")
    adapters = {}
    for name, folder in folders.items():
        adapters[name] = adapter_folder(folder, verify=config.verify)
    family = instantiate(config.model, _convert_="all")
    check_context(settings, family)
    model, overrides = family.folder, export_arguments(arguments)  # fetched, if it is on the hub
    if run is not None:
        model = served_folder(config.ckpt, run, Path(config.paths.cache), overrides=overrides)
    # The command is made before the export, which takes minutes, as it may find a mistake.
    command = launch(
        model,
        instantiate(config.vllm, _convert_="all"),
        replace(settings, port=port),
        adapters=adapters,
        source=config.model.path if run is None else None,
        prompting=OmegaConf.to_container(config.model, resolve=True) if checkpoint else None,
        name=model_name(config, run),
        dtype=config.model.dtype,
        system=chosen_system(config, arguments),
        generation=generation,
    )
    if checkpoint is not None:
        trust, verify = config.trust, config.verify
        export(checkpoint, model, overrides=overrides, trust=trust, verify=verify)
    print(f"{command.shown()}\n{url}/v1 for OpenAI clients, once vLLM has loaded the model")
    return command


def chosen_generation(config: DictConfig, arguments: Sequence[str]) -> dict[str, Any] | None:
    """Returns the defaults of requests that the command line chooses; None: those of the model.

    Raises:
        ValueError: vLLM has no such setting.
    """
    from qwenvl_lit import build
    from qwenvl_lit.serving.vllm.folder import sampling_defaults

    generation = build.generation(config)
    check_generation(generation, engine="engine=vllm", names=NOT_IN_VLLM)
    is_chosen = any(key_of(argument).partition(".")[0] == "generation" for argument in arguments)
    return sampling_defaults(generation) if is_chosen else None


def keys_of(file: str | None, *, host: str) -> list[str]:
    """Returns the keys of a file.

    Warns if others on this machine can read the file, or if there is none and other machines can
    connect to `host`.
    """
    from qwenvl_lit.serving.auth import read_keys

    if file is not None:
        keys = read_keys(file)
        if Path(file).expanduser().stat().st_mode & stat.S_IROTH:
            log.warning("all users of this machine can read the keys: chmod 600 %s", file)
        return keys
    if host not in LOOPBACK:
        log.warning(
            "serve.host=%s without serve.keys: everyone may use the model; serve.keys=FILE asks "
            "for a key",
            host,
        )
    return []


def check_generation(
    generation: Generation, *, engine: str = "serve", names: Collection[str] = tuple(NEUTRAL)
) -> None:
    """Checks that the engine has the settings of `generation`.

    Args:
        engine: its name for messages.
        names: of the settings that it does not have.

    Raises:
        ValueError: names the key and the value to set.
    """
    for name in names:
        neutral, value = NEUTRAL[name], getattr(generation, name)
        if value not in neutral:
            to_set = "null" if neutral[0] is None else neutral[0]
            raise ValueError(
                f"{engine} has no generation.{name}, which is {value!r:.100}: set "
                f"generation.{name}={to_set}"
            )


def model_name(config: DictConfig, run: Run | None) -> str:
    """Returns the name of the folder of the run, or that of the model without its owner."""
    from hydra.core.hydra_config import HydraConfig

    from qwenvl_lit.runs.run import SUFFIX

    if run is not None:
        folder = (run.folder or Path(config.ckpt).expanduser()).absolute()
        if folder.name.startswith("adapter_model."):  # what `ckpt` of an adapter folder became
            folder = folder.parent
        return folder.name.removesuffix(SUFFIX)
    if config.model.get("path"):
        return Path(config.model.path).name
    return HydraConfig.get().runtime.choices["model"]


if __name__ == "__main__":
    command("serve", main, run="needed")
