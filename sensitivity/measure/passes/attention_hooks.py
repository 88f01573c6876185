"""Rounds and scales the probabilities of attention modules in every forward pass, by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sensitivity.measure.passes.attention_functions import (
    Attend,
    AttentionFunctions,
    AttentionMode,
    probabilities_of,
)
from sensitivity.measure.passes.block_modules import block_path
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError

Mode = TypeVar("Mode", bound=AttentionMode)


@dataclass(frozen=True)
class AttentionModule:
    """An attention: its path, its first layer, whose scheme says how probabilities are rounded, and its last layer."""

    path: str
    first: Weight
    last: Weight


def attention_modules(model: nn.Module, weights: Iterable[Weight]) -> list[AttentionModule]:
    """Every attention that is inside a block, in the direction of data flow."""
    groups: dict[tuple[object, ...], list[Weight]] = {}
    for weight in weights:
        if weight.kind in ("attn", "cross") and weight.block is not None:
            groups.setdefault((weight.part, weight.block, weight.kind), []).append(weight)
    found = []
    for group in groups.values():
        modules = list(dict.fromkeys(weight.module for weight in group))
        path = block_path(model, modules) if len(modules) > 1 else modules[0].rpartition(".")[0]
        found.append(AttentionModule(path, group[0], group[-1]))
    return found


def probability_hooks(
    model: nn.Module, path: str, change: Callable[[Tensor], Tensor], factor: Callable[[], Tensor | None]
) -> Iterator[RemovableHandle]:
    """Change the probabilities of one attention; each head's logits are first multiplied by what `factor` returns."""

    def attend(logits: Tensor, value: Tensor | None) -> Tensor:
        # where query heads share keys, transformers moves the heads of a single query into the dimension of queries
        # (pack_gqa), so that logits have fewer heads than there are factors
        if (by := factor()) is not None and len(by) % logits.shape[1] == 0:
            logits = logits * by.to(logits).reshape(logits.shape[1], -1, 1)
        return change(probabilities_of(logits))

    yield from attending_hooks(model.get_submodule(path), attend, lambda calls: check_seen(path, calls))


def attending_hooks(
    module: nn.Module, attend: Attend, check: Callable[[int], None] = lambda calls: None
) -> Iterator[RemovableHandle]:
    """Call `attend` in each attention of a module; `check` gets the number of calls after each forward pass."""
    return mode_hooks(module, lambda: AttentionFunctions(attend), check)


def mode_hooks(
    module: nn.Module, mode: Callable[[], Mode], check: Callable[[int], None], active: list[Mode] | None = None
) -> Iterator[RemovableHandle]:
    """Enter a new mode in each forward pass of a module; `check` gets how many attentions it saw.

    These are hooks, not a replaced forward, since `float_model` restores the float model by removing hooks. `active`
    holds the mode while the module runs, for hooks of the caller.
    """
    active = [] if active is None else active

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        active.append(mode())
        active[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if active:  # not entered where a hook before this one raised an error
            left = active.pop()
            left.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if output is not None:  # None after an error in the module, which no error of `check` may hide
                check(left.calls)

    yield module.register_forward_pre_hook(enter, with_kwargs=True)
    yield module.register_forward_hook(leave, always_call=True)


def check_seen(path: str, calls: int) -> None:
    """Raise an error if a forward pass showed no attention (`calls` is 0)."""
    if not calls:
        raise UserError(
            f"{path} shows no attention probabilities that could be changed, since it computes them inside one kernel; "
            "load the model with attn_implementation sdpa or eager, or choose a method and --set that leave them alone"
        )
