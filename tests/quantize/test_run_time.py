"""What is rounded in each forward pass: inputs of layers, keys and values; against slow versions, and at 16 bits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sensitivity.quantize.methods import weights_of
from sensitivity.quantize.presets import PRESETS
from sensitivity.quantize.run_time.inputs import round_inputs
from sensitivity.quantize.run_time.keys_and_values import round_cached
from sensitivity.quantize.scheme_settings import check_scheme, method_named, scheme
from sensitivity.quantize.stored.rotated import InputTransform
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import CACHE_SETTINGS, Scheme


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest(value: float, levels: list[float]) -> float:
    return min(levels, key=lambda level: abs(level - value))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_inputs_go_to_the_nearest_level_of_their_token(bits: int) -> None:
    x = tokens(2, 3, 7)
    x[0, 1] = 0
    found = round_inputs(x, bits)
    for token, rounded in zip(x.reshape(-1, 7), found.reshape(-1, 7), strict=True):
        step = 2 * float(token.abs().max()) / (2**bits - 1)
        levels = [step * code for code in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]
        for value, got in zip(token.tolist(), rounded.tolist(), strict=True):
            # the largest input is as far from the level below as from the one above
            assert got == pytest.approx(nearest(got, levels), abs=1e-6)
            assert abs(got - value) == pytest.approx(abs(nearest(value, levels) - value), abs=1e-6)


def test_a_token_does_not_depend_on_those_beside_it() -> None:
    x = tokens(5, 9)
    x[0] *= 100
    assert torch.equal(round_inputs(x, 4)[2:], round_inputs(x[2:], 4))
    keys = tokens(5, 70)
    assert torch.equal(round_cached(keys, 3, 32)[2:], round_cached(keys[2:], 3, 32))


def test_a_fixed_range_clips_what_exceeds_it() -> None:
    found = round_inputs(torch.tensor([[-9.0, 0.6, 9.0]]), 2, largest=torch.tensor(1.5))
    assert found.tolist() == [[-2.0, 1.0, 1.0]]  # scale 1; codes -2, -1, 0, 1


def test_a_factor_is_what_the_layer_before_divides_by() -> None:
    x, factor = tokens(4, 6), torch.rand(6) + 0.5
    transform = InputTransform(factor)
    assert torch.equal(transform.back(round_inputs(transform.forward(x), 4)), round_inputs(x / factor, 4) * factor)


@pytest.mark.parametrize("group", [1, 4, 32, 100])
@pytest.mark.parametrize("bits", [2, 8])
def test_keys_go_to_the_nearest_level_of_their_group(bits: int, group: int) -> None:
    x = tokens(3, 10)
    found = round_cached(x, bits, group)
    for token, rounded in zip(x, found, strict=True):
        for start in range(0, 10, group):
            part = token[start : start + group]
            low, high = float(part.min().half()), float(part.max() - part.min())
            step = max(float(torch.tensor(high / (2**bits - 1)).half()), torch.finfo(torch.float16).tiny)
            levels = [low + step * code for code in range(2**bits)]
            for value, got in zip(part.tolist(), rounded[start : start + group].tolist(), strict=True):
                # halfway between two levels either is nearest, and half precision may put them a little apart
                assert abs(got - value) <= abs(nearest(value, levels) - value) + 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_are_kept_and_more_bits_err_less(dtype: torch.dtype) -> None:
    x = tokens(40, 64).to(dtype)
    for how in (lambda bits: round_inputs(x, bits), lambda bits: round_cached(x, bits, 32)):
        errors = [float((how(bits).float() - x.float()).square().mean()) for bits in range(2, 9)]
        assert how(4).dtype == dtype
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > 10 * errors[-1]
    assert torch.isfinite(round_cached(torch.zeros(2, 5, dtype=dtype), 2, 32)).all()


def test_a_scheme_says_what_it_rounds() -> None:
    both = scheme("gptq", 4, activations=8, cache=4)
    assert str(both) == "gptq:4a8kv4"
    assert (both["activation_scale"], both["cache_group"]) == ("token", 32)
    assert Scheme.from_json(both.to_json()) == both
    check_scheme(both)
    assert weights_of(both) == scheme("gptq", 4)
    assert both.without_cache == scheme("gptq", 4, activations=8)


def test_at_16_bits_a_scheme_is_the_one_that_it_always_was() -> None:
    plain, wide = scheme("rtn", 4), scheme("rtn", 4, activations=16, cache=16)
    assert wide == plain
    assert plain.to_json() == {"method": "rtn", "bits": 4, "group": "row", "symmetric": True}


def test_only_a_fixed_range_needs_data() -> None:
    facts = {"calibration": "vqa", "examples": 2, "seed": 0, "data": "x", "path": "float"}
    assert scheme("rtn", 4, activations=8, calibration=facts).get("data") is None
    fixed = scheme("rtn", 4, activations=8, activation_scale="tensor", calibration=facts)
    assert fixed["data"] == "x"
    check_scheme(fixed)
    assert weights_of(fixed) == scheme("rtn", 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scheme("rtn", 4, activations=1), "activations have 2 to 8 bits, or 16 to stay as they are, not 1"),
        (lambda: scheme("rtn", 4, cache=9), "keys and values have 2 to 8 bits, or 16 to stay as they are, not 9"),
        (lambda: scheme("rtn", 4, cache=True), "keys and values have 2 to 8 bits"),
        (lambda: scheme("rtn", 4, activation_scale="token"), "unknown setting of rtn 'activation_scale'"),
        (lambda: scheme("rtn", 4, activations=8, activation_scale="row"), "choose from token, tensor"),
        (lambda: scheme("rtn", 4, cache=4, cache_group=0), "cache_group of rtn is a whole number from 1 to 65,536"),
        (lambda: scheme("llm-int8", 8, activations=8), "llm-int8 rounds activations by itself; leave out"),
        (lambda: scheme("keep", 4), "keep takes only 16 bits, not 4"),
        (lambda: scheme("keep", 16, group=32), "keep is always as stored before"),
        (lambda: check_scheme(replace(scheme("rtn", 4), settings=(("cache_group", 32),))), "unknown setting of rtn"),
    ],
)
def test_a_wrong_wish_is_refused_in_one_sentence(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.slow  # the import takes seconds
def test_the_step_of_a_symmetric_grid_is_that_of_compressed_tensors() -> None:
    args = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = tokens(2, 5, 16)
    for bits in (4, 8):
        how = args.QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="token", dynamic=True)
        scale, zero = compute_dynamic_scales_and_zp(value=x, args=how, module=torch.nn.Linear(1, 1))
        theirs = fake_quantize(x=x, scale=scale, zero_point=zero, args=how)
        assert torch.allclose(round_inputs(x, bits), theirs, atol=1e-6)
    assert math.isclose(float(round_inputs(torch.tensor([[1.0, 0.3]]), 2)[0, 0]), 2 / 3, rel_tol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_not_rounded_takes_its_own_settings_out_of_a_preset(name: str) -> None:
    width = min(method_named(name).widths, key=lambda bits: abs(bits - 4))
    whole = scheme(name, width)
    without_activations, without_cache = scheme(name, width, activations=16), scheme(name, width, cache=16)
    assert without_activations.cache == whole.cache
    of_cache, left = ({key for key in CACHE_SETTINGS if one.get(key)} for one in (whole, without_activations))
    assert of_cache == left
    assert without_cache.activations == whole.activations
    assert not any(without_cache.get(key) for key in CACHE_SETTINGS)
