"""The program `qwenvl-lit`: commands and tab completion."""

import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from commands import environment

from qwenvl_lit.__main__ import COMMANDS, main

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
# What pip writes as the program `qwenvl-lit`.
PROGRAM = "import sys; sys.argv[0] = 'qwenvl-lit'; from qwenvl_lit.__main__ import main; main()"


def run_program(
    folder: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(folder, **variables),
    )


def complete(folder: Path, line: str) -> list[str]:
    """The words that are offered at the end of a line; the shell chooses those that fit."""
    process = run_program(folder, "-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout.split()


def test_the_program_is_installed_as_qwenvl_lit():
    scripts = tomllib.loads(PYPROJECT.read_text())["project"]["scripts"]
    assert scripts == {"qwenvl-lit": "qwenvl_lit.__main__:main"}


def test_a_command_runs_as_its_module_with_the_arguments_after_it(monkeypatch):
    calls = []
    monkeypatch.setattr(
        runpy, "run_module", lambda name, **options: calls.append((name, options, sys.argv[1:]))
    )
    monkeypatch.setattr(sys, "argv", ["qwenvl-lit", "train", "-m", "seed=1,2"])
    main()
    # Lightning reads the name of this module to start other ranks.
    options = {"run_name": "__main__", "alter_sys": True}
    assert calls == [("qwenvl_lit.train", options, ["-m", "seed=1,2"])]


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_without_a_command_the_commands_are_listed(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qwenvl-lit", *arguments])
    main()
    printed = capsys.readouterr().out
    assert printed.startswith("python -m qwenvl_lit.train    Fine-tune a model on a dataset.\n")
    assert all(f"qwenvl_lit.{command} " in printed for command in COMMANDS)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("trian", "did you mean train?"),
        ("sft", "here it is train: qwenvl-lit train --help"),
        ("infer", "here it is predict: qwenvl-lit predict --help"),
        ("eval", "here it is test: qwenvl-lit test --help"),
        ("merge-lora", "here it is export: qwenvl-lit export --help"),
        ("deploy", "here it is serve: qwenvl-lit serve --help"),
        ("quux", "there are train, test, predict, chat, serve, check, export"),
    ],
)
def test_a_command_that_does_not_exist_is_refused(name, hint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qwenvl-lit", name])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: there is no command {name!r}; {hint}\n"


def test_a_mistake_has_the_message_and_status_of_the_module(tmp_path):
    process = run_program(tmp_path, "train", "seed=x")
    assert process.returncode == 2
    assert process.stderr.startswith("error: seed must be a whole number")


def test_tab_completion_is_installed_for_the_program(tmp_path):
    process = run_program(tmp_path, "-sc", "install=bash")
    assert process.stdout.rstrip().endswith(
        "complete -o nospace -o default -F hydra_bash_completion qwenvl-lit"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qwenvl-lit ", set(COMMANDS)),
        ("qwenvl-lit tr", {"train"}),
        ("qwenvl-lit train optim.l", {"optim.lr="}),
        (
            "qwenvl-lit train seed=1 model=qwen_vl_c",
            {"model=qwen_vl_chat", "model=qwen_vl_chat_int4"},
        ),
        ("qwenvl-lit predict answ", {"answered="}),
        ("qwenvl-lit export merg", {"merge="}),
        ("qwenvl-lit deploy x", set()),
    ],
)
def test_commands_keys_and_choices_are_completed(line, expected, tmp_path):
    words = complete(tmp_path, line)
    prefix = line.rpartition(" ")[2]
    assert {word for word in words if word.startswith(prefix)} == expected
