"""How a changed model answers calibration data: the rise of its loss, and its divergence from the float model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from sensitivity.measure.gradients.backward import teacher_forced_logits
from sensitivity.measure.passes.token_batches import TokenBatch
from sensitivity.models.vlm import VLM


@dataclass(frozen=True)
class PredictionChange:
    """What differs from the float model: means over the tokens of a right answer, summed over examples."""

    divergence: float  # Kullback-Leibler, of the changed model's next-token probabilities from the float model's
    loss: float  # by how much the cross-entropy of the right token rises


class AnswerChanges:
    """The float model's predictions of the right answers, and how those of the changed model differ."""

    def __init__(self, vlm: VLM, data: Callable[[], Iterable[TokenBatch]]) -> None:
        self.vlm, self.data = vlm, data
        self.log_probabilities: list[Tensor] = []  # of all next tokens, by batch: rows x positions x vocabulary
        self.loss = 0.0  # summed over examples
        for predicted, targets in self._predictions():
            self.log_probabilities.append(predicted.float().cpu())
            self.loss -= float(predicted.gather(-1, targets[..., None]).mean(1).sum())

    def now(self) -> PredictionChange:
        """How the answers of the model differ at this moment, from one forward pass over the data."""
        divergence = loss = 0.0
        for unchanged, (predicted, targets) in zip(self.log_probabilities, self._predictions(), strict=True):
            before = unchanged.to(predicted)
            # a token that the float model rules out has a log-probability of minus infinity, and adds nothing
            each = torch.where(before.isfinite(), before.exp() * (before - predicted), 0.0).sum(-1)
            divergence += float(each.mean(1).sum())
            loss += float((before - predicted).gather(-1, targets[..., None]).mean(1).sum())
        return PredictionChange(divergence, loss)

    def under(self, changed: AbstractContextManager[object]) -> PredictionChange:
        """How the answers differ while a context manager changes the model."""
        with changed:
            return self.now()

    def _predictions(self) -> Iterable[tuple[Tensor, Tensor]]:
        """For each batch the log-probabilities of all next tokens, and the right ones."""
        with torch.inference_mode():
            for batch in self.data():
                logits, targets = teacher_forced_logits(self.vlm, batch)
                yield logits.log_softmax(-1), targets
