"""SCORES: cheap scores of every component at every scheme, higher for more damage, each with its cost in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from sensitivity.measure.attribution.weight_errors import WeightErrors, plan_changes
from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.gradients.backward import in_rows_that_fit
from sensitivity.measure.gradients.first_order import FirstOrder, first_order
from sensitivity.measure.gradients.path_integral import path_integral
from sensitivity.measure.passes.token_batches import TokenBatch
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.linears import input_of
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.plan import Plan, Scheme

Scores = dict[str, dict[Scheme, float]]  # component -> scheme -> damage, in units of the score's own


@dataclass
class Calibrated:
    """What scores are computed from: a model, schemes, the statistics of calibration data, and the data itself."""

    vlm: VLM
    parts: ComponentMap
    schemes: Sequence[Scheme]
    statistics: Statistics
    data: Callable[[int], Iterable[TokenBatch]]  # in batches of at most so many rows

    @cached_property
    def errors(self) -> WeightErrors:
        """The errors of quantized weights."""
        return WeightErrors(self.vlm.model, self.parts, self.schemes, self.statistics)

    @cached_property
    def weights(self) -> list[Weight]:
        """The weights of layers that multiply an input."""
        return [weight for weight in self.parts.weights if not weight.is_embedding]

    @cached_property
    def first_order(self) -> FirstOrder:
        """The first-order scores of all weights, from one backward pass over the data."""
        return in_rows_that_fit(
            self.vlm, self.data, lambda data: first_order(self.vlm, self.weights, self.errors.of, data())
        )

    def by_component(self, of_weight: Callable[[Weight], Iterable[float]]) -> Scores:
        """Sum the scores of weights, one for each scheme, over each component."""
        sums_of: Scores = {name: dict.fromkeys(self.schemes, 0.0) for name in self.parts.names}
        # block by block, since statistics of a large model are in memory for a few blocks at a time
        for weight in (weight for block in self.parts.regroup("block").components for weight in block.weights):
            if not weight.is_embedding:
                sums = sums_of[weight.place(self.parts.by)]
                for scheme, value in zip(self.schemes, of_weight(weight), strict=True):
                    sums[scheme] += float(value)
        return sums_of


def relative_weight_error(given: Calibrated) -> Scores:
    """|E|^2 / |W|^2 of each layer: what rounding does to the weights, whatever they are multiplied by."""

    def of_weight(weight: Weight) -> list[float]:
        whole = float(given.errors.own[weight.name].float().square().sum())
        return [_ratio(float(error.float().square().sum()), whole) for error in given.errors.of(weight)]

    return given.by_component(of_weight)


def relative_gram_error(given: Calibrated) -> Scores:
    """tr(E H E') / tr(W H W') of each layer: the share of its output on the calibration data that rounding changes."""

    def of_weight(weight: Weight) -> list[float]:
        gram = given.statistics.gather([weight])[input_of(weight)].gram
        whole = _quadratic(given.errors.own[weight.name], gram)
        return [_ratio(_quadratic(error, gram), whole) for error in given.errors.of(weight)]

    return given.by_component(of_weight)


def fisher(given: Calibrated) -> Scores:
    """The sum of (gradient x change)^2 over a layer's outputs: ModelOpt's score of a quantized layer."""
    return _first_order(given, given.first_order.fisher)


def gradient_times_change(given: Calibrated) -> Scores:
    """|gradient x change| of each example: the first-order change of its loss (DeltaLoss, known from descriptions)."""
    return _first_order(given, given.first_order.change)


def path(given: Calibrated) -> Scores:
    """The share of a component in the damage of the uniform plan, integrated along the way from the float model."""
    shares: Scores = {name: dict.fromkeys(given.schemes, 0.0) for name in given.parts.names}
    for scheme in given.schemes:
        plan = Plan.uniform(given.parts, scheme)
        changes = plan_changes(given.vlm.model, given.parts, plan, given.statistics)
        integral = in_rows_that_fit(given.vlm, given.data, partial(path_integral, given.vlm, given.parts, changes))
        for (_, name, _), values in integral.terms.items():
            shares[name][scheme] += float(values.sum())
    return shares


# name -> a function of what calibration found that scores every component at every scheme
SCORES: dict[str, Callable[[Calibrated], Scores]] = {
    "weight": relative_weight_error,
    "gram": relative_gram_error,
    "fisher": fisher,
    "change": gradient_times_change,
    "path": path,
}
WITH_GRADIENTS = ("fisher", "change", "path")  # those that need right answers, whose loss they differentiate


@dataclass(frozen=True)
class Attribution:
    """One row of SCORES, computed: the score of each component at each scheme, and its cost in seconds of processor.

    The cost of what several scores share (errors of weights, a backward pass) is counted in full for each of them.
    """

    name: str
    scores: Scores
    seconds: float


def attribute(given: Calibrated, names: Sequence[str]) -> list[Attribution]:
    """Compute some scores of SCORES."""
    for name in names:
        if name not in SCORES:
            raise unknown("score", name, SCORES)
    errors = _seconds(lambda: given.errors)
    backward = _seconds(lambda: given.first_order) if {"fisher", "change"} & set(names) else 0.0
    attributions = []
    for name in names:
        began = time.process_time()
        scores = SCORES[name](given)
        seconds = time.process_time() - began
        attributions.append(
            Attribution(name, scores, errors + seconds + (backward if name in ("fisher", "change") else 0.0))
        )
    for one in attributions:
        _check_finite(one)
    return attributions


def _check_finite(scored: Attribution) -> None:
    """Raise an error where a score of SCORES is NaN or infinite: a plan that is chosen by it would be arbitrary."""
    for component, scores in scored.scores.items():
        for scheme, value in scores.items():
            if not torch.isfinite(torch.tensor(value)):
                raise UserError(
                    f"the {scored.name} score of {component} at {scheme} is NaN or infinite; run the model in float32 "
                    "(--dtype fp32)"
                )


def _seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def _first_order(given: Calibrated, sums: Mapping[str, Tensor]) -> Scores:
    """By component; layers that the loss does not reach do no damage."""
    nothing = [0.0] * len(given.schemes)
    return given.by_component(lambda weight: sums[weight.name].tolist() if weight.name in sums else nothing)


def _quadratic(error: Tensor, gram: Tensor) -> float:
    """tr(E H E')."""
    values = error.float()
    return float((values @ gram).mul_(values).sum())


def _ratio(part: float, whole: float) -> float:
    """A share of the whole; nothing where there is no whole, as for a layer whose inputs are all zero."""
    return part / whole if whole > 0 else 0.0
