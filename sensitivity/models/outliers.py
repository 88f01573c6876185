"""Plants synthetic outliers in a LLaVA-type model's weights without changing what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sensitivity.spec.errors import UserError

NOTE = "synthetic outliers, same function"
SIGMA = 0.4  # of the log-normal factors
OUTLIER_CHANNELS = 2  # of each weight
OUTLIER_FACTOR = 6.0  # by which the factors of outlier channels are larger


@torch.no_grad()
def plant_outliers(model: nn.Module, seed: int = 0) -> None:
    """Rescale channels in place: a factor in one weight is undone in the next. The connector does not change."""
    generator = torch.Generator().manual_seed(seed)
    blocks: list[Any] = [
        module for module in model.modules() if hasattr(module, "self_attn") and hasattr(module, "mlp")
    ]
    if not blocks:
        raise UserError(f"{type(model).__name__} has no LLaVA-type blocks; outliers can be planted only in those")
    for block in blocks:
        attention, mlp = block.self_attn, block.mlp
        gated = hasattr(mlp, "up_proj")
        norms = ("input_layernorm", "post_attention_layernorm") if gated else ("layer_norm1", "layer_norm2")
        _norm_to_columns(getattr(block, norms[0]), [attention.q_proj, attention.k_proj, attention.v_proj], generator)
        _norm_to_columns(getattr(block, norms[1]), [mlp.gate_proj, mlp.up_proj] if gated else [mlp.fc1], generator)
        reader = attention.o_proj if gated else attention.out_proj
        _rows_to_columns(attention.v_proj, reader, generator, attention.head_dim)
        if gated:  # up is multiplied by the gate, so a factor passes through; quick_gelu after fc1 is not linear
            _rows_to_columns(mlp.up_proj, mlp.down_proj, generator)


def _norm_to_columns(norm: nn.Module, readers: list[nn.Linear], generator: torch.Generator) -> None:
    """Divide a norm's output channels by random factors, and multiply the columns that read them by the same."""
    factor = _factors(readers[0].in_features, generator)
    for parameter in norm.parameters():  # the gain, and the bias of a LayerNorm
        _scale(parameter, 1 / factor)
    for linear in readers:
        _scale(linear.weight, factor)


def _rows_to_columns(writer: nn.Linear, reader: nn.Linear, generator: torch.Generator, head: int = 1) -> None:
    """Multiply a linear layer's rows by random factors, and divide the columns that read them by the same."""
    factor = _factors(writer.out_features, generator)
    _scale(writer.weight, factor[:, None])
    if writer.bias is not None:
        _scale(writer.bias, factor)
    heads = factor.view(-1, head)  # each query head reads the value head that it shares with others
    _scale(reader.weight, 1 / heads.repeat_interleave(reader.in_features // factor.numel(), 0).flatten())


def _scale(parameter: Tensor, factor: Tensor) -> None:
    """Multiply in place, rounding to the parameter's dtype once."""
    parameter.copy_(parameter * factor.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32)))


def _factors(n: int, generator: torch.Generator) -> Tensor:
    """Log-normal factors, a few of which are much larger."""
    factor = torch.exp(SIGMA * torch.randn(n, generator=generator))
    factor[torch.randperm(n, generator=generator)[:OUTLIER_CHANNELS]] *= OUTLIER_FACTOR
    return factor
