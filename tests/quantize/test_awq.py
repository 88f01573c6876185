"""Scale search and clip search: against loops over real outputs, and the invariants they must keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.error_cost import STRIP, ErrorCost, low_rank_factor, quadratic, upper_half
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solvers.clip import RATIOS, clipped
from sensitivity.quantize.solvers.scale_search import QUERY_KEY, output_errors, scales
from sensitivity.quantize.solving import fake_quantize, solve
from sensitivity.quantize.stored.integer_grid import QuantizedWeight, encode, ranges, scale_and_zero
from sensitivity.spec.stored_bits import OVERHEAD

WIDTH, GROUP = 48, 16


def inputs(tokens: int = 200) -> Tensor:
    """A few channels carry most of the signal, as in real models."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(tokens, WIDTH, generator=g) * torch.logspace(-1, 1.5, WIDTH)[torch.randperm(WIDTH, generator=g)]


def linears(names: tuple[str, ...] = ("up.weight", "gate.weight")) -> Linears:
    g = torch.Generator().manual_seed(1)
    seen = Curvature(WIDTH)
    seen.add(inputs())
    return Linears(names, tuple(torch.randn(10 + i, WIDTH, generator=g) for i in range(len(names))), seen)


def output_error(weight: Tensor, quantized: Tensor) -> float:
    return float((inputs() @ (weight - quantized).T).double().square().sum())


def result(given: Linears, **chosen: object) -> QuantizedWeight:
    found = solve(given, [scheme("awq", 3, **{"group": GROUP, **chosen})])[0][0]
    assert isinstance(found, QuantizedWeight)
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [GROUP, 11, "row"])
def test_errors_from_the_gram_matrix_are_those_of_the_outputs(bits: int, group: int | str) -> None:
    given = linears()
    chosen = scheme("awq", bits, group=group)
    grid = scales(given.input_statistics, 20, torch.float32)
    (found,) = output_errors(given.rows, grid, given.input_statistics.gram, [chosen], torch.float32)
    for s, error in zip(grid, found.tolist(), strict=True):
        slow = 0.0
        for weight in given.weights:
            nearest = fake_quantize(weight * s, scheme("rtn", bits, group=group, symmetric=False)) / s
            slow += output_error(weight, nearest)
        assert error == pytest.approx(slow, rel=1e-4)


def test_the_search_in_pieces_is_the_search_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = linears()
    grid = scales(given.input_statistics, 20, torch.float32)
    whole = output_errors(given.rows, grid, given.input_statistics.gram, [scheme("awq", 3)], torch.float32)
    monkeypatch.setattr("sensitivity.quantize.solvers.scale_search.NUMBERS_AT_ONCE", 1)
    torch.testing.assert_close(
        output_errors(given.rows, grid, given.input_statistics.gram, [scheme("awq", 3)], torch.float32), whole
    )


@pytest.mark.parametrize("method", ["awq", "clip"])
@pytest.mark.parametrize("group", [GROUP, 11, "row"])
def test_a_width_has_the_same_bits_alone_and_among_others(method: str, group: int | str) -> None:
    given = linears()
    schemes = [scheme(method, bits, group=group) for bits in (2, 3, 4, 5, 6, 8)]
    for one, results in zip(schemes, solve(given, schemes), strict=True):
        (alone,) = solve(given, [one])
        for a, b in zip(alone, results, strict=True):
            assert isinstance(a, QuantizedWeight)
            assert isinstance(b, QuantizedWeight)
            assert torch.equal(a.codes, b.codes)
            assert torch.equal(a.scale, b.scale)
            assert (a.inputs is None and b.inputs is None) or torch.equal(a.inputs, b.inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [1, 100, 128, 300])
def test_half_a_matrix_gives_the_whole_form(width: int) -> None:
    e = torch.randn(7, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = e.T @ e + torch.eye(width)
    torch.testing.assert_close(quadratic(e, upper_half(gram)).double(), ((e @ gram) * e).sum(1), rtol=1e-6, atol=1e-6)


def test_exponent_0_is_nearest() -> None:
    assert torch.equal(scales(linears().input_statistics, 20, torch.float32)[0], torch.ones(WIDTH))
    given = linears()
    found = result(given, exponents=1, clip=False)
    assert found.inputs is None
    nearest = scheme("rtn", 3, group=GROUP, symmetric=False)
    assert torch.equal(found.dequantize(), fake_quantize(given.weights[0], nearest))


def test_scales_and_clipping_each_help() -> None:
    given = linears()
    nearest, scaled, both = (
        output_error(given.weights[0], result(given, **chosen).dequantize())
        for chosen in ({"exponents": 1, "clip": False}, {"clip": False}, {})
    )
    assert both <= scaled < nearest


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_token_weights_choose_among_the_scales_that_all_tokens_give(bits: int) -> None:
    """MBQ: only the error is weighted, so that no row of AWQ has less of it than the one that minimizes it."""
    given, r = linears(), torch.rand(200, generator=torch.Generator().manual_seed(2)).pow(6)
    r[::7] = 0
    weighted = Curvature(WIDTH)
    weighted.add(inputs(), r)
    assert torch.equal(scales(weighted, 20, torch.float32), scales(given.input_statistics, 20, torch.float32))
    found = {}
    for name, seen in (("alike", given.input_statistics), ("weighted", weighted)):
        rounded = solve(replace(given, curvature=seen), [scheme("awq", bits, group=GROUP, clip=False)])[0]
        deltas = [w - one.dequantize() for w, one in zip(given.weights, rounded, strict=True) if one is not None]
        found[name] = sum(float((d @ weighted.gram * d).sum()) for d in deltas)
    assert found["weighted"] <= found["alike"] * (1 + 1e-6)


def test_weights_that_share_an_input_share_the_scale() -> None:
    first, second = solve(linears(), [scheme("awq", 3, group=GROUP)])[0]
    assert isinstance(first, QuantizedWeight)
    assert isinstance(second, QuantizedWeight)
    assert first.inputs is not None
    assert torch.equal(first.inputs, second.inputs)  # type: ignore[arg-type]


def test_a_scale_takes_16_bits_and_is_counted() -> None:
    found = result(linears())
    assert found.inputs is not None
    assert torch.equal(found.inputs, found.inputs.half().float())
    plain = OVERHEAD["rtn"](scheme("rtn", 3, group=GROUP, symmetric=False), 10, WIDTH)
    assert OVERHEAD["awq"](scheme("awq", 3, group=GROUP), 10, WIDTH) == plain + 16 * WIDTH


def test_the_effective_weight_on_plain_inputs_is_the_scaled_one_on_divided_inputs() -> None:
    found = result(linears())
    assert found.inputs is not None
    scaled = QuantizedWeight(found.codes, found.scale, found.zero, found.group)
    torch.testing.assert_close(
        inputs() @ found.dequantize().T, (inputs() / found.inputs) @ scaled.dequantize().T, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("layers.0.self_attn.q_proj.weight", True),
        ("layers.0.self_attn.k_proj.weight", True),
        ("layer.0.attention.attention.query.weight", True),
        ("block.0.SelfAttention.k.weight", True),
        ("layers.0.self_attn.qkv.weight", True),
        ("layers.0.self_attn.v_proj.weight", False),
        ("layers.0.self_attn.out_proj.weight", False),
        ("layers.0.mlp.fc1.weight", False),
        ("layer.0.intermediate_query.dense.weight", False),
    ],
)
def test_queries_and_keys_are_not_clipped(name: str, skipped: bool) -> None:
    assert bool(QUERY_KEY.search(name)) is skipped
    given = linears((name,))
    plain, found = result(given, clip=False), result(given)
    assert torch.equal(plain.scale, found.scale) is skipped
    assert not torch.equal(result(given, clip_qk=True).scale, plain.scale)


# -- clip


@pytest.mark.parametrize("group", [GROUP, 11, "row"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_best_range_of_every_group_is_the_best_of_all_tried(group: int | str, symmetric: bool) -> None:
    given = linears(("w",))
    w, gram = given.rows, given.input_statistics.gram
    chosen = scheme("clip", 3, group=group, symmetric=symmetric)
    width = WIDTH if group == "row" else int(group)
    low, high = clipped(w, chosen, torch.float32, ErrorCost.of(gram, width))
    error = w - encode(w, chosen, *scale_and_zero(w, chosen, low, high, torch.float32)).dequantize()
    row = scheme("rtn", 3, symmetric=symmetric)
    for i in range(len(w)):
        for g, start in enumerate(range(0, WIDTH, width)):
            piece, block = w[i : i + 1, start : start + width], gram[start : start + width, start : start + width]
            best = float("inf")
            least, most = ranges(piece, row)
            for ratio in RATIOS:
                edge = ratio * torch.maximum(-least, most)
                near = scale_and_zero(piece, row, torch.maximum(least, -edge), torch.minimum(most, edge), torch.float32)
                e = piece - encode(piece, row, *near).dequantize()
                best = min(best, float((e @ block @ e.T).squeeze()))
            e = error[i, start : start + width]
            assert float(e @ block @ e) == pytest.approx(best, rel=1e-3), g


def tall(width: int, seed: int = 0) -> Tensor:
    """A Gram matrix as real ones are: a few directions hold most of it, and one channel was always zero."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(4 * width, width // 10, generator=g) @ torch.randn(width // 10, width, generator=g)
    x = common + torch.randn(4 * width, width, generator=g) / 2
    x[:, 3] = 0
    return x.T @ x


@pytest.mark.parametrize("width", [100, 128, 300])
def test_a_few_directions_never_say_more_than_the_whole_matrix(width: int) -> None:
    gram = tall(width)
    few = low_rank_factor(gram).double()
    assert few.shape == (width, -(-width // 8))
    rest = torch.linalg.eigvalsh(gram.double() - few @ few.T)
    largest = float(torch.linalg.eigvalsh(gram.double())[-1])
    assert rest.min() > -1e-6 * largest
    assert rest.max() < 0.5 * largest
    assert not low_rank_factor(torch.zeros(width, width)).any()


@pytest.mark.parametrize("tokens", [0, 1, 3, 12])
def test_inputs_of_fewer_tokens_than_directions_are_no_trouble(tokens: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    x, w = torch.randn(tokens, 256, generator=g), torch.randn(40, 256, generator=g)
    gram = (x.T @ x) / max(tokens, 1)
    few = low_rank_factor(gram).double()
    assert torch.isfinite(few).all()
    assert few.shape[1] <= tokens
    top = float(torch.linalg.eigvalsh(gram.double())[-1].clamp(min=1e-30))
    assert torch.linalg.eigvalsh(gram.double() - few @ few.T).min() > -1e-5 * top
    fast, chosen = ErrorCost.of(gram, 256), scheme("clip", 3, group="row")
    found, slow = (clipped(w, chosen, torch.float32, cost) for cost in (fast, ErrorCost(fast.exact, ())))
    assert all(torch.equal(a, b) for a, b in zip(found, slow, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", ["row", 128])
def test_what_a_few_directions_rule_out_would_not_have_been_chosen(
    bits: int, group: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(1)
    gram, w = tall(200), torch.randn(150, 200, generator=g)
    size = 200 if group == "row" else int(group)
    scale = torch.rand(200, generator=g) + 0.5
    chosen = scheme("clip", bits, group=group)
    fast = ErrorCost.of(gram, size)
    assert size > STRIP
    assert len(fast.low_rank) == len(fast.exact) == -(-200 // size)
    judged: list[int] = []
    monkeypatch.setattr(
        "sensitivity.quantize.layer.error_cost.quadratic",
        lambda e, half: (judged.append(len(e)), quadratic(e, half))[1],
    )
    for cost in (fast, fast.under(scale)):
        found = clipped(w, chosen, torch.float32, cost)
        assert sum(judged) < 0.6 * len(RATIOS) * len(w) * len(cost.exact)
        slow = clipped(w, chosen, torch.float32, ErrorCost(cost.exact, ()))
        assert all(torch.equal(a, b) for a, b in zip(found, slow, strict=True))
        judged.clear()


def test_clipping_never_costs_more_than_nearest_within_a_row() -> None:
    given = linears(("w",))
    for bits in (2, 3, 4, 8):
        clip_error = output_error(given.rows, fake_quantize(given.rows, scheme("clip", bits), given.input_statistics))
        assert clip_error <= output_error(given.rows, fake_quantize(given.rows, scheme("rtn", bits)))
