"""Converts the messages of a chat to token ids with Qwen-VL's own processor, without a template.

The text of a client stays text: it forges neither roles nor ends of turns, and names no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from pydantic import TypeAdapter, ValidationError
from vllm import envs
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media.connector import global_thread_pool
from vllm.renderers.base import BaseRenderer
from vllm.renderers.inputs.preprocess import parse_dec_only_prompt
from vllm.renderers.params import ChatParams
from vllm.utils.async_utils import make_async

from qwenvl_lit.images import MAX_IMAGE_PIXELS
from qwenvl_lit.serving.conversations import conversation_of
from qwenvl_lit.serving.errors import ApiError, refused_field
from qwenvl_lit.serving.images import ImageLoader
from qwenvl_lit.serving.schema import Message
from qwenvl_lit.serving.vllm.folder import processor_of, small_files
from qwenvl_lit.serving.vllm.tokenizer import Tokenizer
from qwenvl_lit.types import DataError, Sample

SETTINGS = "qwenvl_lit"  # the key of ours in `--additional-config`
MESSAGES = TypeAdapter(list[Message])
# Options of a template, and the values that ask for nothing
TEMPLATE_OPTIONS: Mapping[str, Sequence[Any]] = {
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "reasoning_effort": (None, "none"),
    "tools": (None, []),
}

Rendered = tuple[list[dict[str, Any]], Any]


class Renderer(BaseRenderer[Tokenizer]):
    """Renders chats. Images come from data URIs, or from hosts of `--allowed-media-domains`."""

    def __init__(self, config: VllmConfig, tokenizer: Tokenizer | None):
        super().__init__(config, tokenizer)
        model = self.model_config
        folder = small_files(model.model, model.revision)
        self.processor = processor_of(folder, config.additional_config.get(SETTINGS))
        self.loader = ImageLoader(
            allowed_hosts=tuple(model.allowed_media_domains or ()),
            max_bytes=envs.VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB * 1_000_000,
            max_pixels=min(envs.VLLM_MAX_IMAGE_PIXELS or MAX_IMAGE_PIXELS, MAX_IMAGE_PIXELS),
            seconds=envs.VLLM_IMAGE_FETCH_TIMEOUT,
        )
        # Fetching an image takes seconds, so that it has threads of its own.
        self._render_async = make_async(self.render_messages, executor=global_thread_pool)

    def render_messages(self, messages: Sequence[Any], params: ChatParams) -> Rendered:
        """Returns the messages, and the prompt with its images.

        Raises:
            VLLMValidationError: the messages cannot be answered; status 400.
        """
        _check_options(params)
        plain = [_plain(message) for message in messages]
        sample = self._sample(plain)
        prompt = parse_dec_only_prompt(self._without_image_tokens(sample))
        # Images that are not in the prompt belong to exchanges that were too long ago.
        pixels = sample.vision["pixel_values"]
        if len(pixels):
            images = [Image.fromarray(image.numpy()) for image in pixels]
            prompt["multi_modal_data"] = {"image": images}
        return plain, prompt

    async def render_messages_async(self, messages: Sequence[Any], params: ChatParams) -> Rendered:
        return await self._render_async(messages, params)

    def _sample(self, messages: Sequence[Mapping[str, Any]]) -> Sample:
        # Without a processor, images were switched off with --limit-mm-per-prompt.
        limits = self.mm_processor.info.allowed_mm_limits if self.mm_processor else {"image": 0}
        try:
            conversation = conversation_of(
                MESSAGES.validate_python(messages),
                self.loader.load,
                max_images=limits["image"],
                one_text=self.processor.continues_text,
                markup_in_answers=True,
            )
            return self.processor.encode(conversation, prompt=True)
        except ValidationError as error:
            first = error.errors()[0]
            first["loc"] = ("body", "messages", *first["loc"])
            refused = refused_field([first], {})
            raise VLLMValidationError(refused.message, parameter=refused.param) from None
        except ApiError as error:
            raise VLLMValidationError(error.message, parameter=error.param) from None
        except DataError as error:
            raise VLLMValidationError(str(error), parameter="messages") from None

    def _without_image_tokens(self, sample: Sample) -> list[int]:
        """Returns the ids with `<img></img>` for an image, which vLLM replaces by its span."""
        padding = set(sample.vision_positions.tolist())
        ids = sample.input_ids.tolist()
        return [token_id for index, token_id in enumerate(ids) if index not in padding]


def _plain(message: Any) -> dict[str, Any]:
    """Returns a message as a dict without iterators, which pydantic leaves in those of requests."""
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        parts = []
        for part in content:
            parts.append(dict(part) if isinstance(part, Mapping) else part)
        content = parts
    given = {key: value for key, value in message.items() if value is not None}
    return {**given, "content": content}


def _check_options(params: ChatParams) -> None:
    for name, neutral in TEMPLATE_OPTIONS.items():
        if params.chat_template_kwargs.get(name) not in neutral:
            raise VLLMValidationError(
                f"{name} is not supported by Qwen-VL; leave it out", parameter=name
            )
    if params.chat_template is not None:
        raise VLLMValidationError(
            "chat_template is not supported: Qwen-VL has no template; leave it out",
            parameter="chat_template",
        )
