"""The class that lmms-eval evaluates. It is imported by lmms-eval, see `plugin`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from tqdm import tqdm

from qwenvl_lit.api import QwenVL
from qwenvl_lit.evaluation.lmms.questions import TaskSettings, conversation_of, task_settings
from qwenvl_lit.types import Conversation, DataError

ROWS_PER_BATCH = 8  # batches whose rows are sorted by length together


class EvaluatedModel(lmms):
    """A model of `QwenVL.load` under lmms-eval's interface.

    A task's answers are those of `QwenVL.generate`, with the markup of boxes as text. Their texts
    do not depend on `batch_size`, beyond rounding.

    Args:
        pretrained: as `source` of `QwenVL.load`: a run folder, an adapter folder, a full model, or
            the name of a model on the hub.
        batch_size: questions that are answered together.
        device: None: the GPU of this process if there is one.
        system_prompt: the system message of all questions, or a file with it; None: the model's.
        options: as in `QwenVL.load`.

    Raises:
        ValueError: `batch_size` is no number.
        DataError: as `QwenVL.load`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        system_prompt: str | None = None,
        **options: Any,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1 or max_batch_size is not None:
            raise ValueError(
                f"batch_size={batch_size}: give a number of questions, such as batch_size=16, and "
                f"leave out max_batch_size"
            )
        self.batch_size = int(batch_size)
        if device is None and "device_map" not in options and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(device)  # lmms-eval gathers results on the current GPU
        self.system_prompt = system_prompt and self._resolve_system_prompt(system_prompt)
        self.qwenvl: QwenVL | None = QwenVL.load(str(pretrained), device=device, **options)
        self.device = self.qwenvl.device

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> EvaluatedModel:
        """Makes the model from `--model_args`, whose values win over options of the command line.

        lmms-eval's own method would refuse `batch_size` in `--model_args`, because `--batch_size`
        has a default.
        """
        given = {}
        for name, value in (additional_config or {}).items():
            if value is not None:
                given[name] = value
        return cls(**{**given, **simple_parse_args_string(arg_string)})

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers questions.

        Raises:
            DataError: a question has a video or audio, an image cannot be read, or a setting of a
                task is not supported.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            settings = request.args[2]
            groups.setdefault(f"{request.task_name} {settings}", []).append(index)
        answers: dict[int, GenerationResult] = {}
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Answers") as progress:
            for indices in groups.values():
                first = requests[indices[0]]
                settings = task_settings(first.task_name, first.args[2])
                window = ROWS_PER_BATCH * self.batch_size
                for start in range(0, len(indices), window):
                    chosen = indices[start : start + window]
                    rows = [self._conversation(requests[index]) for index in chosen]
                    answers.update(zip(chosen, self._answer(rows, settings), strict=True))
                    progress.update(len(chosen))
        return [answers[index] for index in range(len(requests))]

    def _conversation(self, request: Instance) -> Conversation:
        _, doc_to_messages, _, row, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][row])
        if self.system_prompt:
            messages = self._apply_system_prompt(messages, self.system_prompt)
        return conversation_of(
            messages,
            row=f"{task}, row {row}",
            read_options=self.qwenvl.read_options,
            continues_text=self.qwenvl.is_base_model,
        )

    def _answer(
        self, rows: Sequence[Conversation], settings: TaskSettings
    ) -> list[GenerationResult]:
        results = []
        answers = self.qwenvl.generate(rows, batch_size=self.batch_size, **settings.generation)
        for answer in answers:
            counts = TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=answer.new_tokens)
            results.append(GenerationResult(settings.answer(str(answer)), counts))
        return results

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        _refuse("tasks that compare likelihoods (multiple_choice, loglikelihood)")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        _refuse("tasks of several rounds")

    def generate_visual_cot(self, requests: Sequence[Instance]) -> NoReturn:
        _refuse("tasks whose answers are images")

    def clean(self) -> None:
        """Frees the model: lmms-eval has all answers, and may need the memory for a judge."""
        self.qwenvl = None
        super().clean()


def _refuse(what: str) -> NoReturn:
    raise DataError(
        f"qwenvl_lit answers tasks of the type generate_until, and no {what}; choose others, "
        f"or answer these rows with python -m qwenvl_lit.test"
    )
