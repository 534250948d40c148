"""The Lightning task: one module trains, validates, tests and predicts, whatever the family and the adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qwenvl_lit.generation.choices import option_losses
from qwenvl_lit.metrics.token_scores import TokenScores
from qwenvl_lit.training.adapters.merging import StartingCheckpoint, read_trained_state
from qwenvl_lit.training.adapters.methods import Full
from qwenvl_lit.training.non_finite import NonFiniteGuard
from qwenvl_lit.training.strategies import summed
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from torchmetrics import Metric

    from qwenvl_lit.generation.generation import Generation
    from qwenvl_lit.models.protocols import Family
    from qwenvl_lit.training.adapters.methods import Adapter
    from qwenvl_lit.training.optim import AdamW
    from qwenvl_lit.training.speed import Speed
    from qwenvl_lit.types import Batch, Prediction


class VisionLanguageModule(lightning.LightningModule):
    """Steps and lean checkpoints; everything that is a choice is handed in.

    Args:
        adapter: what is trained; None for a model that is used as it was published.
        speed: how the model is made fast to train; a task that only answers has none.
        init: what an earlier run learned, which this one starts from.
        metrics: scores of predictions by name; each set of rows gets copies of its own.
        config: plain data that is stored in every checkpoint, from which the run can be built again.

    Logs of each optimizer step `train/loss`, `train/accuracy` (of the next supervised token), `train/grad_norm` (before clipping);
    of all held-out tokens `val/loss`, `val/perplexity`, `val/token_accuracy`; `val/NAME` of answers; and `SET/NAME` for each test set, with
    `SET/rows`. A metric that found no row it could score is not logged.
    """

    def __init__(
        self,
        *,
        family: Family,
        adapter: Adapter | None,
        generation: Generation,
        metrics: Mapping[str, Metric],
        optim: AdamW | None = None,
        speed: Speed | None = None,
        init: StartingCheckpoint | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.family = family
        self.adapter = adapter
        self.init = init
        self.generation = generation
        self.optim = optim
        self.speed = speed
        self.config = config
        self.processor = family.processor()
        self.model: nn.Module | None = None
        self.home = torch.device(
            "cpu"
        )  # where `configure_model` puts the weights; a trainer says so in `setup`
        self.trained: Path | None = None  # a checkpoint whose tensors `configure_model` is to load
        self.metrics = nn.ModuleDict(metrics)
        self.set_metrics = nn.ModuleList()  # copies of `metrics` for each set being scored
        self.set_rows: list[int] = []
        self.val_tokens = TokenScores()
        self.guard = NonFiniteGuard()
        self.window: list[Batch] = []  # of the optimizer step that is being made
        self.register_buffer(
            "window_sums", torch.zeros(2), persistent=False
        )  # its losses and right predictions
        self.strict_loading = (
            False  # frozen tensors are not in checkpoints; `load_state_dict` checks the rest
        )

    def setup(self, stage: str) -> None:
        self.home = self.trainer.strategy.root_device

    def configure_model(self) -> None:
        """Load the base weights, straight to the device that a trainer gave this process, and apply the adapter, once; then the trained
        tensors of `trained`, once.

        Raises:
            DataError: a checkpoint that is not this network's, or not this adapter's.
        """
        if self.trained is not None and self.family.quantization and isinstance(self.adapter, Full):
            # no other weights can be put in place of those of few bits: what was learned comes before
            self.init = StartingCheckpoint(
                checkpoint=str(self.trained), sha256=None, adapter=self.adapter, init=self.init
            )
            self.adapter = self.trained = self.model = None
        if self.model is None:
            model = self._load_base()
            self.model = (
                self.adapter.apply(model, self.family.components) if self.adapter else model
            ).train()
            if self.adapter and self.speed:
                self.speed.apply(
                    self.model, family=self.family, adapter=self.adapter, trainer=self.trainer
                )
        if self.trained is not None:
            checkpoint, self.trained = self.trained, None
            try:
                self.load_state_dict(
                    {
                        f"model.{name}": tensor
                        for name, tensor in read_trained_state(checkpoint, self.model).items()
                    }
                )
            except (ValueError, RuntimeError) as error:
                raise DataError(f"{checkpoint}: {error}") from error

    def _load_base(self) -> nn.Module:
        quantization = (self.adapter and self.adapter.quantization) or self.family.quantization
        if self.init is None:
            return self.family.load(self.home, quantization=quantization)
        # folded at full precision: on the host, where the few bits are all that the device has room for
        model = self.init.merge_into(
            self.family.load("cpu" if quantization else self.home), self.family.components
        )
        return self.family.quantized(model, self.home, quantization) if quantization else model

    def trainable_names(self) -> set[str]:
        """Names, as in `state_dict`, of the tensors that are trained: what a checkpoint holds."""
        return {name for name, tensor in self.named_parameters() if tensor.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep = self.trainable_names()
        checkpoint["state_dict"] = {
            name: tensor for name, tensor in checkpoint["state_dict"].items() if name in keep
        }
        checkpoint["config"] = self.config

    def load_state_dict(
        self, state_dict: Mapping[str, torch.Tensor], strict: bool = False, assign: bool = False
    ):
        """Load what a checkpoint holds: all trainable tensors and nothing else.

        Raises:
            ValueError: a trainable tensor is missing, or the checkpoint has one that this model does not train.
        """
        missing, unexpected = (
            self.trainable_names() - set(state_dict),
            set(state_dict) - self.trainable_names(),
        )
        for what, names in (("lacks", missing), ("has unknown", unexpected)):
            if names:
                shown = ", ".join(sorted(names)[:5])
                raise ValueError(
                    f"the checkpoint {what} {len(names)} tensors ({shown}, ...); was it made with this model and adapter?"
                )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def configure_optimizers(self):
        optimizer, schedule = self.optim.build(
            self.model,
            self._steps(),
            self.family.components,
            compile=self.speed is not None and self.speed.compiled,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _steps(self) -> int:
        data = self.trainer.datamodule
        steps = data.steps_of_run() if data else self.trainer.estimated_stepping_batches
        if steps == math.inf:
            raise DataError(
                "a rate that falls needs an end: give trainer.max_epochs or trainer.max_steps"
            )
        return int(steps)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """The sum of the losses of a batch: the mean over all supervised tokens of the step is known at its end only."""
        output = self.model(**self.family.inputs(batch), num_items_in_batch=1)
        self.window.append(batch)
        if not len(
            batch.target_positions
        ):  # every row was dropped: a step all the same, since other ranks wait for its gradients
            return output.logits.sum() * 0
        targets = batch.labels.flatten()[batch.target_positions + 1]
        correct = (output.logits.detach().argmax(-1) == targets).sum()
        self.window_sums = self.window_sums + torch.stack(
            (output.loss.detach().float(), correct.float())
        )
        return output.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the gradient that of the mean over the supervised tokens of all batches and ranks of the step, whatever their number.

        Raises:
            DataError: a trainable tensor got no gradient, or the gradient before this one was not finite.
        """
        self.guard.check(Path(self.trainer.default_root_dir), self.global_rank)
        tokens = self.window_sums.new_full(
            (1,), sum(len(batch.target_positions) for batch in self.window)
        )  # a copy would be waited for
        loss, correct, tokens = summed(torch.cat((self.window_sums, tokens)))
        gradients = self._gradients()
        # Lightning has divided by the number of batches, and the ranks' sums were averaged
        factor = (
            self.trainer.accumulate_grad_batches * self.trainer.world_size / tokens.clamp(min=1)
        )
        torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
        norm = torch.nn.utils.get_total_norm(gradients)
        self.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = self.gradient_norm.isfinite()
        optimizer.found_inf = (
            ~finite
        ).float()  # torch's own sign to leave a step out, which is obeyed on the device
        self.guard.note(finite, step=self.trainer.global_step + 1, batches=self.window)
        self.log("train/loss", loss / tokens.clamp(min=1))
        self.log("train/accuracy", correct / tokens.clamp(min=1))
        self.log("train/grad_norm", self.gradient_norm)
        self.window, self.window_sums = [], torch.zeros_like(self.window_sums)

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        """Clips to the norm `gradient_clip_val`, with the norm that is known already; also where parameters are sharded."""
        if gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(
                f"trainer.gradient_clip_algorithm={gradient_clip_algorithm}: gradients are clipped by their norm only"
            )
        if gradient_clip_val:
            factor = (gradient_clip_val / (self.gradient_norm + 1e-6)).clamp(max=1)
            torch._foreach_mul_([local(gradient) for gradient in self._gradients()], factor)

    def on_train_end(self) -> None:
        self.guard.check(Path(self.trainer.default_root_dir), self.global_rank)
        if self.home.type == "cuda":
            self.trainer.strategy.optimizers = []  # what is to be kept is saved by now; see `cpu`

    def cpu(self) -> VisionLanguageModule:
        """Where a GPU has the weights, they stay there. Lightning calls them, and the optimizer's states, to the host when a run ends: tens
        of gigabytes, which take long and may find no room."""
        return self if self.home.type == "cuda" else super().cpu()

    def _gradients(self) -> list[torch.Tensor]:
        trained = {
            name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad
        }
        if without := [name for name, tensor in trained.items() if tensor.grad is None]:
            raise DataError(
                f"{len(without)} trainable tensors got no gradient: {', '.join(without[:5])}{', ...' if len(without) > 5 else ''}. "
                f"Nothing in the batch reaches them: choose an adapter without them, or data that does"
            )
        return [tensor.grad for tensor in trained.values()]

    def on_validation_epoch_start(self) -> None:
        self._start_scoring(1)

    def validation_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[Prediction] | None:
        if dataloader_idx == 0:  # all rows with their answers; loader 1 has prompts of some
            output = self.model(**self.family.inputs(batch))
            if output.loss is not None:  # else every row was dropped
                targets = batch.labels.flatten()[batch.target_positions + 1]
                self.val_tokens.update(
                    output.loss * len(targets),
                    len(targets),
                    (output.logits.argmax(-1) == targets).sum(),
                )
            return None
        return self._answer(batch, 0)

    def on_validation_epoch_end(self) -> None:
        for name, value in self.val_tokens.compute().items():
            self.log(f"val/{name}", value.float())
        self.val_tokens.reset()
        if len(self.trainer.num_val_batches) > 1:
            self._log_scores(["val"])
            self.generation.release(self.model)  # training has other uses for the memory

    def on_test_epoch_start(self) -> None:
        self._start_scoring(len(self.trainer.datamodule.test_names))

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[Prediction]:
        return self._answer(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        names = self.trainer.datamodule.test_names
        self._log_scores(names)
        for name, rows in zip(names, self.set_rows, strict=True):
            self.log(f"{name}/rows", float(rows), reduce_fx="sum", sync_dist=True)

    def predict_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[Prediction]:
        return self.predict(batch)

    def predict(self, batch: Batch) -> list[Prediction]:
        """The model's answer to each row of a batch of prompts."""
        if not batch.conversations:
            return []
        inputs = self.family.inputs(batch, generate=True)
        if any(conversation.options for conversation in batch.conversations):
            return self._choose(batch, inputs)
        images = [
            image for conversation in batch.conversations for image in conversation.prompt().images
        ]
        whole = len(images) == len(
            inputs.get("pixel_values", ())
        )  # old turns of a long conversation are left out with their images
        rows = self.generation(
            self.model,
            inputs,
            stop_ids=self.processor.stop_ids,
            pad_id=self.processor.pad_id,
            image_keys=[image.key for image in images] if whole else None,
        )
        return [
            replace(self.processor.decode(ids, conversation), tokens=len(ids))
            for ids, conversation in zip(rows, batch.conversations, strict=True)
        ]

    def _choose(self, batch: Batch, inputs: Mapping[str, Any]) -> list[Prediction]:
        """The option with the lowest mean loss of its tokens."""
        if without := [
            conversation for conversation in batch.conversations if not conversation.options
        ]:
            row = without[0]
            raise DataError(
                f"{row.where or 'data'}: row {row.id!r} has no options and others of its set have; keep them in sets of their own"
            )
        options = [self.processor.option_ids(conversation) for conversation in batch.conversations]
        return [
            self.processor.read(conversation.options[losses.index(min(losses))], conversation)
            for conversation, losses in zip(
                batch.conversations, option_losses(self.model, inputs, options), strict=True
            )
        ]

    def _answer(self, batch: Batch, scored_set: int) -> list[Prediction]:
        predictions = self.predict(batch)
        for metric in self.set_metrics[scored_set].values():
            metric.update(predictions)
        self.set_rows[scored_set] += len(predictions)
        return predictions

    def _start_scoring(self, sets: int) -> None:
        self.generation.release(
            self.model
        )  # the weights may be others than those that images were encoded with
        self.set_metrics = nn.ModuleList(
            nn.ModuleDict({name: metric.clone() for name, metric in self.metrics.items()})
            for _ in range(sets)
        ).to(self.device)
        self.set_rows = [0] * sets

    def _log_scores(self, names: list[str]) -> None:
        for set_name, metrics in zip(names, self.set_metrics, strict=True):
            for name, metric in metrics.items():
                if (value := metric.compute()).isfinite():
                    self.log(f"{set_name}/{name}", value.float())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
