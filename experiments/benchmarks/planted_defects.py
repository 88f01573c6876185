"""Planted defects: noise in one component, and which component has the most blame then."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from experiments.benchmarks.put_back import ROUGHLY, blame_of
from sensitivity import Plan, inspect, scheme
from sensitivity.measure.attribution.weight_errors import plan_changes
from sensitivity.measure.calibrate.calibration import calibration_examples
from sensitivity.measure.gradients.path_integral import path_integral
from sensitivity.measure.passes.token_batches import batches
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import ComponentMap
from sensitivity.tasks.examples.types import Task

PASSES = 8  # backward passes at most: which of several causes is the largest shows in fewer than its exact share takes


def component(vlm: VLM, cases: int, bits: int, examples: int = 4) -> dict[str, object]:
    """Noise of the size of a component's rounding error at 2 bits, beside the rounding of all at `bits`.

    Where another component has more blame, each of the two is put back, to see which of them does more damage.
    """
    parts = inspect(vlm, by="group.kind")
    coarse, fine = (plan_changes(vlm.model, parts, Plan.uniform(parts, scheme("rtn", width))) for width in (2, bits))
    missed, worse = [], 0
    for case in range(cases):
        draw = torch.Generator().manual_seed(case)
        planted = parts.components[case % len(parts.components)]
        changes = dict(fine)
        for weight in planted.weights:
            noise = torch.randn(fine[weight.name].shape, generator=draw)
            changes[weight.name] = fine[weight.name] + noise * coarse[weight.name].norm() / noise.norm()
        (data,) = calibration_examples(["vqa"], examples, case)
        shares = blame_of(vlm, parts, changes, data, PASSES).components
        if (worst := max(shares, key=lambda name: shares[name])) != planted.name:
            harm = [without(vlm, parts, changes, data, name) for name in (worst, planted.name)]
            missed.append(f"{planted.name} (blamed: {worst})")
            worse += harm[0] < harm[1]
    return {"cases": cases, "found": cases - len(missed), "missed": "; ".join(missed), "worse": worse}


def without(vlm: VLM, parts: ComponentMap, changes: Mapping[str, Tensor], task: Task, name: str) -> float:
    """The loss with one component put back to float."""
    own = {weight.name for weight in parts[name].weights}
    rest = {key: change for key, change in changes.items() if key not in own}
    return path_integral(vlm, parts, rest, lambda: batches(vlm, [task], 8), ROUGHLY, 0).after
