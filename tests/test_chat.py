import fcntl
import io
import os
import pty
import re
import select
import subprocess
import termios
import time
from typing import NamedTuple

import pytest
import torch
from commands import command_line, environment, only_run, read_json_lines
from PIL import Image
from scripted import says, tiny_checkpoint

from qwenvl_lit import QwenVL
from qwenvl_lit.chat import COMMANDS, Chat
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows

DOG = "<ref>the dog</ref><box>(250,500),(500,999)</box>"
TEN_WORDS = "one two three four five six seven eight nine ten"
CHATML_USER = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)


class Transcript(NamedTuple):
    """What a chat printed, and the prompts that its model read, as text."""

    output: str
    errors: str
    prompts: list[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("published") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return QwenVL.load(folder, dtype="float32")


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "dog.png"
    Image.new("RGB", (40, 20), "teal").save(path)
    return path


@pytest.fixture
def talk(model, tmp_path, monkeypatch, capsys):
    """Returns a function that types lines into a chat whose answers are scripted."""

    def run(typed, *answers, chat_with=model, **options) -> Transcript:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        with says(chat_with, *(answers or ("yes",))) as prompts:
            Chat(chat_with, tmp_path, **options).run()
        printed = capsys.readouterr()
        texts = [chat_with.processor.text(ids) for ids in prompts]
        return Transcript(printed.out, printed.err, texts)

    return run


def recorded(folder) -> list[dict]:
    return read_json_lines(folder / "conversation.jsonl")


def questions(prompt: str) -> list[str]:
    return CHATML_USER.findall(prompt)


def system_message(prompt: str) -> str:
    return prompt.split("<|im_end|>")[0].removeprefix("<|im_start|>system\n")


def test_each_line_is_a_question_and_only_answers_are_printed(talk):
    output, errors, prompts = talk("Hello\n\n   \nHow are you?\n", "Hi!", "日本 fine")
    assert output == "Hi!\n日本 fine\n"
    assert errors == ""
    assert [questions(prompt) for prompt in prompts] == [["Hello"], ["Hello", "How are you?"]]


def test_lines_after_exit_are_not_read(talk):
    for word in ("exit", "quit", " EXIT "):
        assert talk(f"Hello\n{word}\nHow are you?\n").output == "yes\n"


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085"])
def test_a_recorded_conversation_is_one_line_whatever_it_holds(talk, tmp_path, character):
    talk(f"a{character}b\n", f"c{character}d")
    [row] = recorded(tmp_path)
    assert (row["query"], row["response"]) == (f"a{character}b", f"c{character}d")
    [read] = read_rows(str(tmp_path / "conversation.jsonl"))
    assert read.turns[0].parts == (f"a{character}b",)


def test_files_from_windows_are_read_without_their_marks(talk, tmp_path):
    chat = talk("\ufeffHello\r\nclear\r\nmulti-line\r\nOne\r\ntwo#\r\nexit\r\n")
    assert [questions(prompt) for prompt in chat.prompts] == [["Hello"], ["One\ntwo"]]
    assert [row["query"] for row in recorded(tmp_path)] == ["Hello", "One\ntwo"]


def test_bytes_that_are_not_utf8_are_an_error_in_questions_and_system_messages(talk, tmp_path):
    typed = b"Hello\nIch hei\xdfe Max\nreset-system\n\xfcber\nBye\n"
    chat = talk(typed.decode(errors="surrogateescape"), system="Be brief.")
    assert chat.errors.splitlines() == [
        "error: line 2: the question is not valid UTF-8: it has the byte 0xdf after 'Ich hei'; "
        "convert the text, for example with iconv -f latin1 -t utf-8",
        "error: line 4: the system message is not valid UTF-8: it has the byte 0xfc after ''; "
        "convert the text, for example with iconv -f latin1 -t utf-8",
    ]
    assert [row["query"] for row in recorded(tmp_path)] == ["Hello", "Bye"]
    assert [system_message(prompt) for prompt in chat.prompts] == ["Be brief."] * 2


def test_help_lists_all_commands_and_is_not_asked(talk):
    chat = talk("help\n")
    assert chat.prompts == []
    assert [line.split()[0] for line in chat.errors.splitlines()[:-1]] == list(COMMANDS)
    assert "<img>path or address</img>" in chat.errors


def test_clear_empties_the_history(talk):
    chat = talk("Hello\nclear\nHow are you?\n")
    assert questions(chat.prompts[-1]) == ["How are you?"]
    assert chat.errors == "the history is empty\n"


def test_reset_system_takes_the_next_input_and_clears_the_history(talk):
    typed = "Hello\nreset-system\nBe brief.\nHow are you?\nreset-system\n\nAnd now?\n"
    prompts = talk(typed, system="Be kind.").prompts
    assert [system_message(prompt) for prompt in prompts] == [
        "Be kind.",
        "Be brief.",
        "You are a helpful assistant.",
    ]
    assert [questions(prompt) for prompt in prompts] == [["Hello"], ["How are you?"], ["And now?"]]


def test_in_multi_line_mode_a_question_ends_with_a_line_that_ends_in_a_hash(talk):
    multi_line = "multi-line\nOne\n#two # three\n\nfour#\n"
    single_line = "single-line\nfive #\n"
    commands_inside = "multi-line\nsix\nexit\nseven # \nexit\nnever#\n"
    chat = talk(multi_line + single_line + commands_inside)
    assert questions(chat.prompts[-1]) == [
        "One\n#two # three\n\nfour",
        "five #",
        "six\nexit\nseven ",
    ]
    assert chat.errors.splitlines() == [
        "a line that ends in # ends a question",
        "each line is a question",
        "a line that ends in # ends a question",
    ]


def test_a_chat_may_start_in_multi_line_mode_and_the_end_of_input_ends_a_question(talk):
    chat = talk("One\ntwo", multiline=True)
    assert questions(chat.prompts[-1]) == ["One\ntwo"]
    assert talk("clear#\nexit#\nOne#", multiline=True).prompts == []


def test_images_with_boxes_are_saved_and_their_files_are_named(talk, image, tmp_path):
    typed = f"<img>{image}</img>Where is the dog?\nAnd now?\nThanks\n"
    output, errors, _ = talk(typed, f"There: {DOG}", DOG, "Bye")
    assert output == f"There: {DOG}\n{DOG}\nBye\n"
    assert re.findall("boxes: .*(boxes/.*)", errors) == ["boxes/000000.png", "boxes/000001.png"]
    drawing = Image.open(tmp_path / "boxes/000000.png")
    assert drawing.width >= 320
    assert len(drawing.getcolors(1 << 20)) > 2
    expected = [["boxes/000000.png"], ["boxes/000001.png"], []]
    assert [row["boxes"] for row in recorded(tmp_path)] == expected
    talk(f"<img>{image}</img><img>{image}</img>Where is the dog?\n", DOG)
    assert recorded(tmp_path)[-1]["boxes"] == ["boxes/000000_1.png"]


def test_boxes_beyond_their_image_give_one_remark(talk, image):
    typed = f"<img>{image}</img>Where?\n"
    chat = talk(typed, DOG.replace("999", "1500") + DOG.replace("250", "-3"))
    assert chat.errors.count("reaches beyond its image") == 1
    assert "reaches beyond" not in talk(typed, DOG).errors


def test_the_conversation_is_recorded_as_rows_of_a_dataset(talk, image, tmp_path):
    question = f"<img>{image}</img>Was ist das?"
    talk(f"{question}\nIs it “big”?\n", f"Ein Hund: {DOG}", "是", system="Be brief.")
    first, second = recorded(tmp_path)
    assert (first["query"], first["history"], first["system"]) == (question, [], "Be brief.")
    assert second["history"] == [[first["query"], first["response"]]]
    assert second["prompt_tokens"] > first["prompt_tokens"] > 0
    assert second["seconds"] >= second["first_seconds"] > 0
    turns = read_rows(str(tmp_path / "conversation.jsonl"), ReadOptions())[1].turns
    roles = [turn.role for turn in turns]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert turns[-1].parts == ("是",)


def test_recorded_image_paths_are_absolute(talk, image, tmp_path, monkeypatch):
    monkeypatch.chdir(image.parent)
    talk(f"<img>{image.name}</img>What?\nWhy?\n")
    first, second = recorded(tmp_path)
    assert [first["query"], second["query"]] == [f"<img>{image}</img>What?", "Why?"]
    assert second["history"] == [[f"<img>{image}</img>What?", "yes"]]


def test_a_mistake_is_one_line_and_the_chat_continues_without_it(talk, image, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("nothing")
    missing = "<img>nowhere.png</img>What?"
    too_long = "1" * 3000
    typed = f"Hello\n{missing}\n{too_long}\n<img>{broken}</img>What?\nBye\n"
    output, errors, prompts = talk(typed)
    assert output == "yes\nyes\n"
    starts = [line.split(": ")[:2] for line in errors.splitlines()]
    assert starts == [["error", f"line {number}"] for number in (2, 3, 4)]
    assert "sample" not in errors
    assert "'nowhere.png' does not exist" in errors
    assert "the model reads fewer than 2048" in errors
    assert "broken.png cannot be read" in errors
    assert questions(prompts[-1]) == ["Hello", "Bye"]
    assert len(recorded(tmp_path)) == 2


def raise_once(model, error: BaseException, *, after: int):
    """Makes the head of the network raise `error` once, after that many tokens."""
    calls = 0

    def count_and_raise(*_):
        nonlocal calls
        calls += 1
        if calls == after + 1:
            raise error

    return model.model.lm_head.register_forward_hook(count_and_raise)


def test_at_a_terminal_an_interrupted_answer_is_kept_as_far_as_it_was_printed(
    talk, model, tmp_path
):
    hook = raise_once(model, KeyboardInterrupt(), after=5)
    chat = talk("Hello\nBye\n", TEN_WORDS, "yes", terminal=True)
    hook.remove()
    assert "\n(stopped)\n" in chat.output
    first, second = recorded(tmp_path)
    assert first["stopped"] is True
    assert first["response"]
    assert "one two three four five six".startswith(first["response"])
    assert second["history"] == [["Hello", first["response"]]]
    assert f"{first['response']}<|im_end|>" in chat.prompts[-1]


def test_an_answer_that_ran_out_of_memory_is_not_kept(talk, model, tmp_path):
    error = torch.OutOfMemoryError("no memory is left\ndetails")
    hook = raise_once(model, error, after=5)
    output, errors, prompts = talk("Hello\nBye\n", TEN_WORDS, "yes")
    hook.remove()
    assert errors == "\nerror: line 1: no memory is left\n"
    assert output.endswith("yes\n")
    assert questions(prompts[-1]) == ["Bye"]
    assert len(recorded(tmp_path)) == 1


def test_without_a_terminal_an_interrupt_ends_the_chat(talk, model):
    hook = raise_once(model, KeyboardInterrupt(), after=1)
    with pytest.raises(KeyboardInterrupt):
        talk("Hello\nBye\n")
    hook.remove()


def test_a_terminal_shows_prompts_and_no_control_characters(talk):
    output, errors, _ = talk("Hello\nexit\n", "a\x07b\x1b[2Jc\td", terminal=True)
    assert output.startswith("An image is <img>path or address</img>. Commands: help, multi-line, ")
    assert "you> ab[2Jc\td\nyou> " in output
    assert errors == ""


def test_an_img_tag_without_its_end_is_an_error(talk):
    output, errors, [prompt] = talk("<img>dog.png What?\nHello\n")
    assert output == "yes\n"
    assert "error: line 1: '<img>dog.png What?' has no </img>; write <img>path</img>" in errors
    assert questions(prompt) == ["Hello"]


def test_a_base_model_is_announced_and_has_no_system_message(talk, folder, capsys):
    base_model = QwenVL.load(folder, dtype="float32", template="raw")
    capsys.readouterr()  # what loading prints
    output, errors, prompts = talk(
        "Once upon\nreset-system\nA dog\n", "a time", chat_with=base_model
    )
    assert output == "a time\na time\n"
    assert errors.splitlines() == [
        "This is a base model: it continues each text as it stands, without chat markup, "
        "system message and history.",
        "a base model has no system message",
    ]
    assert prompts == ["Once upon", "A dog"]


def chat_command(*arguments: str) -> list[str]:
    return command_line("chat", "model=qwen_vl_tiny", *arguments)


def chat_environment(folder) -> dict[str, str]:
    return environment(folder, TERM="xterm", PYTHONUTF8="1")


def test_lines_from_a_pipe_are_answered_and_the_status_is_1_if_one_was_not(tmp_path, image):
    typed = f"<img>{image}</img>Where's the car?\r\n<img>nowhere.png</img>What?\n"
    process = subprocess.run(
        chat_command("generation.max_new_tokens=5", "system=Be brief, (always)!"),
        cwd=tmp_path,
        env=chat_environment(tmp_path),
        input=typed.encode() + b"not UTF-8: \xff\nBye\n",
        capture_output=True,
    )
    output, errors = process.stdout.decode(), process.stderr.decode()
    assert process.returncode == 1, errors
    rows = recorded(only_run(tmp_path, "chat"))
    assert output == "".join(row["response"] + "\n" for row in rows)
    questions = [f"<img>{image}</img>Where's the car?", "Bye"]
    assert [row["query"] for row in rows] == questions
    assert {row["system"] for row in rows} == {"Be brief, (always)!"}
    assert "error: line 2: image 'nowhere.png' does not exist" in errors
    assert "error: line 3: the question is not valid UTF-8: it has the byte 0xff" in errors
    assert errors.endswith("\n2 of 4 questions not answered\n")
    assert "Traceback" not in errors


class Terminal:
    """A process at a pseudo-terminal."""

    def __init__(self, command: list[str], **options):
        self.controller, terminal = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=_make_stdin_the_controlling_terminal,
            **options,
        )
        os.close(terminal)
        self.unread = ""

    def wait_for(self, pattern: str, seconds: float = 120) -> None:
        """Waits for output that matches, and discards it with all that was printed before it."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.unread)):
            message = f"waited for {pattern!r}, got {self.unread[-2000:]!r}"
            timeout = max(0, deadline - time.monotonic())
            assert select.select([self.controller], [], [], timeout)[0], message
            try:
                self.unread += os.read(self.controller, 1 << 16).decode(errors="replace")
            except OSError as error:  # the process has closed its side
                raise AssertionError(message) from error
        self.unread = self.unread[match.end() :]

    def type(self, keys: str) -> None:
        os.write(self.controller, keys.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.controller)


def _make_stdin_the_controlling_terminal() -> None:
    """Lets Ctrl-C reach the process; runs in the new session before the command starts."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_person_at_a_terminal_edits_recalls_and_stops_lines_and_leaves(tmp_path):
    endless = chat_command("generation.max_new_tokens=6000", "generation.min_new_tokens=6000")
    terminal = Terminal(endless, cwd=tmp_path, env=chat_environment(tmp_path))
    backspace, line_start, line_before, interrupt, end = "\x7f", "\x01", "\x1b[A", "\x03", "\x04"
    try:
        terminal.wait_for("you> ")
        for keys in (f"many cat{backspace}r?{line_start}How \r", f"{line_before}\r"):
            terminal.type(keys)
            terminal.wait_for(r"\n")
            terminal.wait_for("[a-z]{3}")  # the answer has begun
            terminal.type(interrupt)
            terminal.wait_for(r"\(stopped\)\s+you> ")
        terminal.type("half a line")
        terminal.wait_for("half a line")
        time.sleep(0.3)  # readline notices a signal only while it waits for a key
        terminal.type(interrupt)
        terminal.wait_for(r"ends the chat\s+you> ")
        terminal.type(end)
        terminal.wait_for("Conversation: outputs/chat/")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()
    rows = recorded(only_run(tmp_path, "chat"))
    assert [row["query"] for row in rows] == ["How many car?"] * 2
    assert (tmp_path / "cache/chat_history").read_text().splitlines()[-1] == "How many car?"
