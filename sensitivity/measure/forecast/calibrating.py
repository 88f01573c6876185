"""The seconds that calibration takes: forward passes for statistics, and backward passes for what needs gradients."""

from __future__ import annotations

from collections.abc import Sequence

from sensitivity.measure.attribution.scores import NEEDS
from sensitivity.measure.install.tweaked_norms import PASSES as TWEAKING_PASSES
from sensitivity.measure.passes.token_batches import ROWS
from sensitivity.quantize.methods import UNIFORM, needs_data, needs_fisher, token_weighting
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.plan import TWEAK, Plan, Scheme

# What each kind of importance observes; kinds that observe the same share its passes.
LOSS, BLOCK, ATTENTION, PERTURBATION, BLOCK_INPUTS = "loss", "block", "attention", "perturbation", "block inputs"
OBSERVED = {
    "modality": LOSS, "gradient": LOSS, "output": LOSS, "block": BLOCK, "attention": ATTENTION,
    "perturbation": PERTURBATION, "filtered": BLOCK_INPUTS,
}  # fmt: skip
# Costs in forward passes: a backward pass counts as two, and running the blocks again for it as one.
PASSES = {LOSS: 4.0, BLOCK: 4.0, ATTENTION: 1.0, PERTURBATION: 3.0, BLOCK_INPUTS: 1.0}
STEP = 4.0  # of a block, for a gradient step on its norms: one forward, one backward, and one for the error
WEIGHT_GRADIENT = 1.0  # a product for each weight's own gradient
FISHER = PASSES[LOSS] + WEIGHT_GRADIENT


def calibration_seconds(
    schemes: Sequence[Scheme],
    examples: int,
    forward: float,
    products: float,
    plans: int,
    scores: Sequence[str] = (),
    groups: int = 1,
) -> dict[str, float]:
    """Seconds of calibration, and of gradients.

    `forward` and `products` are the seconds of one example in all parts: for its forward pass, and for adding its
    inputs to the Gram matrices. Each kind of importance has statistics of its own; on any path but float, so does
    each plan. Comparing both paths takes two passes. `scores` of components need statistics in which all tokens count
    alike, and gradients if errors of weights fit into memory in so many `groups`.
    """
    calibrated = [scheme for scheme in schemes if needs_data(scheme)]
    kinds = {token_weighting(scheme) for scheme in calibrated}
    path = str(calibrated[0].get("path", "float")) if calibrated else "float"
    passes = len(kinds | ({UNIFORM} if scores else set())) * (1 if path == "float" else plans)
    backward = sum(PASSES[name] for name in {OBSERVED[kind] for kind in kinds if kind in OBSERVED})
    backward += _scoring_passes(scores, groups) + (FISHER if any(map(needs_fisher, calibrated)) else 0.0)
    return {
        "calibration": examples * passes * (forward * (2 if path == "both" else 1) + products),
        "gradients": examples * backward * forward,
    }


def _scoring_passes(scores: Sequence[str], groups: int) -> float:
    """Forward passes that scores from gradients take, if errors of weights fit into memory in so many groups."""
    needed = {kind for name in scores for kind in NEEDS[name]}
    if errors := needed & {"change", "fisher"}:
        return PASSES[LOSS] * groups + WEIGHT_GRADIENT * len(errors)
    return PASSES[LOSS] if "squares" in needed else 0.0


def tweaking_seconds(parts: ComponentMap, plans: Sequence[Plan], examples: int, forward: float) -> float:
    """Seconds of gradient steps on norms: once for each block and its schemes; on any path but float, for each plan."""
    component_of = {weight.name: component.name for component in parts.components for weight in component.weights}
    whole, seen = sum(weight.numel for weight in parts.weights), min(examples, TWEAKING_PASSES * ROWS // 4)
    found = 0.0
    for block in parts.regroup("block").components:
        done: set[object] = set()
        for plan in plans:
            own = tuple(plan[component_of[weight.name]] for weight in block.weights)
            tweaked = [scheme for scheme in own if scheme and scheme.get(TWEAK)]
            exposed = any(scheme.get("path", "float") != "float" for scheme in tweaked)
            if not tweaked or (key := plan if exposed else own) in done or block.weights[0].block is None:
                continue
            done.add(key)
            steps = max(int(scheme.get(TWEAK) or 0) for scheme in tweaked)
            found += seen * forward * ((2 if exposed else 1) + STEP * steps * block.numel / whole)
    return found
