"""Rows of the demo as messages of requests."""

import base64
from pathlib import Path

from qwenvl_lit.grounding import tags_from_object
from qwenvl_lit.types import Conversation, GroundedObject, ImageSource


def messages_of(row: Conversation) -> list[dict]:
    """Returns the question of a row as the messages of a request."""
    content = []
    for part in row.prompt().turns[-1].parts:
        if isinstance(part, ImageSource):
            content.append({"type": "image_url", "image_url": {"url": data_uri(part.source)}})
        elif isinstance(part, GroundedObject):
            tags = tags_from_object(part, row.images)
            text = "".join(tag if isinstance(tag, str) else tag.value for tag in tags)
            content.append({"type": "text", "text": text})
        else:
            content.append({"type": "text", "text": part})
    return [{"role": "user", "content": content}]


def data_uri(image: Path | bytes) -> str:
    content = image.read_bytes() if isinstance(image, Path) else image
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
