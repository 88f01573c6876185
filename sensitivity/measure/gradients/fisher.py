"""The diagonal Fisher matrix: squared gradients of the answer loss for each weight, summed over examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sensitivity.measure.gradients.backward import backward_pass, in_rows_that_fit
from sensitivity.measure.passes.block_modules import float_model
from sensitivity.measure.passes.token_batches import TokenBatch
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.exact_products import exact_in_tf32
from sensitivity.spec.components import Weight

FISHER_BYTES = 1 << 30  # bytes of squared gradients in memory at once


class Fisher:
    """Squared gradients of the float model, a few blocks at a time, with a backward pass for each group of blocks."""

    def __init__(self, vlm: VLM, weights: Sequence[Weight], data: Callable[[int], Iterable[TokenBatch]]) -> None:
        """`weights` are in the order in which they will be asked for."""
        self.vlm, self.data = vlm, data
        self.group_of: dict[str, list[Weight]] = {}
        group: list[Weight] = []
        bytes_left = 0
        for weight in weights:
            if 4 * weight.numel > bytes_left:
                group, bytes_left = [], FISHER_BYTES
            group.append(weight)
            bytes_left -= 4 * weight.numel
            self.group_of[weight.name] = group
        self.found: Mapping[str, Tensor] = {}

    def of(self, name: str, own: Mapping[str, Tensor]) -> Tensor:
        """The squared gradients of one weight in the float model, with weights `own`, whatever plan is installed."""
        if name not in self.found:
            group = self.group_of[name]
            self.found = {}  # freed before the next are computed

            def compute(batches: Callable[[], Iterable[TokenBatch]]) -> Mapping[str, Tensor]:
                with float_model(self.vlm.model, own):
                    return squared_gradients(self.vlm, group, batches())

            self.found = in_rows_that_fit(self.vlm, self.data, compute)
        return self.found[name]


def squared_gradients(vlm: VLM, weights: Sequence[Weight], data: Iterable[TokenBatch]) -> dict[str, Tensor]:
    """For each weight the sum over examples of G^2; zero where the loss does not reach it.

    G = sum_t d_t x_t' is an example's gradient, from the output gradient d_t and the input x_t of each token.
    """
    squares = {weight.name: torch.zeros(weight.rows, weight.cols, device=vlm.device) for weight in weights}
    examples = 1

    def visit(weight: Weight, inputs: Tensor, gradient: Tensor) -> None:
        # examples of a batch have equal shapes, one after the other
        tokens = len(inputs) // examples
        for row in range(examples):
            of_row = slice(row * tokens, (row + 1) * tokens)
            with exact_in_tf32(gradient, inputs):
                squares[weight.name] += (gradient[of_row].float().T @ inputs[of_row].float()).square()

    for batch in data:
        examples = len(batch.examples)
        backward_pass(vlm, weights, batch, visit)
    return squares
