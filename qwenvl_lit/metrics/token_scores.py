"""Loss, perplexity and next-token accuracy on the expected answers."""

from __future__ import annotations

import torch
from torchmetrics import Metric


class TokenScores(Metric):
    """Loss, perplexity and next-token accuracy over the supervised tokens of all batches and ranks.

    The scores are NaN without any token. The state consists of sums over batches, which do not
    identify rows. A row that is passed twice therefore counts twice, so the sampler must not repeat
    rows.
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
            loss_sum: the sum of the losses of the batch's supervised tokens, in nats.
            tokens: the number of supervised tokens.
            correct: the number of supervised tokens that the model considered most likely.
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
