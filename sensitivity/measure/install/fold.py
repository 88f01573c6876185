"""Folds the scales of a scale search into what stands before a layer, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sensitivity.measure.calibrate.absorbers import Absorber
from sensitivity.quantize.grid import QuantizedWeight
from sensitivity.spec.errors import UserError


def fold(
    model: nn.Module, results: Mapping[str, QuantizedWeight], inputs: Mapping[str, str], into: Mapping[str, Absorber]
) -> dict[str, QuantizedWeight]:
    """Divide what stands before each scaled layer, in the model and among the results; codes stay as they are.

    `inputs` says which input each weight reads. Results come back without scales of their own; a layer whose scale
    nothing absorbs is an error.
    """
    folded = {name: replace(result, inputs=None) for name, result in results.items()}
    scales: dict[str, Tensor] = {}
    for name, result in results.items():
        if result.inputs is not None:
            scales[inputs[name]] = result.inputs
    for shared, scale in scales.items():
        if shared not in into:
            names = ", ".join(name for name, of in inputs.items() if of == shared and name in results)
            raise UserError(f"nothing before {names} can absorb its scales; make the scheme with scales='folded'")
        absorber = into[shared]
        module: Any = model.get_submodule(absorber.path)
        if absorber.norm:
            _divide_norm(module, scale)
            continue
        name = f"{absorber.path}.weight"
        module.weight.data = (module.weight.data.float() / scale[:, None]).to(module.weight.dtype)
        if module.bias is not None:  # the bias is part of what is divided
            module.bias.data = (module.bias.data.float() / scale).to(module.bias.dtype)
        if name in folded:
            folded[name] = replace(folded[name], scale=folded[name].scale / scale[:, None])
    return folded


def _divide_norm(norm: Any, scale: Tensor) -> None:
    """Divide a norm's output. Some norms multiply by 1 + weight (Gemma); which is which, a trial tells."""
    x = torch.randn(4, len(scale), device=norm.weight.device, dtype=norm.weight.dtype)
    own, weight = norm(x).float(), norm.weight.data.clone()
    bias = getattr(norm, "bias", None)
    if bias is not None:
        bias.data = (bias.data.float() / scale).to(bias.dtype)
    for offset in (0.0, 1.0):
        norm.weight.data = ((weight.float() + offset) / scale - offset).to(weight.dtype)
        tolerance = 4 * torch.finfo(weight.dtype).eps * own.abs().max()
        if ((norm(x).float() * scale - own).abs() <= tolerance.clamp(min=1e-5) * scale.clamp(min=1)).all():
            return
    raise UserError(f"{type(norm).__name__} is not proportional to its weight, so no scale can be folded into it")
