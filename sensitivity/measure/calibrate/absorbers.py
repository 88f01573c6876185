"""Absorbers: what can take over a scale per input channel of a layer that comes after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sensitivity.quantize.linears import reads
from sensitivity.spec.components import ComponentMap, Weight

VALUE, OUTPUT = ("v_proj", "v", "value"), ("o_proj", "out_proj", "o")


# gated feed-forwards: down reads act(gate) * up, which is linear in up. fc2 reads act(fc1), which nothing can be
# folded into, whatever the activation.
UP, DOWN = ("up_proj", "wi_1", "w3"), ("down_proj", "wo", "w2")


LINEAR = (torch.nn.functional.linear, torch._C._nn.linear)


@dataclass(frozen=True)
class Absorber:
    """What can divide an input's channels in advance: a norm, or the rows of a linear layer."""

    path: str
    norm: bool


def absorbers(model: nn.Module, parts: ComponentMap, run: Callable[[], None]) -> dict[str, Absorber]:
    """By input: the norm whose output goes there and nowhere else; value before output; up before down.

    `run` is one forward pass, watched: a norm whose output is also added to, viewed or returned to another layer (as
    in a Q-Former, whose norms stand on the residual stream) does not qualify.
    """
    found = {shared: Absorber(path, True) for shared, path in _norms(model, parts, run).items()}
    by_module = {weight.module: weight for weight in parts.weights}
    for weight in parts.weights:
        before = _sibling(weight, by_module, VALUE, OUTPUT) or _sibling(weight, by_module, UP, DOWN)
        # where a norm stands between the two (Kosmos-2), it is what is found already
        if before is not None and before.rows == weight.cols and reads(weight) not in found:
            found[reads(weight)] = Absorber(before.module, False)
    return found


def _sibling(
    weight: Weight, by_module: Mapping[str, Weight], before: Sequence[str], after: Sequence[str]
) -> Weight | None:
    """The layer named like one of `before` beside a layer named like one of `after`."""
    parent, _, leaf = weight.module.rpartition(".")
    if leaf not in after:
        return None
    return next((by_module[f"{parent}.{name}"] for name in before if f"{parent}.{name}" in by_module), None)


def _norms(model: nn.Module, parts: ComponentMap, run: Callable[[], None]) -> dict[str, str]:
    # a tied head cannot be scaled: the embedding would be scaled with it
    names = {id(model.get_parameter(weight.name)): reads(weight) for weight in parts.weights if not weight.tied}
    watch = _Watch(names)
    with ExitStack() as hooks:
        for path, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1:
                hooks.callback(module.register_forward_hook(watch.hook(path)).remove)
        with watch, torch.no_grad():
            run()
    feeds: dict[str, list[str]] = {}
    for path, consumers in watch.consumers.items():
        if len(consumers) == 1 and None not in consumers:
            feeds.setdefault(str(next(iter(consumers))), []).append(path)
    return {shared: paths[0] for shared, paths in feeds.items() if len(paths) == 1}


def _holds_tensor(result: Any) -> bool:
    return isinstance(result, Tensor) or (isinstance(result, (list, tuple)) and any(map(_holds_tensor, result)))


class _Watch(TorchFunctionMode):
    """Who uses the outputs of norms: the inputs of known linears by name, None for anything else."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.outputs: dict[int, tuple[Tensor, str]] = {}  # held, so that no other tensor takes an id
        self.consumers: dict[str, set[str | None]] = {}

    def hook(self, path: str) -> Callable[..., None]:
        def note(module: Any, args: Any, output: Tensor) -> None:
            self.outputs[id(output)] = output, path
            self.consumers.setdefault(path, set())

        return note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _holds_tensor(result):  # a shape or a type is not a use
            for value in (*args, *(kwargs or {}).values()):
                for one in value if isinstance(value, (list, tuple)) else (value,):
                    if id(one) in self.outputs and result is not one:
                        linear = func in LINEAR and one is args[0]
                        shared = self.names.get(id(args[1])) if linear else None
                        self.consumers[self.outputs[id(one)][1]].add(shared)
        return result
