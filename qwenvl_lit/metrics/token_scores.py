"""How well a model foresees the tokens of the expected answers."""

from __future__ import annotations

import torch
from torchmetrics import Metric


class TokenScores(Metric):
    """Loss, perplexity and accuracy of the next token, each over all supervised tokens of all batches and ranks; nan without any.

    The sums of a batch say nothing of its rows, so a row that arrives twice counts twice: the sampler must not repeat any.
    """

    is_differentiable = False
    full_state_update = False

    loss: torch.Tensor
    tokens: torch.Tensor
    correct: torch.Tensor

    def __init__(self):
        super().__init__()
        self.add_state("loss", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, loss_sum: torch.Tensor, tokens: int | torch.Tensor, correct: int | torch.Tensor
    ) -> None:
        """Adds a batch: the sum of its tokens' losses (in nats), how many there are, and how many of them were the likeliest."""
        self.loss += loss_sum.detach().double()
        self.tokens += tokens
        self.correct += correct

    def compute(self) -> dict[str, torch.Tensor]:
        loss = self.loss / self.tokens  # 0 / 0 is nan
        return {
            "loss": loss,
            "perplexity": loss.exp(),
            "token_accuracy": self.correct.double() / self.tokens,
        }
