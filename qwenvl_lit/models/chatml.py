"""ChatML: turns messages into token ids, and marks which ids are supervised, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

from qwenvl_lit.types import DataError, Role, Turn

DEFAULT_SYSTEM = "You are a helpful assistant."
REPEATED = 8  # a token that is repeated more often than this is shown once, with a count

NO_SYSTEM = "none"  # as the setting `system`: write no system message

Supervise = Literal["answers", "official"]


class Piece(NamedTuple):
    """Consecutive token ids that are all supervised or all not."""

    ids: Sequence[int]
    supervised: bool = False
    image: int | None = None
    """If these ids are the span of an image: its index in the conversation.

    The span includes the image's two tags. It is never split and never supervised.
    """
    masked: bool = False
    """Whether these ids are not supervised even in an answer."""


class Message(NamedTuple):
    """A turn with encoded content; `ChatML.render` decides which of its ids are supervised."""

    role: Role
    body: Sequence[Piece]
    has_newline: bool = False
    """Whether `body` begins with the newline that follows the role."""


def with_system(turns: Sequence[Turn], system: str | None) -> tuple[Turn, ...]:
    """Returns `turns` with a system message in front, unless `system` is "none".

    Turns that start with a system message are returned unchanged. Otherwise `system` is the
    message: "" is an empty message, and None stands for `DEFAULT_SYSTEM`.

    Raises:
        DataError: a system message is not the first turn.
    """
    if any(turn.role == "system" for turn in turns[1:]):
        raise DataError(
            "a system message may only come first; move its text there or into a question"
        )
    if turns and turns[0].role == "system":
        return tuple(turns)
    if system == NO_SYSTEM:
        return tuple(turns)
    text = DEFAULT_SYSTEM if system is None else system
    return (Turn(role="system", parts=(text,)), *turns)


class ChatML:
    """The markup around messages.

    A message is `<|im_start|>`, its role, a newline, its content, `<|im_end|>` and a newline, each
    tokenized on its own, unless the content begins with the newline.

    Args:
        encode: converts plain text to ids.
        start, end: ids of `<|im_start|>` and `<|im_end|>`.
        supervise: "answers" supervises answers and their end-of-turn tokens, as ms-swift does, and
            writes nothing after the last end-of-turn token. The end-of-turn token of an empty
            answer is supervised only in the last message. "official" supervises what the
            fine-tuning script published with the model does: also `<|im_start|>`, `<|im_end|>` and
            the last newline of every message; or, without `official_markup`, answers with the
            end-of-turn token and the newline behind it.
        official_markup: see `supervise`.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        *,
        start: int,
        end: int,
        supervise: Supervise = "answers",
        official_markup: bool = True,
    ):
        self.start, self.end, self.newline = [start], [end], encode("\n")
        self.roles = {role: encode(role) for role in ("system", "user", "assistant")}
        self.official = supervise == "official"
        self.supervises_markup = self.official and official_markup

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> Iterator[Piece]:
        """Yields the pieces of a conversation; with `prompt`, ends with the start of an answer."""
        for number, (role, body, has_newline) in enumerate(messages, 1):
            answer = role == "assistant"
            yield Piece(self.start, self.supervises_markup)
            yield Piece(self.roles[role] if has_newline else self.roles[role] + self.newline)
            for piece in body:
                is_text = piece.image is None and not piece.masked
                yield piece._replace(supervised=answer and is_text)
            is_last = number == len(messages)
            # ms-swift supervises the end-of-turn token of every answer with text, and of the last
            # message even if it is empty (`use_dynamic_eos` in swift/llm/utils/template.py, 2.6.1).
            ends_answer = answer and (is_last or any(piece.ids for piece in body))
            official = self.supervises_markup or (self.official and answer)
            yield Piece(self.end, ends_answer or official)
            if self.official or prompt or not is_last:
                yield Piece(self.newline, official)
        if prompt:
            yield Piece(self.start + self.roles["assistant"] + self.newline)

    def recent(self, messages: Sequence[Message], limit: int) -> list[Message]:
        """Returns `messages` without the oldest exchanges.

        A leading system message and the last question always stay. Going back from the newest, an
        exchange is kept while the system message and the kept exchanges have fewer than `limit`
        tokens in total; the last question is not counted. As in the published `chat`, all exchanges
        before the first one that does not fit are dropped.
        """
        system, rest = list(messages[:1]), list(messages[1:])
        if system and system[0].role != "system":
            system, rest = [], list(messages)
        questions = {index for index, message in enumerate(rest) if message.role == "user"}
        starts = sorted({0} | questions)
        first_kept = starts.pop()
        # `_length` counts a newline in front of each message; the first message has none.
        used = sum(map(self._length, system)) - len(self.newline)
        for start in reversed(starts):
            used += sum(map(self._length, rest[start:first_kept]))
            if used >= limit:
                break
            first_kept = start
        return system + rest[first_kept:]

    def _length(self, message: Message) -> int:
        newlines = self.newline if message.has_newline else 2 * self.newline
        markup = newlines + self.start + self.roles[message.role] + self.end
        return len(markup) + sum(len(piece.ids) for piece in message.body)


def truncate_left(pieces: Sequence[Piece], limit: int) -> list[Piece]:
    """Returns the last `limit` tokens, or fewer: an image's span that would be cut is removed."""
    excess = sum(len(piece.ids) for piece in pieces) - limit
    kept = list(pieces)
    while excess > 0:
        first = kept.pop(0)
        if first.image is None and len(first.ids) > excess:
            kept.insert(0, first._replace(ids=first.ids[excess:]))
        excess -= len(first.ids)
    return kept


def truncate_right(pieces: Sequence[Piece], limit: int) -> list[Piece]:
    """Returns the first `limit` tokens, or fewer: an image's span that would be cut is removed."""
    kept: list[Piece] = []
    for piece in pieces:
        if len(piece.ids) >= limit:
            if limit and (piece.image is None or len(piece.ids) == limit):
                kept.append(piece._replace(ids=piece.ids[:limit]))
            break
        kept.append(piece)
        limit -= len(piece.ids)
    return kept


def show(ids: Sequence[int], labels: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str:
    """Returns a sample as colored text for a terminal: supervised tokens green, the rest dim."""
    text = ""
    for run, supervised in runs(ids, labels, decode):
        color = 32 if supervised else 2
        text += f"\x1b[{color}m{run}\x1b[0m"
    return text


def runs(
    ids: Sequence[int], labels: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> Iterator[tuple[str, bool]]:
    """Yields a sample's text in runs of tokens that are all supervised (True) or all not.

    A token that is repeated many times in a row is written once, with a count.
    """
    pairs = zip(ids, labels, strict=True)
    for supervised, run in groupby(pairs, key=lambda pair: pair[1] >= 0):
        yield _with_counts([token_id for token_id, _ in run], decode), supervised


def _with_counts(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str:
    text = ""
    plain: list[int] = []
    for token_id, group in groupby(ids):
        count = len(list(group))
        if count > REPEATED:
            text += f"{decode(plain)}{decode([token_id])} x {count} "
            plain = []
        else:
            plain += [token_id] * count
    return text + decode(plain)
