"""README and docs/ are true: commands compose with keys that exist, and Python blocks run."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image
from scripted import tiny_checkpoint
from tiny_qwen3_vl import tiny_qwen3_vl

from qwenvl_lit.cli.alternatives import is_sweep, quote_alternatives
from qwenvl_lit.cli.from_run import FROM_RUN
from qwenvl_lit.cli.mixture import expand_datasets
from qwenvl_lit.cli.overrides import quote_free_text
from qwenvl_lit.runs.run import config_folder

ROOT = Path(__file__).parent.parent
PAGES = {page.name: page.read_text() for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Choices of optional packages, which need not be installed.
OF_EXTRAS = ("hydra/launcher=", "hydra.launcher.", "hydra/sweeper=", "hydra.sweeper.")


def python_blocks(text: str) -> list[str]:
    return [block for language, block in FENCED.findall(text) if language == "python"]


def commands(text: str) -> list[str]:
    """Commands of this package in fenced blocks, without comments, and in last cells of tables."""
    blocks = "\n".join(block for _, block in FENCED.findall(text)).replace("\\\n", " ")
    lines = [re.split(r"\s+#", line)[0].strip() for line in blocks.splitlines()]
    cells = re.findall(r"^\|.*?`(python -m [^`]+)` *\|$", text, re.MULTILINE)
    return [line for line in [*lines, *cells] if "python -m qwenvl_lit." in line]


COMMANDS = sorted({command for text in PAGES.values() for command in commands(text)})
PYTHON = {name: python_blocks(text) for name, text in PAGES.items() if python_blocks(text)}


def test_commands_are_found_in_blocks_and_tables():
    text = (
        "```\npython -m qwenvl_lit.train a=1 \\\n   b=x#2   # why\nmake\n```\n"
        "| `swift` | `python -m qwenvl_lit.test c=1` |\n"
    )
    assert commands(text) == [
        "python -m qwenvl_lit.train a=1     b=x#2",
        "python -m qwenvl_lit.test c=1",
    ]
    assert len(COMMANDS) > 60


def test_links_between_pages_exist():
    for name, text in PAGES.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / target).exists(), f"{name}: {target}"


@pytest.fixture(scope="module", autouse=True)
def a_run():
    """Initializes Hydra and offers the groups of a composed training run, as `ckpt=` does."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        trained = compose("train")
        for group in FROM_RUN:
            node = OmegaConf.to_container(trained[group])
            ConfigStore.instance().store(group=group, name="run", node=node)
        yield


def jobs(command: str, arguments: list[str]) -> list[list[str]]:
    """The overrides of each job of a command line; an interval stands for its lower end."""
    parser = OverridesParser.create()
    parsed = [parser.parse_override(text) for text in arguments]
    fixed = [override.input_line for override in parsed if not override.is_sweep_override()]
    config = compose(command, fixed, return_hydra_config=True)
    swept = [f"{key}={values}" for key, values in (config.hydra.sweeper.params or {}).items()]
    for override in parsed:
        text = override.input_line
        if override.is_interval_sweep():
            text = f"{override.key_or_group}={override.value().start}"
        swept.append(text)
    return BasicSweeper.split_arguments(parser.parse_overrides(swept), None)[0]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_documentation_composes(line):
    words = shlex.split(line[line.index("python -m ") :])
    command = words[2].removeprefix("qwenvl_lit.")
    assert (ROOT / f"qwenvl_lit/{command}.py").exists()
    options = ("-", "|", *OF_EXTRAS)
    if "--config-dir=my_conf" in words:
        options = (*options, "experiment=signs")  # `test_experiments` runs it
    quote = quote_alternatives if is_sweep(words) else quote_free_text
    arguments = [quote(word) for word in words[3:] if not word.startswith(options)]
    if "--config-dir=examples/conf" in words:
        arguments.append(f"hydra.searchpath=[file://{ROOT}/examples/conf]")
    for overrides in jobs(command, arguments):
        config = compose(command, overrides)
        if config.get("data") and config.data.get("datasets"):
            expand_datasets(config)


@pytest.mark.parametrize("page", PYTHON)
def test_python_blocks_run_as_shown(page, tmp_path, monkeypatch, capsys):
    """One after the other, with the files they name: images, and tiny published checkpoints."""
    tiny_checkpoint(tmp_path / "Qwen/Qwen-VL-Chat")
    family, exported = tiny_qwen3_vl("qwen3_vl"), tmp_path / "my-qwen3-vl"
    exported.mkdir()
    family.export(family.base_reader(), exported, dtype=torch.float32)
    for name in ("road.png", "dog.jpg"):
        Image.new("RGB", (64, 48), "teal").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in PYTHON[page]:
        exec(compile(block, page, "exec"), names)
    assert capsys.readouterr().out


def test_there_is_python_to_run():
    assert len(PYTHON["python.md"]) > 4
