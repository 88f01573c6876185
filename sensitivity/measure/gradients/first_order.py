"""What backward passes over calibration data say about errors of weights, one number for each layer and scheme.

In what follows g is the gradient of the loss with respect to a layer's outputs, x its inputs, E the error of its weight
under a scheme, and d = E x the change of its outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sensitivity.measure.gradients.backward import backward_pass
from sensitivity.measure.passes.token_batches import TokenBatch
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.exact_products import exact_in_tf32
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError

ErrorsOf = Callable[[Weight], Sequence[Tensor]]  # the error of a weight (rows x columns) under each scheme
NUMBERS_AT_ONCE = 2**24  # gradients of weights, of several examples, that are in memory at once


@dataclass
class Squares:
    """By weight: g^2 of each row, and of each example under each scheme the sum of g^2 times the error of the row.

    `errors` has a number for each row of each weight under each scheme (schemes x rows), so that of an example no more
    than a number for each scheme is kept.
    """

    errors: Mapping[str, Tensor]
    sums: dict[str, Tensor] = field(default_factory=dict)  # over all tokens
    tokens: dict[str, int] = field(default_factory=dict)
    by_example: dict[str, list[Tensor]] = field(default_factory=dict)
    batch: dict[str, Tensor] = field(default_factory=dict)  # examples x rows, of the batch that is under way

    def visit(self, weight: Weight, inputs: Tensor, gradient: Tensor, examples: int) -> None:
        """Take a layer's inputs and gradient (tokens x columns, tokens x rows); examples have equally many tokens."""
        squares = gradient.float().square().reshape(examples, -1, gradient.shape[-1]).sum(1).cpu().double()
        _add(self.batch, weight.name, squares)
        self.tokens[weight.name] = self.tokens.get(weight.name, 0) + len(inputs)

    def end_batch(self) -> None:
        """Add up the batch, all of whose layers were visited; a layer may run several times in a pass."""
        for name, squares in self.batch.items():
            _add(self.sums, name, squares.sum(0))
            self.by_example.setdefault(name, []).append(squares @ self.errors[name].double().T)
        self.batch = {}

    @property
    def means(self) -> dict[str, Tensor]:
        """By weight: of each row, the mean square over tokens."""
        return {name: sums / self.tokens[name] for name, sums in self.sums.items()}

    @property
    def variances(self) -> dict[str, Tensor]:
        """By weight (examples x schemes): of what is added to an example's loss, were the errors random.

        `errors` are sums over tokens, hence the division.
        """
        return {name: torch.cat(batches) / self.tokens[name] for name, batches in self.by_example.items()}


@dataclass
class Fisher:
    """By weight, for each scheme: the sum of (g d)^2 over tokens and outputs."""

    errors_of: ErrorsOf
    scored: Collection[str]
    sums: dict[str, Tensor] = field(default_factory=dict)

    def visit(self, weight: Weight, inputs: Tensor, gradient: Tensor, examples: int) -> None:
        """As `Squares.visit`."""
        if weight.name in self.scored:
            errors, sums = self.errors_of(weight), []
            with exact_in_tf32(inputs, *errors):
                for error in errors:
                    sums.append((inputs.float() @ error.float().T).mul_(gradient).square().sum())
            _add(self.sums, weight.name, torch.stack(sums).cpu().double())

    def end_batch(self) -> None:
        """Nothing is left to do."""


@dataclass
class Change:
    """By weight, for each scheme: |sum of g d| of each example, summed over examples."""

    errors_of: ErrorsOf
    scored: Collection[str]
    sums: dict[str, Tensor] = field(default_factory=dict)
    batch: dict[str, Tensor] = field(default_factory=dict)  # schemes x examples

    def visit(self, weight: Weight, inputs: Tensor, gradient: Tensor, examples: int) -> None:
        """As `Squares.visit`."""
        if weight.name not in self.scored:
            return
        # the sum of g d is that of E times the gradient of the weight, which is one product for all schemes
        errors = torch.stack([error.flatten() for error in self.errors_of(weight)]).float()
        at_once, moved = max(1, NUMBERS_AT_ONCE // weight.numel), []
        read, gradients = (
            torch.split(tokens.float().reshape(examples, -1, tokens.shape[-1]), at_once)
            for tokens in (inputs, gradient)
        )
        for x, g in zip(read, gradients, strict=True):
            with exact_in_tf32(inputs, gradient):
                of_weight = torch.bmm(g.transpose(1, 2), x).flatten(1)
            moved.append(errors @ of_weight.T)
        _add(self.batch, weight.name, torch.cat(moved, 1).cpu().double())

    def end_batch(self) -> None:
        """As `Squares.end_batch`."""
        for name, moved in self.batch.items():
            _add(self.sums, name, moved.abs().sum(1))
        self.batch = {}


Gathering = Squares | Fisher | Change


@dataclass
class Passed:
    """The loss of the model as it is, over the data of a pass, and CPU seconds."""

    loss: float = 0.0  # summed over examples
    examples: int = 0
    seconds: float = 0.0  # of the pass alone
    own_seconds: list[float] = field(default_factory=list)  # of each gathering


def gather(vlm: VLM, weights: Sequence[Weight], data: Iterable[TokenBatch], gatherings: Sequence[Gathering]) -> Passed:
    """Gather numbers from one backward pass over all batches; layers that the loss does not reach are not visited."""
    found, began = Passed(own_seconds=[0.0] * len(gatherings)), time.process_time()
    for batch in data:

        def visit(weight: Weight, inputs: Tensor, gradient: Tensor, batch: TokenBatch = batch) -> None:
            if len(inputs) % len(batch.examples):
                raise UserError(f"{weight.reader} reads other tokens of each example, which cannot be told apart")
            for i, one in enumerate(gatherings):
                start = time.process_time()
                one.visit(weight, inputs, gradient, len(batch.examples))
                found.own_seconds[i] += time.process_time() - start

        found.loss += backward_pass(vlm, weights, batch, visit)
        found.examples += len(batch.examples)
        for one in gatherings:
            one.end_batch()
    found.seconds = time.process_time() - began - sum(found.own_seconds)
    return found


def _add(sums: dict[str, Tensor], name: str, values: Tensor) -> None:
    sums[name] = sums[name] + values if name in sums else values
