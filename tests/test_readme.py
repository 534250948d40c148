"""What the documents show works: every command composes, its verb, its choices and its keys exist, and Python runs."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image
from scripted import tiny_checkpoint

from qwenvl_lit.cli.from_run import FROM_RUN
from qwenvl_lit.cli.mixture import expand_datasets
from qwenvl_lit.cli.overrides import quote_free_text
from qwenvl_lit.runs.run import config_folder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = {
    page.name: blocks
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if (blocks := re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
}
OF_EXTRAS = (
    "hydra/launcher=",
    "hydra.launcher.",
    "hydra/sweeper=",
    "hydra.sweeper.",
)  # choices of packages that need not be there


def commands(text: str) -> list[str]:
    """Commands of this package in fenced blocks, continuation lines joined and comments cut off, and in the cells of tables."""
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).replace(
        "\\\n", " "
    )
    lines = [re.split(r"\s+#", line)[0].strip() for line in fenced.splitlines()]
    cells = re.findall(r"^\|.*?`(python -m [^`]+)` *\|$", text, re.MULTILINE)
    return list(dict.fromkeys(line for line in [*lines, *cells] if "python -m qwenvl_lit." in line))


def test_commands_are_found_in_blocks_and_tables():
    text = "```\npython -m qwenvl_lit.train a=1 \\\n   b=x#2   # why\nmake\n```\n| `swift` | `python -m qwenvl_lit.test c=1` |\n"
    assert commands(text) == [
        "python -m qwenvl_lit.train a=1     b=x#2",
        "python -m qwenvl_lit.test c=1",
    ]
    assert len(commands(README)) > 10


@pytest.fixture(scope="module", autouse=True)
def a_run():
    """The configs, and what `ckpt=` offers: the groups of a composed training run."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        trained = compose("train")
        for group in FROM_RUN:
            ConfigStore.instance().store(
                group=group, name="run", node=OmegaConf.to_container(trained[group])
            )
        yield


def jobs(verb: str, arguments: list[str]) -> list[list[str]]:
    """The overrides of each run that a command line stands for: one, or those of a sweep; an interval stands for its lower end."""
    parser = OverridesParser.create()
    parsed = [parser.parse_override(text) for text in arguments]
    arguments = [
        f"{one.key_or_group}={one.value().start}" if one.is_interval_sweep() else one.input_line
        for one in parsed
    ]
    fixed = [one.input_line for one in parsed if not one.is_sweep_override()]
    config = compose(verb, fixed, return_hydra_config=True)
    swept = [f"{key}={values}" for key, values in (config.hydra.sweeper.params or {}).items()]
    return BasicSweeper.split_arguments(parser.parse_overrides([*swept, *arguments]), None)[0]


@pytest.mark.parametrize("command", commands(README))
def test_a_command_of_the_readme_composes(command):
    words = shlex.split(command[command.index("python -m ") :])
    verb = words[2].removeprefix("qwenvl_lit.")
    arguments = [
        quote_free_text(word) for word in words[3:] if not word.startswith(("-", *OF_EXTRAS))
    ]
    assert (config_folder().parent / f"qwenvl_lit/{verb}.py").exists()
    for overrides in jobs(verb, arguments):
        config = compose(verb, overrides)
        if config.get("data") and config.data.get("datasets"):
            expand_datasets(config)


@pytest.mark.parametrize("page", PYTHON)
def test_python_runs_as_it_is_shown(page, tmp_path, monkeypatch, capsys):
    """Block after block, with images of the names that are used, and a tiny checkpoint in a folder that is named as the published one."""
    tiny_checkpoint(tmp_path / "Qwen/Qwen-VL-Chat")
    for name in ("road.png", "dog.jpg"):
        Image.new("RGB", (64, 48), "teal").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in PYTHON[page]:
        exec(compile(block, page, "exec"), names)
    assert capsys.readouterr().out


def test_there_is_python_to_run():
    assert len(PYTHON["python.md"]) > 4
