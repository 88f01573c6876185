"""Finds the modules of transformer blocks, reads what they get, and replaces their forward or weights for a while."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sensitivity.spec.components import Weight


def block_path(model: nn.Module, layers: Iterable[str]) -> str:
    """The path of the deepest module around some layers that has a forward of its own; a ModuleList has none."""
    path = os.path.commonpath([layer.replace(".", "/") for layer in layers])
    while isinstance(model.get_submodule(path.replace("/", ".")), nn.ModuleList | nn.ModuleDict):
        path = os.path.dirname(path)
    return path.replace("/", ".")


def block_paths(model: nn.Module, weights: Iterable[Weight]) -> dict[tuple[str, int], str]:
    """By part and number, the path of the module around each block's weights, unless it holds another block too."""
    layers: dict[tuple[str, int], list[str]] = {}
    for weight in weights:
        if weight.block is not None:
            layers.setdefault((weight.part, weight.block), []).append(weight.module)
    around = {block: block_path(model, modules) for block, modules in layers.items()}
    return {
        block: path
        for block, path in around.items()
        if path and not any(f"{other}.".startswith(f"{path}.") for of, other in around.items() if of != block)
    }


def layer_input(args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> Tensor:
    """What a linear layer reads, by position or by name, as a hook gets it."""
    return args[0] if args else kwargs["input"]


def hidden_states(value: object) -> Tensor:
    """The hidden states among a block's arguments, or in its output: the first tensor."""
    return next(leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Inside the `with` block, a module has another forward; it stays itself, since transformers finds it by class."""
    # accelerate, which spreads a model over devices, sets a forward on each instance; it must be back afterwards
    instance_forward = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # makes the method of the class visible again
        if instance_forward is not None:
            module.forward = instance_forward


def recorded_forward(module: nn.Module, record: Callable[[object], None]) -> AbstractContextManager[None]:
    """Inside the `with` block, `record` gets every output of the module."""
    original = module.forward

    def recording(*args: object, **kwargs: object) -> object:
        output = original(*args, **kwargs)
        record(output)
        return output

    return replaced_forward(module, recording)


@contextmanager
def float_model(model: nn.Module, own: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the `with` block the model has its own weights, and none of the hooks that a plan has installed in it."""
    of_plan = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.data = own[name]
        with without_hooks(model):
            yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = of_plan[name]


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Inside the `with` block, a module and those in it have none of the hooks that a plan has installed."""
    every = [hooks for one in module.modules() for hooks in (one._forward_pre_hooks, one._forward_hooks)]
    before = [(hooks, hooks.copy()) for hooks in every if any(map(_ours, hooks.values()))]
    try:
        for hooks, copy in before:
            for key, hook in copy.items():
                if _ours(hook):
                    del hooks[key]
        yield
    finally:
        for hooks, copy in before:
            hooks.clear()
            hooks.update(copy)


def _ours(hook: object) -> bool:
    """Whether this package made a hook; transformers has hooks of its own, by which it returns hidden states."""
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "sensitivity"
