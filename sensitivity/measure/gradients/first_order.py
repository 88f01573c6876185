"""First-order scores of weight errors: what one backward pass over calibration data says about each of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sensitivity.measure.gradients.backward import backward_pass
from sensitivity.measure.passes.token_batches import TokenBatch
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import Weight

ErrorsOf = Callable[[Weight], Sequence[Tensor]]  # the error of a weight (rows x columns) under each scheme


@dataclass
class FirstOrder:
    """By weight name: two scores for each scheme, summed over examples.

    Let g be the gradient of the loss with respect to a layer's output, and d the change of that output when the weight
    is quantized. `fisher` is the sum of (g d)^2 over tokens and outputs. `change` is |sum of g d| of each example.
    """

    fisher: dict[str, Tensor] = field(default_factory=dict)
    change: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self, vlm: VLM, weights: Sequence[Weight], batch: TokenBatch, errors_of: ErrorsOf, scored: Collection[str]
    ) -> None:
        """Add the examples of a batch."""
        moved_loss: dict[str, Tensor] = {}  # per weight: schemes x examples

        def visit(weight: Weight, inputs: Tensor, gradient: Tensor) -> None:
            if weight.name not in scored:
                return
            fisher, moved = [], []
            for error in errors_of(weight):
                products = (inputs.float() @ error.float().T).mul_(gradient)
                fisher.append(products.square().sum())
                # examples of a batch have equal shapes, so each has an equal share of the tokens
                moved.append(products.sum(1).reshape(len(batch.examples), -1).sum(1))
            _add(self.fisher, weight.name, torch.stack(fisher).cpu().double())
            _add(moved_loss, weight.name, torch.stack(moved).cpu().double())  # a layer may run several times in a pass

        backward_pass(vlm, weights, batch, visit)
        for name, moved in moved_loss.items():
            _add(self.change, name, moved.abs().sum(1))


def first_order_scores(
    vlm: VLM, weights: Sequence[Weight], errors_of: ErrorsOf, data: Iterable[TokenBatch], scored: Collection[str]
) -> FirstOrder:
    """First-order scores of the weights that `scored` names; those that the loss does not reach are left out."""
    found = FirstOrder()
    for batch in data:
        found.add(vlm, weights, batch, errors_of, scored)
    return found


def _add(sums: dict[str, Tensor], name: str, values: Tensor) -> None:
    sums[name] = sums[name] + values if name in sums else values
