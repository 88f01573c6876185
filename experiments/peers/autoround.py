"""AutoRound's DeltaLoss of weights, as `auto_round/auto_scheme/delta_loss.py` of version 0.16.1 computes it."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor

from sensitivity.measure.attribution.calibrated import Calibrated, Scores
from sensitivity.measure.gradients.backward import backward_pass
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.spec.components import Weight
from sensitivity.spec.plan import Plan

ROWS = 8  # examples whose gradients are added up before their absolute values are taken


def delta_loss(given: Calibrated) -> Scores:
    """The sum over a weight's elements of |gradient x error|, with all layers quantized at the scheme that is scored.

    Their score has a second term, of rounded activations, which is 0 here. `sensitivity explain --scores change` takes
    the absolute value after summing over the elements, and of each example.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(given.schemes))
    own, model = given.errors.own, given.vlm.model
    for place, scheme in enumerate(given.schemes):
        with quantized(model, given.parts, Plan.uniform(given.parts, scheme), None, given.statistics):

            def visit(weight: Weight, inputs: Tensor, gradient: Tensor, place: int = place) -> None:
                error = model.get_parameter(weight.name).data - own[weight.name]
                product = (gradient.float().T @ inputs.float()) * error.float()
                sums[weight.name][place] += float(product.abs().sum())

            for batch in given.data(ROWS):
                backward_pass(given.vlm, given.weights, batch, visit)
    return given.by_component(lambda weight: sums[weight.name])
