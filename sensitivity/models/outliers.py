"""Synthetic outliers: a LLaVA-type model's weights made plant_outliers-tailed without changing what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sensitivity.spec.errors import UserError

NOTE = "synthetic outliers, same function"
SPREAD, LOUD, LOUDER = 0.4, 2, 6.0  # log-normal factors, and that many channels louder by this much


@torch.no_grad()
def plant_outliers(model: nn.Module, seed: int = 0) -> None:
    """Rescales in place: what a channel gains in one weight it loses in its partner. The projector is left alone."""
    draw = torch.Generator().manual_seed(seed)
    blocks: list[Any] = [
        module for module in model.modules() if hasattr(module, "self_attn") and hasattr(module, "mlp")
    ]
    if not blocks:
        raise UserError(f"{type(model).__name__} has no LLaVA-type blocks; outliers can be planted only in those")
    for block in blocks:
        attention, mlp = block.self_attn, block.mlp
        gated = hasattr(mlp, "up_proj")
        norms = ("input_layernorm", "post_attention_layernorm") if gated else ("layer_norm1", "layer_norm2")
        _norm_to_columns(getattr(block, norms[0]), [attention.q_proj, attention.k_proj, attention.v_proj], draw)
        _norm_to_columns(getattr(block, norms[1]), [mlp.gate_proj, mlp.up_proj] if gated else [mlp.fc1], draw)
        reader = attention.o_proj if gated else attention.out_proj
        _rows_to_columns(attention.v_proj, reader, draw, attention.head_dim)
        if gated:  # up is multiplied into the gate, so it may be scaled; nothing passes quick_gelu of fc1 unchanged
            _rows_to_columns(mlp.up_proj, mlp.down_proj, draw)


def _norm_to_columns(norm: nn.Module, readers: list[nn.Linear], draw: torch.Generator) -> None:
    factor = _factors(readers[0].in_features, draw)
    for parameter in norm.parameters():  # the gain, and the bias of a LayerNorm
        _scale(parameter, 1 / factor)
    for linear in readers:
        _scale(linear.weight, factor)


def _rows_to_columns(writer: nn.Linear, reader: nn.Linear, draw: torch.Generator, head: int = 1) -> None:
    factor = _factors(writer.out_features, draw)
    _scale(writer.weight, factor[:, None])
    if writer.bias is not None:
        _scale(writer.bias, factor)
    heads = factor.view(-1, head)  # a value head that several query heads share is read once by each of them
    _scale(reader.weight, 1 / heads.repeat_interleave(reader.in_features // factor.numel(), 0).flatten())


def _scale(parameter: Tensor, factor: Tensor) -> None:
    parameter.copy_(parameter * factor.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32)))


def _factors(n: int, draw: torch.Generator) -> Tensor:
    factor = torch.exp(SPREAD * torch.randn(n, generator=draw))
    factor[torch.randperm(n, generator=draw)[:LOUD]] *= LOUDER
    return factor
