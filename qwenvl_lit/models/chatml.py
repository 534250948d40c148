"""ChatML: messages to token ids and to what is learned of them, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

from qwenvl_lit.types import DataError, Role, Turn

DEFAULT_SYSTEM = "You are a helpful assistant."
Supervise = Literal["answers", "official"]


class Piece(NamedTuple):
    """A run of token ids with one fate."""

    ids: Sequence[int]
    learned: bool = False
    image: int | None = (
        None  # the ids are the span of this image of the conversation, tags included; never parted, never learned
    )


class Message(NamedTuple):
    """A turn whose content is encoded; what is learned of it is decided here."""

    role: Role
    body: Sequence[Piece]


def with_system(turns: Sequence[Turn], system: str | None) -> tuple[Turn, ...]:
    """`turns` with a system message in front: their own, else `system`, else the default sentence; "" is written as an empty message.

    Raises:
        DataError: a system message stands further back.
    """
    if any(turn.role == "system" for turn in turns[1:]):
        raise DataError(
            "a system message may only come first; move its text there or into a question"
        )
    if turns and turns[0].role == "system":
        return tuple(turns)
    return (Turn(role="system", parts=(DEFAULT_SYSTEM if system is None else system,)), *turns)


class ChatML:
    """The markup around messages: `<|im_start|>`, role, newline, content, `<|im_end|>`, newline, each tokenised on its own.

    Args:
        encode: plain text to ids.
        start, end: ids of `<|im_start|>` and `<|im_end|>`.
        supervise: "answers": answers and their end marks are learned, as by ms-swift, and nothing follows the last end mark.
            "official": besides, both marks and the last newline of every message, as by the script published with the model.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        *,
        start: int,
        end: int,
        supervise: Supervise = "answers",
    ):
        self.start, self.end, self.newline = [start], [end], encode("\n")
        self.roles = {role: encode(role) for role in ("system", "user", "assistant")}
        self.official = supervise == "official"

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> Iterator[Piece]:
        """The pieces of a conversation; `prompt` opens an answer at its end."""
        for place, (role, body) in enumerate(messages, 1):
            answer = role == "assistant"
            yield Piece(self.start, self.official)
            yield Piece(self.roles[role] + self.newline)
            for piece in body:
                yield piece._replace(learned=answer and piece.image is None)
            yield Piece(self.end, answer or self.official)
            if self.official or prompt or place < len(messages):
                yield Piece(self.newline, self.official)
        if prompt:
            yield Piece(self.start + self.roles["assistant"] + self.newline)

    def recent(self, messages: Sequence[Message], limit: int) -> list[Message]:
        """`messages` without the oldest exchanges. A leading system message and the last question always stay.

        Backwards from the newest exchange, one stays while it, what stays already and the system message are fewer than `limit` tokens
        together (the last question does not count); the first that does not fit ends it, as in the published `chat`.
        """
        system, rest = list(messages[:1]), list(messages[1:])
        if system and system[0].role != "system":
            system, rest = [], list(messages)
        starts = sorted(
            {0, *(place for place, message in enumerate(rest) if message.role == "user")}
        )
        kept = starts.pop()
        used = sum(map(self._length, system)) - len(self.newline)  # none before the first message
        for start in reversed(starts):
            used += sum(map(self._length, rest[start:kept]))
            if used >= limit:
                break
            kept = start
        return system + rest[kept:]

    def _length(self, message: Message) -> int:
        around = self.newline + self.start + self.roles[message.role] + self.newline + self.end
        return len(around) + sum(len(piece.ids) for piece in message.body)


def truncate_left(pieces: Sequence[Piece], limit: int) -> list[Piece]:
    """The last `limit` tokens; fewer where the cut would part an image's span, which then goes as a whole."""
    excess = sum(len(piece.ids) for piece in pieces) - limit
    kept = list(pieces)
    while excess > 0:
        first = kept.pop(0)
        if first.image is None and len(first.ids) > excess:
            kept.insert(0, first._replace(ids=first.ids[excess:]))
        excess -= len(first.ids)
    return kept


def show(ids: Sequence[int], labels: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str:
    """A sample for the terminal: what is learned in green, the rest dim (see `runs`)."""
    return "".join(
        f"\x1b[{32 if learned else 2}m{text}\x1b[0m" for text, learned in runs(ids, labels, decode)
    )


def runs(
    ids: Sequence[int], labels: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> Iterator[tuple[str, bool]]:
    """A sample's text in runs that are learned or not; a token that repeats is written once, with a count."""

    def text(run: Sequence[int]) -> str:
        written = ""
        plain: list[int] = []
        for id, same in groupby(run):
            count = len(list(same))
            if count > 8:
                written += f"{decode(plain)}{decode([id])} x {count} "
                plain = []
            else:
                plain += [id] * count
        return written + decode(plain)

    for learned, run in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] >= 0):
        yield text([id for id, _ in run]), learned
