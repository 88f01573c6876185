"""Targets from both calibration paths: the least-squares shift, GPTAQ's steps one by one, and VLM-PTQ's ranges."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.layer.two_paths import TwoPaths
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solvers.shifting import shifted
from sensitivity.quantize.solvers.vlm_ptq import SHARES, costs, quantize_vlm_ptq
from sensitivity.quantize.solving import fake_quantize, solve
from sensitivity.spec.errors import UserError

ROWS, WIDTH, TOKENS = 6, 16, 80


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(difference: float = 0.3) -> tuple[Tensor, Tensor]:
    """Correlated inputs behind quantized layers, and those of the float model."""
    quantized = random(TOKENS, WIDTH, seed=1) @ random(WIDTH, WIDTH, seed=2)
    return quantized, quantized + difference * random(TOKENS, WIDTH, seed=3) @ random(WIDTH, WIDTH, seed=4)


def seen(difference: float = 0.3, importance: Tensor | None = None, image: Tensor | None = None) -> Curvature:
    found, (quantized, unquantized) = Curvature(WIDTH), inputs(difference)
    found.add(quantized, importance)
    found.paths = TwoPaths(WIDTH)
    found.paths.add(quantized, unquantized, importance, image)
    return found


def weighed(curvature: Curvature) -> list[Tensor]:
    assert curvature.paths is not None
    return costs(curvature, curvature.paths)


@pytest.mark.parametrize("by_activation", [False, True])
def test_the_whole_shift_is_the_least_squares_solution(by_activation: bool) -> None:
    """With a tiny damping, no weights give an output closer to W x~ from the quantized inputs."""
    weight, curvature, (quantized, unquantized) = random(ROWS, WIDTH), seen(), inputs()
    assert curvature.paths is not None
    found = shifted(weight, curvature.factor(1e-7, by_activation), curvature.paths.cross, 1.0, later=False)
    best = torch.linalg.lstsq(quantized.double(), (unquantized @ weight.T).double()).solution.T
    torch.testing.assert_close(found.double(), best, rtol=1e-3, atol=1e-3)


def gptaq_steps(weight: Tensor, curvature: Curvature, damp: float, strength: float, scale: Tensor) -> Tensor:
    """GPTAQ column by column: each step solves for all later columns, by an inverse of its own."""
    assert curvature.paths is not None
    hessian = curvature.gram.double() + damp * curvature.gram.diagonal().double().mean() * torch.eye(WIDTH)
    original, left, found = weight.double(), weight.double().clone(), torch.zeros_like(weight).double()
    for j in range(WIDTH):
        found[:, j] = (left[:, j] / scale).round().clamp(-4, 3) * scale
        if j + 1 < WIDTH:
            inverse = torch.linalg.inv(hessian[j + 1 :, j + 1 :])
            # what rounding column j leaves, and what its input lacks of the float model's, spread over later columns
            error = (left[:, j] - found[:, j])[:, None] * hessian[j, j + 1 :]
            lacking = strength * original[:, j, None] * curvature.paths.cross[j, j + 1 :].double()
            left[:, j + 1 :] += (error + lacking) @ inverse
    return found


def test_gptaq_is_its_steps_one_by_one() -> None:
    weight, curvature = random(ROWS, WIDTH, seed=5), seen(0.05)
    asked = scheme("gptaq", 3, order="given", clip=False, strength=0.5)
    ((result,),) = solve(Linears(("w",), (weight,), curvature), [asked])
    assert result is not None
    scale = result.scale[:, 0].double()  # type: ignore[attr-defined]
    expected = gptaq_steps(weight, curvature, 0.01, 0.5, scale)
    found = result.dequantize().double()
    # a number on the edge between two codes may fall to either side
    assert float((found == expected).float().mean()) > 0.9
    errors = [output_error(weight, codes) for codes in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def output_error(weight: Tensor, found: Tensor, difference: float = 0.05) -> float:
    quantized, unquantized = inputs(difference)
    return float((unquantized.double() @ weight.double().T - quantized.double() @ found.double().T).square().sum())


def test_both_paths_bring_the_output_closer_to_the_float_models() -> None:
    """The error of W x~ - Q x falls from GPTQ over GPTAQ to the whole shift, on average over weights."""
    totals = []
    for shift in ("none", "later", "all"):
        asked = scheme("gptq", 4, order="given", shift=shift)
        found = [fake_quantize(random(ROWS, WIDTH, seed=s), asked, seen(0.3)) for s in range(8)]
        totals.append(sum(output_error(random(ROWS, WIDTH, seed=s), q, 0.3) for s, q in enumerate(found)))
    assert totals[0] > 1.05 * totals[1] > 1.05 * totals[2]


@pytest.mark.parametrize("order", ["given", "activation"])
@pytest.mark.parametrize("shift", ["later", "all"])
def test_equal_paths_give_gptq(order: str, shift: str) -> None:
    weight, curvature = random(ROWS, WIDTH), seen(0.0)
    host = fake_quantize(weight, scheme("gptq", 3, order=order), curvature)
    assert torch.equal(fake_quantize(weight, scheme("gptq", 3, order=order, shift=shift), curvature), host)
    assert torch.equal(fake_quantize(weight, scheme("gptaq", 3, order=order), curvature), host)


def test_equal_importance_gives_gptaq() -> None:
    weight = random(ROWS, WIDTH)
    plain, weighed = (seen(importance=r) for r in (None, torch.ones(TOKENS)))
    assert torch.equal(
        fake_quantize(weight, scheme("gptaq", 3), plain), fake_quantize(weight, scheme("salq-vlm", 3), weighed)
    )


def test_a_token_counts_as_often_as_its_weight_says() -> None:
    """Doubling a token's weight is giving it twice, on both paths."""
    quantized, unquantized = inputs()
    weights = torch.ones(TOKENS)
    weights[3] = 2.0
    once, twice = TwoPaths(WIDTH), TwoPaths(WIDTH)
    once.add(quantized, unquantized, weights, None)
    again = [*range(TOKENS), 3]
    twice.add(quantized[again], unquantized[again], None, None)
    torch.testing.assert_close(once.cross, twice.cross)
    torch.testing.assert_close(once.image, twice.image)


def test_vlm_ptq_weighs_image_and_text() -> None:
    image = torch.arange(TOKENS) < 50
    curvature, (quantized, _) = seen(image=image), inputs()
    halves = [quantized[mask].square().sum(0) for mask in (image, ~image)]
    for mu, cost in zip(SHARES, weighed(curvature), strict=True):
        torch.testing.assert_close(cost, mu * halves[0] + (1 - mu) * halves[1])
    torch.testing.assert_close(weighed(curvature)[0], curvature.gram.diagonal() / 2)
    # a tower of the image alone has nothing to weigh
    assert len(weighed(seen(image=None))) == len(weighed(seen(image=torch.zeros(TOKENS, dtype=torch.bool)))) == 1


def test_vlm_ptq_takes_the_best_share_of_each_weight() -> None:
    """A slow plain version: one run for each share, and the smallest error of W x~ - Q x."""
    image = torch.arange(TOKENS) < 50
    curvature = seen(image=image)
    curvature.gram = curvature.gram * (torch.arange(WIDTH)[:, None] == torch.arange(WIDTH)) + 0.1 * curvature.gram
    weights = tuple(random(ROWS, WIDTH, seed=s) for s in (5, 6))
    asked = [scheme("vlm-ptq", bits, group=4) for bits in (2, 3)]
    found = quantize_vlm_ptq(Linears(("a", "b"), weights, curvature), asked)
    rows, gram = torch.cat(weights), curvature.gram.double()
    assert curvature.paths is not None
    target = shifted(rows, curvature.factor(0.01, True), curvature.paths.cross, 1.0, later=False).double()
    for (s, chosen), w in itertools.product(enumerate(asked), range(2)):
        own = target[w * ROWS : (w + 1) * ROWS]
        errors = []
        for mu in SHARES:
            one = weighed(curvature)[SHARES.index(mu)]
            result = vlm_ptq_of(curvature, weights, chosen, one)[w].double()
            errors.append(float(torch.einsum("ij,jk,ik->", result - own, gram, result - own)))
        best = found[s][w]
        assert best is not None
        difference = best.dequantize().double() - own
        assert float(torch.einsum("ij,jk,ik->", difference, gram, difference)) == pytest.approx(min(errors), rel=1e-4)


def vlm_ptq_of(curvature: Curvature, weights: tuple[Tensor, ...], chosen: object, cost: Tensor) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sensitivity.quantize.solvers.vlm_ptq.costs", lambda seen, paths: [cost])
        ((first, second),) = quantize_vlm_ptq(Linears(("a", "b"), weights, curvature), [chosen])  # type: ignore[list-item]
    assert first is not None
    assert second is not None
    return [first.dequantize(), second.dequantize()]


@pytest.mark.parametrize("name", ["gptaq", "salq-vlm", "vlm-ptq"])
def test_one_path_is_not_enough(name: str) -> None:
    curvature = Curvature(WIDTH)
    curvature.add(inputs()[0])
    with pytest.raises(UserError, match=r"a shifted target needs the inputs of both paths; calibrate on path 'both'"):
        fake_quantize(random(ROWS, WIDTH), scheme(name, 3), curvature)


def test_the_other_solver_shifts_nothing() -> None:
    with pytest.raises(UserError, match="gptaq shifts or rotates weights, which gptqmodel does not"):
        scheme("gptaq", 4, backend="gptqmodel")
