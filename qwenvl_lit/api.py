"""Models from Python: `from qwenvl_lit import QwenVL`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from torch import nn

from qwenvl_lit import build
from qwenvl_lit.data.collate import Pad
from qwenvl_lit.data.readers.prompts import fill_prompt
from qwenvl_lit.data.readers.question import (
    History,
    ImageLike,
    Query,
    conversation,
    image_of,
    question_options,
)
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.generation.answer import Answer
from qwenvl_lit.generation.attention_maps import AttentionMaps, Reading
from qwenvl_lit.generation.generation import Generation, with_settings
from qwenvl_lit.generation.hidden_states import hidden_states
from qwenvl_lit.grounding import to_frame
from qwenvl_lit.models.loading import device_named
from qwenvl_lit.models.protocols import Family
from qwenvl_lit.runs.model_types import is_hub_name
from qwenvl_lit.runs.run import check_base_model, find_model_on_hub, find_run
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.types import (
    QUESTION_ID,
    Batch,
    Conversation,
    DataError,
    GroundedObject,
    Sample,
    Turn,
)


class QwenVL:
    """A model that answers questions about images.

    A question is text, in which `<img>path-or-address</img>` is an image and `<ref>`, `<box>` and
    `<quad>` are read as markup. Or it is a list of texts and images: paths, encoded bytes, PIL
    images, `{"image": path-or-address}`, content items of OpenAI's API. A history is a list of
    [question, answer] pairs; calls do not change it, they return a longer one. `settings` are
    fields of `Generation`, such as `max_new_tokens`, `do_sample` and `seed`.

    A base model (`is_base_model`) continues a text as it stands, without chat markup, system
    message and history.

    Every method raises a `DataError` for an image that cannot be read and for a prompt that is too
    long.
    """

    def __init__(
        self,
        *,
        family: Family,
        model: nn.Module,
        device: torch.device,
        generation: Generation,
        read_options: ReadOptions,
    ):
        self.family = family
        self.model = model
        self.device = device  # of the prompts
        self.generation = generation
        self.read_options = read_options
        self.processor = family.processor()

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[int | str, str] | None = None,
        load_in_4bit: bool = False,
        template: str | None = None,
        base_model: str | Path | None = None,
        download: bool = True,
        trust: bool = False,
        verify: bool = True,
        cache: str | Path | None = None,
        **settings: Any,
    ) -> QwenVL:
        """Loads a checkpoint or a run, in evaluation mode.

        Args:
            source: a checkpoint folder or its name on the hub; or a run folder, a checkpoint file
                of a run, "latest", or an adapter folder of peft.
            device: None: the first GPU if there is one.
            dtype: of the weights; None: that of the run, bfloat16 for a checkpoint.
            device_map, max_memory: as in transformers, to spread a model over GPUs and host
                memory. They exclude `device`.
            load_in_4bit: quantize all linear layers but the head to 4 bits, a third of the memory.
                Needs bitsandbytes. A run whose adapter was trained on a 4-bit model always does.
            template: "chatml" or "raw", for a checkpoint of Qwen-VL; None: what its
                generation_config.json says.
            base_model: the checkpoint that an adapter folder belongs to; None: the one it names.
            download: whether a checkpoint may be downloaded.
            trust: build every class that the stored config of a run names, also such as are not
                part of this package.
            verify: compare weights with their checksums, if they have any.
            cache: folder for downloaded images; None: the one that the commands use.
            settings: defaults of generation for all calls. Without them greedy and at most 512
                tokens, or as in the run.

        Raises:
            DataError: `source` does not exist, is incomplete or is something else.
        """
        if not isinstance(source, str | Path) or not str(source):
            raise DataError(f"source must be a path or a name on the hub, got {source!r:.100}")
        if device is not None and device_map is not None:
            raise ValueError("give either device or device_map")
        # Unknown settings are refused before weights are read.
        own = [name for name in signature(cls.load).parameters if name != "settings"]
        with_settings(Generation(), settings, *own)
        device = device_named(device)
        given = {
            "path": None if base_model is None else str(base_model),
            "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
            "device_map": device_map,
            "max_memory": max_memory,
            "load_in_4bit": load_in_4bit or None,
            "download": download,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        name = str(source)
        if is_hub_name(name):
            run = find_model_on_hub(name, download=download, trust=trust, verify=verify)
        elif name == "latest" or Path(name).expanduser().exists():
            base = None if base_model is None else str(base_model)
            run = find_run(name, trust=trust, verify=verify, base_model=base)
            check_base_model(run, name)
        else:
            raise DataError(
                f"{name} is no folder, relative to {Path.cwd()}, and no hub name such as "
                f"Qwen/Qwen-VL-Chat"
            )
        is_checkpoint = run.checkpoint is None
        if base_model is not None and is_checkpoint:
            raise ValueError("base_model is for an adapter folder; a checkpoint needs none")
        if template is not None:
            if not is_checkpoint:
                raise ValueError("template is for a checkpoint; a run has its own")
            if "template" not in run.config["model"]:
                raise ValueError(f"template={template!r}: {name} has one template; leave it out")
            changes["template"] = template
        read_options = question_options(cache, run.config.get("data"))
        module = build.trained_module(run, changes, load_device=device, verify=verify)
        model = cls.from_module(module, read_options=read_options)
        model.generation = replace(model.generation, **settings)
        return model

    @classmethod
    def from_module(cls, module: VisionLanguageModule, *, read_options: ReadOptions) -> QwenVL:
        """Loads the weights of `module`, and returns its model in evaluation mode."""
        module.configure_model()
        return cls(
            family=module.family,
            model=module.model.eval(),
            device=module.load_device,
            generation=module.generation,
            read_options=read_options,
        )

    @property
    def is_base_model(self) -> bool:
        """Whether the model continues texts instead of answering questions."""
        return self.processor.continues_text

    def chat(
        self,
        query: Query,
        history: History | None = None,
        *,
        system: str | None = None,
        **settings: Any,
    ) -> tuple[Answer, History]:
        """Answers a question; returns the answer and the history with both.

        Args:
            system: the system message; None: the model's default.
        """
        *_, last = self.stream(query, history, system=system, **settings)
        return last

    def stream(
        self,
        query: Query,
        history: History | None = None,
        *,
        system: str | None = None,
        **settings: Any,
    ) -> Iterator[tuple[str, History]]:
        """Yields the answer so far, with the history, while it is generated.

        Each text begins with the one before and never ends within a character; the last one is the
        `Answer`. Of a thinking model, the texts before it begin with its thoughts, which the answer
        does not have. The caller may leave the iteration at any point.
        """
        start = perf_counter()
        generation = with_settings(self.generation, settings, "system")
        sample = self.processor.encode(self._conversation(query, history, system), prompt=True)
        generation = self._within_limit(generation, len(sample.input_ids))
        earlier = [list(pair) for pair in history or ()]
        question = list(query) if isinstance(query, list | tuple) else query
        token_ids: list[int] = []
        first_token = start

        def arriving_ids() -> Iterator[int]:
            nonlocal first_token
            for ids in self._generate_ids(generation, [sample], whole=generation.num_beams > 1):
                for token_id in ids:
                    if not token_ids:
                        first_token = perf_counter()
                    token_ids.append(token_id)
                    yield token_id

        text = ""
        for piece in self.processor.stream(arriving_ids()):
            text += piece
            stripped = text.strip()  # as in the finished answer
            yield stripped, [*earlier, [question, stripped]]
        prediction = self.processor.decode(token_ids, sample.conversation)
        tokens = (len(sample.input_ids), token_ids)
        answer = Answer(prediction, *tokens, perf_counter() - start, first_token - start)
        yield answer, [*earlier, [question, str(answer)]]

    def generate(
        self,
        prompts: Sequence[Query | Conversation],
        *,
        system: str | None = None,
        batch_size: int = 8,
        **settings: Any,
    ) -> list[Answer]:
        """Answers many independent questions; returns the answers in their order.

        Args:
            prompts: questions, or conversations, whose last question is answered.
            system: the system message of the questions; conversations have their own.
            batch_size: questions that are answered together.
        """
        if isinstance(prompts, str):
            raise ValueError("generate takes a list of questions; for one: generate([question])")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        generation = with_settings(self.generation, settings, "system", "batch_size")
        conversations = []
        for prompt in prompts:
            if not isinstance(prompt, Conversation):
                prompt = self._conversation(prompt, None, system)
            conversations.append(prompt)
        lengths = [self.processor.length(row, prompt=True).tokens for row in conversations]
        # Rows of a batch have similar lengths.
        longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        answers: dict[int, Answer] = {}
        for first in range(0, len(longest_first), batch_size):
            indices = longest_first[first : first + batch_size]
            start = perf_counter()
            samples = [self.processor.encode(conversations[i], prompt=True) for i in indices]
            limited = self._within_limit(generation, lengths[indices[0]])
            rows = list(self._generate_ids(limited, samples, whole=True))
            seconds = perf_counter() - start
            for index, ids in zip(indices, rows, strict=True):
                prediction = self.processor.decode(ids, conversations[index])
                answers[index] = Answer(prediction, lengths[index], ids, seconds)
        return [answers[index] for index in range(len(conversations))]

    def ground(
        self, image: ImageLike, label: str, *, prompt: str | None = None, **settings: Any
    ) -> list[GroundedObject]:
        """Locates something in an image.

        Args:
            prompt: the question with `{image}` and `{question}`, which becomes
                `<ref>label</ref>`; None: the wording that the model was trained with.

        Returns:
            Objects with boxes in pixels of the image; none if the answer has no box.
        """
        if not label.strip():
            raise ValueError("label is empty: say what to look for")
        with_settings(self.generation, settings, "prompt")
        parts = fill_prompt(
            prompt or self.processor.find_prompt,
            image=image_of(image, self.read_options),
            question=GroundedObject(label=label),
        )
        question = Conversation(id=QUESTION_ID, turns=(Turn(role="user", parts=parts),))
        [answer] = self.generate([question], **settings)
        with_boxes = [found for found in answer.objects if found.boxes]
        return [replace(found, label=found.label or label) for found in with_boxes]

    def draw(
        self, image: ImageLike, objects: Iterable[GroundedObject], path: str | Path | None = None
    ) -> Image.Image:
        """Draws the boxes and labels of `objects` on a copy of an image.

        Args:
            path: also write the drawing to this file.

        Raises:
            ValueError: the folder of `path` does not exist, or its ending names no image format.
            TypeError: `objects` are no objects but, for example, the text of an answer.
        """
        from qwenvl_lit.rendering.drawing import check_image_name, check_objects, draw_objects

        if path is not None:
            check_image_name(Path(path))
        objects = check_objects(objects)
        opened = image_of(image, self.read_options).open()
        in_pixels = []
        for located in objects:
            boxes = [to_frame(box, "pixel", size=opened.size) for box in located.boxes]
            in_pixels.append(replace(located, boxes=tuple(boxes)))
        drawing = draw_objects(opened, in_pixels)
        if path is not None:
            drawing.save(path)
        return drawing

    def attend(
        self,
        images: ImageLike | Sequence[ImageLike],
        question: str,
        *,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        system: str | None = None,
        **settings: Any,
    ) -> AttentionMaps:
        """Answers a question about images, and returns where each token of the answer attends to.

        The answer is that of `chat`. Its tokens are then read once more, for their attention.

        Args:
            layers, heads: those of the language model that are kept, from 0; None: all.
        """
        with_settings(self.generation, settings, "layers", "heads", "system")
        listed = images if isinstance(images, list | tuple) else [images]
        query = [*(image_of(image, self.read_options) for image in listed), question]
        conversation = self._conversation(query, None, system)
        reading = Reading(self.model, self.family, layers=layers, heads=heads)
        [answer] = self.generate([conversation], **settings)
        batch = self._batch([self.processor.encode(conversation, prompt=True)])
        tokens = [self.processor.text([token_id]) for token_id in answer.ids]
        return reading.maps(batch, answer, tokens)

    def draw_attention(
        self,
        maps: AttentionMaps,
        path: str | Path | None = None,
        *,
        image: int = 0,
        tokens: Sequence[int] | None = None,
        queries: Sequence[int] | None = None,
    ) -> Image.Image:
        """Draws heat maps over an image, one for each token of the answer, in a grid.

        Args:
            path: also write the drawing to this file.
            image: the index of the image.
            tokens: indices of the tokens to draw; None: all.
            queries: draw the maps of these queries of the resampler instead.

        Raises:
            ValueError: an index is out of range, there is nothing to draw, or as `draw`.
        """
        from qwenvl_lit.rendering.drawing import check_image_name
        from qwenvl_lit.rendering.heat_maps import draw_heat_maps

        if path is not None:
            check_image_name(Path(path))
        source, values, titles = maps.titled(image, tokens, queries)
        drawing = draw_heat_maps(source.open(), values.numpy(), titles)
        if path is not None:
            drawing.save(path)
        return drawing

    def hidden_states(
        self, query: Query, *, system: str | None = None, only: str | None = None
    ) -> dict[str, torch.Tensor]:
        """Reads a question; returns what blocks and resampler compute, by module path, on the CPU.

        Args:
            only: a regular expression; other module paths are left out.
        """
        sample = self.processor.encode(self._conversation(query, None, system), prompt=True)
        inputs = self.family.inputs(self._batch([sample]))
        resampler = self.family.components["resampler"]
        return hidden_states(self.model, inputs, also=[resampler], only=only)

    def _conversation(
        self, query: Query, history: History | None, system: str | None
    ) -> Conversation:
        if self.is_base_model:
            if system is not None:
                raise ValueError("a base model has no system message; write it into the text")
            history = None  # as published, it reads the question alone
        return conversation(query, history, system=system, read_options=self.read_options)

    def _within_limit(self, generation: Generation, prompt_tokens: int) -> Generation:
        """Limits the new tokens to the positions that the model has left."""
        limit = self.family.max_tokens
        if prompt_tokens == 0:
            raise DataError("there is nothing to continue: the text is empty")
        if prompt_tokens >= limit:
            raise DataError(
                f"the prompt has {prompt_tokens} tokens, and the model reads fewer than {limit}; "
                f"shorten it, or give fewer images"
            )
        max_new = min(generation.max_new_tokens, limit - prompt_tokens)
        min_new = min(generation.min_new_tokens, max_new)
        return replace(generation, max_new_tokens=max_new, min_new_tokens=min_new)

    def _generate_ids(
        self, generation: Generation, samples: Sequence[Sample], *, whole: bool
    ) -> Iterator[list[int]]:
        """New ids of each sample; unless `whole`, those of the only sample, a few at a time."""
        processor, batch = self.processor, self._batch(samples)
        generate = generation if whole else generation.stream
        yield from generate(
            self.model,
            self.family.inputs(batch, generate=True),
            stop_ids=processor.stop_ids,
            pad_id=processor.pad_id,
            image_keys=[image.key for image in batch.images],
        )

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        processor = self.processor
        pad = Pad(pad_id=processor.pad_id, collate_vision=processor.collate_vision, side="left")
        return pad(samples).to(self.device)
