"""`python -m qwenvl_lit.export ckpt=RUN out=DIR`: writes the model, or the adapter, of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_lit.cli.command import command
from qwenvl_lit.libraries import import_libraries
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qwenvl_lit.runs.run import Run

CHOICES = {
    "dtype": ("bfloat16", "float16", "float32"),
    "compare": ("run", "sample", "none"),
    "merge": (True, False),
    "overwrite": (True, False),
    "push_private": (True, False),
}


def main(config: DictConfig) -> None:
    out = checked_target(config)
    check_choices(config)
    repository = None
    if config.push is not None:
        from qwenvl_lit.runs.hub import find_repository

        repository = find_repository(config.push, private=config.push_private)
    import_libraries()
    import torch
    from omegaconf import OmegaConf

    from qwenvl_lit import build, checksums
    from qwenvl_lit.atomic import atomic_folder, disk_errors
    from qwenvl_lit.data.download.files import format_bytes
    from qwenvl_lit.evaluation.equivalence import check_equivalence, comparison_batches
    from qwenvl_lit.models.loading import device_named
    from qwenvl_lit.reports.model_card import model_card
    from qwenvl_lit.runs import exported_folder
    from qwenvl_lit.runs.run import find_run
    from qwenvl_lit.runs.stored_config import trust_argument
    from qwenvl_lit.training.adapters.peft_files import absolute_path

    build.start(config)
    run = None
    if config.ckpt:
        run = find_run(config.ckpt, trust=config.trust, verify=config.verify)
    quantized_base = run is not None and bool(config.adapter.get("quantization"))
    if quantized_base:
        # What was trained on a 4-bit base is merged into the published weights.
        config.adapter.quantization = None
    dtype = config.dtype or config.model.dtype
    device = device_named(config.device)
    module = build.module(
        config,
        adapted=run is not None,
        trained_checkpoint=run and run.checkpoint,
        load_device=device,
    )
    if not config.merge:
        exported_folder.check_adapter(module)
    batches = []
    if config.compare != "none":
        batches = list(comparison_batches(config, module, device))
    model = OmegaConf.to_container(config.model, resolve=True)
    if repository and not config.merge:
        model["path"] = exported_folder.shared_base(model["path"])
    settings = {
        "model": exported_folder.portable_settings(model, module.family),
        "generation": OmegaConf.to_container(config.generation, resolve=True),
        **exported_folder.portable_recipe(training_config(run) or exported_settings(config)),
    }
    advice = "free disk space, or choose another folder with out="
    with disk_errors(out, advice), atomic_folder(out, replace=config.overwrite) as folder:
        if config.merge:
            kind = dtype
            exported_folder.write_model(module, folder, getattr(torch, dtype))
        else:
            kind = "an adapter"
            base = absolute_path(model["path"])
            exported_folder.write_adapter(module, folder, base)
        exported_folder.write_settings(
            folder, settings, module.family, merged=config.merge, dtype=dtype
        )
        notes = ["not compared with the run"]
        if batches:
            dtypes = {dtype, config.model.dtype}
            notes = [check_equivalence(module, folder, batches, dtypes=dtypes, device=device)]
        if quantized_base:
            notes.append(
                "the run used 4-bit base weights, the export uses the published weights: "
                "its answers may differ from the run's"
            )
        if not config.merge:
            notes += exported_folder.adapter_caveats(folder, module.family)
            if base and Path(base).is_dir():
                notes.append(
                    f"the adapter names its base model by a folder of this machine ({base}): "
                    f"elsewhere it needs model.path="
                )
        card = model_card(
            repository.name.partition("/")[2] if repository else out.name,
            run=run,
            training=training_config(run),
            config=settings,
            merged=config.merge,
            dtype=dtype,
            comparison="; ".join(notes),
            repository=config.push,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        checksums.write_sums(folder)
    size = format_bytes(sum(file.stat().st_size for file in out.iterdir()))
    print(f"\nWrote {build.shown(str(out))}: {size}, {kind}")
    print("\n".join(notes))
    arguments = f"ckpt={build.shown(str(out))}{trust_argument(settings)}"
    print(f"Try it:    python -m qwenvl_lit.chat {arguments}")
    print(f"Serve it:  python -m qwenvl_lit.serve {arguments}")
    if repository:
        print(f"\n{repository.announcement(out)}", flush=True)
        repository.upload(out)
        print(f"Uploaded: {repository.url}")


def check_choices(config: DictConfig) -> None:
    """Raises a DataError if an option has a value that the command does not know."""
    values = {
        "dtype": config.dtype or config.model.dtype,
        "compare": config.compare,
        "merge": config.merge,
        "overwrite": config.overwrite,
        "push_private": config.push_private,
    }
    for key, value in values.items():
        if value not in CHOICES[key]:
            known = ", ".join(map(str, CHOICES[key])).lower()
            raise DataError(f"{key} is one of {known}, got {value!r}")
    if config.model.get("load_in_4bit"):
        raise DataError(
            "model.load_in_4bit quantizes a model when it is loaded to answer; "
            "an export is not quantized: leave it out"
        )


def training_config(run: Run | None) -> dict[str, Any]:
    """Returns the resolved config of the training; empty if it was not a run of this package."""
    from qwenvl_lit.runs.stored_config import read_config

    if run is None or run.folder is None:
        return {}
    file = run.folder / "config.yaml"
    if not file.exists():
        return run.config
    return read_config(file)


def exported_settings(config: DictConfig) -> dict[str, Any]:
    """Returns the settings of an exported folder that is exported again; empty for others."""
    from qwenvl_lit.runs.run import stored_settings

    if config.ckpt is None:
        return {}
    source = Path(config.ckpt).expanduser()
    folder = source if source.is_dir() else source.parent
    return stored_settings(folder, trust=config.trust)


def checked_target(config: DictConfig) -> Path:
    """Returns the folder to write.

    Raises:
        DataError: `out` is missing, exists already, was not written by an export, or contains the
            model to read.
    """
    from qwenvl_lit.runs.run import SETTINGS

    if config.out is None:
        raise DataError(
            f"out is missing: python -m qwenvl_lit.export ckpt={config.ckpt or 'RUN'} out=FOLDER"
        )
    out = Path(config.out).expanduser().resolve()
    for source in (config.model.path, config.ckpt):
        if source and Path(source).expanduser().resolve().is_relative_to(out):
            raise DataError(f"out={config.out} holds what is to be read; choose another folder")
    if out.exists() and not config.overwrite:
        raise DataError(f"out={config.out} exists; choose another folder, or overwrite=true")
    if out.exists() and not (out / SETTINGS).exists():
        raise DataError(
            f"out={config.out} was not written by an export and is not replaced: "
            f"remove it yourself, or choose another folder"
        )
    return out


if __name__ == "__main__":
    command("export", main, run="needed")
