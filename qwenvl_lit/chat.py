"""`python -m qwenvl_lit.chat model=qwen_vl_chat`, or `ckpt=RUN`: talk to a model, at a terminal or through a pipe."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qwenvl_lit.cli.command import command
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qwenvl_lit.api import Answer, QwenVL

COMMANDS = ("multi-line", "single-line", "clear", "reset-system", "exit", "quit")


class Chat:
    """Reads questions line by line, shows answers while they are decoded, and keeps the conversation.

    Each answer is a line of `conversation.jsonl`, a row that `data=jsonl` reads, and its boxes are drawn to
    `boxes/NUMBER.png`, or `NUMBER_k.png` where they are in image k > 0 of the conversation.

    Args:
        folder: for these files.
        system: the system message; None: the model's own.
        multiline: a question goes on until a line that ends in `#`.
        terminal: somebody is typing: there are prompts and remarks, and Ctrl-C stops an answer only. Else answers alone are printed, and
            the rest goes to standard error.
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

    def run(self) -> None:
        """Until `exit`, or the end of the input."""
        self._welcome()
        while True:
            try:
                said = self._read("you> ")
            except EOFError:
                if self.terminal:
                    self.remark("")  # Ctrl-D leaves the cursor behind the prompt
                return
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
                self.remark("\nexit, quit or Ctrl-D ends the chat")
                continue
            match said.strip().lower():
                case "exit" | "quit":
                    return
                case "multi-line" | "single-line" as mode:
                    self.multiline = mode == "multi-line"
                    self.remark(
                        "a line that ends in # ends a question"
                        if self.multiline
                        else "each line is a question"
                    )
                case "clear":
                    self.history = []
                    self.remark("the history is empty")
                case "reset-system":
                    self._reset_system()
                case "":
                    pass
                case _:
                    self._answer(said)

    def remark(self, text: str) -> None:
        """Say what is no answer."""
        print(text, file=sys.stdout if self.terminal else sys.stderr, flush=True)

    def _welcome(self) -> None:
        if self.terminal:
            self.remark(
                f"An image is <img>path or address</img>. Commands: {', '.join(COMMANDS)}. Ctrl-C stops an answer."
            )
            if self.multiline:
                self.remark("A line that ends in # ends a question.")
        if self.model.is_base_model:
            self.remark(
                "This is a base model: it continues each text as it stands, without chat markup, system message and history."
            )

    def _read(self, prompt: str) -> str:
        """A line, or several; EOFError where there is none. The end of the input ends several."""
        lines = [self._line(prompt)]
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
        return input(prompt if self.terminal else "")

    def _reset_system(self) -> None:
        if self.model.is_base_model:
            self.remark("a base model has no system message")
            return
        try:
            said = self._read("system> ")
        except (EOFError, KeyboardInterrupt):
            self.remark("\nthe system message stays as it was")
            return
        self.system, self.history = said.strip() or None, []
        self.remark(
            f"the system message is {'the default' if self.system is None else 'set'}, the history is empty"
        )

    def _answer(self, query: str) -> None:
        import torch

        if query.count("<img>") > query.count("</img>"):
            self.remark("(an <img> without </img> is text)")
        before, shown = self.history, ""
        try:
            for text, history in self.model.stream(query, before, system=self.system):
                new, shown, self.history = (
                    text[len(shown) :],
                    text,
                    history,
                )  # first: Ctrl-C may come while it is printed
                print(self._printable(new), end="", flush=True)
            print(flush=True)
            files = self._draw(text)
        except KeyboardInterrupt:
            if not self.terminal:
                raise
            self.remark("\n(stopped)")
            if shown:
                self._record(query, before, shown, stopped=True)
        except (DataError, torch.OutOfMemoryError) as fault:
            self.history = before
            self.remark(("\n" if shown else "") + f"error: {str(fault).splitlines()[0]}")
        else:
            self._record(query, before, text, **self._measured(text), boxes=files)

    def _printable(self, text: str) -> str:
        """A terminal would obey control characters."""
        return (
            "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")
            if self.terminal
            else text
        )

    @staticmethod
    def _measured(answer: Answer) -> dict[str, float]:
        seconds = {
            "seconds": round(answer.seconds, 3),
            "first_seconds": round(answer.first_seconds or 0.0, 3),
        }
        return {"prompt_tokens": answer.prompt_tokens, "new_tokens": answer.new_tokens, **seconds}

    def _draw(self, answer: Answer) -> list[str]:
        """Names of the files."""
        from qwenvl_lit.build import shown
        from qwenvl_lit.grounding import GRID, objects_from_tags
        from qwenvl_lit.rendering.drawing import draw_prediction
        from qwenvl_lit.rendering.text import box_numbers, images_with_boxes
        from qwenvl_lit.types import GroundedObject

        files = []
        for image in images_with_boxes(answer.prediction):
            further = f"_{image}" if image else ""
            file = self.folder / "boxes" / f"{self.answers:06d}{further}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            draw_prediction(answer.prediction, image).save(file)
            files.append(str(file.relative_to(self.folder)))
            self.remark(f"boxes: {shown(str(file))}")
        placed = [part for part in objects_from_tags(answer) if isinstance(part, GroundedObject)]
        numbers = [number for thing in placed for box in box_numbers(thing) for number in box]
        if files and not all(0 <= number <= GRID for number in numbers):
            self.remark(
                f"(a box of the answer reaches beyond 0..{GRID}, and so its image: it is drawn up to the edge)"
            )
        return files

    def _record(
        self, query: str, history: list[list[str]], response: str, **further: object
    ) -> None:
        earlier = (
            []
            if self.model.is_base_model
            else [[images_in_full(asked), said] for asked, said in history]
        )
        row = {
            "query": images_in_full(query),
            "response": response,
            "history": earlier,
            "system": self.system,
            **further,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "conversation.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.answers += 1


def images_in_full(query: str) -> str:
    """A question whose paths of images hold in every folder; addresses are left as they are."""

    def tag(found: re.Match[str]) -> str:
        file = Path(found[1].strip()).expanduser()
        return f"<img>{file.absolute()}</img>" if file.is_file() else found[0]

    return re.sub(r"<img>(.*?)</img>", tag, query, flags=re.DOTALL)


@contextmanager
def line_editing(history: Path) -> Iterator[None]:
    """`input` with arrow keys and with the lines of earlier chats, by the standard library's readline; Windows has its own."""
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
    from contextlib import nullcontext

    from qwenvl_lit import build
    from qwenvl_lit.api import QwenVL, device_named
    from qwenvl_lit.data.readers.rows import ReadOptions
    from qwenvl_lit.runs.run import find_run

    build.start(config)
    task = build.module(config, adapted=config.ckpt is not None)
    cache, folder = Path(config.paths.cache), Path(config.paths.run)
    model = QwenVL.from_module(
        task,
        checkpoint=find_run(config.ckpt).checkpoint if config.ckpt else None,
        device=device_named(config.device),
        read_options=ReadOptions(cache=cache),
    )
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(
            errors="replace"
        )  # a chat does not end for a character that the terminal cannot show
    chat = Chat(model, folder, system=config.system, multiline=config.multiline, terminal=terminal)
    with line_editing(cache / "chat_history") if terminal else nullcontext():
        try:
            chat.run()
        except KeyboardInterrupt:
            sys.exit(130)
    if chat.answers:
        chat.remark(f"The conversation: {build.shown(str(folder / 'conversation.jsonl'))}")


if __name__ == "__main__":
    command("chat", main, needs_run=True)
