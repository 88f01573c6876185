"""Shifts weights so that a layer's output fits the float model's although its inputs come from quantized layers."""

from __future__ import annotations

import torch
from torch import Tensor

from sensitivity.quantize.layer.curvature import Factor


def shifted(rows: Tensor, factor: Factor, cross: Tensor, strength: float, later: bool) -> Tensor:
    """Weights W + strength W S, so that a solver which minimizes the error of (W + W S) x - Q x fits Q x to W x~.

    Without `later`, S = C H^-1 for `cross` C, the least-squares solution: that of VLM-PTQ, exact for the damped H. With
    `later`, the difference of an input channel shifts only the weights of columns that are rounded after it, as in
    GPTAQ (Li et al. 2025). In both cases S = N M^-1 for H = M D M' and N = C M^-T D^-1. N_kj is the shift that the
    difference of channel k causes in the target of column j while all columns before j are fixed; GPTAQ keeps only what
    is above the diagonal.
    """
    order = factor.order
    ordered = cross if order is None else cross[order][:, order]
    lower = factor.unit.T
    shift = torch.linalg.solve_triangular(lower, ordered, upper=False, left=False, unitriangular=True)
    shift = shift / factor.importance
    if later:
        shift = shift.triu(1)
    shift = torch.linalg.solve_triangular(factor.unit, shift, upper=True, left=False, unitriangular=True)
    moved: Tensor = rows @ shift if order is None else (rows[:, order] @ shift)[:, torch.argsort(order)]
    return rows + strength * moved
