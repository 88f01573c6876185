"""Absorbers: norms and linear layers into which the scales of a later layer's input channels can be folded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sensitivity.quantize.layer.linears import input_of
from sensitivity.spec.components import ComponentMap, Weight

# Attention's output projection reads weighted means of value rows, which are linear in them.
VALUE, OUTPUT = ("v_proj", "v", "value"), ("o_proj", "out_proj", "o")
# Gated feed-forwards: down reads act(gate) * up, which is linear in up. In fc2(act(fc1)), no scale passes through the
# activation, so nothing can be folded into fc1.
UP, DOWN = ("up_proj", "wi_1", "w3"), ("down_proj", "wo", "w2")
# The functions by which torch's linear layers multiply.
LINEAR = (torch.nn.functional.linear, torch._C._nn.linear)


@dataclass(frozen=True)
class Absorber:
    """A module whose output channels can be divided in advance: a norm, or a linear layer by its rows."""

    path: str
    norm: bool


def absorbers_of(model: nn.Module, parts: ComponentMap, run: Callable[[], object]) -> dict[str, Absorber]:
    """The absorber of each input: a norm that feeds it alone, or else the value or up projection in front of it.

    `run` is one forward pass, which is watched. A norm whose output is also added, viewed or read by another layer does
    not qualify, since these would be divided, too (as in a Q-Former, whose norms are on the residual stream).
    """
    absorber_of = {shared: Absorber(path, True) for shared, path in _norms(model, parts, run).items()}
    by_module = {weight.module: weight for weight in parts.weights}
    for weight in parts.weights:
        writer = _sibling(weight, by_module, VALUE, OUTPUT) or _sibling(weight, by_module, UP, DOWN)
        # A norm between the two (Kosmos-2) was found above, and feeds the input instead. With grouped-query attention,
        # value has fewer rows than output has columns: several heads share one.
        if writer is not None and writer.rows == weight.cols and input_of(weight) not in absorber_of:
            absorber_of[input_of(weight)] = Absorber(writer.module, False)
    return absorber_of


def _sibling(
    weight: Weight, by_module: Mapping[str, Weight], writer: Sequence[str], after: Sequence[str]
) -> Weight | None:
    """The layer named in `writer` beside this one, if this one is named in `after`."""
    parent, _, leaf = weight.module.rpartition(".")
    if leaf not in after:
        return None
    return next((by_module[f"{parent}.{name}"] for name in writer if f"{parent}.{name}" in by_module), None)


def _norms(model: nn.Module, parts: ComponentMap, run: Callable[[], object]) -> dict[str, str]:
    """By input: the path of the norm whose output goes to that input and nowhere else."""
    # a tied head cannot be scaled: the embedding would be scaled with it
    names = {id(model.get_parameter(weight.name)): input_of(weight) for weight in parts.weights if not weight.tied}
    uses = _OutputUses(names)
    with ExitStack() as hooks:
        for path, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1:
                hooks.callback(module.register_forward_hook(uses.hook(path)).remove)
        with uses, torch.no_grad():
            run()
    feeds: dict[str, list[str]] = {}
    for path, consumers in uses.consumers.items():
        if len(consumers) == 1 and None not in consumers:
            feeds.setdefault(str(next(iter(consumers))), []).append(path)
    # one scale cannot serve two norms that feed the same input, as where a layer is called twice
    return {shared: paths[0] for shared, paths in feeds.items() if len(paths) == 1}


def _holds_tensor(result: object) -> bool:
    """Whether a result is a tensor, or a list or tuple that holds one."""
    return isinstance(result, Tensor) or (isinstance(result, (list, tuple)) and any(map(_holds_tensor, result)))


class _OutputUses(TorchFunctionMode):
    """Records who reads the output of each norm: inputs of known linear layers by name, None for anything else."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.outputs: dict[int, tuple[Tensor, str]] = {}  # kept alive, so that no new tensor gets the same id
        self.consumers: dict[str, set[str | None]] = {}

    def hook(self, path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: object, output: Tensor) -> None:
            self.outputs[id(output)] = output, path
            self.consumers.setdefault(path, set())

        return note

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if _holds_tensor(result):  # reading a shape or a dtype uses no values
            for value in (*args, *(kwargs or {}).values()):
                for one in value if isinstance(value, (list, tuple)) else (value,):
                    # an operation that returns its argument, such as .to() the same dtype, does not count as a use
                    if id(one) in self.outputs and result is not one:
                        linear = func in LINEAR and one is args[0]
                        shared = self.names.get(id(args[1])) if linear else None
                        self.consumers[self.outputs[id(one)][1]].add(shared)
        return result
