"""METHODS, and `with quantized(vlm, parts, plan)`: a plan put into a model and taken out again, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sensitivity.components import ComponentMap
from sensitivity.errors import UserError, unknown
from sensitivity.plan import Plan, Scheme
from sensitivity.quantize.grid import Quantised
from sensitivity.quantize.nearest import rtn, uniform

# name -> weight and scheme to codes; None leaves the weight as it is (a constant tensor has nothing to round)
METHODS: dict[str, Callable[[Tensor, Scheme], Quantised | None]] = {
    "uniform": uniform,
    "rtn": rtn,
}

# What a method is without further words: its group, its symmetry, the widths it is defined for.
DEFAULTS: dict[str, dict[str, Any]] = {
    "uniform": {"group": "tensor", "symmetric": False},
    "rtn": {"group": "row", "symmetric": True},
}
WIDTHS: dict[str, range] = {"uniform": range(1, 9), "rtn": range(1, 9)}
FIXED = {"uniform": "per tensor and asymmetric"}

Memory = MutableMapping[tuple[str, Scheme], Tensor]


def scheme(method: str, bits: int, **chosen: Any) -> Scheme:
    """A scheme of a known method: its defaults, and what was chosen beyond them."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if bits not in WIDTHS[method]:
        widths = WIDTHS[method]
        raise UserError(f"{method} takes {widths[0]} to {widths[-1]} bits, not {bits}")
    settings: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    shape = {**DEFAULTS[method], **{name: settings.pop(name) for name in ("group", "symmetric") if name in settings}}
    if method in FIXED and shape != DEFAULTS[method]:
        raise UserError(f"{method} is always {FIXED[method]}; use rtn for other groups and symmetric grids")
    return Scheme(method, bits, shape["group"], shape["symmetric"], tuple(settings.items()))


def quantise(weight: Tensor, scheme: Scheme) -> Tensor:
    """The weight as its codes would give it back, in its own type."""
    if scheme.method not in METHODS:
        raise unknown("method", scheme.method, METHODS)
    result = METHODS[scheme.method](weight.detach(), scheme)
    return weight.detach().clone() if result is None else result.dequantise().to(weight.dtype)


@contextmanager
def quantized(model: nn.Module, parts: ComponentMap, plan: Plan, memory: Memory | None = None) -> Iterator[set[str]]:
    """Inside the block the model has the plan's weights; after it, also after an exception, its own again.

    Yields the names of the changed parameters, which are exactly those that the plan asks for, or it is an error.
    `memory` keeps quantised weights by (parameter, scheme), for plans to come.
    """
    parameters = dict(model.named_parameters())
    asked = targets(parts, plan)
    if strangers := sorted(set(asked) - set(parameters)):
        raise UserError(f"the plan names weights that this model does not have: {', '.join(strangers[:4])}")
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, chosen in asked.items():
            parameters[name].data = _remembered(name, before[name], chosen, memory)
        changed = {name for name, parameter in parameters.items() if parameter.data_ptr() != before[name].data_ptr()}
        if changed != set(asked):
            missed, surplus = sorted(set(asked) - changed), sorted(changed - set(asked))
            raise UserError(f"coverage: not quantised {missed[:4]}, quantised without being asked {surplus[:4]}")
        yield changed
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def targets(parts: ComponentMap, plan: Plan) -> dict[str, Scheme]:
    """The parameters that a plan changes, each with its scheme; biases only where the scheme says so."""
    asked: dict[str, Scheme] = {}
    for component in parts.components:
        if (chosen := plan[component.name]) is not None:
            for weight in component.weights:
                asked[weight.name] = chosen
                if weight.bias and chosen.get("biases"):
                    asked[weight.bias] = chosen
    return asked


def _remembered(name: str, weight: Tensor, chosen: Scheme, memory: Memory | None) -> Tensor:
    if memory is not None and (name, chosen) in memory:
        return memory[name, chosen]
    if not torch.isfinite(weight).all():
        raise UserError(f"{name} holds NaN or infinite values and cannot be quantised")
    flat = weight.reshape(1, -1) if weight.dim() == 1 else weight
    result = quantise(flat, chosen).reshape(weight.shape)
    if memory is not None:
        memory[name, chosen] = result
    return result
