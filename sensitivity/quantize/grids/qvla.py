"""QVLA: each output channel of a weight gets a width of its own, 0 to 16 bits, by what its rounding costs."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.stored.channels import ChannelWidthsWeight
from sensitivity.quantize.stored.integer_grid import as_16_bit, encode, ranges, scale_and_zero
from sensitivity.spec.plan import Scheme
from sensitivity.spec.stored_bits import CHANNEL_WIDTHS, channel_budget


def quantize_qvla(linears: Linears, schemes: Sequence[Scheme]) -> list[list[ChannelWidthsWeight | None]]:
    """Round each row to nearest at its own width, so that the weight stores no more than its scheme says.

    As in the released code, a row's cost at b bits is sum_j (w_j - q_j)^2 D_j, where D_j is what an error of column j
    costs after the later columns have compensated for it, and widths are 0, 2, 4, 8 and 16 bits. In the release, the
    channels of the whole model share a budget that does not count scales, and the next step down is the one that ends
    at the smallest cost. Here the channels of one weight share a budget of stored bits (so that a plan has a size
    before it is computed), and the next step is the one that adds the least cost for each bit that it saves.
    """
    importance = linears.input_statistics.factor(float(schemes[0]["damp"] or 0)).importance
    weights = [weight.detach().float() for weight in linears.weights]
    return [[_one_weight(weight, importance, scheme, linears.dtype) for weight in weights] for scheme in schemes]


def _one_weight(weight: Tensor, importance: Tensor, scheme: Scheme, dtype: torch.dtype) -> ChannelWidthsWeight:
    """Quantize one weight, each row at a width of its own."""
    rows, cols = weight.shape
    grids = {bits: _on_grid(weight, bits, scheme, dtype) for bits in CHANNEL_WIDTHS if 0 < bits < 16}
    numbers = {bits: (codes.float() - 2 ** (bits - 1)) * scale for bits, (codes, scale) in grids.items()}
    numbers |= {0: torch.zeros_like(weight), 16: as_16_bit(weight, dtype)}
    costs = torch.stack([(weight - numbers[bits]).square() @ importance for bits in CHANNEL_WIDTHS], 1)
    widths = torch.tensor(allocated(costs.tolist(), cols, channel_budget(scheme, rows, cols)), device=weight.device)
    codes, scale = torch.zeros(rows, cols, dtype=torch.uint8, device=weight.device), torch.zeros_like(weight[:, :1])
    for bits, (own, step) in grids.items():
        mask = widths[:, None] == bits
        codes, scale = torch.where(mask, own, codes), torch.where(mask, step, scale)
    return ChannelWidthsWeight(codes, scale, widths.to(torch.int16), numbers[16][widths == 16])


def _on_grid(weight: Tensor, bits: int, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of all rows at one width."""
    chosen = replace(scheme, bits=bits)
    on_grid = encode(weight, chosen, *scale_and_zero(weight, chosen, *ranges(weight, chosen), dtype))
    return on_grid.codes, on_grid.scale


def allocated(costs: Sequence[Sequence[float]], cols: int, budget: int) -> list[int]:
    """A width for each row: from 16 bits down, always the step that adds the least cost for each bit that it saves.

    `costs` has a row's cost at each of CHANNEL_WIDTHS. A step may skip widths, so that rows stay on the lower hull of
    their costs; then no other choice of widths with as few bits in total costs less.
    """
    bits = [_bits(width, cols) for width in CHANNEL_WIDTHS]
    places = [len(CHANNEL_WIDTHS) - 1] * len(costs)
    total = len(costs) * bits[-1]

    def best_step(row: int) -> tuple[float, int, int]:
        """A row's best step: the cost it adds per saved bit, the row, and the index of the width that it leads to."""
        at = places[row]
        rates = [((costs[row][to] - costs[row][at]) / (bits[at] - bits[to]), row, to) for to in range(at)]
        return min(rates)

    steps = [best_step(row) for row in range(len(costs))]
    heapq.heapify(steps)
    while total > budget and steps:
        _, row, to = heapq.heappop(steps)
        total -= bits[places[row]] - bits[to]
        places[row] = to
        if to:
            heapq.heappush(steps, best_step(row))
    return [CHANNEL_WIDTHS[place] for place in places]


def _bits(width: int, cols: int) -> int:
    """The stored bits of a row: its elements, and a 16-bit scale unless its width is 0 or 16."""
    return width * cols + (16 if 0 < width < 16 else 0)
