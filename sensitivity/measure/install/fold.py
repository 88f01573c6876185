"""Folds input scales of a scale search into the norm or linear layer before the scaled one; codes do not change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sensitivity.measure.calibrate.absorbers import Absorber
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.spec.errors import UserError


def fold_scales(
    model: nn.Module, results: Mapping[str, QuantizedWeight], inputs: Mapping[str, str], into: Mapping[str, Absorber]
) -> dict[str, QuantizedWeight]:
    """Divide the absorber in front of each scaled layer by its scales, in the model and in the results.

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
        module = model.get_submodule(absorber.path)
        if absorber.norm:
            _divide_norm(module, scale)
            continue
        name = f"{absorber.path}.weight"
        _divide(module.get_parameter("weight"), scale[:, None])
        if (bias := _bias(module)) is not None:  # the bias is part of the output that is divided
            _divide(bias, scale)
        # the absorber is quantized, too: dividing a row divides its scales, and its codes stay
        if name in folded:
            folded[name] = replace(folded[name], scale=folded[name].scale / scale[:, None])
    return folded


def _bias(module: nn.Module) -> nn.Parameter | None:
    """A module's bias, if it has one."""
    return dict(module.named_parameters(recurse=False)).get("bias")


def _divide(parameter: nn.Parameter, scale: Tensor) -> None:
    """Divide a parameter in float32, and round it to its own dtype once."""
    parameter.data = (parameter.data.float() / scale).to(parameter.dtype)


def _divide_norm(norm: nn.Module, scale: Tensor) -> None:
    """Divide a norm's output by a scale. Some norms multiply by 1 + weight (Gemma); trying both shows which."""
    gain = norm.get_parameter("weight")
    x = torch.randn(4, len(scale), device=gain.device, dtype=gain.dtype)
    expected, weight = norm(x).float(), gain.data.clone()
    if (bias := _bias(norm)) is not None:
        _divide(bias, scale)
    # Only the output tells which formula a norm has: with the right one, the divided output times the scales is the
    # norm's own output again. The inputs are random, so that no channel is zero by chance.
    for offset in (0.0, 1.0):
        gain.data = ((weight.float() + offset) / scale - offset).to(weight.dtype)
        # rounding of the divided output is multiplied by the scales, too, so the tolerance grows with them
        tolerance = 4 * torch.finfo(weight.dtype).eps * expected.abs().max()
        if ((norm(x).float() * scale - expected).abs() <= tolerance.clamp(min=1e-5) * scale.clamp(min=1)).all():
            return
    raise UserError(f"{type(norm).__name__} is not proportional to its weight, so no scale can be folded into it")
