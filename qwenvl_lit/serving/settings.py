"""The settings of the server. Nothing here imports FastAPI or torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from qwenvl_lit.settings import check_settings


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """What `conf/serve.yaml` describes.

    Raises:
        ValueError: names the key, what it may be and what it is.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    name: str | None = None
    keys: str | None = None  # path of a file
    rows: int | Literal["auto"] = "auto"
    context: int | Literal["auto"] = "auto"
    queue: int = 64
    max_choices: int = 8
    max_body_mb: float = 32.0
    body_s: float = 30.0
    max_images: int = 16
    max_image_mb: float = 16.0
    max_image_megapixels: float = 50.0
    image_s: float = 10.0
    allowed_hosts: Sequence[str] = ()
    workers: int = 4
    grace_s: float = 30.0

    def __post_init__(self):
        check_settings("serve", {item.name: getattr(self, item.name) for item in fields(self)})

    @property
    def most_answers(self) -> int:
        """The most answers at a time, running or waiting. `queue` counts requests."""
        assert self.rows != "auto"
        return (self.rows + self.queue) * self.max_choices

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 1e6)

    @property
    def max_image_bytes(self) -> int:
        return int(self.max_image_mb * 1e6)

    @property
    def max_image_pixels(self) -> int:
        return int(self.max_image_megapixels * 1e6)
