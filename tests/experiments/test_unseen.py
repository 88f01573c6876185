"""Errors of layers on calibration and evaluation data: none without rounding, and those that rounding makes."""

from __future__ import annotations

import torch

from experiments.methods.comparison.rows import plan_of
from experiments.methods.comparison.unseen import Data
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.models.discovery import inspect
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.tasks.table import task


def test_errors_of_layers_alone_and_behind_others(scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="part")
    weights = [one for one in parts.weights if one.part == "connector"]
    data = Data(scenes_llava, [task("vqa", n=8)], weights)
    _, errors = data.errors()
    assert all(float(one[:2].sum()) == 0 for one in errors.values())

    own = {one.name: scenes_llava.model.get_parameter(one.name).detach().clone() for one in weights}
    with quantized(scenes_llava.model, parts, plan_of(parts, "connector", scheme("rtn", 3))):
        _, errors = data.errors()
        changed = {one.name: scenes_llava.model.get_parameter(one.name).detach().clone() for one in weights}
    first, second = (one.name for one in weights)
    # by hand: what the first layer reads, times the change of its weight
    before = [seen[first] for _, seen in data.passes]
    delta = changed[first] - own[first]
    wrong = sum(float((inputs @ delta.T).square().sum()) for inputs, _ in before)
    whole = sum(float(outputs.square().sum()) for _, outputs in before)
    torch.testing.assert_close(float(errors[first][0]), wrong / whole, rtol=1e-4, atol=0)
    # nothing before the first layer is quantized, and the second also reads the first one's error
    assert errors[first][0] == errors[first][1]
    assert errors[second][1] != errors[second][0]
