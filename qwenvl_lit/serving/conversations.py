"""Turns the messages of a request into a conversation.

The text of a client stays text: `<img>path</img>` names no file, and names of special tokens forge
neither roles nor ends of turns. Only `<ref>`, `<box>` and `<quad>` are read as markup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwenvl_lit.data.readers.prompts import fill_prompt
from qwenvl_lit.data.readers.question import valid_text
from qwenvl_lit.grounding import objects_from_tags
from qwenvl_lit.serving.errors import ApiError
from qwenvl_lit.serving.schema import ImagePart, Message, TextPart
from qwenvl_lit.types import (
    QUESTION_ID,
    Conversation,
    DataError,
    GroundedObject,
    ImageSource,
    Part,
    Role,
    Turn,
)

WRONG = "invalid_value"  # code of errors
LoadImage = Callable[[str], ImageSource]
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


def conversation_of(
    messages: Sequence[Message],
    load: LoadImage,
    *,
    max_images: int,
    one_text: bool,
    markup_in_answers: bool,
) -> Conversation:
    """Returns the conversation whose last message is to be answered.

    Args:
        load: opens an image by its address, within limits.
        one_text: the model continues a text and knows no messages: there has to be one, the
            user's.
        markup_in_answers: read markup in messages of the assistant, too.

    Raises:
        ApiError: the messages are none that the model can answer, or an image cannot be used.
    """
    _check_roles(messages, one_text=one_text)
    _check_images(messages, max_images)
    turns, images = [], 0
    for number, message in enumerate(messages):
        role = ROLES[message.role]
        parts: list[Part] = []
        for index, part in enumerate(message.content):
            param = f"messages[{number}].content[{index}]"
            if isinstance(part, TextPart):
                has_markup = role == "user" or (role == "assistant" and markup_in_answers)
                parts += _text_parts(part.text, images, param, has_markup=has_markup)
                continue
            parts.append(_image(part, load, param))
            images += 1
        turns.append(Turn(role=role, parts=tuple(parts)))
    return Conversation(id=QUESTION_ID, turns=tuple(turns))


def grounding_of(url: str, label: str, load: LoadImage, *, prompt: str) -> Conversation:
    """Returns the question where something is in an image.

    Args:
        prompt: text with `{image}` and `{question}`.

    Raises:
        ApiError: the image cannot be used, or the label is empty.
    """
    if not label.strip():
        raise ApiError(400, "label is empty: say what to look for", param="label", code=WRONG)
    question = GroundedObject(label=_valid(label, "label"))
    try:
        image = load(url)
    except DataError as error:
        raise refused(error, "image", code="bad_image") from None
    parts = fill_prompt(prompt, image=image, question=question)
    return Conversation(id=QUESTION_ID, turns=(Turn(role="user", parts=parts),))


def _check_roles(messages: Sequence[Message], *, one_text: bool) -> None:
    roles = [ROLES[message.role] for message in messages]
    if "system" in roles[1:]:
        index = roles.index("system", 1)
        message = f"messages[{index}] is a system message; it may only come first"
        raise ApiError(400, message, param=f"messages[{index}].role", code=WRONG)
    if roles[-1] != "user":
        message = f"the last message is of role {messages[-1].role}; it must be the user's"
        raise ApiError(400, message, param="messages", code=WRONG)
    if one_text and len(messages) > 1:
        raise ApiError(
            400,
            "this is a base model, which continues a text: send one message, of the user; it has "
            "no system message and no history",
            param="messages",
            code=WRONG,
        )
    last = messages[-1].content
    texts = [part.text for part in last if isinstance(part, TextPart)]
    if len(texts) == len(last) and not "".join(texts).strip():
        raise ApiError(400, "the last message is empty", param="messages", code=WRONG)


def _check_images(messages: Sequence[Message], most: int) -> None:
    images = 0
    for number, message in enumerate(messages):
        for index, part in enumerate(message.content):
            if not isinstance(part, ImagePart):
                continue
            images += 1
            param = f"messages[{number}].content[{index}]"
            if message.role != "user":
                message = "only messages of the user may have images"
                raise ApiError(400, message, param=param, code=WRONG)
            if images > most:
                message = f"there are more than {most} images"
                raise ApiError(400, message, param=param, code=WRONG)


def _image(part: ImagePart, load: LoadImage, param: str) -> ImageSource:
    try:
        return load(part.image_url.url)
    except DataError as error:
        raise refused(error, f"{param}.image_url.url", code="bad_image") from None


def _text_parts(text: str, images: int, param: str, *, has_markup: bool) -> tuple[Part, ...]:
    text = _valid(text, f"{param}.text")
    if not has_markup:
        return (text,)
    return objects_from_tags(text, image=max(images - 1, 0))


def _valid(text: str, param: str) -> str:
    try:
        return valid_text(text, "text")
    except DataError as error:
        raise refused(error, param, code="invalid_value") from None


def refused(error: DataError, param: str, *, code: str) -> ApiError:
    """Returns the error of a request for one about its data."""
    message = str(error).replace("image <bytes> ", "the image ")
    return ApiError(400, f"{param}: {message}", param=param, code=code)
