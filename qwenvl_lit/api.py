"""Qwen-VL from Python: `from qwenvl_lit import QwenVL`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from torch import nn

from qwenvl_lit import build
from qwenvl_lit.data.collate import Pad
from qwenvl_lit.data.readers.prompts import REFERRING_PROMPT, ask
from qwenvl_lit.data.readers.question import (
    History,
    ImageLike,
    Query,
    conversation,
    image_of,
)
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.grounding import to_frame
from qwenvl_lit.models.qwen_vl.checkpoint import find_checkpoint
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.processor import Template
from qwenvl_lit.runs.run import Run, find_run, stored_settings
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.types import Conversation, DataError, GroundedObject, Part, Prediction, Sample, Turn

FIND_PROMPT = "{image}Find {question}"  # as training rows for chat ask for a box


class Answer(str):
    """The text of an answer, in the family's markup, with what else is known of it.

    Args:
        prediction: the answer with its conversation; boxes are in pixels of the conversation's images.
        prompt_tokens: images included.
        new_tokens: without the end mark.
        seconds: from the question to the whole answer; in a batch, to those of all its rows.
        first_seconds: to the first token; None in a batch.
    """

    def __new__(cls, prediction: Prediction, *measured: float | None) -> Answer:
        return super().__new__(cls, prediction.text)

    def __init__(
        self,
        prediction: Prediction,
        prompt_tokens: int,
        new_tokens: int,
        seconds: float,
        first_seconds: float | None = None,
    ):
        self.prediction = prediction
        self.prompt_tokens = prompt_tokens
        self.new_tokens = new_tokens
        self.seconds = seconds
        self.first_seconds = first_seconds

    def __getnewargs__(self):  # of copies and pickles
        return (
            self.prediction,
            self.prompt_tokens,
            self.new_tokens,
            self.seconds,
            self.first_seconds,
        )

    @property
    def parts(self) -> tuple[Part, ...]:
        """The answer as text and objects, in order."""
        return self.prediction.parts

    @property
    def objects(self) -> list[GroundedObject]:
        """What the answer names or places; boxes in pixels, or on the grid of 0..999 where there is no image."""
        return [part for part in self.parts if isinstance(part, GroundedObject)]


class QwenVL:
    """A model to talk to.

    A question is text, in which `<img>path-or-address</img>` is an image and `<ref>`, `<box>` and `<quad>` are read; or a list of such
    texts and of images: paths, encoded bytes, PIL images, `{"image": path-or-address}`. A history is a list of [question, answer] pairs;
    none is changed, each call returns a longer one. `settings` are fields of `Generation`, as `max_new_tokens`, `do_sample` or `seed`.

    The base model (`is_base_model`) continues a text as it stands: without chat markup, system message and history.

    Whatever is asked, an image that cannot be read and a prompt that is too long are a `DataError`.
    """

    def __init__(
        self,
        *,
        family: QwenVLFamily,
        model: nn.Module,
        device: torch.device,
        generation: Generation,
        read_options: ReadOptions,
    ):
        self.family = family
        self.model = model
        self.device = device  # where prompts go
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
        template: Template | None = None,
        base_model: str | Path | None = None,
        download: bool = True,
        cache: str | Path | None = None,
        **settings: Any,
    ) -> QwenVL:
        """A checkpoint or a run, in evaluation mode.

        Args:
            source: a checkpoint's folder or its name on the hub; or a run folder, a checkpoint file of a run, "latest", or an adapter
                folder of peft.
            device: None: the first GPU if there is one.
            dtype: of the weights; None: that of the run, bfloat16 for a checkpoint.
            device_map, max_memory: as transformers has them, to spread a model over cards and host memory; then `device` is None.
            load_in_4bit: hold linear layers but the head in 4 bits: a third of the memory. Needs bitsandbytes. A run whose adapter was
                trained over 4 bits is always held so.
            template: "chatml" or "raw", for a checkpoint; None: what its generation_config.json says.
            base_model: the checkpoint below an adapter folder; None: the one that the folder names.
            download: whether a checkpoint may be fetched.
            cache: folder of remote images; None: the one that the commands use.
            settings: how answers are decoded, unless a call says otherwise. Greedy, up to 512 tokens, or as the run says.

        Raises:
            DataError: there is nothing there, or it is incomplete or something else.
        """
        if device is not None and device_map is not None:
            raise ValueError("give either device or device_map")
        own = (
            "device",
            "dtype",
            "device_map",
            "max_memory",
            "load_in_4bit",
            "template",
            "base_model",
            "download",
            "cache",
        )
        with_settings(
            Generation(), settings, *own
        )  # what is unknown is refused before weights are read
        device = device_named(device)
        changes: dict[str, Any] = {
            "device_map": device_map,
            "max_memory": max_memory,
            "download": download,
        }
        changes["load_in_4bit"] = load_in_4bit or None
        if dtype is not None:
            changes["dtype"] = str(dtype).removeprefix("torch.")
        if base_model is not None:
            changes["path"] = str(base_model)
        changes = {name: value for name, value in changes.items() if value is not None}
        read_options = ReadOptions(cache=Path(cache) if cache else default_cache())
        if run := _run(source):
            if template:
                raise ValueError("template is for a checkpoint; a run has its own")
            model = cls.from_module(
                build.trained(run, changes),
                checkpoint=run.checkpoint,
                device=device,
                read_options=read_options,
            )
        elif base_model is not None:
            raise ValueError("base_model is for an adapter folder; a checkpoint stands on its own")
        else:
            folder = find_checkpoint(str(source), download=download)
            stored = _stored(folder)
            prompting = {
                "dtype": "bfloat16",
                **stored.get("model", {}),
                **changes,
                "path": str(folder),
            }
            family = QwenVLFamily(
                **{
                    **prompting,
                    "template": template or prompting.get("template") or _template(folder),
                }
            )
            network = family.load(device, quantization=family.quantization)
            answering = Generation(**stored.get("generation", {}))
            model = cls(
                family=family,
                model=network,
                device=device,
                generation=answering,
                read_options=read_options,
            )
        model.generation = replace(model.generation, **settings)
        return model

    @classmethod
    def from_module(
        cls,
        task: VisionLanguageModule,
        *,
        checkpoint: Path | None,
        device: torch.device,
        read_options: ReadOptions,
    ) -> QwenVL:
        """The model of a task whose weights are not loaded yet; with the tensors of `checkpoint`, if there is one."""
        task.home = device
        task.trained = checkpoint
        task.configure_model()
        return cls(
            family=task.family,
            model=task.model.eval(),
            device=device,
            generation=task.generation,
            read_options=read_options,
        )

    @property
    def is_base_model(self) -> bool:
        """Whether it is the base model, which continues texts instead of answering."""
        return self.processor.template == "raw"

    def chat(
        self, query: Query, history: History = (), *, system: str | None = None, **settings: Any
    ) -> tuple[Answer, History]:
        """The answer to a question, and the history with both.

        Args:
            system: the system message; None: the model's own.
        """
        *_, last = self.stream(query, history, system=system, **settings)
        return last

    def stream(
        self, query: Query, history: History = (), *, system: str | None = None, **settings: Any
    ) -> Iterator[tuple[str, History]]:
        """The answer so far, never with half a character, and the history with it, while it is being decoded.

        Each text begins with the one before; the last is the `Answer`. The iteration may be left at any point.
        """
        began = perf_counter()
        generation = with_settings(self.generation, settings, "system")
        sample = self.processor.encode(self._asked(query, history, system), prompt=True)
        generation = self._limited(generation, len(sample.input_ids))
        earlier = [list(pair) for pair in history]
        asked = list(query) if isinstance(query, list | tuple) else query
        first = began
        new: list[int] = []

        def arriving() -> Iterator[int]:
            nonlocal first
            for id in chain.from_iterable(
                self._ids(generation, [sample], whole=generation.num_beams > 1)
            ):
                first = first if new else perf_counter()
                new.append(id)
                yield id

        text = ""
        tokenizer = self.processor.tokenizer
        for piece in tokenizer.stream(arriving(), skip_special=True, keep=tokenizer.tag_ids):
            text += piece
            yield (
                text.strip(),
                [*earlier, [asked, text.strip()]],
            )  # an answer begins and ends without blanks
        prediction = self.processor.decode(new, sample.conversation)
        answer = Answer(
            prediction, len(sample.input_ids), len(new), perf_counter() - began, first - began
        )
        yield answer, [*earlier, [asked, str(answer)]]

    def generate(
        self,
        prompts: Sequence[Query | Conversation],
        *,
        system: str | None = None,
        batch_size: int = 8,
        **settings: Any,
    ) -> list[Answer]:
        """The answers to many questions, each on its own, in order.

        Args:
            prompts: questions; or conversations, which are answered after their last question.
            system: of the questions; conversations have their own.
            batch_size: questions that are answered together.
        """
        if isinstance(prompts, str):
            raise ValueError(
                "generate answers a list of questions; of a single one: generate([question])"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        generation = with_settings(self.generation, settings, "system", "batch_size")
        asked = [
            one if isinstance(one, Conversation) else self._asked(one, (), system)
            for one in prompts
        ]
        lengths = [self.processor.length(one, prompt=True)[0] for one in asked]
        longest_first = sorted(
            range(len(asked)), key=lambda place: -lengths[place]
        )  # rows of a batch are of a length, about
        answers: dict[int, Answer] = {}
        for start in range(0, len(asked), batch_size):
            places, began = longest_first[start : start + batch_size], perf_counter()
            samples = [self.processor.encode(asked[place], prompt=True) for place in places]
            rows = list(
                self._ids(self._limited(generation, lengths[places[0]]), samples, whole=True)
            )
            seconds = perf_counter() - began
            for place, ids in zip(places, rows, strict=True):
                prediction = self.processor.decode(ids, asked[place])
                answers[place] = Answer(prediction, lengths[place], len(ids), seconds)
        return [answers[place] for place in range(len(asked))]

    def ground(
        self, image: ImageLike, label: str, *, prompt: str | None = None, **settings: Any
    ) -> list[GroundedObject]:
        """Where in an image something is: objects with boxes in its pixels; none, if the answer has no box.

        Args:
            prompt: how it is asked, with `{image}` and `{question}`, which is `<ref>label</ref>`; None: as the model has learned it.
        """
        if not label.strip():
            raise ValueError("label is empty: say what is to be found")
        with_settings(self.generation, settings, "prompt")
        wanted = GroundedObject(label=label)
        parts = ask(
            prompt or (REFERRING_PROMPT if self.is_base_model else FIND_PROMPT),
            image=image_of(image, self.read_options),
            question=wanted,
        )
        [answer] = self.generate(
            [Conversation(id="question", turns=(Turn(role="user", parts=parts),))], **settings
        )
        return [
            thing if thing.label else replace(thing, label=label)
            for thing in answer.objects
            if thing.boxes
        ]

    def draw(
        self, image: ImageLike, objects: Iterable[GroundedObject], path: str | Path | None = None
    ) -> Image.Image:
        """A copy of an image with the boxes and labels of `objects` on it; also written to `path`, if given.

        Raises:
            ValueError: `path` is in a folder that is not there, or no image by its name.
        """
        from qwenvl_lit.rendering.drawing import draw_objects

        if path is not None:
            check_image_name(Path(path))
        opened = image_of(image, self.read_options).open()
        placed = [
            replace(
                thing, boxes=tuple(to_frame(box, "pixel", size=opened.size) for box in thing.boxes)
            )
            for thing in objects
        ]
        drawn = draw_objects(opened, placed)
        if path is not None:
            drawn.save(path)
        return drawn

    def _asked(self, query: Query, history: History, system: str | None) -> Conversation:
        if self.is_base_model and system is not None:
            raise ValueError(
                "the base model has no system message; write what it should know into the text"
            )
        history = () if self.is_base_model else history  # as published, it reads the question alone
        return conversation(query, history, system=system, read_options=self.read_options)

    def _limited(self, generation: Generation, prompt_tokens: int) -> Generation:
        """Answers end where the model's positions do."""
        limit = self.family.config.max_position_embeddings
        if prompt_tokens == 0:
            raise DataError("there is nothing to continue: the text is empty")
        if prompt_tokens >= limit:
            raise DataError(
                f"the prompt has {prompt_tokens} tokens, and {limit} are the most that the model reads; shorten it, or give fewer images"
            )
        most = min(generation.max_new_tokens, limit - prompt_tokens)
        return replace(
            generation, max_new_tokens=most, min_new_tokens=min(generation.min_new_tokens, most)
        )

    def _ids(
        self, generation: Generation, samples: Sequence[Sample], *, whole: bool
    ) -> Iterator[list[int]]:
        """New ids of each sample; not `whole`, those of the only one, a few at a time."""
        batch = Pad(pad_id=self.processor.pad_id, side="left")(samples).to(self.device)
        decode = generation if whole else generation.stream
        keys = [key for sample in samples for key in _image_keys(sample)]
        yield from decode(
            self.model,
            self.family.inputs(batch, generate=True),
            stop_ids=self.processor.stop_ids,
            pad_id=self.processor.pad_id,
            image_keys=keys,
        )


def with_settings(generation: Generation, settings: Mapping[str, Any], *own: str) -> Generation:
    """`generation` with other `settings`.

    Args:
        own: arguments of the call that it does not know, which one may have meant as well.

    Raises:
        TypeError: there is no such setting.
    """
    known = [field.name for field in fields(generation)]
    for name in settings:
        if name not in known:
            [nearest, *_] = [*get_close_matches(name, [*known, *own], n=1), None]
            hint = (
                f"did you mean {nearest}?" if nearest else f"there are {', '.join([*own, *known])}"
            )
            raise TypeError(f"there is no setting {name!r}; {hint}")
    return replace(generation, **settings)


def check_image_name(path: Path) -> None:
    """Raises a ValueError if no image can be written to `path`."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(
            f"path={str(path)!r}: its end says which kind of image it is to be, as .png or .jpg, got {path.suffix!r}"
        )
    if not path.parent.is_dir():
        raise ValueError(f"path={str(path)!r}: there is no folder {path.parent}; make it first")


def device_named(name: torch.device | str | None) -> torch.device:
    """None: the first GPU if there is one.

    Raises:
        ValueError: it is no name of torch's, or names a GPU that is not here.
    """
    try:
        device = torch.device(name or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device is a name of torch's, as cpu or cuda:0, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"device={name}: torch {torch.__version__} sees {count} GPUs here; leave device out to take what there is"
        )
    return device


def default_cache() -> Path:
    """What conf/verb.yaml has as `paths.cache`."""
    return Path(os.environ.get("QWENVL_LIT_CACHE") or Path.home() / ".cache/qwenvl_lit")


def _run(source: str | Path) -> Run | None:
    """The run that `source` names, if it is none of a checkpoint's names."""
    path = Path(source).expanduser()
    is_run = (
        source == "latest"
        or path.is_file()
        or (path.is_dir() and not (path / "config.json").exists())
    )
    return find_run(str(source)) if is_run else None


def _stored(folder: Path) -> dict[str, dict[str, Any]]:
    """How an exported model is prompted and answers, as arguments."""
    stored = stored_settings(folder)
    return {
        part: {key: value for key, value in node.items() if key != "_target_"}
        for part, node in stored.items()
    }


def _template(folder: Path) -> Template:
    """What a checkpoint's generation_config.json says; the base model is published with "raw"."""
    settings = QwenVLFamily(path=str(folder)).generation
    return "raw" if getattr(settings, "chat_format", "chatml") == "raw" else "chatml"


def _image_keys(sample: Sample) -> list[str]:
    """Of the images that are in the prompt: the last ones, since a window leaves out the oldest turns."""
    count = len(sample.vision["pixel_values"])
    images = sample.conversation.prompt().images
    return [image.key for image in images[len(images) - count :]]
