import fcntl
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripted import says, tiny_checkpoint

from qwenvl_lit import QwenVL
from qwenvl_lit.chat import Chat
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows

DOG = "<ref>the dog</ref><box>(250,500),(500,999)</box>"
COMMAND = [sys.executable, "-m", "qwenvl_lit.chat", "model=qwen_vl_tiny"]


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
    """Type lines into a chat that answers with a script; gives what was printed, what went to standard error, and the prompts as text."""

    def run(typed, *answers, chat_with=model, **options):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        with says(chat_with, *(answers or ("yes",))) as asked:
            Chat(chat_with, tmp_path, **options).run()
        printed = capsys.readouterr()
        return printed.out, printed.err, [chat_with.processor.text(ids) for ids in asked]

    return run


def rows(folder: Path) -> list[dict]:
    return [
        json.loads(line)
        for line in (folder / "conversation.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def questions(prompt: str) -> list[str]:
    return re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", prompt, re.DOTALL)


def test_each_line_is_a_question_and_answers_alone_are_printed(talk):
    out, err, asked = talk("Hello\n\n   \nHow are you?\n", "Hi!", "日本 fine")
    assert out == "Hi!\n日本 fine\n"
    assert err == ""
    assert [questions(prompt) for prompt in asked] == [["Hello"], ["Hello", "How are you?"]]


def test_lines_after_exit_are_not_read(talk):
    for word in ("exit", "quit", " EXIT "):
        assert talk(f"Hello\n{word}\nHow are you?\n")[0] == "yes\n"


def test_clear_forgets_what_was_said(talk):
    _, err, asked = talk("Hello\nclear\nHow are you?\n")
    assert questions(asked[-1]) == ["How are you?"]
    assert err == "the history is empty\n"


def test_reset_system_takes_the_next_input_and_clears_the_history(talk):
    _, _, asked = talk(
        "Hello\nreset-system\nBe brief.\nHow are you?\nreset-system\n\nAnd now?\n",
        system="Be kind.",
    )
    assert [
        prompt.split("<|im_end|>")[0].removeprefix("<|im_start|>system\n") for prompt in asked
    ] == [
        "Be kind.",
        "Be brief.",
        "You are a helpful assistant.",
    ]
    assert [questions(prompt) for prompt in asked] == [["Hello"], ["How are you?"], ["And now?"]]


def test_several_lines_are_a_question_until_a_line_that_ends_in_a_hash(talk):
    typed = "multi-line\nOne\n#two # three\n\nfour#\nsingle-line\nfive #\nmulti-line\nsix\nexit\nseven # \nexit\nnever#\n"
    _, err, asked = talk(typed)
    assert questions(asked[-1]) == ["One\n#two # three\n\nfour", "five #", "six\nexit\nseven "]
    assert err.splitlines() == [
        "a line that ends in # ends a question",
        "each line is a question",
        "a line that ends in # ends a question",
    ]


def test_a_chat_may_begin_with_several_lines_and_the_end_of_input_ends_a_question(talk):
    _, _, asked = talk("One\ntwo", multiline=True)
    assert questions(asked[-1]) == ["One\ntwo"]
    assert talk("clear#\nexit#\nOne#", multiline=True)[2] == []


def test_a_image_with_its_boxes_is_saved_and_named(talk, image, tmp_path):
    out, err, _ = talk(
        f"<img>{image}</img>Where is the dog?\nAnd now?\nThanks\n", f"There: {DOG}", DOG, "Bye"
    )
    assert out == f"There: {DOG}\n{DOG}\nBye\n"
    assert re.findall("boxes: .*(boxes/.*)", err) == ["boxes/000000.png", "boxes/000001.png"]
    drawn = Image.open(tmp_path / "boxes/000000.png")
    assert drawn.width >= 320
    assert len(drawn.getcolors(1 << 20)) > 2
    assert [row["boxes"] for row in rows(tmp_path)] == [
        ["boxes/000000.png"],
        ["boxes/000001.png"],
        [],
    ]
    talk(f"<img>{image}</img><img>{image}</img>Where is the dog?\n", DOG)
    assert rows(tmp_path)[-1]["boxes"] == ["boxes/000000_1.png"]


def test_a_box_that_reaches_beyond_its_image_is_remarked_once(talk, image):
    _, err, _ = talk(
        f"<img>{image}</img>Where?\n", DOG.replace("999", "1500") + DOG.replace("250", "-3")
    )
    assert err.count("reaches beyond its image") == 1
    assert "reaches beyond" not in talk(f"<img>{image}</img>Where?\n", DOG)[1]


def test_the_conversation_is_kept_as_rows_that_can_be_read_again(talk, image, tmp_path):
    talk(
        f"<img>{image}</img>Was ist das?\nIs it “big”?\n",
        f"Ein Hund: {DOG}",
        "是",
        system="Be brief.",
    )
    first, second = rows(tmp_path)
    assert (first["query"], first["history"], first["system"]) == (
        f"<img>{image}</img>Was ist das?",
        [],
        "Be brief.",
    )
    assert second["history"] == [[first["query"], first["response"]]]
    assert second["prompt_tokens"] > first["prompt_tokens"] > 0
    assert second["seconds"] >= second["first_seconds"] > 0
    read = read_rows(str(tmp_path / "conversation.jsonl"), ReadOptions())
    assert [turn.role for turn in read[1].turns] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert read[1].turns[-1].parts == ("是",)


def test_images_of_the_conversation_are_found_from_anywhere(talk, image, tmp_path, monkeypatch):
    monkeypatch.chdir(image.parent)
    talk(f"<img>{image.name}</img>What?\nWhy?\n")
    assert [row["query"] for row in rows(tmp_path)] == [f"<img>{image}</img>What?", "Why?"]
    assert rows(tmp_path)[1]["history"] == [[f"<img>{image}</img>What?", "yes"]]


def test_a_mistake_is_one_line_and_the_chat_goes_on_without_it(talk, image, tmp_path):
    (tmp_path / "broken.png").write_text("nothing")
    typed = f"Hello\n<img>nowhere.png</img>What?\n{'1' * 3000}\n<img>{tmp_path / 'broken.png'}</img>What?\nBye\n"
    out, err, asked = talk(typed)
    assert out == "yes\nyes\n"
    assert [line[:6] for line in err.splitlines()] == ["error:"] * 3
    for said in ("'nowhere.png' does not exist", "the model reads fewer than 2048", "broken.png cannot be read"):
        assert said in err
    assert questions(asked[-1]) == ["Hello", "Bye"]
    assert len(rows(tmp_path)) == 2


def raising(model, error: BaseException, *, after: int):
    """The head of the network raises once, after so many tokens."""
    left = [after]

    def hook(*_):
        left[0] -= 1
        if left[0] == -1:
            raise error

    return model.model.lm_head.register_forward_hook(hook)


def test_an_answer_can_be_stopped_at_a_terminal_and_stays_as_far_as_it_came(talk, model, tmp_path):
    hook = raising(model, KeyboardInterrupt(), after=5)
    out, _, asked = talk(
        "Hello\nBye\n", "one two three four five six seven eight nine ten", "yes", terminal=True
    )
    hook.remove()
    assert "\n(stopped)\n" in out
    first, second = rows(tmp_path)
    assert first["stopped"] is True
    assert first["response"]
    assert "one two three four five six".startswith(first["response"])
    assert second["history"] == [["Hello", first["response"]]]
    assert f"{first['response']}<|im_end|>" in asked[-1]


def test_nothing_stays_of_an_answer_that_ran_out_of_memory(talk, model, tmp_path):
    hook = raising(model, torch.OutOfMemoryError("no memory is left\ndetails"), after=5)
    out, err, asked = talk(
        "Hello\nBye\n", "one two three four five six seven eight nine ten", "yes"
    )
    hook.remove()
    assert err == "\nerror: no memory is left\n"
    assert out.endswith("yes\n")
    assert questions(asked[-1]) == ["Bye"]
    assert len(rows(tmp_path)) == 1


def test_a_pipe_is_interrupted_as_a_whole(talk, model):
    for hook in (raising(model, KeyboardInterrupt(), after=1),):
        with pytest.raises(KeyboardInterrupt):
            talk("Hello\nBye\n")
        hook.remove()


def test_a_terminal_sees_prompts_remarks_and_no_control_characters(talk):
    out, err, _ = talk("Hello\nexit\n", "a\x07b\x1b[2Jc\td", terminal=True)
    assert out.startswith("An image is <img>path or address</img>. Commands: multi-line, ")
    assert "you> ab[2Jc\td\nyou> " in out
    assert err == ""


def test_a_image_that_does_not_end_is_remarked(talk):
    printed, remarks, [prompt] = talk("<img>dog.png What?\n")
    assert (printed, "(an <img> without </img> is text)" in remarks) == ("yes\n", True)
    assert "<img>dog.png What?" in prompt


def test_the_base_model_says_what_it_is(talk, folder, capsys):
    base = QwenVL.load(folder, dtype="float32", template="raw")
    capsys.readouterr()  # what loading says
    out, err, asked = talk("Once upon\nreset-system\nA dog\n", "a time", chat_with=base)
    assert out == "a time\na time\n"
    assert err.splitlines() == [
        "This is a base model: it continues each text as it stands, without chat markup, system message and history.",
        "a base model has no system message",
    ]
    assert asked == ["Once upon", "A dog"]


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "QWENVL_LIT_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "TERM": "xterm",
        "PYTHONUTF8": "1",
    }


def test_lines_through_a_pipe_are_answered(tmp_path, image):
    lines = (
        f"<img>{image}</img>Where's the car?\n<img>nowhere.png</img>What?\n".encode()
        + b"not UTF-8: \xff\n"
    )
    command = [*COMMAND, "generation.max_new_tokens=5", "system=Be brief, (always)!"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), input=lines, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    [run] = (tmp_path / "outputs/chat").iterdir()
    said = rows(run)
    assert done.stdout.decode() == "".join(row["response"] + "\n" for row in said)
    assert [row["query"] for row in said] == [
        f"<img>{image}</img>Where's the car?",
        "not UTF-8: \ufffd",
    ]
    assert {row["system"] for row in said} == {"Be brief, (always)!"}
    assert "error: image 'nowhere.png' does not exist" in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


class Terminal:
    """A command at a pseudo-terminal."""

    def __init__(self, command: list[str], **options):
        self.own, other = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
            preexec_fn=_take_terminal,
            **options,
        )
        os.close(other)
        self.seen = ""

    def until(self, pattern: str, seconds: float = 120) -> None:
        """Wait for what matches, and forget what came up to its end."""
        ends = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            waited = f"waited for {pattern!r}, saw {self.seen[-2000:]!r}"
            assert select.select([self.own], [], [], max(0, ends - time.monotonic()))[0], waited
            try:
                self.seen += os.read(self.own, 1 << 16).decode(errors="replace")
            except OSError as ended:  # nobody has the other side open any more
                raise AssertionError(waited) from ended
        self.seen = self.seen[found.end() :]

    def type(self, keys: str) -> None:
        os.write(self.own, keys.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.own)


def _take_terminal() -> None:
    """Make standard input the terminal of the new session, so that Ctrl-C reaches it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_person_at_a_terminal_edits_recalls_stops_and_leaves(tmp_path):
    long = ["generation.max_new_tokens=6000", "generation.min_new_tokens=6000"]
    terminal = Terminal([*COMMAND, *long], cwd=tmp_path, env=environment(tmp_path))
    try:
        terminal.until("you> ")
        for keys in (
            "many cat\x7fr?\x01How \r",
            "\x1b[A\r",
        ):  # backspace, and Ctrl-A to the beginning; then the line before
            terminal.type(keys)
            terminal.until(r"\n")
            terminal.until("[a-z]{3}")  # the answer has begun
            terminal.type("\x03")
            terminal.until(r"\(stopped\)\s+you> ")
        terminal.type("half a line")
        terminal.until("half a line")
        time.sleep(0.3)  # readline notices a signal only while it waits for a key
        terminal.type("\x03")
        terminal.until(r"ends the chat\s+you> ")
        terminal.type("\x04")
        terminal.until("Conversation: outputs/chat/")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()
    [run] = (tmp_path / "outputs/chat").iterdir()
    assert [row["query"] for row in rows(run)] == ["How many car?"] * 2
    assert (tmp_path / "cache/chat_history").read_text().splitlines()[-1] == "How many car?"
