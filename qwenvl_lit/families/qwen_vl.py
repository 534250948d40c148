"""Qwen-VL and Qwen-VL-Chat: a picture is a span of 256 tokens, a box is tagged text, a conversation is ChatML or plain text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from qwenvl_lit.chatml import ChatML, Message, Piece, Supervise, cut_left, with_system
from qwenvl_lit.families.checkpoint import VOCABULARY, few_bits, find_checkpoint, open_shard, stored_tensors
from qwenvl_lit.families.pixels import normalised, resized
from qwenvl_lit.grounding import Tag, object_in_frame, objects_from_tags, tags_from_object
from qwenvl_lit.models.config import QWEN_VL_VISUAL, QwenVLConfig
from qwenvl_lit.models.flops import training_flops
from qwenvl_lit.models.qwen_vl import QwenVLForCausalLM, file_shapes
from qwenvl_lit.models.tokenizer import TINY_VOCABULARY, QwenTokenizer
from qwenvl_lit.types import Batch, Conversation, DataError, Dropped, GroundedObject, Part, Picture, Prediction, Sample, Turn

NAMED_PICTURE = re.compile(r"Picture\s*\d+\s*[:：]\s*$")

Template = Literal["chatml", "raw"]
TooLong = Literal["error", "drop", "truncate_left"]


@contextmanager
def _naming(conversation: Conversation) -> Iterator[None]:
    """Faults get the name of the row they are in."""
    try:
        yield
    except DataError as fault:
        raise type(fault)(f"{conversation.where}: sample {conversation.id!r}: {fault}".removeprefix(": ")) from fault


class QwenVLProcessor:
    """Conversations to tensors, and generated ids to text and boxes.

    Args:
        span: tokens of a picture, its two tags not counted.
        side: width and height of the resized pictures, in pixels.
        template: "chatml"; or "raw", for the base model: the texts one after the other, an answer ends with `<|endoftext|>`.
        system: the system message of conversations without one: None is the default sentence, "" an empty message. Not for "raw".
        supervise: see `ChatML`; "raw" learns answers and their end marks.
        max_length: most tokens of a training sample.
        too_long: what becomes of longer ones: "error"; "drop": they are left out; or "truncate_left": the last tokens are kept, and
            pictures whole or not at all.
        window: a prompt's system message and earlier exchanges have fewer tokens than this; older exchanges are left out. Not for "raw".
    """

    def __init__(
        self,
        tokenizer: QwenTokenizer,
        *,
        span: int = 256,
        side: int = 448,
        template: Template = "chatml",
        system: str | None = None,
        supervise: Supervise = "answers",
        max_length: int | None = None,
        too_long: TooLong = "error",
        window: int = 6144,
    ):
        for name, value, choices in (
            ("template", template, Template),
            ("supervise", supervise, Supervise),
            ("too_long", too_long, TooLong),
        ):
            if value not in get_args(choices):
                raise ValueError(f"{name} is one of {', '.join(get_args(choices))}, got {value!r}")
        self.tokenizer = tokenizer
        self.span = span
        self.side = side
        self.template = template
        self.system = system
        self.supervise = supervise
        self.max_length = max_length
        self.too_long = too_long
        self.window = window
        self.chatml = ChatML(tokenizer.encode, start=tokenizer.im_start_id, end=tokenizer.im_end_id, supervise=supervise)
        self.pad_id = tokenizer.pad_id
        self.stop_ids = (tokenizer.pad_id,) if template == "raw" else (tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.pad_id)

    def encode(self, conversation: Conversation, *, prompt: bool = False) -> Sample:
        """Ids and labels in one pass; `prompt` leaves the answer out and opens the assistant's turn.

        A picture is introduced by `Picture k: ` and followed by a newline, unless the text before it does the former, or in "raw".

        Raises:
            Dropped: the sample is too long, and that is what `too_long` says.
            DataError: a picture is unreadable, a box names one that does not exist, the sample is too long, or nothing can be learned.
        """
        with _naming(conversation):
            return self._sample(conversation, self._fated(conversation, prompt))

    def length(self, conversation: Conversation, *, prompt: bool = False) -> tuple[int, int]:
        """Tokens of `encode(conversation, prompt=prompt)`, and how many of them are learned, without decoding a picture.

        Raises:
            DataError: as `encode`, but for pictures that cannot be decoded.
        """
        with _naming(conversation):
            pieces = self._fated(conversation, prompt)
        tokens, learned = (sum(len(piece.ids) for piece in some) for some in (pieces, [piece for piece in pieces if piece.learned]))
        return tokens, learned - pieces[0].learned  # nothing predicts the first token

    @property
    def settings(self) -> dict[str, Any]:
        """What decides ids and labels, as plain data: two processors with equal settings encode alike."""
        vocabulary = hashlib.sha256(self.tokenizer.path.read_bytes()).hexdigest()
        names = ("span", "side", "template", "system", "supervise", "max_length", "too_long", "window")
        return {"processor": type(self).__name__, "vocabulary": vocabulary, **{name: getattr(self, name) for name in names}}

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text, special tokens by their names; a picture's span shows nothing between its tags."""
        return self.tokenizer.decode(ids)

    def decode(self, ids: Sequence[int], conversation: Conversation) -> Prediction:
        """The answer up to the first stop id. Boxes are taken to be in the last picture of the prompt."""
        answer = takewhile(lambda id: id not in self.stop_ids, ids)
        return self.read(self.tokenizer.decode(answer, skip_special=True, keep=self.tokenizer.tag_ids).strip(), conversation)

    def read(self, text: str, conversation: Conversation) -> Prediction:
        pictures = conversation.prompt().pictures
        parts: Sequence[Part] = objects_from_tags(text, picture=max(len(pictures) - 1, 0))
        if pictures:
            parts = [object_in_frame(part, "pixel", pictures) if isinstance(part, GroundedObject) else part for part in parts]
        return Prediction(conversation=conversation, text=text, parts=tuple(parts), reference=self._reference(conversation))

    def option_ids(self, conversation: Conversation) -> list[list[int]]:
        """Ids of each of the conversation's options, as they follow its prompt; after a raw one, which ends in a word, with a space."""
        return [self.tokenizer.encode(f" {option}" if self.template == "raw" else option) for option in conversation.options]

    def _reference(self, conversation: Conversation) -> str | None:
        if conversation.answer is None:
            return None
        written = self._written(conversation.answer, len(conversation.prompt().pictures), conversation.pictures)
        return "".join(item.value if isinstance(item, Tag) else "<img></img>" if isinstance(item, int) else item for item in written)

    def _fated(self, conversation: Conversation, prompt: bool) -> list[Piece]:
        pieces = self._pieces(conversation, prompt)
        return [piece._replace(learned=False) for piece in pieces] if prompt else self._fitted(pieces)

    def _pieces(self, conversation: Conversation, prompt: bool) -> list[Piece]:
        turns: Sequence[Turn] = conversation.prompt().turns if prompt else conversation.turns
        if self.template == "chatml":
            turns = with_system(turns, self.system)
        messages, pictures_before = [], 0
        for turn in turns:
            messages.append(Message(turn.role, list(self._body(turn, pictures_before, conversation.pictures))))
            pictures_before += sum(isinstance(part, Picture) for part in turn.parts)
        if self.template == "raw":
            return list(self._raw(messages))
        if prompt:
            messages = self.chatml.recent(messages, self.window)
        return list(self.chatml.render(messages, prompt=prompt))

    def _raw(self, messages: Sequence[Message]) -> Iterator[Piece]:
        for role, body in messages:
            for piece in body:
                yield piece._replace(learned=role == "assistant" and piece.picture is None)
            if role == "assistant":
                yield Piece([self.pad_id], learned=True)

    def _body(self, turn: Turn, pictures_before: int, pictures: Sequence[Picture]) -> Iterator[Piece]:
        """Texts that stand side by side are one run for the tokenizer; only tags and pictures become special ids."""
        special, text = self.tokenizer.special, ""
        for item in self._written(turn, pictures_before, pictures):
            if isinstance(item, str):
                text += item
                continue
            if text:
                yield Piece(self.tokenizer.encode(text))
            text = ""
            if isinstance(item, Tag):
                yield Piece([special[item.value]])
            else:
                yield Piece([special["<img>"], *[special["<imgpad>"]] * self.span, special["</img>"]], picture=item)
        if text:
            yield Piece(self.tokenizer.encode(text))

    def _written(self, turn: Turn, pictures_before: int, pictures: Sequence[Picture]) -> Iterator[str | Tag | int]:
        """A turn as text, tags, and pictures by index."""
        index, before = pictures_before, ""
        for part in turn.parts:
            if isinstance(part, str):
                yield part
                before += part
                continue
            if isinstance(part, GroundedObject):
                yield from tags_from_object(part, pictures)
            elif self.template == "raw" or NAMED_PICTURE.search(before):
                yield index
                index += 1
            else:
                yield f"Picture {index + 1}: "
                yield index
                yield "\n"
                index += 1
            before = ""

    def _fitted(self, pieces: list[Piece]) -> list[Piece]:
        length = sum(len(piece.ids) for piece in pieces)
        if self.max_length and length > self.max_length:
            excess = f"{length} tokens are more than max_length={self.max_length}"
            if self.too_long == "drop":
                raise Dropped(excess)
            if self.too_long == "error":
                raise DataError(f"{excess}; raise it, or set too_long=drop or truncate_left")
            pieces = cut_left(pieces, self.max_length)
        if not any(piece.learned for piece in pieces[1:]):  # the first token has nothing before it to be predicted from
            raise DataError("no answer to learn from; is the last turn the assistant's, and is max_length above the answer's length?")
        return pieces

    def _sample(self, conversation: Conversation, pieces: Sequence[Piece]) -> Sample:
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        pixels: list[torch.Tensor] = []
        for piece in pieces:
            if piece.picture is not None:
                positions += range(len(ids) + 1, len(ids) + 1 + self.span)
                pixels.append(resized(conversation.pictures[piece.picture].open(), self.side))
            ids += piece.ids
            labels += piece.ids if piece.learned else [-100] * len(piece.ids)
        return Sample(
            conversation=conversation,
            input_ids=torch.tensor(ids, dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.int64),
            vision_positions=torch.tensor(positions, dtype=torch.int64),
            vision={"pixel_values": torch.stack(pixels) if pixels else torch.empty(0, self.side, self.side, 3, dtype=torch.uint8)},
        )


class QwenVL:
    """The family: a checkpoint's weights and vocabulary, or random weights of any size.

    Args:
        path: a checkpoint's folder or its name on the hub; None for random weights.
        weights: "checkpoint", or "random": the network of `path` (a folder's, else the published one) as it starts, to try and to measure.
        config: fields of `QwenVLConfig` for random weights without `path`; `vocab_size` and `image_start_id` follow from the vocabulary.
        vocabulary: a file in tiktoken's format, or "tiny" for the one of the demo; None: the checkpoint's `qwen.tiktoken`.
        download: whether a hub name may be fetched.
        device_map, max_memory: how transformers spreads the network over cards and host memory, say "auto" and {0: "10GiB"}; to predict and
            to chat only. None: all of it on one device.
        dtype: of the weights, by torch's name.
        seed: of random weights.
        checkpointing: to train, keep what goes into a block and compute the rest again for the gradients: less memory, a third more work.
        window: as for `QwenVLProcessor`; None: that of the checkpoint's `generation_config.json`, else the published 6144.

    The others are those of `QwenVLProcessor`.
    """

    parts: Mapping[str, str] = {
        "vision": "transformer.visual",
        "resampler": "transformer.visual.attn_pool",
        "language": "transformer.h",
        "embeddings": "transformer.wte",
        "head": "lm_head",
    }
    packable = True

    def __init__(
        self,
        *,
        path: str | None = None,
        weights: Literal["checkpoint", "random"] = "checkpoint",
        config: Mapping[str, Any] | None = None,
        vocabulary: str | None = None,
        download: bool = True,
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[int | str, str] | None = None,
        template: Template = "chatml",
        system: str | None = None,
        supervise: Supervise = "answers",
        max_length: int | None = None,
        too_long: TooLong = "error",
        window: int | None = None,
        dtype: str = "float32",
        seed: int = 0,
        checkpointing: bool = False,
    ):
        if (path is None) == (config is None):
            raise ValueError("a model has either a `path`, or a `config` for random weights")
        if weights not in ("checkpoint", "random"):
            raise ValueError(f"weights is checkpoint or random, got {weights!r}")
        self.random = weights == "random" or path is None
        if self.random and device_map is not None:
            raise ValueError("random weights are drawn on one device; device_map is for checkpoints")
        if path is None and vocabulary is None:
            raise ValueError('random weights need a `vocabulary`: a file, or "tiny"')
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype is a name of torch's, as float32 or bfloat16, got {dtype!r}")
        self.path = path
        self.sizes = dict(config or {})
        self.vocabulary = vocabulary
        self.download = download
        self.device_map = device_map
        self.max_memory = max_memory
        self.prompting: dict[str, Any] = {
            "template": template,
            "system": system,
            "supervise": supervise,
            "max_length": max_length,
            "too_long": too_long,
        }
        self.window = window
        self.dtype = dtype
        self.seed = seed
        self.checkpointing = checkpointing

    @cached_property
    def folder(self) -> Path | None:
        """Where the checkpoint is, fetched if need be; None if all there is are the published sizes and random weights."""
        if not self.random:
            return find_checkpoint(str(self.path), download=self.download)
        return Path(self.path).expanduser() if self.path and Path(self.path).expanduser().is_dir() else None

    @cached_property
    def tokenizer(self) -> QwenTokenizer:
        if self.vocabulary is not None:
            return QwenTokenizer(TINY_VOCABULARY if self.vocabulary == "tiny" else self.vocabulary)
        if self.folder is None:
            raise ValueError(
                f"random weights of {self.path} come without a vocabulary: give model.vocabulary=FILE, a copy of its {VOCABULARY}, or "
                f"model.vocabulary=tiny, which cuts words into more tokens"
            )
        return QwenTokenizer(self.folder / VOCABULARY)

    @cached_property
    def config(self) -> QwenVLConfig:
        """The network's config.

        Raises:
            ValueError: it and the vocabulary disagree.
        """
        tokenizer = self.tokenizer
        if self.folder is not None:
            config = QwenVLConfig.from_pretrained(self.folder)
        else:
            start = {"image_start_id": tokenizer.img_start_id}
            if self.path is not None:  # the published sizes, embeddings included
                config = QwenVLConfig(visual={**QWEN_VL_VISUAL, **start})
            else:
                ids = -(-tokenizer.vocab_size // 16) * 16  # a round number of rows
                visual = {**start, **self.sizes.get("visual", {**QWEN_VL_VISUAL, **start})}
                config = QwenVLConfig(**{"vocab_size": ids, **self.sizes, "visual": visual})
        assert config.visual is not None  # the config fills it in
        configured = config.visual["image_start_id"]
        if configured != tokenizer.img_start_id:  # the last ids but two, hence this covers the number of ids
            raise ValueError(
                f"<img> is {tokenizer.img_start_id} in {tokenizer.path}, but `image_start_id` of the model's config is {configured}; "
                f"choose the vocabulary of this model"
            )
        return config

    @cached_property
    def generation(self) -> GenerationConfig:
        """What `generation_config.json` of the checkpoint says; without the file, what transformers does by itself."""
        stored = self.folder is not None and (self.folder / "generation_config.json").exists()
        return GenerationConfig.from_pretrained(self.folder) if stored else GenerationConfig()

    def processor(self) -> QwenVLProcessor:
        assert self.config.visual is not None
        window = self.window or getattr(self.generation, "max_window_size", 6144)
        side = self.config.visual["image_size"]
        return QwenVLProcessor(self.tokenizer, span=self.config.n_queries, side=side, window=window, **self.prompting)

    def outline(self) -> QwenVLForCausalLM:
        """The network on the meta device: names, shapes and types, without weights."""
        with torch.device("meta"):
            return QwenVLForCausalLM(self.config).to(getattr(torch, self.dtype))

    def load(self, device: torch.device | str = "cpu", *, quantization: Mapping[str, Any] | None = None) -> QwenVLForCausalLM:
        """The network in evaluation mode on `device`, or spread out by `device_map`. Weights go there tensor by tensor, and those of linear
        layers but the head become what `quantization` says, settings of `BitsAndBytesConfig`, on their way.

        Random weights depend on `seed` alone up to 1 B parameters; larger networks are drawn on `device`, by its own generator.

        Raises:
            DataError: the checkpoint's tensors are not those of its config.
        """
        dtype = getattr(torch, self.dtype)
        if self.random:
            model = self._drawn(torch.device(device), dtype)
            return self.quantized(model, device, quantization) if quantization else model
        assert self.folder is not None
        shapes = file_shapes(self.outline())
        try:
            tensors = stored_tensors(self.folder, shapes)
            if self.device_map is None:
                model = self._placed(tensors, device, quantization)
            else:
                offloaded = TemporaryDirectory()  # what fits neither cards nor memory
                places = {"device_map": self.device_map, "max_memory": self.max_memory, "offload_folder": offloaded.name}
                places["quantization_config"] = self._few_bits(quantization)
                model = QwenVLForCausalLM.from_pretrained(self.folder, dtype=dtype, **places)
                model.offloaded = offloaded  # removed with the model
        finally:
            open_shard.cache_clear()  # which keeps the last files mapped
        model.generation_config = self.generation
        return model.eval()

    def quantized(self, model: QwenVLForCausalLM, device: torch.device | str, quantization: Mapping[str, Any]) -> QwenVLForCausalLM:
        """The network with the weights of `model`, which may be elsewhere, as `load` gives it."""
        placed = self._placed(model.state_dict(), device, quantization)
        placed.generation_config = model.generation_config
        return placed.eval()

    def _placed(self, tensors: Mapping[str, Any], device: torch.device | str, quantization: Mapping[str, Any] | None) -> QwenVLForCausalLM:
        options = {"config": self.config, "dtype": getattr(torch, self.dtype), "quantization_config": self._few_bits(quantization)}
        return QwenVLForCausalLM.from_pretrained(None, state_dict=tensors, device_map={"": device}, **options)

    def _few_bits(self, quantization: Mapping[str, Any] | None) -> BitsAndBytesConfig | None:
        return few_bits(quantization, dtype=getattr(torch, self.dtype), but=[self.parts["head"]]) if quantization else None

    def _drawn(self, device: torch.device, dtype: torch.dtype) -> QwenVLForCausalLM:
        with torch.device("meta"):
            parameters = QwenVLForCausalLM(self.config).num_parameters()
        place = torch.device("cpu") if parameters < 1e9 else device
        drawn_in = torch.float32 if parameters < 1e9 else dtype  # a second copy of a large one would not fit
        with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
            generator = torch.cuda.default_generators[place.index or 0] if place.type == "cuda" else torch.default_generator
            generator.manual_seed(self.seed)
            model = AutoModelForCausalLM.from_config(self.config, dtype=drawn_in)
        return model.to(device=device, dtype=dtype).eval()

    def inputs(self, batch: Batch, *, generate: bool = False) -> dict[str, Any]:
        """Arguments of `forward`, for rows padded on the right, or of `generate`, for rows padded on the left.

        The former get no mask: causal attention never sees what follows a token, and runs faster without.
        """
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        if generate:
            inputs |= {"attention_mask": batch.attention_mask}
        if len(batch.vision_positions):
            pixels = batch.vision["pixel_values"]
            pixels = normalised(pixels) if pixels.dtype == torch.uint8 else pixels
            inputs |= {"pixel_values": pixels, "vision_positions": batch.vision_positions}
        if len(batch.target_positions) and not generate:
            inputs |= {"labels": batch.labels, "target_positions": batch.target_positions}
        return {name: value for name, value in inputs.items() if value is not None}

    def flops(self, batch: Batch, trained: Mapping[str, float]) -> torch.Tensor:
        counts = {"pictures": len(batch.vision.get("pixel_values", ())), "targets": len(batch.target_positions)}
        rows = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        return training_flops(self.config, **rows, **counts, trained=trained)
