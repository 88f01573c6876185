"""AutoRound's DeltaLoss of weights, as `auto_round/auto_scheme/delta_loss.py` of version 0.16.1 computes it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from torch import Tensor

from sensitivity.measure.attribution.calibrated import Calibrated, Scores
from sensitivity.measure.gradients.backward import backward_pass
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.spec.components import Weight
from sensitivity.spec.plan import Plan

ROWS = 8  # examples whose gradients are added up before their absolute values are taken


def delta_loss(given: Calibrated, rows: int = ROWS, names: Collection[str] | None = None) -> Scores:
    """The sum over a weight's elements of |gradient x error|, with all layers quantized at the scheme that is scored.

    Their score has a second term, of rounded activations, which is 0 here. `sensitivity explain --scores change` takes
    the absolute value after summing over the elements, and of each example. With `names`, these components alone are
    quantized and scored.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(given.schemes))
    own, model = given.errors.own, given.vlm.model
    known = given.parts.names if names is None else names
    for place, scheme in enumerate(given.schemes):
        plan = Plan(tuple((name, scheme if name in known else None) for name in given.parts.names))
        with quantized(model, given.parts, plan, None, given.statistics):

            def visit(weight: Weight, inputs: Tensor, gradient: Tensor, place: int = place) -> None:
                if weight.name not in own:
                    return
                error = model.get_parameter(weight.name).data - own[weight.name]
                product = (gradient.float().T @ inputs.float()) * error.float()
                sums[weight.name][place] += float(product.abs().sum())

            for batch in given.data(rows):
                backward_pass(given.vlm, given.weights, batch, visit)
    return given.by_component(lambda weight: sums[weight.name])
