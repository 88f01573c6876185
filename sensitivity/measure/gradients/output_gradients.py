"""Squared gradients of the answer loss with respect to layers' outputs: one number for each row of a weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sensitivity.measure.gradients.backward import backward_pass
from sensitivity.measure.passes.token_batches import TokenBatch
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import Weight


@dataclass
class OutputGradients:
    """The loss of the model as it is, and how strongly it depends on each output of each layer."""

    squares: dict[str, Tensor] = field(default_factory=dict)  # by weight: of each row, the mean square over tokens
    loss: float = 0.0  # summed over examples
    examples: int = 0


def squared_output_gradients(vlm: VLM, weights: Sequence[Weight], data: Iterable[TokenBatch]) -> OutputGradients:
    """Squared gradients over all batches, from one backward pass; weights that the loss does not reach are left out."""
    found, tokens = OutputGradients(), dict.fromkeys((weight.name for weight in weights), 0)

    def visit(weight: Weight, inputs: Tensor, gradient: Tensor) -> None:
        squares = gradient.float().square().sum(0).cpu().double()
        found.squares[weight.name] = found.squares.get(weight.name, 0) + squares
        tokens[weight.name] += len(inputs)

    for batch in data:
        found.loss += backward_pass(vlm, weights, batch, visit)
        found.examples += len(batch.examples)
    for name, squares in found.squares.items():
        squares /= tokens[name]
    return found
