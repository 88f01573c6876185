"""Scores that are sums over layers: relative errors of weights and outputs, and first-order effects on the loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sensitivity.measure.attribution.calibrated import Calibrated, Scores
from sensitivity.spec.components import Weight


def relative_weight_error(calibrated: Calibrated) -> Scores:
    """|E|^2 / |W|^2 of each layer: what rounding does to the weights, whatever they are multiplied by."""

    def of_weight(weight: Weight) -> list[float]:
        layer = calibrated.layers[weight.name]
        return [_ratio(error, layer.weight) for error in layer.weight_errors]

    return calibrated.by_component(of_weight)


def relative_gram_error(calibrated: Calibrated) -> Scores:
    """tr(E H E') / tr(W H W') of each layer: the share of its output on the calibration data that rounding changes."""

    def of_weight(weight: Weight) -> list[float]:
        layer = calibrated.layers[weight.name]
        return [_ratio(float(error), layer.output) for error in layer.output_errors.sum(1)]

    return calibrated.by_component(of_weight)


def kfac(calibrated: Calibrated) -> Scores:
    """Fisher with inputs and gradients taken as independent, as K-FAC does: sum of g^2 E H E' over a layer's rows.

    The backward pass does not need the errors of weights, so one pass serves all layers; `fisher` takes one for each
    group of blocks.
    """
    squares = calibrated.squares.means
    sums = {name: calibrated.layers[name].output_errors.double() @ square for name, square in squares.items()}
    return _first_order(calibrated, sums)


def swing(calibrated: Calibrated) -> Scores:
    """How far each example's loss is expected to move, up or down, summed over examples.

    Errors of a component count as random: the variance of what they add to an example's loss is the sum of g^2 E H E'
    over rows and layers, with g^2 that of the example, and its root is the movement. `kfac` sums the variances
    themselves, which are those of a few examples with large gradients; what answers lose depends on all.
    """
    found: Scores = {name: dict.fromkeys(calibrated.schemes, 0.0) for name in calibrated.parts.names}
    variances: dict[str, Tensor] = {}
    of_weights = calibrated.squares.variances
    for weight in calibrated.weights:
        if (own := of_weights.get(weight.name)) is not None:
            name = weight.component_name(calibrated.parts.by)
            variances[name] = variances[name] + own if name in variances else own
    for name, variance in variances.items():
        found[name] = dict(zip(calibrated.schemes, variance.sqrt().sum(0).tolist(), strict=True))
    return found


def fisher_scores(calibrated: Calibrated) -> Scores:
    """The sum of (gradient x change)^2 over a layer's outputs: ModelOpt's score of a quantized layer."""
    return _first_order(calibrated, calibrated.fisher)


def gradient_times_change(calibrated: Calibrated) -> Scores:
    """|gradient x change| of each example: the first-order change of its loss (DeltaLoss, as its paper has it)."""
    return _first_order(calibrated, calibrated.change)


def _first_order(calibrated: Calibrated, sums: Mapping[str, Tensor]) -> Scores:
    """Sum the scores of layers by component; layers that the loss does not reach score 0."""
    zeros = [0.0] * len(calibrated.schemes)
    return calibrated.by_component(lambda weight: sums[weight.name].tolist() if weight.name in sums else zeros)


def _ratio(part: float, whole: float) -> float:
    """A share of the whole; 0 where the whole is 0, as for a layer whose inputs are all zero."""
    return part / whole if whole > 0 else 0.0
