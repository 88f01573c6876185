"""Path integral: divides the change of the answer loss, from float weights to a plan, among components and tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor, nn

from sensitivity.measure.gradients.backward import Counted, answer_loss, backward_pass
from sensitivity.measure.passes.token_batches import TokenBatch
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.stage import each

TOLERANCE = 0.01  # the most by which the sum of the terms may miss the whole change of the loss, as a share of it
MIN_SHARE = 1e-6  # of the loss itself: a smaller difference is float32 rounding
# backward passes over the data: 2 for the whole path, 4 for each halving; what the terms then still miss is reported
MAX_PASSES = 130
NODES = ((0.5 - 0.5 / 3**0.5, 0.5), (0.5 + 0.5 / 3**0.5, 0.5))  # two-point Gauss-Legendre rule on [0, 1]

MakeBatches = Callable[[], Iterable[TokenBatch]]  # called once for every pass
Place = tuple[int, str, int]  # an example, by its number; a component; how many of the example's tokens a layer reads
Terms = dict[Place, Tensor]  # what each of these tokens adds to the loss


@dataclass(eq=False)
class _Piece:
    """A segment of the path, with its terms and what they miss of the change of the loss on it."""

    begin: float
    end: float
    terms: Terms
    missing: float


@dataclass
class PathIntegral:
    """The terms of a plan's damage, and how far they are from its whole: loss after minus loss before."""

    before: float  # the loss of the float model
    after: float  # the loss under the plan
    terms: Terms
    passes: int  # backward passes over the data
    modalities: dict[Place, Tensor | None] = field(default_factory=dict)  # None: all are vision
    prompts: dict[int, list[int]] = field(default_factory=dict)  # the tokens of each example's question

    @property
    def change(self) -> float:
        """The whole change of the loss."""
        return self.after - self.before

    @property
    def total(self) -> float:
        """The sum of all terms."""
        return sum(float(values.sum()) for values in self.terms.values())

    @property
    def missing(self) -> float:
        """How much of the change the terms do not account for, as a share of it."""
        return abs(self.total - self.change) / max(abs(self.change), MIN_SHARE * abs(self.before), 1e-300)


def integrate_path(
    vlm: VLM,
    parts: ComponentMap,
    changes: Mapping[str, Tensor],
    data: MakeBatches,
    tolerance: float = TOLERANCE,
    max_passes: int = MAX_PASSES,
    counted: Counted | None = None,
    name: str = "loss of answers",
) -> PathIntegral:
    """The integral of the loss gradient times the change of each layer's output, from float weights to quantized ones.

    All weights move together on straight lines: W + t * change, t from 0 to 1 (the Aumann-Shapley value). Since the
    loss is known at every t, so is the error of every piece of the path: the worst piece is halved until what all
    pieces miss is at most `tolerance` of the whole change. `changes` is by parameter; `counted` chooses the tokens of
    answers whose loss counts, and `name` is what progress lines call it.
    """
    with closing(each(count(), name, "backward passes", max_passes, at_most=True)) as progress:
        path = _Path(vlm, parts, changes, data, counted, progress)
        before, after = path.loss(0.0), path.loss(1.0)
        pieces = [path.piece(0.0, 1.0)]
        while _passes(pieces) < max_passes:
            missing = sum(abs(piece.missing) for piece in pieces)
            if missing <= max(tolerance * abs(after - before), MIN_SHARE * abs(before)):
                break
            worst = max(pieces, key=lambda piece: abs(piece.missing))
            middle = (worst.begin + worst.end) / 2
            pieces.remove(worst)
            pieces += [path.piece(worst.begin, middle), path.piece(middle, worst.end)]
    terms: Terms = {}
    for piece in sorted(pieces, key=lambda piece: piece.begin):
        _add(terms, piece.terms, 1.0)
    return PathIntegral(before, after, terms, _passes(pieces), path.modalities, path.prompts)


def _passes(pieces: Sequence[_Piece]) -> int:
    """The backward passes that were run: each halving left one piece more, and ran two anew."""
    return len(NODES) * (2 * len(pieces) - 1)


class _Path:
    """The model at points between its own weights and the quantized ones, and the losses that were computed there."""

    def __init__(
        self,
        vlm: VLM,
        parts: ComponentMap,
        changes: Mapping[str, Tensor],
        data: MakeBatches,
        counted: Counted | None,
        progress: Iterator[object],
    ) -> None:
        self.vlm, self.changes, self.data, self.counted = vlm, changes, data, counted
        # also those that do not change: then every block runs again in the backward pass, and no activations are kept
        self.weights = [weight for weight in parts.weights if not weight.is_embedding]
        self.component = {weight.name: c.name for c in parts.components for weight in c.weights}
        self.progress = progress
        self.losses: dict[float, float] = {}
        self.modalities: dict[Place, Tensor | None] = {}
        self.prompts: dict[int, list[int]] = {}

    def loss(self, t: float) -> float:
        """The answer loss over all data at a point of the path."""
        if t not in self.losses:
            with moved(self.vlm.model, self.changes, t), torch.inference_mode():
                self.losses[t] = sum(float(answer_loss(self.vlm, batch, self.counted)) for batch in self.data())
        return self.losses[t]

    def piece(self, begin: float, end: float) -> _Piece:
        """The terms of one piece of the path."""
        terms: Terms = {}
        for node, weight in NODES:
            _add(terms, self.gradients(begin + node * (end - begin)), weight * (end - begin))
        total = sum(float(values.sum()) for values in terms.values())
        return _Piece(begin, end, terms, self.loss(end) - self.loss(begin) - total)

    def gradients(self, t: float) -> Terms:
        """By how much each token of each component moves the loss as t grows."""
        terms: Terms = {}
        next(self.progress)
        with moved(self.vlm.model, self.changes, t):
            for batch in self.data():
                self._add_batch(terms, batch)
        return terms

    def _add_batch(self, terms: Terms, batch: TokenBatch) -> None:
        """Add the terms of a batch's examples, and note the modality of their tokens."""
        count = len(batch.examples)
        self.prompts |= dict(zip(batch.examples, batch.prompts, strict=True))

        def visit(weight: Weight, inputs: Tensor, gradient: Tensor) -> None:
            if weight.name not in self.changes:
                return
            shift = inputs @ self.changes[weight.name].to(inputs.dtype).T
            if weight.bias in self.changes:
                shift = shift + self.changes[str(weight.bias)].to(shift.dtype)
            values = (shift * gradient).sum(1).cpu().double().reshape(count, -1)
            modality, _ = batch.modality(weight.part, torch.Size((values.numel(),)))
            for row, example in enumerate(batch.examples):
                place = example, self.component[weight.name], values.shape[1]
                _add(terms, {place: values[row]}, 1.0)
                if place not in self.modalities:
                    self.modalities[place] = None if modality is None else modality.reshape(count, -1)[row].cpu()

        backward_pass(self.vlm, self.weights, batch, visit, self.counted)


@contextmanager
def moved(model: nn.Module, changes: Mapping[str, Tensor], t: float) -> Iterator[None]:
    """Inside the `with` block, the changed parameters are W + t * change; afterwards they are the model's own again."""
    parameters = {name: model.get_parameter(name) for name in changes}
    float_weights = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, change in changes.items():
            parameters[name].data = float_weights[name] + t * change.to(float_weights[name])
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = float_weights[name]


def _add(terms: Terms, more: Mapping[Place, Tensor], factor: float) -> None:
    """Add other terms, times a factor, in place."""
    for place, values in more.items():
        terms[place] = terms[place] + factor * values if place in terms else factor * values
