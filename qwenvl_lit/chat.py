"""`python -m qwenvl_lit.chat`: a conversation with a model, at a terminal or through a pipe."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from qwenvl_lit.cli.command import command
from qwenvl_lit.data.json_lines import append_json_lines
from qwenvl_lit.libraries import import_libraries
from qwenvl_lit.terminal import counted, printable, wrapped
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qwenvl_lit.api import QwenVL
    from qwenvl_lit.generation.answer import Answer

COMMANDS = {
    "help": "lists these commands",
    "multi-line": "a question ends with a line that ends in #",
    "single-line": "each line is a question",
    "clear": "empties the history",
    "reset-system": "asks for a new system message and empties the history",
    "exit": "ends the chat; so does Ctrl-D",
    "quit": "ends the chat",
}


class Chat:
    """Reads questions line by line, prints answers while they are generated, keeps the history.

    Each answer becomes a line of `conversation.jsonl`, a row that `data=jsonl` reads. Its boxes are
    drawn to `boxes/NUMBER.png`; for image k > 0 of the conversation to `NUMBER_k.png`.

    Args:
        folder: where these files are written.
        system: the system message; None: the model's default.
        multiline: a question ends with a line that ends in `#`.
        terminal: a person is typing. Prompts and remarks are shown, and Ctrl-C stops an answer
            only. Without a terminal, standard output holds nothing but answers, remarks go to
            standard error, and errors name the line of the input.

    Attributes:
        answers: the number of questions that were answered.
        failed: the number of questions that were not answered, because of an error.
    """

    def __init__(
        self,
        model: QwenVL,
        folder: Path,
        *,
        system: str | None = None,
        multiline: bool = False,
        terminal: bool = False,
    ):
        self.model = model
        self.folder = folder
        self.system = system
        self.multiline = multiline
        self.terminal = terminal
        self.history: list[list[str]] = []
        self.answers = 0
        self.failed = 0
        self.lines_read = 0
        self.question_line = 0  # the number of the line that the last question begins with

    def run(self) -> None:
        """Answers questions until `exit` or the end of the input."""
        self._welcome()
        while True:
            try:
                text = self._read("you> ")
            except EOFError:
                if self.terminal:
                    self.remark("")  # Ctrl-D leaves the cursor behind the prompt
                return
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
                self.remark("\nexit, quit or Ctrl-D ends the chat")
                continue
            word = text.strip().lower()
            if word in ("exit", "quit"):
                return
            if word in COMMANDS:
                self._obey(word)
            elif word:
                self._answer(text)

    def remark(self, text: str) -> None:
        """Prints something that is not part of an answer."""
        stream = sys.stdout if self.terminal else sys.stderr
        print(printable(text, keep="\n\t"), file=stream, flush=True)

    def _welcome(self) -> None:
        if self.terminal:
            commands = ", ".join(COMMANDS)
            text = f"An image is <img>path or address</img>. Commands: {commands}. "
            self.remark(wrapped(text + "Ctrl-C stops an answer."))
            if self.multiline:
                self.remark("A line that ends in # ends a question.")
        if self.model.is_base_model:
            self.remark(
                "This is a base model: it continues each text as it stands, without chat markup, "
                "system message and history."
            )

    def _obey(self, word: str) -> None:
        match word:
            case "help":
                width = max(map(len, COMMANDS))
                for name, effect in COMMANDS.items():
                    self.remark(f"{name:{width}}  {effect}")
                self.remark(
                    "Every other line is a question. An image in it is written as "
                    "<img>path or address</img>."
                )
            case "multi-line":
                self.multiline = True
                self.remark("a line that ends in # ends a question")
            case "single-line":
                self.multiline = False
                self.remark("each line is a question")
            case "clear":
                self.history = []
                self.remark("the history is empty")
            case "reset-system":
                self._reset_system()

    def _read(self, prompt: str) -> str:
        """One line, or several in multi-line mode; the end of the input ends those, too.

        Raises:
            EOFError: the input has ended.
        """
        lines = [self._line(prompt)]
        self.question_line = self.lines_read
        while self.multiline and not lines[-1].rstrip().endswith("#"):
            if len(lines) == 1 and lines[0].strip().lower() in COMMANDS:
                return lines[0]
            try:
                lines.append(self._line("...> "))
            except EOFError:
                return "\n".join(lines)
        if self.multiline:
            lines[-1] = lines[-1].rstrip().removesuffix("#")
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        """One line, without the marks that files from Windows have."""
        line = input(prompt if self.terminal else "").removesuffix("\r")
        self.lines_read += 1
        return line.removeprefix("\ufeff") if self.lines_read == 1 else line

    def _reset_system(self) -> None:
        from qwenvl_lit.data.readers.question import valid_text

        if self.model.is_base_model:
            self.remark("a base model has no system message")
            return
        try:
            text = valid_text(self._read("system> "), "system message")
        except (EOFError, KeyboardInterrupt):
            self.remark("\nthe system message is unchanged")
            return
        except DataError as error:
            self._report(error)
            return
        self.system, self.history = text.strip() or None, []
        state = "the default" if self.system is None else "set"
        self.remark(f"the system message is {state}, the history is empty")

    def _answer(self, query: str) -> None:
        import torch

        before, shown = self.history, ""
        try:
            for text, history in self.model.stream(query, before, system=self.system):
                # The state is complete before the text is printed, where Ctrl-C may arrive.
                new, shown, self.history = text[len(shown) :], text, history
                print(self._printable(new), end="", flush=True)
            print(flush=True)
            files = self._draw(text)
        except KeyboardInterrupt:
            if not self.terminal:
                raise
            self.remark("\n(stopped)")
            if shown:
                self._record(query, before, shown, stopped=True)
        except (DataError, torch.OutOfMemoryError) as error:
            self.history = before
            self._report(error, start="\n" if shown else "")
        else:
            self._record(query, before, text, **_measurements(text), boxes=files)

    def _report(self, error: Exception, start: str = "") -> None:
        """Prints an error; the chat continues without the question."""
        self.failed += 1
        line = "" if self.terminal else f"line {self.question_line}: "
        self.remark(f"{start}error: {line}{str(error).splitlines()[0]}")

    def _printable(self, text: str) -> str:
        """For a terminal, `text` without control characters, which it would obey."""
        if not self.terminal and not sys.stdout.isatty():
            return text
        return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")

    def _draw(self, answer: Answer) -> list[str]:
        """Draws the boxes of an answer; returns the file names, relative to the folder."""
        from qwenvl_lit.atomic import atomic_file
        from qwenvl_lit.build import shown
        from qwenvl_lit.rendering.drawing import draw_prediction
        from qwenvl_lit.rendering.text import images_with_boxes

        files = []
        for image in images_with_boxes(answer.prediction):
            suffix = f"_{image}" if image else ""
            file = self.folder / "boxes" / f"{self.answers:06d}{suffix}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as unfinished:
                draw_prediction(answer.prediction, image).save(unfinished, "PNG")
            files.append(str(file.relative_to(self.folder)))
            self.remark(f"boxes: {shown(str(file))}")
        if files and _leaves_its_image(answer):
            self.remark("(a box reaches beyond its image; it is drawn up to the edge)")
        return files

    def _record(
        self, query: str, history: Sequence[Sequence[str]], response: str, **details: object
    ) -> None:
        earlier = []
        if not self.model.is_base_model:
            earlier = [[with_absolute_paths(asked), answer] for asked, answer in history]
        row = {
            "query": with_absolute_paths(query),
            "response": response,
            "history": earlier,
            "system": self.system,
            **details,
        }
        append_json_lines(self.folder / "conversation.jsonl", [row])
        self.answers += 1


def _measurements(answer: Answer) -> dict[str, float]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
        "seconds": round(answer.seconds, 3),
        "first_seconds": round(answer.first_seconds or 0.0, 3),
    }


def _leaves_its_image(answer: Answer) -> bool:
    """Whether a box of the answer has a corner outside its image."""
    from qwenvl_lit.rendering.text import box_numbers

    images = answer.prediction.conversation.images
    for found in answer.objects:
        width, height = images[found.image].size
        for numbers in box_numbers(found):
            xs, ys = numbers[::2], numbers[1::2]
            if min(numbers) < 0 or max(xs) > width or max(ys) > height:
                return True
    return False


def with_absolute_paths(query: str) -> str:
    """A question whose image files are found from every folder; addresses stay as they are."""

    def tag(match: re.Match[str]) -> str:
        file = Path(match[1].strip()).expanduser()
        return f"<img>{file.absolute()}</img>" if file.is_file() else match[0]

    return re.sub(r"<img>(.*?)</img>", tag, query, flags=re.DOTALL)


@contextmanager
def line_editing(history: Path) -> Iterator[None]:
    """Gives `input` arrow keys and the lines of earlier chats, through readline.

    Windows has no readline; its console edits lines by itself.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    if history.exists():
        readline.read_history_file(history)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        history.parent.mkdir(parents=True, exist_ok=True)
        readline.write_history_file(history)


def main(config: DictConfig) -> None:
    import_libraries()
    from qwenvl_lit import build
    from qwenvl_lit.api import QwenVL
    from qwenvl_lit.data.readers.question import question_options
    from qwenvl_lit.models.loading import device_named
    from qwenvl_lit.runs.run import find_run

    build.start(config)
    run = None
    if config.ckpt:
        run = find_run(config.ckpt, trust=config.trust, verify=config.verify)
    module = build.module(
        config,
        adapted=run is not None,
        trained_checkpoint=run.checkpoint if run else None,
        load_device=device_named(config.device),
    )
    cache, folder = Path(config.paths.cache), Path(config.paths.run)
    read_options = question_options(cache, run.config.get("data") if run else None)
    model = QwenVL.from_module(module, read_options=read_options)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    sys.stdin.reconfigure(errors="surrogateescape")  # a question that is not UTF-8 is an error
    sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show is none
    chat = Chat(model, folder, system=config.system, multiline=config.multiline, terminal=terminal)
    with line_editing(cache / "chat_history") if terminal else nullcontext():
        try:
            chat.run()
        except KeyboardInterrupt:
            sys.exit(130)
    if chat.answers:
        chat.remark(f"Conversation: {build.shown(str(folder / 'conversation.jsonl'))}")
    if chat.failed and not terminal:
        chat.remark(
            f"{chat.failed} of {counted(chat.failed + chat.answers, 'question')} not answered"
        )
        sys.exit(1)


if __name__ == "__main__":
    command("chat", main, run="needed")
