"""Compares the logits of an exported model with those of the run that was exported."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig

from qwenvl_lit import build
from qwenvl_lit.data.collate import Pad
from qwenvl_lit.data.demo.scenes import scenes
from qwenvl_lit.runs.run import find_run
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.types import Batch, Conversation, DataError, ImageSource, Turn

ROWS = 3  # number of prompts to compare
# Largest allowed difference of logits, relative to the largest logit. With float32, only the order
# of summation differs. With the other dtypes, the merged weights are also rounded once more.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.1}


def comparison_batches(
    config: DictConfig, module: VisionLanguageModule, device: torch.device
) -> Iterator[Batch]:
    """Yields batches of one prompt each, on which the logits are compared.

    With `compare=run`, the prompts are validation or test rows of the run's data. Otherwise, and
    for a run without such rows, they are questions about generated images.
    """
    conversations = []
    if config.compare == "run" and config.data:
        conversations = _rows_of_run(config, module)
    if not conversations:
        conversations = _drawn_rows()
    processor = module.processor
    pad = Pad(pad_id=processor.pad_id, collate_vision=processor.collate_vision)
    for conversation in conversations:
        yield pad([processor.encode(conversation, prompt=True)]).to(device)


def _rows_of_run(config: DictConfig, module: VisionLanguageModule) -> list[Conversation]:
    data = build.data(config, module.processor)
    if not any(dataset.validation or dataset.test for dataset in data.datasets.values()):
        return []
    data.prepare_data()
    data.setup("predict")
    rows = next(iter(data.test.values()))
    return [rows[index] for index in range(min(ROWS, len(rows)))]


def _drawn_rows() -> list[Conversation]:
    conversations: list[Conversation] = []
    for number, scene in enumerate(scenes("test", ROWS)):
        question = (ImageSource(scene.draw()), "What is in the picture?")
        turn = Turn(role="user", parts=question)
        conversations.append(Conversation(id=str(number), turns=(turn,)))
    return conversations


def check_equivalence(
    module: VisionLanguageModule,
    folder: Path,
    batches: Sequence[Batch],
    *,
    dtypes: Collection[str],
    device: torch.device,
) -> str:
    """Loads an exported folder as a user would, and compares its logits with those of the run.

    Args:
        module: the model of the run.
        folder: the exported folder.
        dtypes: the dtypes of the weights of the run and of the exported model. The larger
            tolerance of the two applies.

    Returns:
        The result as a sentence.

    Raises:
        DataError: the logits are not finite, or differ by more than the tolerance.
    """
    expected = _logits(module, batches)
    run = find_run(str(folder), trust=True)  # this process has just written it
    exported = build.trained_module(run, {}, load_device=device)
    actual = _logits(exported, batches)
    largest = float(max(logits.abs().max() for logits in expected))
    allowed = max(TOLERANCE[dtype] for dtype in dtypes) * largest
    difference, agreeing, tokens = 0.0, 0, 0
    for run_logits, exported_logits in zip(expected, actual, strict=True):
        if not torch.isfinite(exported_logits).all():
            raise DataError(
                "the logits of the exported model are not finite. The largest float16 number is "
                "65504; choose dtype=bfloat16"
            )
        difference = max(difference, float((run_logits - exported_logits).abs().max()))
        agreeing += int((run_logits.argmax(-1) == exported_logits.argmax(-1)).sum())
        tokens += len(run_logits)
    if not difference <= allowed:
        raise DataError(
            f"the exported model is not the run's: logits up to {largest:.3g} differ by up to "
            f"{difference:.3g}, but rounding explains only {allowed:.3g}; no model was exported"
        )
    return (
        f"logits up to {largest:.3g} differ by at most {difference:.2g} in {len(batches)} rows; "
        f"{agreeing} of {tokens} most likely tokens agree"
    )


def _logits(module: VisionLanguageModule, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Returns the logits (T, V) of each batch of one prompt, on the CPU.

    Loads the weights of `module` and frees them afterwards.
    """
    module.configure_model()
    module.model.eval()
    logits: list[torch.Tensor] = []
    with torch.inference_mode():
        for batch in batches:
            output = module.model(**module.family.inputs(batch))
            logits.append(output.logits[0].float().cpu())
    module.unload_model()
    return logits
