"""The text of an answer, made from token ids while they arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"  # what bytes of an unfinished character are decoded to


class AnswerText:
    """Collects the text of an answer: complete characters, up to the first stop string.

    White space at both ends is left out, as in the answers of `predict`. What may be part of it, or
    of a stop string, is held back until that is certain.

    Args:
        decode: converts ids to text. Ids that end within a character give `INCOMPLETE` there.
        stops: texts that end the answer and are no part of it.

    Attributes:
        text: what `add` and `end` have returned.
        stopped: whether a stop string has ended the answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        self.text = ""
        self.stopped = False
        self._decode = decode
        self._stops = stops
        self._ids: list[int] = []  # that end within a character
        self._held = ""

    def add(self, ids: Sequence[int]) -> str:
        """Returns the text that is certain after these ids and was not before."""
        self._ids += ids
        text = self._decode(self._ids)
        if text.endswith(INCOMPLETE):
            return ""
        self._ids.clear()
        return self._release(text, is_last=False)

    def end(self) -> str:
        """Returns the rest of the text; no ids follow."""
        text = self._decode(self._ids) if self._ids else ""
        self._ids.clear()
        return self._release(text, is_last=True)

    def _release(self, text: str, *, is_last: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [self._held.find(stop) for stop in self._stops]
        starts = [start for start in found if start >= 0]
        if starts:
            self.stopped = True
            end = min(starts)
        elif is_last:
            end = len(self._held)
        else:
            end = len(self._held) - self._beginning_of_stop()
        certain = self._held[:end].rstrip()
        self._held = self._held[len(certain) :]
        if not self.text:
            certain = certain.lstrip()
        self.text += certain
        return certain

    def _beginning_of_stop(self) -> int:
        """Returns how many of the last characters may begin a stop string."""
        longest = 0
        for stop in self._stops:
            for count in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:count]):
                    longest = count
                    break
        return longest
