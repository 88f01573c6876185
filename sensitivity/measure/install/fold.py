"""Folds the input scales of a scale search into the norm or linear layer before, exactly."""

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
    """Divide the absorber before each scaled layer by its scales, in the model and in the results; codes do not change.

    `inputs` names the input that each weight reads. The results are returned without input scales; a layer whose scales
    nothing absorbs is an error.
    """
    folded = {name: replace(result, inputs=None) for name, result in results.items()}
    scales: dict[str, Tensor] = {}
    for name, result in results.items():
        if result.inputs is not None:
            # weights that read one input share one scale, so any of them may set it
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
        if module.bias is not None:  # the bias is part of the output that is divided
            module.bias.data = (module.bias.data.float() / scale).to(module.bias.dtype)
        # the absorber is quantized, too: dividing a row divides its scales, and its codes stay
        if name in folded:
            folded[name] = replace(folded[name], scale=folded[name].scale / scale[:, None])
    return folded


def _divide_norm(norm: Any, scale: Tensor) -> None:
    """Divide a norm's output by a scale. Some norms multiply by 1 + weight (Gemma); a trial shows which."""
    x = torch.randn(4, len(scale), device=norm.weight.device, dtype=norm.weight.dtype)
    own, weight = norm(x).float(), norm.weight.data.clone()
    bias = getattr(norm, "bias", None)
    if bias is not None:
        bias.data = (bias.data.float() / scale).to(bias.dtype)
    # the right formula gives the norm's own output again once it is multiplied by the scales
    for offset in (0.0, 1.0):
        norm.weight.data = ((weight.float() + offset) / scale - offset).to(weight.dtype)
        # rounding of the divided output is multiplied by the scales, too, so the tolerance grows with them
        tolerance = 4 * torch.finfo(weight.dtype).eps * own.abs().max()
        if ((norm(x).float() * scale - own).abs() <= tolerance.clamp(min=1e-5) * scale.clamp(min=1)).all():
            return
    raise UserError(f"{type(norm).__name__} is not proportional to its weight, so no scale can be folded into it")
