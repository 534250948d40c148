"""Questions of lmms-eval's tasks: their messages as conversations, their settings as ours."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from qwenvl_lit.data.readers.question import image_of, valid_text
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.grounding import objects_from_tags
from qwenvl_lit.types import Conversation, DataError, Part, Role, Turn

ROLES: tuple[Role, ...] = ("system", "user", "assistant")
GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
# Settings of tasks that are meant for other models, with the values that ask for nothing here.
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "image_aspect_ratio": ("original",),  # LLaVA's: whether images are padded or cut into tiles
    "num_return_sequences": (1,),
    "skip_special_tokens": (True,),
    "use_cache": (True,),
}
# Fields of `Generation` that take another form here, or that a task cannot decide.
NOT_FROM_TASKS = ("compile", "stop_words_ids")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSettings:
    """How the questions of a task are to be answered.

    Attributes:
        generation: fields of `Generation` that the task sets.
        stops: texts that end an answer and are no part of it.
    """

    generation: Mapping[str, Any]
    stops: tuple[str, ...] = ()

    def answer(self, text: str) -> str:
        """Returns the answer up to the first stop text, without white space at its ends."""
        found = [text.find(stop) for stop in self.stops]
        end = min((start for start in found if start >= 0), default=len(text))
        return text[:end].strip()


def task_settings(task: str, settings: Mapping[str, Any]) -> TaskSettings:
    """Returns the settings that a task gives as `generation_kwargs`.

    A temperature above 0 means sampling unless `do_sample` is false. Greedy decoding has no use for
    `temperature`, `top_p` and `top_k`, so their values are dropped then, as transformers does.

    >>> task_settings("mme", {"max_new_tokens": 16, "temperature": 0, "until": "Q:"})
    ... # doctest: +NORMALIZE_WHITESPACE
    TaskSettings(generation={'max_new_tokens': 16, 'do_sample': False, 'temperature': 1.0,
                             'top_p': 1.0, 'top_k': 0}, stops=('Q:',))

    Raises:
        DataError: a setting is not supported.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    stops = _stops(task, given.pop("until", ()))
    known = [field.name for field in fields(Generation) if field.name not in NOT_FROM_TASKS]
    generation: dict[str, Any] = {}
    for name, value in given.items():
        if name in known:
            generation[name] = value
        elif name not in NEUTRAL or value not in NEUTRAL[name]:
            raise DataError(_unsupported(task, name, value, known))
    if "do_sample" in generation or "temperature" in generation:
        samples = generation.get("do_sample", True) and generation.get("temperature", 1) != 0
        if samples:
            generation["do_sample"] = True
        else:
            _warn_of_temperature(task, generation.get("temperature", 0))
            generation |= GREEDY
    return TaskSettings(generation=generation, stops=stops)


def _stops(task: str, until: Any) -> tuple[str, ...]:
    stops = (until,) if isinstance(until, str) else until
    is_list = isinstance(stops, Sequence)
    if not is_list or not all(isinstance(stop, str) and stop for stop in stops):
        raise DataError(f"task {task}: until must be a text or a list of texts, got {until!r:.200}")
    return tuple(stops)


def _unsupported(task: str, name: str, value: Any, known: Sequence[str]) -> str:
    message = f"task {task}: the generation setting {name}={value!r:.100} is not supported"
    if name in NEUTRAL:
        neutral = NEUTRAL[name][0]
        return f"{message}; to evaluate without it: --gen_kwargs {name}={neutral}"
    return f"{message}; there are until, {', '.join(known)}"


def _warn_of_temperature(task: str, temperature: float) -> None:
    if temperature not in (0, 1):
        log.warning("task %s: do_sample=false, so temperature=%g has no effect", task, temperature)


def conversation_of(
    messages: Sequence[Mapping[str, Any]],
    *,
    row: str,
    read_options: ReadOptions,
    continues_text: bool,
) -> Conversation:
    """Returns the conversation whose last message is to be answered.

    As in the server, text of the user may have `<ref>`, `<box>` and `<quad>` markup. Other tags
    stay text: `<img>path</img>` names no file.

    Args:
        messages: in lmms-eval's form, {"role", "content": [{"type": "text", "text"}, {"type":
            "image", "url": image, path or address}]}; content may be text alone.
        row: task and number of the row, which become the id of the conversation.
        continues_text: the model is a base model, which reads one message of the user.

    Raises:
        DataError: there is a video, audio or something else that the model cannot read.
    """
    turns: list[Turn] = []
    images = 0
    for number, message in enumerate(messages, 1):
        role = message.get("role")
        if role not in ROLES:
            raise DataError(f"{row}: message {number} has the role {role!r:.50}")
        content = message.get("content")
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts: list[Part] = []
        for item in items or ():
            read = _parts_of(item, role, images, row, read_options)
            images += item["type"] == "image"
            parts += read
        turns.append(Turn(role=role, parts=tuple(parts)))
    _check_turns(turns, row, continues_text=continues_text)
    return Conversation(id=row, turns=tuple(turns))


def _parts_of(
    item: Mapping[str, Any], role: Role, images: int, row: str, read_options: ReadOptions
) -> tuple[Part, ...]:
    """Returns the parts of an item of the content of a message.

    Args:
        images: number of images before it.
    """
    match item:
        case {"type": "text", "text": text}:
            text = valid_text(text, f"text of {row}")
            if role == "user":
                return objects_from_tags(text, image=max(images - 1, 0))
            return (text,)
        case {"type": "image", "url": image}:
            try:
                return (image_of(image, read_options),)
            except DataError as error:
                raise type(error)(f"{row}: {error}") from None
        case _:
            kind = item.get("type") if isinstance(item, Mapping) else item
            raise DataError(
                f"{row} has content of type {kind!r:.50}: qwenvl_lit answers questions about "
                f"images and text; choose tasks without video and audio"
            )


def _check_turns(turns: Sequence[Turn], row: str, *, continues_text: bool) -> None:
    roles = [turn.role for turn in turns]
    after_system = roles[1:] if roles[:1] == ["system"] else roles
    expected = [("user", "assistant")[number % 2] for number in range(len(after_system))]
    if not after_system or after_system != expected or after_system[-1] != "user":
        raise DataError(
            f"{row}: messages must go user, assistant, ..., user, after at most one system "
            f"message; got {', '.join(roles) or 'none'}"
        )
    if continues_text and len(turns) > 1:
        raise DataError(
            f"{row} has {len(turns)} messages ({', '.join(roles)}), and a base model continues one "
            f"text; evaluate a chat model, or leave out system_prompt"
        )
