"""The gradient of an optimizer step.

It is that of the original, does not depend on how a step is divided into batches, and is never
applied unless it is finite.
"""

import math
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from parity.network import as_in_files, image_inputs, load, read, tensors_of
from tiny import CONFIG
from torch import nn
from torch.utils.data import DataLoader
from toy_task import trainer
from two_ranks import GLOO, on_two_ranks

from qwenvl_lit.data.collate import Pad, target_positions
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.optim import AdamW
from qwenvl_lit.types import Batch, Conversation, DataError, Turn

GOLDEN = Path(__file__).parents[1] / "golden" / "model"
CONFIG = {**CONFIG, "num_hidden_layers": 2}


class Steps(lightning.Callback):
    """Keeps the losses of all steps, and the gradient of the last one as the optimizer gets it."""

    def __init__(self):
        self.losses: list[float] = []
        self.gradient: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if len(self.losses) < trainer.global_step:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.gradient = {}
            for name, tensor in module.model.named_parameters():
                if tensor.requires_grad:
                    self.gradient[name] = tensor.grad.clone()


# -- The steps of the original ---------------------------------------------------------------------


class GoldenFamily(QwenVLFamily):
    """The network of the golden values, which has no vocabulary."""

    quantization = None

    def __init__(self):
        pass

    def processor(self, features=None):
        return SimpleNamespace(pad_id=0)

    def load(self, device="cpu", *, quantization=None):
        return load(GOLDEN)


class OriginalFull(Full):
    """Full fine-tuning of the original's script, with a frozen vision tower.

    It also trains the position table of the resampler.
    """

    def apply(self, model: nn.Module, family) -> nn.Module:
        resampler = model.transformer.visual.attn_pool
        table = resampler.pos_embed
        del resampler.pos_embed
        resampler.pos_embed = nn.Parameter(table)
        return super().apply(model, family)


def golden_batch(case: dict) -> Batch:
    tensors = tensors_of(GOLDEN / case["file"])
    inputs = image_inputs(GOLDEN, case["images"], tensors["input_ids"].shape[1])
    return Batch(
        conversations=(Conversation(id=case["name"], turns=()),),
        input_ids=tensors["input_ids"],
        labels=tensors["labels"],
        attention_mask=tensors["attention_mask"],
        position_ids=None,
        lengths=tuple(tensors["attention_mask"].sum(1).tolist()),
        vision_positions=inputs.get("vision_positions", torch.empty(0, dtype=torch.int64)),
        target_positions=target_positions(tensors["labels"]),
        vision={"pixel_values": inputs["pixel_values"]} if inputs else {},
    )


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("all", Full()),
        ("fix_vit", OriginalFull(freeze=["vision"], train=["resampler"])),
        ("fix_vit_text_only", OriginalFull(freeze=["vision"], train=["resampler"])),
    ],
)
def test_six_steps_are_those_of_the_original(name, adapter, tmp_path):
    recipe = read(GOLDEN / "train_steps.json")[name]
    cases = read(GOLDEN / "cases.json")["cases"]
    case = next(case for case in cases if case["name"] == recipe["case"])
    optim = AdamW(
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0,
        warmup=0,
        schedule="constant",
    )
    module = VisionLanguageModule(
        family=GoldenFamily(), adapter=adapter, generation=Generation(), metrics={}, optim=optim
    )
    steps = Steps()
    rows = DataLoader([case] * 6, batch_size=None, collate_fn=golden_batch)
    trainer(tmp_path, steps, max_epochs=1).fit(module, rows)
    # A loss is a difference of logits of about 10, so that its rounding error does not shrink with
    # it below 1. The sixth loss is 0.002.
    assert steps.losses == pytest.approx(recipe["losses"], rel=1e-4, abs=1e-5)
    before, after = as_in_files(load(GOLDEN).state_dict()), as_in_files(module.model.state_dict())
    unchanged = [name for name, tensor in after.items() if torch.equal(tensor, before[name])]
    assert sorted(unchanged) == sorted(recipe["unchanged"])


# -- A step divided into batches and ranks ---------------------------------------------------------


class NoUpdate:
    """An optimizer with a learning rate of 0."""

    def build(self, model: nn.Module, *_, **__):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1)


def small_module(adapter=None, optim=None) -> VisionLanguageModule:
    return VisionLanguageModule(
        family=QwenVLFamily(config=CONFIG, vocabulary="tiny"),
        adapter=adapter or Full(),
        generation=Generation(),
        metrics={},
        optim=optim or NoUpdate(),
    )


def answers_of_many_lengths() -> list[Conversation]:
    rows = []
    for index in range(16):
        answer = " ".join(["two"] * (1 + index * index % 11))
        turns = (
            Turn(role="user", parts=("How many?",)),
            Turn(role="assistant", parts=(answer,)),
        )
        rows.append(Conversation(id=f"row {index}", turns=turns))
    return rows


def loader(rows, *, batch_size: int) -> DataLoader:
    """Batches of encoded rows."""
    processor = QwenVLFamily(config=CONFIG, vocabulary="tiny").processor()
    samples = [processor.encode(row) for row in rows]
    return DataLoader(
        samples,
        batch_size=batch_size,
        collate_fn=Pad(pad_id=processor.pad_id, collate_vision=processor.collate_vision),
    )


def gradient_of_one_step(
    folder: Path, batch_size: int, accumulated: int, rank: int = 0, ranks: int = 1, **options
):
    steps = Steps()
    rows = loader(answers_of_many_lengths()[rank::ranks], batch_size=batch_size)
    options = {**options, "max_steps": 1, "accumulate_grad_batches": accumulated}
    trainer(folder, steps, **options).fit(small_module(), rows)
    return steps.losses[0], steps.gradient


def rank_of_two(rank: int, folder: Path) -> None:
    strategy = DDPStrategy(**GLOO)
    result = gradient_of_one_step(folder, 8, 1, rank=rank, ranks=2, strategy=strategy, devices=2)
    torch.save(result, folder / f"{rank}.pt")


def test_the_gradient_does_not_depend_on_how_a_step_is_divided(tmp_path):
    loss, gradient = gradient_of_one_step(tmp_path, 16, 1)
    divided = {
        "4 x 4": gradient_of_one_step(tmp_path, 4, 4),
        "16 x 1": gradient_of_one_step(tmp_path, 1, 16),
        "the last batch is smaller": gradient_of_one_step(tmp_path, 5, 4),
    }
    on_two_ranks(rank_of_two, tmp_path)
    for rank in (0, 1):
        divided[f"2 ranks x 8: rank {rank}"] = torch.load(tmp_path / f"{rank}.pt")
    for how, (other_loss, other_gradient) in divided.items():
        assert other_loss == pytest.approx(loss, rel=1e-5), how
        assert other_gradient.keys() == gradient.keys(), how
        for name, tensor in other_gradient.items():

            def message(text, where=(how, name)):
                return f"{where}: {text}"

            # Float32 sums in another order; gradients are about 0.1.
            torch.testing.assert_close(tensor, gradient[name], rtol=1e-4, atol=1e-7, msg=message)


def test_clipping_takes_the_norm_of_the_whole_step(tmp_path):
    steps, rows = Steps(), loader(answers_of_many_lengths(), batch_size=4)
    run = trainer(tmp_path, steps, max_steps=1, accumulate_grad_batches=4, gradient_clip_val=0.01)
    run.fit(small_module(), rows)
    assert torch.nn.utils.get_total_norm(steps.gradient.values()) == pytest.approx(0.01, rel=1e-4)
    assert run.callback_metrics["train/grad_norm"] > 0.1


# -- Steps that must not be applied ----------------------------------------------------------------


class InfiniteGradient(lightning.Callback):
    """Makes a gradient of one step infinite."""

    def __init__(self, step: int):
        self.step = step

    def on_after_backward(self, trainer, module):
        if trainer.global_step + 1 == self.step:
            tensor = next(tensor for tensor in module.parameters() if tensor.grad is not None)
            tensor.grad[0] = math.inf


@pytest.mark.parametrize("step", [2, 4], ids=["in the middle", "the last"])
def test_a_gradient_that_is_not_finite_is_never_applied_and_its_batch_is_saved(step, tmp_path):
    optim = AdamW(lr=1e-2, warmup=0, schedule="constant")
    rows = loader(answers_of_many_lengths(), batch_size=4)

    def fit(module: VisionLanguageModule, steps: int, *callbacks) -> None:
        trainer(tmp_path, *callbacks, max_steps=steps, gradient_clip_val=1.0).fit(module, rows)

    undisturbed, stopped = small_module(optim=optim), small_module(optim=optim)
    fit(undisturbed, step - 1)
    expected = undisturbed.model.state_dict()
    first_row = 4 * (step - 1)
    message = rf"step {step} is not finite and was not applied.*row {first_row}, "
    with pytest.raises(DataError, match=message):
        fit(stopped, 4, InfiniteGradient(step))
    for name, tensor in stopped.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    saved = torch.load(tmp_path / f"not_finite_step_{step}.rank0.pt", weights_only=True)
    assert saved["rows"] == [f"row {index}" for index in range(first_row, first_row + 4)]
    assert saved["batches"][0]["input_ids"].shape[0] == 4


def test_a_trainable_tensor_without_a_gradient_is_named(tmp_path):
    module = small_module(adapter=LoRA(rank=2, alpha=4, dropout=0.0, targets="attention"))
    module.configure_model()
    # Trainable, and not part of the forward pass
    module.model.base_model.model.extra = nn.Linear(2, 2)
    rows = loader(answers_of_many_lengths()[:1], batch_size=1)
    with pytest.raises(DataError, match=r"2 trainable tensors got no gradient: .*extra\.weight"):
        trainer(tmp_path, max_steps=1).fit(module, rows)
