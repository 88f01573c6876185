"""Scores that are sums over layers: relative errors of weights and outputs, and first-order effects on the loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sensitivity.measure.attribution.calibrated import Calibrated, Scores
from sensitivity.spec.components import Weight


def relative_weight_error(given: Calibrated) -> Scores:
    """|E|^2 / |W|^2 of each layer: what rounding does to the weights, whatever they are multiplied by."""

    def of_weight(weight: Weight) -> list[float]:
        layer = given.layers[weight.name]
        return [_ratio(error, layer.weight) for error in layer.weight_errors]

    return given.by_component(of_weight)


def relative_gram_error(given: Calibrated) -> Scores:
    """tr(E H E') / tr(W H W') of each layer: the share of its output on the calibration data that rounding changes."""

    def of_weight(weight: Weight) -> list[float]:
        layer = given.layers[weight.name]
        return [_ratio(float(error), layer.output) for error in layer.output_errors.sum(1)]

    return given.by_component(of_weight)


def kfac(given: Calibrated) -> Scores:
    """Fisher with inputs and gradients taken as independent, as K-FAC does: sum of g^2 E H E' over a layer's rows.

    The backward pass does not use the errors of weights, so they need not be in memory during it.
    """
    squares = given.output_gradients.squares
    sums = {name: given.layers[name].output_errors.double() @ square for name, square in squares.items()}
    return _first_order(given, sums)


def fisher(given: Calibrated) -> Scores:
    """The sum of (gradient x change)^2 over a layer's outputs: ModelOpt's score of a quantized layer."""
    return _first_order(given, given.first_order.fisher)


def gradient_times_change(given: Calibrated) -> Scores:
    """|gradient x change| of each example: the first-order change of its loss (DeltaLoss, as it is described)."""
    return _first_order(given, given.first_order.change)


def _first_order(given: Calibrated, sums: Mapping[str, Tensor]) -> Scores:
    """By component; layers that the loss does not reach do no damage."""
    nothing = [0.0] * len(given.schemes)
    return given.by_component(lambda weight: sums[weight.name].tolist() if weight.name in sums else nothing)


def _ratio(part: float, whole: float) -> float:
    """A share of the whole; 0 where the whole is 0, as for a layer whose inputs are all zero."""
    return part / whole if whole > 0 else 0.0
