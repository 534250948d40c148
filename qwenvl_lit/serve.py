"""`python -m qwenvl_lit.serve`: a model behind OpenAI's API, for programs and for the browser."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from qwenvl_lit.cli.command import command
from qwenvl_lit.extras import require
from qwenvl_lit.libraries import import_libraries
from qwenvl_lit.terminal import counted
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qwenvl_lit.generation.generation import Generation
    from qwenvl_lit.runs.run import Run
    from qwenvl_lit.serving.auth import Keys
    from qwenvl_lit.serving.settings import ServeSettings

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Settings of `Generation` that the engine does not have, and their values without effect.
NEUTRAL = {
    "num_beams": (1,),
    "min_new_tokens": (0,),
    "stop_words_ids": ([], ()),
    "logits_processor": (None,),
}

log = logging.getLogger(__name__)


def main(config: DictConfig) -> None:
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
    from qwenvl_lit.serving.capacity import with_capacity
    from qwenvl_lit.serving.images import ImageLoader
    from qwenvl_lit.serving.server import bind, serve, url_of
    from qwenvl_lit.serving.service import Model, Service

    build.start(config)
    settings: ServeSettings = instantiate(config.serve, _convert_="all")
    check_generation(build.generation(config))
    keys = keys_of(settings.keys, host=settings.host)
    bound = bind(settings.host, settings.port)
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
            max_waiting=max(1, settings.queue * settings.max_choices),
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


def keys_of(file: str | None, *, host: str) -> Keys:
    """Returns the keys of a file. Without a file, warns if other machines can connect to `host`."""
    from qwenvl_lit.serving.auth import Keys, read_keys

    if file is not None:
        return Keys(read_keys(file))
    if host not in LOOPBACK:
        log.warning("serve.host=%s without serve.keys: everyone may use the model", host)
    return Keys()


def check_generation(generation: Generation) -> None:
    """Checks that the engine has the settings of `generation`.

    Raises:
        ValueError: names the key and the value to set.
    """
    for name, neutral in NEUTRAL.items():
        value = getattr(generation, name)
        if value not in neutral:
            to_set = "null" if neutral[0] is None else neutral[0]
            raise ValueError(
                f"serve has no generation.{name}, which is {value!r:.100}: set "
                f"generation.{name}={to_set}"
            )


def model_name(config: DictConfig, run: Run | None) -> str:
    """Returns the name of the folder of the run, or that of the model without its owner."""
    from hydra.core.hydra_config import HydraConfig

    if run is not None:
        folder = run.folder or Path(config.ckpt).expanduser()
        return folder.absolute().name
    if config.model.get("path"):
        return Path(config.model.path).name
    return HydraConfig.get().runtime.choices["model"]


if __name__ == "__main__":
    command("serve", main, run="needed")
