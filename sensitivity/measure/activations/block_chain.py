"""Records how consecutive blocks are called in forward passes, and runs them again without the rest of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import Cache

from sensitivity.measure.passes.block_modules import hidden_states

Call = tuple[tuple[object, ...], dict[str, object]]


@dataclass
class BlockCalls:
    """A block's module, and the arguments of each of its calls."""

    module: nn.Module
    calls: list[Call] = field(default_factory=list)

    def inputs(self, call: int) -> Tensor:
        """The hidden states that one call got."""
        return hidden_states(self.calls[call])


def recorded_calls(
    model: nn.Module, paths: Sequence[str], passes: Callable[[], Iterable[object]], max_passes: int
) -> list[BlockCalls]:
    """The calls of some blocks in the first `max_passes` passes, without the cache: a second run would append to it."""
    found = [BlockCalls(model.get_submodule(path)) for path in paths]
    with ExitStack() as hooks:
        for block in found:

            def note(module: nn.Module, args: object, kwargs: object, block: BlockCalls = block) -> None:
                leaves, shape = tree_flatten((args, kwargs))
                kept = [None if isinstance(leaf, Cache) else leaf for leaf in leaves]
                block.calls.append(tree_unflatten(kept, shape))

            hooks.callback(block.module.register_forward_pre_hook(note, with_kwargs=True).remove)
        for count, _ in enumerate(passes(), start=1):
            if count == max_passes:
                break
    return found


@torch.inference_mode()
def outputs(chain: Sequence[BlockCalls]) -> list[Tensor]:
    """The last block's output in each call, when the first one gets its recorded input and the others follow."""
    found = []
    for number in range(len(chain[0].calls)):
        states = chain[0].inputs(number)
        for block in chain:
            args, kwargs = with_hidden_states(block.calls[number], states)
            states = hidden_states(block.module(*args, **kwargs))
        found.append(states)
    return found


def squared_error(found: Sequence[Tensor], target: Sequence[Tensor]) -> float:
    """The sum of squared differences."""
    return sum(
        float((a.float() - b.float()).square().sum(dtype=torch.float64)) for a, b in zip(found, target, strict=True)
    )


def with_hidden_states(call: Call, states: Tensor) -> Call:
    """The arguments of a call with other hidden states."""
    leaves, shape = tree_flatten(call)
    first = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    leaves[first] = states
    found: Call = tree_unflatten(leaves, shape)
    return found
