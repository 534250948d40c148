"""The gradient of an optimizer step: the original's, the same however the step is cut up, and never applied unless finite."""

import math
import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from parity.network import as_in_files, image_inputs, load, read, tensors_of
from torch import nn
from torch.utils.data import DataLoader
from toy_task import trainer

from qwenvl_lit.data.collate import Pad, target_positions
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.optim import AdamW
from qwenvl_lit.types import Batch, Conversation, DataError, Turn

GOLDEN = Path(__file__).parents[1] / "golden" / "model"
VISUAL = {
    "image_size": 16,
    "patch_size": 8,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "mlp_ratio": 2.0,
    "output_dim": 32,
    "n_queries": 4,
}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "intermediate_size": 64,
}
SIZES |= {"visual": {**VISUAL, "resampler_heads": 2}}


class Steps(lightning.Callback):
    """The losses of all steps, and the gradient of the last one as the optimizer gets it."""

    def __init__(self):
        self.losses: list[float] = []
        self.gradient: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if len(self.losses) < trainer.global_step:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            trained = {
                name: tensor
                for name, tensor in module.model.named_parameters()
                if tensor.requires_grad
            }
            self.gradient = {name: tensor.grad.clone() for name, tensor in trained.items()}


# -- the original's steps --------------------------------------------------------------------------------------------------------


class GoldenFamily(QwenVLFamily):
    """The network of the recorded values, which has no vocabulary."""

    quantization = None

    def __init__(self):
        pass

    def processor(self):
        return SimpleNamespace(pad_id=0)

    def load(self, device="cpu", *, quantization=None):
        return load(GOLDEN)


class OriginalFull(Full):
    """Full fine-tuning as the original's script does it with a frozen tower: it thaws the resampler's table of positions too."""

    def apply(self, model: nn.Module, components: Mapping[str, str]) -> nn.Module:
        resampler = model.transformer.visual.attn_pool
        table = resampler.pos_embed
        del resampler.pos_embed
        resampler.pos_embed = nn.Parameter(table)
        return super().apply(model, components)


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
    case = next(
        case for case in read(GOLDEN / "cases.json")["cases"] if case["name"] == recipe["case"]
    )
    optim = AdamW(
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0,
        warmup=0,
        schedule="constant_with_warmup",
    )
    made = VisionLanguageModule(
        family=GoldenFamily(), adapter=adapter, generation=Generation(), metrics={}, optim=optim
    )
    steps = Steps()
    rows = DataLoader([case] * 6, batch_size=None, collate_fn=golden_batch)
    trainer(tmp_path, steps, max_epochs=1).fit(made, rows)
    # A loss is a difference of logits of about 10: below 1, its rounding does not shrink with it (the sixth is 0.002).
    assert steps.losses == pytest.approx(recipe["losses"], rel=1e-4, abs=1e-5)
    before, after = as_in_files(load(GOLDEN).state_dict()), as_in_files(made.model.state_dict())
    assert sorted(
        name for name, tensor in after.items() if torch.equal(tensor, before[name])
    ) == sorted(recipe["unchanged"])


# -- a step cut up ---------------------------------------------------------------------------------------------------------------


class Descent:
    """Plain descent, which unlike AdamW shows the size of a gradient."""

    def build(self, model: nn.Module, *_, **__):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1)


def small_task(adapter=None, optim=None) -> VisionLanguageModule:
    family = QwenVLFamily(config=SIZES, vocabulary="tiny")
    return VisionLanguageModule(
        family=family,
        adapter=adapter or Full(),
        generation=Generation(),
        metrics={},
        optim=optim or Descent(),
    )


def answers_of_many_lengths() -> list[Conversation]:
    return [
        Conversation(
            id=f"row {i}",
            turns=(
                Turn(role="user", parts=("How many?",)),
                Turn(role="assistant", parts=(" ".join(["two"] * (1 + i * i % 11)),)),
            ),
        )
        for i in range(16)
    ]


def gradient_of_one_step(
    folder: Path, batch_size: int, accumulated: int, rank: int = 0, ranks: int = 1, **options
):
    made = small_task()
    rows = [made.processor.encode(row) for row in answers_of_many_lengths()]
    steps = Steps()
    rows = DataLoader(
        rows[rank::ranks], batch_size=batch_size, collate_fn=Pad(pad_id=made.processor.pad_id)
    )
    trainer(folder, steps, max_steps=1, accumulate_grad_batches=accumulated, **options).fit(
        made, rows
    )
    return steps.losses[0], steps.gradient


def rank_of_two(rank: int, folder: Path, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
        OMP_NUM_THREADS="1",
    )
    strategy = DDPStrategy(
        process_group_backend="gloo", timeout=timedelta(seconds=60)
    )  # not to wait for ever
    torch.save(
        gradient_of_one_step(folder, 8, 1, rank=rank, ranks=2, strategy=strategy, devices=2),
        folder / f"{rank}.pt",
    )


def test_a_step_has_one_gradient_however_it_is_cut_up(tmp_path):
    whole = gradient_of_one_step(tmp_path, 16, 1)
    cut = {
        "4 x 4": gradient_of_one_step(tmp_path, 4, 4),
        "16 x 1": gradient_of_one_step(tmp_path, 1, 16),
        "the last batch is smaller": gradient_of_one_step(tmp_path, 5, 4),
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank_of_two, args=(tmp_path, port), nprocs=2)
    cut |= {f"2 ranks x 8: rank {rank}": torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)}
    for how, (loss, gradient) in cut.items():
        assert loss == pytest.approx(whole[0], rel=1e-5), how
        assert gradient.keys() == whole[1].keys(), how
        for (
            name,
            tensor,
        ) in gradient.items():  # float32 sums in another order; gradients are about 0.1
            torch.testing.assert_close(
                tensor,
                whole[1][name],
                rtol=1e-4,
                atol=1e-7,
                msg=lambda text, at=(how, name): f"{at}: {text}",
            )


def test_clipping_takes_the_norm_of_the_whole_step(tmp_path):
    made, steps = small_task(), Steps()
    rows = DataLoader(
        [made.processor.encode(row) for row in answers_of_many_lengths()],
        batch_size=4,
        collate_fn=Pad(pad_id=made.processor.pad_id),
    )
    run = trainer(tmp_path, steps, max_steps=1, accumulate_grad_batches=4, gradient_clip_val=0.01)
    run.fit(made, rows)
    assert torch.nn.utils.get_total_norm(steps.gradient.values()) == pytest.approx(0.01, rel=1e-4)
    assert run.callback_metrics["train/grad_norm"] > 0.1


# -- steps that must not be made -------------------------------------------------------------------------------------------------


class Spoilt(lightning.Callback):
    """A gradient is infinite in one step."""

    def __init__(self, step: int):
        self.step = step

    def on_after_backward(self, trainer, module):
        if trainer.global_step + 1 == self.step:
            next(tensor for tensor in module.parameters() if tensor.grad is not None).grad[0] = (
                math.inf
            )


@pytest.mark.parametrize("step", [2, 4], ids=["in the middle", "the last"])
def test_a_gradient_that_is_not_finite_is_never_applied_and_its_batch_is_saved(step, tmp_path):
    optim = AdamW(lr=1e-2, warmup=0, schedule="constant_with_warmup")
    rows = [
        QwenVLFamily(config=SIZES, vocabulary="tiny").processor().encode(row)
        for row in answers_of_many_lengths()
    ]

    def fit(steps: int, *callbacks) -> VisionLanguageModule:
        made = small_task(optim=optim)
        loader = DataLoader(rows, batch_size=4, collate_fn=Pad(pad_id=made.processor.pad_id))
        try:
            trainer(tmp_path, *callbacks, max_steps=steps, gradient_clip_val=1.0).fit(made, loader)
        finally:
            left.append(made)
        return made

    left: list[VisionLanguageModule] = []
    expected = fit(step - 1).model.state_dict()
    with pytest.raises(
        DataError, match=rf"step {step} is not finite and was not applied.*row {4 * (step - 1)}, "
    ):
        fit(4, Spoilt(step))
    for name, tensor in left[-1].model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    saved = torch.load(tmp_path / f"not_finite_step_{step}.rank0.pt", weights_only=True)
    assert saved["rows"] == [f"row {i}" for i in range(4 * (step - 1), 4 * step)]
    assert saved["batches"][0]["input_ids"].shape[0] == 4


def test_a_trainable_tensor_without_a_gradient_is_named(tmp_path):
    made = small_task(
        adapter=LoRA(rank=2, alpha=4, dropout=0.0, targets=r"transformer\.h\.\d+\.attn\.c_attn")
    )
    made.configure_model()
    made.model.base_model.model.extra = nn.Linear(
        2, 2
    )  # trainable, and no part of the forward pass
    rows = DataLoader(
        [made.processor.encode(answers_of_many_lengths()[0])],
        batch_size=1,
        collate_fn=Pad(pad_id=0),
    )
    with pytest.raises(DataError, match=r"2 trainable tensors got no gradient: .*extra\.weight"):
        trainer(tmp_path, max_steps=1).fit(made, rows)
