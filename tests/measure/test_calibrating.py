"""What calibration is forecast to cost: kinds that share a backward pass, paths, and plans."""

from __future__ import annotations

import pytest

from sensitivity.measure.forecast.calibrating import (
    FISHER,
    OBSERVED,
    PASSES,
    WEIGHT_GRADIENT,
    calibration_seconds,
)
from sensitivity.quantize.methods import IMPORTANCE, UNIFORM
from sensitivity.quantize.scheme_settings import scheme

FORWARD, PRODUCTS, N = 2.0, 0.5, 10


def seconds(*names: str, path: str = "float", plans: int = 3) -> tuple[float, float]:
    schemes = [scheme(name, 4, calibration={"path": path}) for name in names]
    found = calibration_seconds(schemes, N, FORWARD, PRODUCTS, plans)
    return found["calibration"], found["gradients"]


def test_every_kind_has_a_cost() -> None:
    assert set(OBSERVED) == set(IMPORTANCE) - {UNIFORM}
    assert set(OBSERVED.values()) == set(PASSES)


@pytest.mark.parametrize(
    ("names", "kinds", "passes"),
    [
        (("rtn",), 0, 0.0),
        (("gptq", "awq"), 1, 0.0),
        (("mbq",), 1, PASSES["loss"]),
        (("mbq", "tlq", "oac", "gptq"), 4, PASSES["loss"]),  # three kinds from one backward pass
        (("rsq", "qig"), 2, PASSES["attention"] + PASSES["perturbation"]),
        (("gwq", "squeezellm-fisher"), 1, FISHER),
    ],
)
def test_passes_are_shared(names: tuple[str, ...], kinds: int, passes: float) -> None:
    assert seconds(*names) == (N * kinds * (FORWARD + PRODUCTS), N * passes * FORWARD)


def test_behind_quantized_layers_every_plan_is_calibrated() -> None:
    assert seconds("gptq", path="exposed") == (N * 3 * (FORWARD + PRODUCTS), 0.0)
    assert seconds("gptaq", path="both") == (N * 3 * (2 * FORWARD + PRODUCTS), 0.0)
    assert seconds("gptaq", "salq-vlm", path="both", plans=5)[1] == N * PASSES["block"] * FORWARD


@pytest.mark.parametrize(
    ("scores", "groups", "passes"),
    [
        (("gram",), 3, 0.0),
        (("swing", "gram"), 3, PASSES["loss"]),  # squares of gradients need no errors in memory
        (("change", "swing"), 1, PASSES["loss"] + WEIGHT_GRADIENT),
        (("change", "swing"), 3, 3 * PASSES["loss"] + WEIGHT_GRADIENT),
        (("change", "fisher"), 2, 2 * PASSES["loss"] + 2 * WEIGHT_GRADIENT),
    ],
)
def test_scores_take_a_backward_pass_for_each_group_of_errors(
    scores: tuple[str, ...], groups: int, passes: float
) -> None:
    found = calibration_seconds([scheme("rtn", 4)], N, FORWARD, PRODUCTS, 1, scores, groups)
    assert found == {"calibration": N * (FORWARD + PRODUCTS), "gradients": N * passes * FORWARD}
