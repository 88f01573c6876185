"""QuantVGGT: learns smoothing factors and the ranges of weights by gradient descent on a layer's output error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sensitivity.spec.plan import Scheme

TOKENS, BATCH = 512, 64  # random tokens that are drawn, and how many one step takes
RATE, RATE_OF_RANGES = 1e-3, 1e-2  # learning rates of AdamW for factors and for ranges, as released
GATE_START = 4.0  # as released; the gate's sigmoid, at first .982, is the share of a row's range that is used


def learned(rows: Tensor, gram: Tensor, factor: Tensor, scheme: Scheme, epochs: int) -> tuple[Tensor, Tensor | None]:
    """The factor of each channel and the share of each row's range, trained to lower the error |W x - Q x_q|^2.

    The released code trains on calibration tokens and on the output of a whole block. Here tokens are drawn from a
    normal distribution with the layer's Gram matrix, since calibration keeps no tokens, and inputs are rounded to as
    many bits as weights. If training does not lower the error on these tokens, the given factors are returned, with
    None in place of shares.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # copies, since a tensor from inference mode has no gradients
        return _trained(rows.clone(), gram.clone(), factor.clone(), scheme, epochs)


def _trained(rows: Tensor, gram: Tensor, factor: Tensor, scheme: Scheme, epochs: int) -> tuple[Tensor, Tensor | None]:
    tokens = _tokens(gram)
    target = tokens @ rows.T
    start = float(_error(tokens, target, rows, factor, None, scheme))
    log = factor.log().requires_grad_()
    gate = torch.full((len(rows), 1), GATE_START, device=rows.device).requires_grad_()
    steps = epochs * math.ceil(len(tokens) / BATCH)
    optimizer = torch.optim.AdamW([{"params": [log], "lr": RATE}, {"params": [gate], "lr": RATE_OF_RANGES}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = slice(step * BATCH % len(tokens), step * BATCH % len(tokens) + BATCH)
        optimizer.zero_grad()
        loss = _error(tokens[batch], target[batch], rows, log.exp(), gate.sigmoid(), scheme)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    after, share = log.detach().exp(), gate.detach().sigmoid()
    better = float(_error(tokens, target, rows, after, share, scheme)) < start
    return (after, share) if better else (factor, None)


def _tokens(gram: Tensor) -> Tensor:
    """Random tokens whose expected Gram matrix is that of the calibration data, up to a factor."""
    mean = float(gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    one, damp = torch.eye(len(gram), device=gram.device, dtype=torch.float64), 1e-6
    while int((factor := torch.linalg.cholesky_ex(gram.double() + damp * mean * one)).info):
        damp *= 10  # a sum in float32 may be slightly indefinite
    normal = torch.randn(TOKENS, len(gram), generator=torch.Generator().manual_seed(len(gram)), dtype=torch.float64)
    found: Tensor = normal.to(gram.device) @ factor.L.T
    return (found / found.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)).float()


def _error(
    tokens: Tensor, target: Tensor, rows: Tensor, factor: Tensor, share: Tensor | None, scheme: Scheme
) -> Tensor:
    """The mean squared error of outputs when weights and inputs are rounded, with gradients through the rounding."""
    weight = _rounded(rows * factor, scheme.bits, scheme.symmetric, share)
    return (_rounded(tokens / factor, scheme.bits, True, None) @ weight.T - target).square().mean()


def _rounded(values: Tensor, bits: int, symmetric: bool, share: Tensor | None) -> Tensor:
    """Each row on its own grid; rounding counts as the identity in the backward pass."""
    # gathered, since the backward pass of amin and amax counts equal numbers, which takes half of the time
    at = values.detach().argmin(1, keepdim=True), values.detach().argmax(1, keepdim=True)
    low, high = values.gather(1, at[0]).clamp(max=0), values.gather(1, at[1]).clamp(min=0)
    low, high = (low, high) if share is None else (low * share, high * share)
    if symmetric:
        scale = (2 * torch.maximum(-low, high) / (2**bits - 1)).clamp(min=1e-12)
        zero = torch.full_like(scale, 2.0 ** (bits - 1))
    else:
        scale = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
        zero = (-low / scale).round().detach()
    codes: Tensor = _Nearest.apply(values / scale)  # type: ignore[no-untyped-call]
    rounded: Tensor = codes.clamp(-zero, 2.0**bits - 1 - zero) * scale
    return rounded


class _Nearest(torch.autograd.Function):
    """Rounding that counts as the identity in the backward pass."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        return values.round()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient
