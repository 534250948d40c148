"""A verb's command line: finds the configs, understands free text and `ckpt=`, and turns mistakes into one short message.

Nothing here imports torch, so that `--help` and a misspelt key answer at once.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwenvl_lit.cli.ranks import rank_arguments
from qwenvl_lit.cli.resume import LOOKS_ONLY, refuse_used_folder, resume_arguments, resumed
from qwenvl_lit.runs.predictions import config_beside, scored_arguments
from qwenvl_lit.runs.run import Run, config_folder, find_run, init_from
from qwenvl_lit.sweep.sweep import Sweep, is_a_sweep
from qwenvl_lit.types import DataError

FREE_TEXT = (
    "prompt",
    "image",
    "system",
    "ckpt",
    "resume",
    "answered",
    "out",
    "paths.run",
    "hydra.run.dir",
    "hydra.sweep.dir",
)
FREE_TEXT += (
    "predictions",
    "compare",
    "benchmarks",
    "adapter.targets",
    "data.train",
    "data.test",
    "data.validation",
    "data.root",
)
MAPPINGS = ("data.path_map", "optim.component_lr")  # their keys are the user's own
TO_ANSWER = (
    "model.load_in_4bit",
    "model.device_map",
    "model.max_memory",
)  # the model of a run need not have them
FROM_RUN = (
    "model",
    "adapter",
    "init",
    "data",
    "metrics",
    "generation",
)  # groups that a verb with `ckpt=` takes from the run
STRATEGY = (
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
)  # keys of `trainer` that belong to the machine
# What a model's file chooses, and so a run that training starts from; another adapter than the run's has rates of its own
RECIPE = {
    "model": ("adapter", "trainer", "generation"),
    "adapter": ("optim",),
    "optim": (),
    "trainer": (),
    "generation": (),
}

EXTRAS = {
    "hydra/launcher/submitit": "cluster",
    "hydra/sweeper/optuna": "sweep",
}  # choices that other packages bring
DISK = (
    errno.EACCES,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOTDIR,
)  # full, or not ours to write


def command(
    verb: str,
    main: Callable[[DictConfig], None],
    *,
    needs_run: bool = False,
    starts_from_run: bool = False,
) -> None:
    """Run `main` with the config that the command line of `verb` composes.

    Args:
        verb: name of the primary config, `conf/VERB.yaml`.
        needs_run: the verb starts from `ckpt=`, or from a published model with `model=`; groups that the command line does not choose
            come from the run.
        starts_from_run: the verb goes on from what the run of `ckpt=` has learned; the run is then the model, with a recipe as a model's
            file has it. With `resume=` it goes on with a run itself.

    Exits with 2 after a mistake on the command line, with 1 after one in the data or in a job of a sweep, with 143 where a signal made a
    run save and stop.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach this function as they are
    OmegaConf.register_new_resolver("keys_of", keys_of, replace=True)
    sys.argv[1:] = [quote_free_text(argument) for argument in sys.argv[1:]]
    try:
        if needs_run:
            _offer_run(verb)
        if starts_from_run:
            _start_from_run()
            sys.argv[1:] = [
                quote_free_text(argument) for argument in resume_arguments(sys.argv[1:])
            ]
        sys.argv[1:] = rank_arguments(verb, sys.argv[1:])
        refuse_used_folder(sys.argv[1:])
        sweep = Sweep(verb)
        with sweep.reported():
            hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=verb)(
                _reporting(main, sweep)
            )()
        sys.stdout.flush()
    except (
        ConfigCompositionException,
        MissingConfigException,
        OverrideParseException,
        OmegaConfBaseException,
    ) as error:
        _exit(2, _explain(verb, error))
    except DataError as error:
        _exit(2, str(error))
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # Python flushes once more at the end
        if LOOKS_ONLY & set(sys.argv):
            sys.exit(1)
        _exit(1, "what reads the output of this command has ended, and the command with it")
    except OSError as error:
        if error.errno not in DISK:
            raise
        place = error.filename or "the run folder"
        _exit(
            1,
            f"{place} cannot be written: {error.strerror}. Make room there, or choose another folder with hydra.run.dir=...",
        )
    if sweep.failed:
        sys.exit(1)


def quote_free_text(argument: str) -> str:
    """`key=value` with the value quoted, where values are free text that Hydra's grammar cannot parse; safe to repeat.

    Text that stands in single quotes already, numbers, null and `{...}` are left as they are; of a list `[a,b]` each element is quoted.
    To a mapping whose keys are the user's own, keys may be added, and to the model of a run how it is held.

    >>> quote_free_text("prompt=Is it a dog, (really)?")
    "prompt='Is it a dog, (really)?'"
    >>> quote_free_text("data.train=[a.jsonl#200,b.jsonl]")
    "data.train=['a.jsonl#200','b.jsonl']"
    """
    key, equals, value = argument.partition("=")
    if key in TO_ANSWER or (key in MAPPINGS and value.startswith("{")):
        return f"++{argument}"
    if not equals or key.lstrip("+") not in FREE_TEXT:
        return argument
    if key == "hydra.run.dir" and re.fullmatch(
        '".*"', value
    ):  # as Lightning writes it for the other ranks
        return argument
    if value.startswith("[") and value.endswith("]"):
        elements = re.findall(r"\s*('(?:[^'\\]|\\.)*'|[^,]+)", value[1:-1])
        return f"{key}=[{','.join(map(_quoted, elements))}]"
    return f"{key}={_quoted(value)}"


def _quoted(text: str) -> str:
    if re.fullmatch(r"'.*'|\{.*\}|null|[\d.]+", text, re.DOTALL):
        return text
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)  # backslashes count only before a quote
    if escaped.endswith("\\"):
        escaped += escaped[len(escaped.rstrip("\\")) :]
    return f"'{escaped}'".replace("${", "\\${")


def keys_of(verb: str) -> str:
    """The keys of a verb's own, as conf/VERB.yaml has them with their comments: `--help` shows them."""
    text = (config_folder() / f"{verb}.yaml").read_text(encoding="utf-8")
    return (
        text.partition("\n  - _self_\n")[2].partition("\nhydra:\n")[0].strip().replace("$", "$$")
    )  # for string.Template


def _named(key: str) -> str | None:
    return next(
        (
            a.partition("=")[2].strip("'")
            for a in sys.argv[1:]
            if a.startswith(f"{key}=") and not a.endswith("=null")
        ),
        None,
    )


def _checkpoint_argument(run: Run, ckpt: str) -> str:
    """From here on it is this file, also if `latest` becomes another run meanwhile."""
    return f"ckpt={_quoted(str(run.checkpoint or ckpt))}"


def _say_what_it_expects(ckpt: str, run: Run) -> None:
    if run.expects and os.environ.get("LOCAL_RANK", "0") == "0":
        path = next(
            (a.partition("=")[2] for a in sys.argv if a.startswith("model.path=")),
            run.config["model"]["path"],
        )
        print(
            f"{ckpt} is an adapter for {run.expects}; its base here: model.path={path}",
            file=sys.stderr,
        )


def _start_from_run() -> None:
    """Make what the run that `ckpt=` names has learned available as the init `run`, and its model and recipe as the model `run`, and take
    both, unless the command line chooses another model."""
    if (ckpt := _named("ckpt")) is None:
        return
    run = find_run(ckpt)
    _say_what_it_expects(ckpt, run)
    choices = ("init=run", "model=run") if run.checkpoint else ("model=run",)
    taken = [a for a in choices if not any(b.startswith(a.removesuffix("run")) for b in sys.argv)]
    place = next(number for number, a in enumerate(sys.argv) if a.startswith("ckpt="))
    sys.argv[place : place + 1] = [_checkpoint_argument(run, ckpt), *taken]
    store = ConfigStore.instance().store
    store(group="init", name="run", node=init_from(run) if run.checkpoint else {})
    for group, others in RECIPE.items():
        chosen = [{f"override /{other}@_global_.{other}": "run"} for other in others]
        node = {key: value for key, value in run.config[group].items() if key not in STRATEGY}
        store(
            group=group,
            name="run",
            node={"defaults": [*chosen, "_self_"], **node} if chosen else node,
        )


def _offer_run(verb: str) -> None:
    """Make the groups of the run that `ckpt=` names, or of the one whose `predictions=` are scored, available as the choice `run`, which
    the verb's defaults list takes."""
    sys.argv[1:] = arguments = scored_arguments(sys.argv[1:]) if verb == "test" else sys.argv[1:]
    ckpt, predictions = _named("ckpt"), _named("predictions") if verb == "test" else None
    if verb == "predict":
        _refuse_rows_beside_a_question(arguments)
    needed = not any(
        a.startswith(("model=", "predictions=", "--help", "-h", "--hydra-help", "--info"))
        for a in arguments
    )
    if ckpt is None and needed:
        raise DataError(
            f"ckpt is missing: python -m qwenvl_lit.{verb} ckpt=RUN (a run folder such as outputs/train/..., or ckpt=latest), "
            f"or a model as it was published, model=qwen_vl_chat"
        )
    run = find_run(ckpt) if ckpt else None
    if run:
        _say_what_it_expects(ckpt, run)
        place = next(number for number, a in enumerate(sys.argv) if a.startswith("ckpt="))
        sys.argv[place] = _checkpoint_argument(run, ckpt)
    taken = run.config if run else config_beside(predictions) if predictions else None
    if run and run.checkpoint is None:  # a whole model, whose adapter is a recipe for training
        taken = {**run.config, "adapter": {}}
    if any(a.startswith("benchmarks=") for a in arguments) and not any(
        a.startswith("data=") for a in arguments
    ):
        sys.argv.append(
            "data=jsonl"
        )  # the keys that benchmarks share, for the command line to change
    if verb == "predict" and any(
        a.startswith("data.test=") and not a.endswith("=null") for a in arguments
    ):
        sys.argv.append(
            "data.validation=null"
        )  # a file that is named is answered, not the validation rows of the run
    for group in FROM_RUN:
        node = dict((taken or {}).get(group) or {})
        if group == "data" and run and run.folder:
            for source in (node, *dict(node.get("datasets") or {}).values()):
                if source.get("split_file"):
                    source["split_file"] = str(run.folder / Path(source["split_file"]).name)
        ConfigStore.instance().store(group=group, name="run", node=node)


def _refuse_rows_beside_a_question(arguments: Sequence[str]) -> None:
    of_rows = next(
        (
            a
            for a in arguments
            if a.startswith(("data=", "data.", "answered=")) and not a.endswith("=null")
        ),
        None,
    )
    if of_rows and _named("prompt") is not None:
        asked = "image= with prompt=" if _named("image") is not None else "prompt="
        raise DataError(
            f"{asked} asks one question, and {of_rows} is for the rows of a dataset: give one or the other"
        )


def name_datasets(config: DictConfig) -> None:
    """Put in place of each name in `data.datasets` what conf/data has under it, so that the config says all by itself.

    Raises:
        DataError: there is no such file, or it has no such key.
    """
    from dataclasses import fields

    from qwenvl_lit.data.mixture import DatasetSpec

    known = [field.name for field in fields(DatasetSpec)]
    named = {
        name: value
        for name, value in config.data.datasets.items()
        if not (OmegaConf.is_dict(value) and "_target_" in value)
    }
    for name, value in named.items():
        changes = (
            OmegaConf.to_container(value, resolve=False)
            if OmegaConf.is_dict(value)
            else {"rows": value}
        )
        file = changes.pop("use", name)
        try:
            node = hydra.compose("train", overrides=[f"data={file}"]).data
        except (MissingConfigException, ConfigCompositionException) as error:
            raise DataError(f"data.datasets.{name}: {_explain('train', error)}") from error
        if unknown := sorted(set(changes) - set(known)):
            raise DataError(
                f"data.datasets.{name} has no key {', '.join(unknown)}; its keys are use, {', '.join(known)}"
            )
        own = {
            key: item
            for key, item in OmegaConf.to_container(node, resolve=False).items()
            if key in known
        }
        if "split_file" in own:
            own["split_file"] = f"${{paths.run}}/split_{name}.json"
        whole = {
            "_target_": f"{DatasetSpec.__module__}.{DatasetSpec.__name__}",
            "rows": None,
            **own,
            **changes,
        }
        OmegaConf.update(config, f"data.datasets.{name}", whole, merge=False, force_add=True)


def _keep_named_datasets(config: DictConfig) -> None:
    if not (config.get("data") and config.data.get("datasets")):
        return
    name_datasets(config)
    job = HydraConfig.get()
    if job.output_subdir is not None:
        OmegaConf.save(
            config, Path(job.runtime.output_dir, job.output_subdir, "config.yaml")
        )  # where `find_run` reads it


def _reporting(
    main: Callable[[DictConfig], None], sweep: Sweep
) -> Callable[[DictConfig], float | None]:
    """`main`, or its place in a sweep, with a user's mistakes as short messages; a defect keeps its traceback."""

    def job(config: DictConfig) -> float | None:
        if not is_a_sweep(config):
            return run(config)
        _keep_named_datasets(
            config
        )  # into what Hydra has written of the job, which a run that goes on reads
        return sweep.take(config, run)

    def run(config: DictConfig) -> None:
        try:
            _keep_named_datasets(config)
            main(resumed(config) if "resume" in config else config)
        except DataError as error:
            _leave_no_empty_folder()
            # an error from a data worker carries that worker's traceback; its last line is the message
            _exit(1, re.split(r"(?m)^qwenvl_lit\.types\.\w+: ", str(error))[-1].strip())
        except Exception as error:
            cause = (
                error.__cause__
                if isinstance(error, InstantiationException) and error.__cause__
                else error
            )
            if not _is_a_mistake(cause):
                raise
            _leave_no_empty_folder()
            _exit(2, str(cause))

    job.__module__, job.__qualname__ = main.__module__, main.__qualname__
    return job


def _leave_no_empty_folder() -> None:
    """Remove the run folder of a command that was refused before it wrote anything; jobs of a sweep, and runs that go on, keep theirs."""
    job = HydraConfig.get()
    folder, own = Path(job.runtime.output_dir), job.output_subdir
    if own is None or job.mode != RunMode.RUN or folder.resolve() == Path.cwd():
        return
    if all(
        file.name == own or (file.suffix == ".log" and not file.stat().st_size)
        for file in folder.iterdir()
    ):
        shutil.rmtree(folder)


def _is_a_mistake(error: BaseException) -> bool:
    """Whether this package refused a value with a ValueError, or Lightning a combination of settings."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = isinstance(error, ValueError) and Path(raised_in).is_relative_to(
        Path(__file__).parents[1]
    )
    return ours or type(error).__name__ == "MisconfigurationException"


def _explain(verb: str, error: Exception) -> str:
    """A composition error in a line or two: what is wrong, and the nearest key or the choices."""
    if isinstance(error, MissingConfigException):
        extra = next((extra for choice, extra in EXTRAS.items() if choice in str(error)), None)
        hint = (
            f"\nIt comes with an extra of this package: pip install 'qwenvl_lit[{extra}]'"
            if extra
            else ""
        )
        choices = str(error).split("\nConfig search path")[0].strip()
        return choices.replace("\n\n", "\n").replace(":\n\t", ": ").replace("\n\t", ", ") + hint
    if isinstance(error, ConfigCompositionException) and (
        found := re.search(r"override '([^']+)'", str(error))
    ):
        return f"there is no key {found[1]!r}{_hint(verb, found[1])}"
    return str(error).strip()


def _hint(verb: str, key: str) -> str:
    """What to write in place of a key that does not exist with the choices of the command line."""
    group, _, rest = key.partition(".")
    files = [
        file
        for file in sorted((config_folder() / group).glob("*.yaml"))
        if re.search(rf"^{re.escape(rest)}:", file.read_text(), re.M)
    ]
    if rest and files:
        return f" with the choices made here; {', '.join(f'{group}={file.stem}' for file in files)} {'has' if len(files) == 1 else 'have'} it"
    verbs = sorted(config_folder().glob("*.yaml"))
    if having := [
        file.stem for file in verbs if re.search(rf"^{re.escape(key)}:", file.read_text(), re.M)
    ]:
        return f"; it is one of {', '.join(having)}"
    known = _known_keys(verb)
    if key in known:
        return " with the choices made here; a key of one dataset of a mixture stands with it in data.datasets"
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.75)
    return (
        f"; did you mean {' or '.join(near)}?"
        if near
        else f"; see python -m qwenvl_lit.{verb} --help"
    )


def _known_keys(verb: str) -> list[str]:
    """Keys of the config with the groups that the command line chooses."""
    groups = {path.name for path in config_folder().iterdir() if path.is_dir()}
    choices = [a for a in sys.argv[1:] if a.partition("=")[0] in groups]
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        try:
            config = hydra.compose(verb, choices)
        except (
            ConfigCompositionException,
            MissingConfigException,
            OverrideParseException,
        ):  # the choices are wrong too
            config = hydra.compose(verb)
    keys, todo = [], [("", config)]
    while todo:
        prefix, node = todo.pop()
        for name in (name for name in node if not str(name).startswith("_")):
            keys.append(prefix + str(name))
            if (
                OmegaConf.is_dict(node)
                and isinstance(child := node._get_node(name), DictConfig)
                and not child._is_none()
            ):
                todo.append((f"{prefix}{name}.", child))
    return keys


def _exit(status: int, message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
