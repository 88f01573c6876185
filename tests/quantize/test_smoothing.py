"""Smoothing and its transforms: identities at full precision, slow versions, and what each is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.run_time.inputs import round_between, round_inputs
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solvers.learned_smoothing import _error, _rounded, _tokens, learned
from sensitivity.quantize.solving import fake_quantize, solve
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.quantize.stored.rotated import InputTransform, RotatedWeight, rotate, rotate_back
from sensitivity.spec.errors import UserError

CPU = torch.device("cpu")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(inputs: Tensor, *weights: Tensor, **more: Any) -> Linears:
    seen = Curvature(inputs.shape[1])
    seen.add(inputs)
    return Linears(tuple(f"{i}.weight" for i in range(len(weights))), weights, seen, **more)


def outlying(width: int = 48) -> Tensor:
    """Inputs with two channels that are forty times as large as the others."""
    found = numbers(300, width, seed=1)
    found[:, [3, 7]] *= 40
    return found


def exact(rows: Tensor, inputs: Tensor | None = None) -> QuantizedWeight:
    """A weight as a grid that holds every number."""
    return QuantizedWeight(rows, torch.ones(1, 1), torch.zeros(1, 1), rows.shape[1], inputs)


@pytest.mark.parametrize("width", [24, 64, 96])
def test_no_transform_changes_a_product_before_rounding(width: int) -> None:
    weight, x, factor = numbers(5, width), numbers(9, width, seed=1), numbers(width, seed=2).exp()
    for stored in (
        exact(weight * factor, factor),
        RotatedWeight(exact(rotate(weight))),
        RotatedWeight(exact(rotate(weight) * factor, factor)),
        RotatedWeight(exact(rotate(weight * factor, 8)), factor, 8),
    ):
        transform = InputTransform.of(stored, CPU)
        assert transform is not None
        assert torch.allclose(stored.dequantize(), weight, atol=1e-5)
        assert torch.allclose(transform.back(transform.forward(x)), x, atol=1e-5)
        held = stored.rotated.codes if isinstance(stored, RotatedWeight) else stored.codes
        assert torch.allclose(transform.forward(x) @ held.T, x @ weight.T, atol=1e-3)
    assert InputTransform.of(exact(weight), CPU) is None


def test_a_smaller_block_rotates_each_eight_channels_by_themselves() -> None:
    x = torch.zeros(1, 64)
    x[0, 9] = 1
    assert rotate(x, 8).nonzero()[:, 1].tolist() == list(range(8, 16))
    assert torch.allclose(rotate_back(rotate(x, 8), 8), x, atol=1e-6)


@pytest.mark.parametrize("exponent", [0.15, 0.5, 1.0])
def test_factors_are_those_of_a_loop_over_channels(exponent: float) -> None:
    x, first, second = outlying(), numbers(6, 48, seed=3), numbers(4, 48, seed=4)
    x[:, 11] = 0  # a dead channel
    chosen = scheme("smooth", 8, exponent=exponent)
    ((one, two),) = solve(layer(x, first, second), [chosen])
    assert isinstance(one, QuantizedWeight)
    assert isinstance(two, QuantizedWeight)
    found = []
    for channel in range(48):
        of_weights = max(float(first[:, channel].abs().max()), float(second[:, channel].abs().max()))
        found.append(float(x[:, channel].abs().max()) ** exponent / of_weights ** (1 - exponent))
    alive = [value for i, value in enumerate(found) if i != 11]
    mean = sum(alive) / len(alive)
    expected = torch.tensor([1.0 if i == 11 else value / mean for i, value in enumerate(found)])
    assert one.inputs is not None
    assert torch.allclose(one.inputs, expected, rtol=1e-3)
    assert two.inputs is not None
    assert torch.equal(one.inputs, two.inputs)
    assert torch.allclose(one.dequantize(), fake_quantize(first * one.inputs, scheme("rtn", 8)) / one.inputs)


@pytest.mark.parametrize("transform", ["none", "hadamard", "blocks"])
def test_channels_that_are_large_cost_less(transform: str) -> None:
    """With 8 bits for weights and 4 for inputs, against rounding both as they are."""
    x, weight = outlying(64), numbers(40, 64, seed=2)
    ((stored,),) = solve(layer(x, weight), [scheme("smooth", 8, transform=transform)])
    assert stored is not None
    behind = InputTransform.of(stored, CPU)
    assert behind is not None
    smoothed = behind.back(round_inputs(behind.forward(x), 4)) @ stored.dequantize().T
    plain = round_inputs(x, 4) @ fake_quantize(weight, scheme("rtn", 8)).T
    error, of_plain = ((one - x @ weight.T).square().mean() for one in (smoothed, plain))
    assert error < of_plain / 2


def test_reparameterized_layernorm_is_one_grid_after_dividing_by_r_and_shifting_by_b() -> None:
    """RepQ-ViT's equations written out: one scale and one zero for all channels, r and b folded into norm and layer."""
    x = numbers(200, 12) * torch.linspace(0.2, 8, 12) + torch.linspace(-1, 1, 12)
    weight, bits = numbers(5, 12, seed=1), 4
    linears = layer(x, weight, after_norm=True)
    seen, codes = linears.input_statistics, 2**bits - 1
    scale = (seen.high - seen.low) / codes
    zero = (-seen.low / scale).round()
    mean_scale, mean_zero = scale.mean(), zero.mean().round()
    r, shift = scale / mean_scale, mean_scale * (mean_zero - zero)
    normed = x / r - shift  # the norm's weight and bias are divided by r, and the bias is less b
    one_grid = ((normed / mean_scale).round() + mean_zero).clamp(0, codes)
    outputs = (one_grid - mean_zero) * mean_scale @ (weight * r).T + (weight * r) @ shift
    ours = round_between(x, bits, seen.low, seen.high) @ weight.T
    assert torch.allclose(outputs, ours, atol=2e-2)
    chosen = scheme("repq-vit", bits, activations=16)
    ((stored,),) = solve(linears, [chosen])
    assert isinstance(stored, QuantizedWeight)
    assert stored.inputs is not None
    assert torch.allclose(stored.inputs, r, rtol=1e-3)
    # where no norm stands before the layer there is nothing to fold into, and weights are rounded as they are
    ((plain,),) = solve(layer(x, weight), [chosen])
    assert isinstance(plain, QuantizedWeight)
    assert plain.inputs is None
    assert torch.equal(plain.dequantize(), fake_quantize(weight, scheme("rtn", bits, symmetric=False)))


def test_learning_is_never_worse_than_its_start_and_mends_a_bad_one() -> None:
    x, weight = outlying(), numbers(20, 48, seed=2)
    gram = x.T @ x
    tokens = _tokens(gram)
    target = tokens @ weight.T
    for exponent in (0.5, 1.0):
        chosen = scheme("smooth", 4, exponent=exponent)
        start = x.abs().amax(0).pow(exponent)
        factor, share = learned(weight, gram, start, chosen, 15)
        before = float(_error(tokens, target, weight, start, None, chosen))
        assert float(_error(tokens, target, weight, factor, share, chosen)) < before
    with torch.inference_mode():  # as in a forecast
        again, _ = learned(weight, gram, start, chosen, 15)
    assert torch.equal(again, factor)


def test_the_rounding_in_training_is_that_of_the_stored_weight() -> None:
    weight = numbers(6, 32)
    for symmetric in (True, False):
        chosen = scheme("rtn", 4, symmetric=symmetric)
        same = (_rounded(weight, 4, symmetric, None) - fake_quantize(weight, chosen)).abs() < 2e-3
        assert same.float().mean() > 0.95  # a stored scale has 16 bits, which moves a number between two levels
    values = weight.clone().requires_grad_()
    torch.autograd.backward(_rounded(values, 4, True, None).sum())
    assert values.grad is not None
    assert bool((values.grad != 0).any())


def test_tokens_in_training_have_the_gram_matrix_of_the_data() -> None:
    x = numbers(4000, 6) @ numbers(6, 6, seed=3)
    ours = torch.cat([_tokens(x.T @ x)])
    found, expected = (one.T @ one / len(one) for one in (ours, x / x.square().mean().sqrt()))
    assert torch.allclose(found, expected, atol=0.35)


def test_wrong_settings_of_rows_are_refused() -> None:
    with pytest.raises(UserError, match="quantvla learns factors only with transform=hadamard or none"):
        scheme("quantvla", 4, learned=3)
    with pytest.raises(UserError, match="rotates inputs, whose ranges are then not known; leave activation_scale at"):
        scheme("quantvggt", 4, activation_scale="tensor")
