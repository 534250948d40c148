"""Loss, perplexity and next-token accuracy on the expected answers."""

from __future__ import annotations

import torch
from torchmetrics import Metric


class TokenScores(Metric):
    """Loss, perplexity and next-token accuracy over the supervised tokens of all batches and ranks.

    NaN without any token. The state is sums over batches, which do not tell rows apart. A row that
    arrives twice therefore counts twice: the sampler must not repeat any.
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
        """Adds a batch.

        Args:
            loss_sum: sum of the losses of its supervised tokens, in nats.
            tokens: number of supervised tokens.
            correct: how many of them the model predicted as the most likely token.
        """
        self.loss += loss_sum.detach().double()
        self.tokens += tokens
        self.correct += correct

    def compute(self) -> dict[str, torch.Tensor]:
        loss = self.loss / self.tokens  # 0 / 0 is NaN
        return {
            "loss": loss,
            "perplexity": loss.exp(),
            "token_accuracy": self.correct.double() / self.tokens,
        }
