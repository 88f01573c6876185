"""Codebooks, bit planes, binary weights and outliers: against plain loops, and the invariants they must keep."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain, pairwise

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from sensitivity.measure.memory.weight_codes import from_tensors, tensors
from sensitivity.quantize.grids.billm import BlockGrid
from sensitivity.quantize.grids.kmeans import kmeans_levels, nearest_levels
from sensitivity.quantize.grids.outliers import largest
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.layer.two_paths import TwoPaths
from sensitivity.quantize.methods import METHODS
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solvers.gptq import factor_of
from sensitivity.quantize.solving import fake_quantize, solve
from sensitivity.quantize.stored.channels import ChannelWidthsWeight
from sensitivity.quantize.stored.codebook import CodebookWeight
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.quantize.stored.levels import BinaryWeight, BinnedWeight, LevelsWeight, PlanesWeight
from sensitivity.quantize.stored.low_rank import LowRankWeight
from sensitivity.quantize.stored.sparse import SparseWeight, TwoScaleWeight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import CALIBRATED, Scheme
from sensitivity.spec.stored_bits import OVERHEAD

ROWS, WIDTH = 24, 72
NEW = ("binary", "squeezellm", "leanquant", "leanquant-affine", "bpdq", "billm", "bivlm", "spqr", "adpq", "qvla")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(width: int = WIDTH, tokens: int = 300) -> Curvature:
    found = Curvature(width)
    inputs = random(tokens, width, seed=1) @ random(width, width, seed=2)
    found.add(inputs)
    found.paths = TwoPaths(width)  # of equal inputs, for the methods that compare them
    found.paths.add(inputs, inputs, None, None)
    return found


def stored(weight: Tensor, chosen: Scheme, curvature: Curvature | None = None) -> object:
    fisher = (weight.float().square(),)  # for the methods that ask for gradients
    ((result,),) = solve(Linears(("w",), (weight,), curvature or seen(weight.shape[1]), fisher=fisher), [chosen])
    return result


def every(only: tuple[str, ...] = NEW) -> list[Scheme]:
    return [scheme(name, bits) for name in only for bits in METHODS[name].widths if bits <= 4]


def share(weight: Tensor, found: Tensor) -> float:
    return float((weight - found).square().sum() / weight.square().sum())


# -- weighted k-means


def optimum(values: list[float], heavy: list[float], count: int) -> float:
    """The least weighted squared error of `count` levels: a dynamic program over sorted numbers, in plain Python."""
    pairs = sorted(zip(values, heavy, strict=True))

    def error(i: int, j: int) -> float:
        total = sum(w for _, w in pairs[i:j])
        mean = sum(v * w for v, w in pairs[i:j]) / total if total else 0.0
        return sum(w * (v - mean) ** 2 for v, w in pairs[i:j])

    best = [0.0] + [math.inf] * len(pairs)
    for _ in range(count):
        best = [min(best[i] + error(i, j) for i in range(j + 1)) for j in range(len(pairs) + 1)]
    return best[-1]


@pytest.mark.parametrize("count", [2, 3, 4, 8])
@pytest.mark.parametrize("equal", [True, False])
def test_clusters_are_the_optimum(count: int, equal: bool) -> None:
    rows = random(4, 25)
    heavy = torch.ones(4, 25) if equal else torch.rand(4, 25, generator=torch.Generator().manual_seed(3)).square()
    levels = kmeans_levels(rows, heavy, count)
    found = (heavy * (rows - levels.gather(1, nearest_levels(rows, levels).long())).square()).sum(1)
    for i in range(4):
        assert float(found[i]) == pytest.approx(optimum(rows[i].tolist(), heavy[i].tolist(), count), rel=1e-4)


@pytest.mark.parametrize("count", [4, 16, 64])
def test_long_rows_are_no_worse_than_lloyd_from_quantiles(count: int) -> None:
    rows, heavy = random(3, 1000), random(1, 1000, seed=5).square().expand(3, -1)
    start = torch.quantile(rows, (torch.arange(count) + 0.5) / count, dim=1).T.contiguous()
    for _ in range(50):
        place = nearest_levels(rows, start).long()
        total = torch.zeros_like(start).scatter_add(1, place, heavy)
        mean = torch.zeros_like(start).scatter_add(1, place, heavy * rows) / total
        start = torch.where(total > 0, mean, start).sort(1)[0]

    def error(levels: Tensor) -> Tensor:
        return (heavy * (rows - levels.gather(1, nearest_levels(rows, levels).long())).square()).sum()

    assert error(kmeans_levels(rows, heavy, count)) <= 1.001 * error(start)


@pytest.mark.parametrize("method", ["squeezellm", "leanquant"])
@pytest.mark.parametrize("distinct", [1, 3, 8])
def test_as_many_levels_as_numbers_lose_nothing(method: str, distinct: int) -> None:
    numbers = random(distinct).half().float()
    weight = numbers[torch.randint(0, distinct, (ROWS, 200), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(fake_quantize(weight, scheme(method, 3), seen(200)), weight)


def test_numbers_without_weight_do_not_count() -> None:
    rows, heavy = torch.tensor([[0.0, 1.0, 50.0, 100.0]]), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert kmeans_levels(rows, heavy, 2)[0, :2].tolist() == [0.0, 1.0]
    assert torch.isfinite(kmeans_levels(rows, torch.zeros(1, 4), 2)).all()


# -- outliers


def test_the_largest_are_found_and_ties_have_an_order() -> None:
    score = torch.tensor([[3.0, 1.0, 2.0], [2.0, 2.0, 0.0]])
    assert largest(score, 2).nonzero().tolist() == [[0, 0], [0, 2]]
    assert largest(score, 3).nonzero().tolist() == [[0, 0], [0, 2], [1, 0]]
    assert not largest(score, 0).any()
    assert largest(score, 6).all()


def test_squeezellm_keeps_the_sensitive_and_the_large() -> None:
    weight, curvature = random(ROWS, WIDTH).half(), seen()
    result = stored(weight, scheme("squeezellm", 3, outliers=0.02, sensitive=0.01), curvature)
    assert isinstance(result, SparseWeight)
    score = curvature.gram.diagonal() * weight.float().square()
    first = sorted(range(weight.numel()), key=lambda i: -float(score.view(-1)[i]))[: round(0.01 * weight.numel())]
    rest = [i for i in range(weight.numel()) if i not in first]
    then = sorted(rest, key=lambda i: -abs(float(weight.view(-1)[i])))[: round(0.02 * weight.numel())]
    assert sorted([*first, *then]) == result.index.tolist()
    assert torch.equal(result.dequantize().view(-1)[result.index], weight.float().view(-1)[result.index])


def test_squeezellm_weighs_by_the_fisher_matrix_where_there_is_one() -> None:
    weight, fisher = random(ROWS, WIDTH), random(ROWS, WIDTH, seed=9).square()
    linears = Linears(("w",), (weight,), seen(), fisher=(fisher,))
    ((result,),) = solve(linears, [scheme("squeezellm-fisher", 2, outliers=0, sensitive=0)])
    assert result is not None
    ((other,),) = solve(linears, [asked := scheme("squeezellm", 2, outliers=0, sensitive=0)])
    assert other is not None
    assert torch.equal(other.dequantize(), fake_quantize(weight, asked, seen()))  # which does not ask for gradients

    def error(found: Tensor) -> float:
        return float((fisher * (weight - found).square()).sum())

    best = sum(optimum(weight[i].tolist(), fisher[i].tolist(), 4) for i in range(2))
    assert float((fisher * (weight - result.dequantize()).square())[:2].sum()) == pytest.approx(best, rel=0.01)
    assert error(result.dequantize()) < error(
        fake_quantize(weight, scheme("squeezellm", 2, outliers=0, sensitive=0), seen())
    )


def test_adpq_puts_the_largest_on_a_grid_of_their_own() -> None:
    weight = random(ROWS, WIDTH)
    result = stored(weight, scheme("adpq", 3, group=24, outliers=0.05))
    assert isinstance(result, TwoScaleWeight)
    order = sorted(range(weight.numel()), key=lambda i: -abs(float(weight.view(-1)[i])))
    assert sorted(order[: round(0.05 * weight.numel())]) == result.index.tolist()
    found = result.dequantize()
    for i, g in ((0, 0), (7, 2), (23, 1)):  # each group as two weights of their own
        some = weight[i : i + 1, 24 * g : 24 * g + 24]
        mask = torch.zeros(weight.numel(), dtype=torch.bool).index_fill(0, result.index, True).view_as(weight)
        mask = mask[i : i + 1, 24 * g : 24 * g + 24]
        plain = scheme("rtn", 3, group="row")
        inner, outer = (fake_quantize(some.masked_fill(m, 0), plain) for m in (mask, ~mask))
        torch.testing.assert_close(found[i : i + 1, 24 * g : 24 * g + 24], torch.where(mask, outer, inner))


def test_adpq_codes_do_not_depend_on_scale() -> None:
    weight = random(ROWS, WIDTH)
    small, large = (stored(weight * c, scheme("adpq", 3)) for c in (1.0, 8.0))
    assert isinstance(small, TwoScaleWeight)
    assert isinstance(large, TwoScaleWeight)
    assert torch.equal(small.base.codes, large.base.codes)
    assert torch.equal(small.index, large.index)


def test_no_outliers_leave_the_plain_grid() -> None:
    weight = random(ROWS, WIDTH)
    assert torch.equal(
        fake_quantize(weight, scheme("adpq", 3, outliers=0)), fake_quantize(weight, scheme("rtn", 3, group=128))
    )


# -- the column-wise solver on other grids


def plainly(weight: Tensor, levels: Tensor, curvature: Curvature, chosen: Scheme) -> Tensor:
    """Frantar et al. 2023 with any levels per row: invert, factorize, one column after the other."""
    w, h = weight.double().clone(), curvature.gram.double().clone()
    h.diagonal().add_(float(chosen["damp"]) * h.diagonal().mean())  # type: ignore[arg-type]
    order = torch.argsort(curvature.gram.diagonal(), descending=True, stable=True)
    order = order if chosen["order"] == "activation" else torch.arange(len(h))
    upper, w, out = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True), w[:, order], w.clone()
    for j, column in enumerate(order.tolist()):
        out[:, column] = levels.double().gather(1, (w[:, j, None] - levels).abs().argmin(1, keepdim=True))[:, 0]
        w[:, j:] -= ((w[:, j] - out[:, column]) / upper[j, j])[:, None] * upper[j, j:]
    return out.float()


@pytest.mark.parametrize("order", ["given", "activation"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_leanquant_is_a_loop_over_columns_on_its_codebook(order: str, bits: int) -> None:
    weight, curvature, chosen = random(ROWS, WIDTH), seen(), scheme("leanquant", bits, order=order)
    result = stored(weight, chosen, curvature)
    assert isinstance(result, LevelsWeight)
    slow = plainly(weight, result.levels, curvature, chosen)
    # a number on the edge between two levels may fall either way, and then changes those after it
    assert (result.dequantize() - slow).abs().gt(1e-4).any(1).float().mean() <= 0.1


def test_leanquant_weighs_by_the_inverse_cholesky_factor() -> None:
    weight, curvature, chosen = random(2, 20), seen(20), scheme("leanquant", 2, order="given")
    result = stored(weight, chosen, curvature)
    assert isinstance(result, LevelsWeight)
    h = curvature.gram.double()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    d = torch.linalg.cholesky(torch.linalg.inv(h), upper=True).diagonal()
    for i in range(2):
        heavy = (d / d.min()).pow(-4)
        found = (
            heavy
            * (weight[i] - result.levels[i, nearest_levels(weight[i : i + 1], result.levels[i : i + 1])[0].long()]) ** 2
        )
        assert float(found.sum()) == pytest.approx(optimum(weight[i].tolist(), heavy.tolist(), 4), rel=0.01)


def test_leanquant_on_integers_with_exponent_2_is_gptq_with_its_clip_search() -> None:
    weight, curvature = random(ROWS, WIDTH), seen()
    for group in ("row", 24):
        found = fake_quantize(weight, scheme("leanquant-affine", 3, exponent=2, group=group), curvature)
        assert torch.equal(found, fake_quantize(weight, scheme("gptq", 3, symmetric=False, group=group), curvature))


@pytest.mark.parametrize("order", ["given", "activation"])
def test_spqr_without_outliers_is_gptq_on_its_grid(order: str) -> None:
    weight, curvature = random(ROWS, WIDTH), seen()
    found = fake_quantize(weight, scheme("spqr", 3, outliers=0, scale_bits=16, order=order), curvature)
    gptq = scheme("gptq", 3, group=16, symmetric=False, damp=1.0, order=order, clip=False)
    assert torch.equal(found, fake_quantize(weight, gptq, curvature))


@pytest.mark.parametrize("order", ["given", "activation"])
def test_spqr_is_a_loop_over_columns(order: str) -> None:
    weight, curvature = random(32, WIDTH).half(), seen()
    chosen = scheme("spqr", 3, outliers=0.03, order=order, damp=0.1, group=16)
    result = stored(weight, chosen, curvature)
    assert isinstance(result, SparseWeight)
    assert isinstance(result.base, QuantizedWeight)
    kept = torch.zeros(weight.numel(), dtype=torch.bool).index_fill(0, result.index, True).view_as(weight)
    w, h = weight.double(), curvature.gram.double()
    h.diagonal().add_(0.1 * h.diagonal().mean())
    way = torch.argsort(curvature.gram.diagonal(), descending=True, stable=True)
    way = way if order == "activation" else torch.arange(WIDTH)
    upper, w, out = torch.linalg.cholesky(torch.linalg.inv(h[way][:, way]), upper=True), w[:, way], w.clone()
    for j, column in enumerate(way.tolist()):
        scale, zero = (t[:, column // 16].double() for t in (result.base.scale, result.base.zero))
        plain = ((w[:, j] / scale + zero).round().clamp(0, 7) - zero) * scale
        out[:, column] = torch.where(kept[:, column], w[:, j].half().double(), plain)
        w[:, j:] -= ((w[:, j] - out[:, column]) / upper[j, j])[:, None] * upper[j, j:]
    assert (result.dequantize() - out.float()).abs().gt(1e-3).any(1).float().mean() <= 0.1


def test_spqr_scales_take_eight_values_in_sixteen_rows() -> None:
    result = stored(random(40, WIDTH), scheme("spqr", 3, outliers=0))
    assert isinstance(result, QuantizedWeight)
    for start in (0, 16, 32):
        for t in (result.scale, result.zero):
            assert all(len(t[start : start + 16, g].unique()) <= 8 for g in range(t.shape[1]))


def test_spqr_outliers_are_those_that_save_most() -> None:
    weight, curvature = random(ROWS, WIDTH), seen()
    weight[3, 5], weight[11, 40] = 30.0, -25.0  # planted: they widen the range of their groups
    result = stored(weight, scheme("spqr", 3, outliers=2 / weight.numel()), curvature)
    assert isinstance(result, SparseWeight)
    assert result.index.tolist() == [3 * WIDTH + 5, 11 * WIDTH + 40]


# -- bit planes and binary weights


def test_bpdq_is_no_worse_than_its_first_planes() -> None:
    weight, curvature = random(ROWS, WIDTH), seen()

    def cost(turns: int) -> float:
        error = (weight - fake_quantize(weight, scheme("bpdq", 2, group=24, turns=turns), curvature)).double()
        return float(((error @ curvature.gram.double()) * error).sum())

    assert cost(10) < cost(1) < float(((weight @ curvature.gram) * weight).sum())


def test_bpdq_without_correlation_is_alternating_least_squares() -> None:
    """With H = 1 nothing is compensated: bits are the nearest sums, coefficients plain least squares."""
    weight, curvature = random(5, 24), Curvature(24)
    curvature.add(torch.eye(24))
    found = fake_quantize(weight, scheme("bpdq", 2, group=24, turns=6, damp=0), curvature)
    for i in range(5):
        row, best = weight[i].double(), (math.inf, torch.zeros(24))
        codes = ((row - row.min()) / (row.max() - row.min()) * 255).round().long() >> 6
        for turn in range(7):
            a = torch.stack([torch.ones(24), codes & 1, codes >> 1], 1).double()
            normal = a.T @ a
            c = torch.linalg.solve(normal + 1e-4 * normal.diagonal().mean() * torch.eye(3), a.T @ row)
            levels = torch.stack([c[0], c[0] + c[1], c[0] + c[2], c.sum()])
            codes = (row[:, None] - levels).abs().argmin(1)
            error = float((row - levels[codes]).square().sum())
            best = min(best, (error, levels[codes]), key=lambda pair: pair[0]) if turn < 6 else best
        assert float((weight[i] - found[i]).square().sum()) == pytest.approx(best[0], rel=0.01)


def test_residual_binary_never_gets_worse_with_its_order() -> None:
    for group in ("row", 16, 50):
        weight = random(ROWS, WIDTH).exp()  # skewed, so that means matter
        errors = [share(weight, fake_quantize(weight, scheme("binary", order, group=group))) for order in range(1, 9)]
        assert all(later <= earlier + 1e-6 for earlier, later in pairwise(errors))


def loop(row: list[float], order: int) -> list[float]:
    """Residual binary of one row, as a textbook would."""
    left, found = list(row), [0.0] * len(row)
    for _ in range(order):
        mean = sum(left) / len(left)
        magnitude = sum(abs(v - mean) for v in left) / len(left)
        step = [mean + (magnitude if v >= mean else -magnitude) for v in left]
        left, found = (
            [a - b for a, b in zip(left, step, strict=True)],
            [a + b for a, b in zip(found, step, strict=True)],
        )
    return found


@pytest.mark.parametrize("order", [1, 2, 3])
def test_residual_binary_is_a_loop_over_numbers(order: int) -> None:
    weight = random(4, 20)
    found = fake_quantize(weight, scheme("binary", order, group=8))
    expected = [list(chain(*(loop(row[a : a + 8], order) for a in (0, 8, 16)))) for row in weight.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=2e-3, atol=2e-3)


def test_billm_without_salient_columns_and_halves_is_binary() -> None:
    weight = random(ROWS, WIDTH)
    one_block = fake_quantize(weight, scheme("billm", 1, salient=0, split=False, group=WIDTH), seen())
    torch.testing.assert_close(one_block, fake_quantize(weight, scheme("binary", 1, group=WIDTH)), rtol=0, atol=2e-3)


def test_billm_blocks_hear_of_earlier_blocks() -> None:
    """Each block is the binary form of its compensated weights; found here from the inverse, block by block."""
    weight, curvature, group = random(ROWS, WIDTH), seen(), 24
    found = fake_quantize(weight, scheme("billm", 1, salient=0, split=False, group=group), curvature)
    h = curvature.gram.double()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    for a in range(0, WIDTH, group):
        error = (weight[:, :a] - found[:, :a]).double()
        # the best that later columns can do about these errors, before any of them is rounded
        later = weight[:, a:].double() + error @ h[:a, a:] @ torch.linalg.inv(h[a:, a:])
        block = fake_quantize(later[:, :group].float(), scheme("binary", 1))
        torch.testing.assert_close(found[:, a : a + group], block, rtol=0, atol=5e-3)


def test_billm_parts_lower_the_error() -> None:
    weight, curvature = random(ROWS, 128), seen(128)
    weight[:, [4, 90]] *= 6
    errors = [
        share(weight, fake_quantize(weight, scheme("billm", 1, **how), curvature))
        for how in ({"salient": 0, "split": False}, {"salient": 0}, {})
    ]
    assert errors[0] > errors[1] > errors[2]
    chosen = scheme("billm", 1)
    factor = factor_of(Linears(("w",), (weight,), curvature), chosen)
    grid = BlockGrid(chosen, factor, 128, torch.float32)
    grid.fit(0, 128, [weight])
    (block,) = grid.blocks
    assert block.columns is not None
    assert {4, 90} <= set(block.columns.nonzero().flatten().tolist())  # planted


# -- Bi-VLM


def test_one_bin_of_gaussian_weights_loses_1_minus_2_over_pi() -> None:
    weight = random(400, 400)
    assert share(weight, fake_quantize(weight, scheme("bivlm", 1, bins=1, salient=0))) == pytest.approx(
        1 - 2 / math.pi, abs=0.005
    )


@pytest.mark.parametrize("bins", [2, 3, 5])
def test_bins_are_gaussian_quantiles_and_their_levels_the_mean_magnitude(bins: int) -> None:
    weight = random(200, 200)
    result = stored(weight, scheme("bivlm", 1, bins=bins, salient=0))
    assert isinstance(result, BinnedWeight)
    mean, deviation = float(weight.mean()), float(weight.std(correction=0))
    edges = [0.0, *(mean + deviation * norm.ppf((1 + (k + 1) / bins) / 2) for k in range(bins - 1)), math.inf]
    for k in range(bins):
        inside = (weight.abs() > edges[k]) & (weight.abs() <= edges[k + 1])
        assert float(inside.float().mean()) == pytest.approx(1 / bins, abs=0.02)
        assert torch.equal(result.codes >> 1 == k, inside)
        assert float(result.magnitudes[k]) == pytest.approx(float(weight.abs()[inside].mean()), rel=1e-3)


# relative error with a tail of 1 %, as computed for the method's reference notes on Gaussian weights
@pytest.mark.parametrize(("bins", "error"), [(1, 0.329), (2, 0.124), (3, 0.072), (5, 0.039), (6, 0.032)])
def test_more_bins_lower_the_error_as_known(bins: int, error: float) -> None:
    weight = random(300, 300)
    assert share(weight, fake_quantize(weight, scheme("bivlm", 1, bins=bins))) == pytest.approx(error, abs=0.025)


@pytest.mark.parametrize("bins", [1, 2, 3, 5, 6, 20])
@pytest.mark.parametrize("salient", [0.0, 0.01, 0.05])
def test_bivlm_stores_at_least_the_entropy_of_its_bins(bins: int, salient: float) -> None:
    weight, chosen = random(300, 300), scheme("bivlm", 1, bins=bins, salient=salient)
    result = stored(weight, chosen)
    assert isinstance(result, BinnedWeight)
    shares = torch.bincount((result.codes >> 1).flatten().long()).double() / weight.numel()
    entropy = -float((shares[shares > 0] * shares[shares > 0].log2()).sum())
    assert 1 + OVERHEAD["bivlm"](chosen, 300, 300) / weight.numel() >= 1 + entropy


# -- all of them


def held(result: object, bits: int) -> int:
    """The bits that a stored weight holds, from its own tensors: codes as wide as their numbers need, 16-bit values."""
    if isinstance(result, SparseWeight):
        return held(result.base, bits) + len(result.index) * 16 + positions(result)
    if isinstance(result, TwoScaleWeight):
        again = result.scale.numel() * 16 + (0 if half(result.base, bits) else result.zero.numel() * bits)
        return held(result.base, bits) + again + positions(result)
    if isinstance(result, LevelsWeight):
        return result.codes.numel() * bits + result.levels.numel() * 16
    if isinstance(result, PlanesWeight):
        return result.codes.numel() * (result.coefficients.shape[2] - 1) + result.coefficients.numel() * 16
    if isinstance(result, BinaryWeight):
        wide = 1 if result.halves.shape[2] == 1 and result.salient is None else 2
        extra = 0 if result.salient is None else result.salient.numel() * 16 + result.codes.shape[1]
        return result.codes.numel() * wide + result.halves.numel() * 16 + extra
    if isinstance(result, ChannelWidthsWeight):
        widths, cols = result.widths.tolist(), result.codes.shape[1]
        return sum(width * cols + (16 if 0 < width < 16 else 0) + 3 for width in widths)
    if isinstance(result, BinnedWeight):
        index = math.ceil(math.log2(len(result.magnitudes) + (0 if result.scale is None else 2)))
        rest = [t.numel() for t in (result.magnitudes, result.scale, result.center) if t is not None]
        return result.codes.numel() * (1 + index) + 16 * sum(rest)
    assert isinstance(result, QuantizedWeight)
    scales = result.scale.numel() * 16 + (0 if result.inputs is None else 16 * len(result.inputs))
    return result.codes.numel() * bits + scales + (0 if half(result, bits) else result.zero.numel() * bits)


def half(result: QuantizedWeight, bits: int) -> bool:
    """Whether the zero point is the middle of the codes everywhere, so that nobody stores it."""
    return bool((result.zero == 2.0 ** (bits - 1)).all()) or (bits == 1 and bool((result.zero == 0.5).all()))


def positions(result: SparseWeight | TwoScaleWeight) -> int:
    rows, cols = result.base.codes.shape  # type: ignore[union-attr, attr-defined]
    return 8 * len(result.index) + 16 * rows * math.ceil(cols / 256)


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (32, 300)])
@pytest.mark.parametrize("name", METHODS)
def test_predicted_bits_are_those_that_are_held(name: str, shape: tuple[int, int]) -> None:
    weight = random(*shape)
    for bits in METHODS[name].widths:
        if bits > 4 and name in NEW:
            continue
        chosen = scheme(name, bits)
        result, predicted = stored(weight, chosen), bits * weight.numel() + OVERHEAD[name](chosen, *shape)
        if name in ("uniform", "nf4", "fp4", "llm-int8"):  # 32-bit numbers; their own tests count them
            assert isinstance(result, QuantizedWeight | CodebookWeight)
        elif name == "spqr":  # scales and zero points are 3-bit codes, and 64 bits for every 16 rows
            assert isinstance(result, SparseWeight)
            assert isinstance(result.base, QuantizedWeight)
            grids = result.base.scale.numel() * 6 + 64 * math.ceil(shape[0] / 16) * result.base.scale.shape[1]
            sparse = len(result.index) * 16 + positions(result)
            assert predicted == weight.numel() * bits + grids + sparse
        elif name == "qsvd":  # what weights with a common input share is counted apart (test_qsvd.py)
            assert isinstance(result, LowRankWeight)
            assert predicted == held(result.up, bits)
        elif name == "qvla":  # within the last step of one row
            assert predicted - 16 * shape[1] < held(result, bits) <= predicted
        else:
            ones = getattr(result, "inputs", 0) is None and name == "awq"  # a factor of 1 everywhere, which is left out
            assert predicted == held(result, bits) + (16 * shape[1] if ones else 0)


@pytest.mark.parametrize("chosen", every(), ids=str)
def test_what_is_stored_survives_the_cache(chosen: Scheme) -> None:
    result = stored(random(ROWS, WIDTH), chosen)
    kept = {name: t.clone() for name, t in tensors(result).items()}  # type: ignore[arg-type]
    again = from_tensors(kept)
    assert type(again) is type(result)
    assert torch.equal(again.dequantize(), result.dequantize())  # type: ignore[attr-defined]
    codes = [name for name, t in kept.items() if t.dtype == torch.uint8]
    assert len(codes) == 1  # one byte per weight


@pytest.mark.parametrize("chosen", every(), ids=str)
def test_a_width_has_the_same_bits_alone_and_beside_other_weights(chosen: Scheme) -> None:
    schemes = [replace(chosen, bits=bits) for bits in METHODS[chosen.method].widths if bits <= 4]
    a, b = random(ROWS, WIDTH), random(16, WIDTH, seed=4)
    together = dict(zip(schemes, solve(Linears(("a", "b"), (a, b), seen()), schemes), strict=True))[chosen]
    for weight, result in zip((a, b), together, strict=True):
        assert result is not None
        assert torch.equal(result.dequantize(), fake_quantize(weight, chosen, seen()))


@pytest.mark.parametrize("chosen", every(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_and_odd_shapes(chosen: Scheme, dtype: torch.dtype) -> None:
    weight = random(5, 19).to(dtype)
    found = fake_quantize(weight, chosen, seen(19))
    assert found.dtype == dtype
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("chosen", every(), ids=str)
def test_zeros_stay_finite(chosen: Scheme) -> None:
    assert fake_quantize(torch.zeros(4, WIDTH), chosen, seen()).abs().max() < 1e-3


def test_calibrated_methods_are_those_that_need_inputs() -> None:
    assert {name for name, row in METHODS.items() if row.calibrated} == set(CALIBRATED)


@pytest.mark.parametrize(
    ("method", "bits", "how", "message"),
    [
        ("squeezellm", 3, {"group": 64}, "squeezellm is always with one codebook per row"),
        ("squeezellm", 3, {"outliers": 0.9}, "outliers of squeezellm is a number from 0 to 0.5, not 0.9"),
        ("leanquant", 9, {}, "leanquant takes 1 to 8 bits, not 9"),
        ("leanquant-affine", 3, {"group": "tensor"}, "needs a scale per row or group"),
        ("bpdq", 5, {}, "bpdq takes 1 to 4 bits, not 5"),
        ("bpdq", 2, {"symmetric": True}, "bpdq is always of bit planes, and asymmetric"),
        ("bpdq", 2, {"turns": 0}, "turns of bpdq is a whole number from 1 to 100, not 0"),
        ("billm", 2, {}, "billm takes only 1 bits, not 2"),
        ("billm", 1, {"split": 1}, "split of billm takes a value like True, not 1"),
        ("bivlm", 1, {"bins": 0}, "bins of bivlm is a whole number from 1 to 126, not 0"),
        ("bivlm", 1, {"group": 128}, "bivlm is always per tensor"),
        ("spqr", 3, {"order": "best"}, "unknown order of spqr 'best'"),
        ("adpq", 3, {"outlier": 0.1}, "unknown setting of adpq 'outlier'.*did you mean outliers"),
        ("binary", 2, {"group": "tensor"}, "needs a scale per row or group"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_sentence(
    method: str, bits: int, how: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        scheme(method, bits, **how)
