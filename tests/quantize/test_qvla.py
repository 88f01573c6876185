"""QVLA: widths of output channels are the best choice for what they store, against every choice."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from sensitivity.quantize.grids.qvla import _bits, allocated
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solving import fake_quantize, solve
from sensitivity.quantize.stored.channels import ChannelWidthsWeight
from sensitivity.spec.errors import UserError
from sensitivity.spec.stored_bits import CHANNEL_WIDTHS, channel_budget

COLS = 12


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(width: int = COLS) -> Curvature:
    found = Curvature(width)
    found.add(random(200, width, seed=1) @ random(width, width, seed=2))
    return found


def stored(weight: Tensor, bits: int) -> ChannelWidthsWeight:
    ((result,),) = solve(Linears(("w",), (weight,), seen(weight.shape[1])), [scheme("qvla", bits)])
    assert isinstance(result, ChannelWidthsWeight)
    return result


def costs_of(weight: Tensor) -> list[list[float]]:
    """Each row at each width, number by number."""
    curvature = seen(weight.shape[1])
    damped = curvature.gram.double() + 0.01 * curvature.gram.diagonal().mean() * torch.eye(weight.shape[1])
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).diagonal()  # the d_j of the released code
    found = []
    for row in weight:
        of_row = []
        for bits in CHANNEL_WIDTHS:
            if bits == 0:
                rounded = torch.zeros_like(row)
            elif bits == 16:
                rounded = row.half().float()
            else:
                scale, half = (2 * row.abs().max() / (2**bits - 1)).half().float(), 2 ** (bits - 1)
                rounded = (row / scale).round().clamp(-half, half - 1) * scale
            of_row.append(sum(float((w - q) ** 2 / d**2) for w, q, d in zip(row, rounded, inverse, strict=True)))
        found.append(of_row)
    return found


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_no_other_choice_within_the_reached_bits_costs_less(bits: int) -> None:
    weight = random(5, COLS) * torch.tensor([0.1, 0.3, 1.0, 2.0, 6.0])[:, None]
    result, costs = stored(weight, bits), costs_of(weight)
    widths = [int(width) for width in result.widths]
    reached = sum(_bits(width, COLS) for width in widths)
    assert reached <= channel_budget(scheme("qvla", bits), *weight.shape)
    own = sum(row[CHANNEL_WIDTHS.index(width)] for row, width in zip(costs, widths, strict=True))
    best = min(
        sum(row[place] for row, place in zip(costs, places, strict=True))
        for places in product(range(len(CHANNEL_WIDTHS)), repeat=len(costs))
        if sum(_bits(CHANNEL_WIDTHS[place], COLS) for place in places) <= reached
    )
    assert own == pytest.approx(best, rel=1e-3)


def test_rows_of_large_weights_are_wider() -> None:
    weight = random(32, COLS)
    weight[5] *= 50
    widths = stored(weight, 3).widths
    assert int(widths[5]) == int(widths.max()) > 3
    assert len(set(widths.tolist())) > 1


def test_alike_rows_are_alike_at_a_width_that_there_is() -> None:
    weight = random(1, COLS).expand(8, COLS).contiguous()
    for bits in (2, 4, 8):
        found = stored(weight, bits)
        assert set(found.widths.tolist()) == {bits}
        torch.testing.assert_close(found.dequantize(), fake_quantize(weight, scheme("rtn", bits)))


def test_a_budget_for_all_rows_in_16_bits_keeps_them() -> None:
    assert allocated([[9.0, 4, 2, 1, 0]] * 3, COLS, 3 * 16 * COLS) == [16, 16, 16]
    assert allocated([[9.0, 4, 2, 1, 0]] * 3, COLS, 0) == [0, 0, 0]


def test_more_bits_never_cost_more() -> None:
    weight, costs = random(16, COLS), []
    for bits in range(1, 9):
        costs.append(float((stored(weight, bits).dequantize() - weight).square().sum()))
    assert all(later <= before * 1.05 for before, later in pairwise(costs))


def test_groups_are_refused() -> None:
    with pytest.raises(UserError, match="qvla is always per row and symmetric"):
        scheme("qvla", 3, group=64)
