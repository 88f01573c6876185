"""Searches for the clipping ranges of layers' inputs, jointly over consecutive blocks (Q-VLM)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sensitivity.measure.activations.block_chain import BlockCalls, outputs, recorded_calls, squared_error
from sensitivity.measure.passes.block_modules import layer_input
from sensitivity.quantize.layer.linears import input_of
from sensitivity.quantize.run_time.dependency import blocks_of, conditional_entropy
from sensitivity.quantize.run_time.inputs import percentiles, round_between, round_each_token
from sensitivity.spec.components import Weight

PERCENTILES = (1.0, 0.995, 0.99, 0.985, 0.98)  # percentiles that are tried, as in the paper
PASSES = 4  # passes on which errors are compared: every combination of percentiles runs on them
Passes = Callable[[], Iterable[object]]
Change = Callable[[Tensor], Tensor]
# a context in which some weights are quantized, and each one's input is changed by the given function
Install = Callable[[Sequence[Weight], Mapping[str, Change]], AbstractContextManager[None]]


@dataclass(frozen=True)
class InputRange:
    """How a layer's inputs are rounded: between `low` and `high` of each channel, or in a range of each token."""

    low: Tensor | None = None
    high: Tensor | None = None
    share: float = 1.0  # percentile of each token that its range covers
    shrink: float = 1.0  # factor by which each token's range shrinks

    def rounded(self, bits: int) -> Change:
        """The function that rounds inputs to so many bits."""
        low, high = self.low, self.high
        if low is None or high is None:
            return lambda x: round_each_token(x, bits, self.share, self.shrink)
        return lambda x: round_between(x, bits, low, high)


Layer = tuple[str, Sequence[Weight]]  # a transformer block's path, and weights in it


def blocks_to_search(
    model: nn.Module, layers: Sequence[Layer], component_of: Mapping[str, str], bits: int, passes: Passes
) -> list[list[Layer]]:
    """One part's transformer blocks (the paper's layers), grouped into runs of dependent ones (the paper's blocks).

    Blocks are grouped alike whatever a plan rounds, and no group crosses from one component to another: so the ranges
    of a component depend on its own schemes alone, and plans can share them.
    """
    calls = recorded_calls(model, [path for path, _ in layers], passes, PASSES)
    if not layers or not all(block.calls for block in calls):
        return [[layer] for layer in layers]
    states = [torch.cat([block.inputs(i).flatten() for i in range(len(block.calls))]) for block in calls]
    owners = [{component_of[weight.name] for weight in weights} for _, weights in layers]
    dependencies, cuts = [], []
    for (before, after), (first, second) in zip(itertools.pairwise(states), itertools.pairwise(owners), strict=True):
        cuts.append(first != second or len(before) != len(after))
        dependencies.append(conditional_entropy(before, after, bits) if len(before) == len(after) else 0.0)
    return [[layers[i] for i in block] for block in blocks_of(dependencies, cuts)]


def search_joint_ranges(
    model: nn.Module, blocks: Sequence[Sequence[Layer]], bits: int, install: Install, passes: Passes
) -> dict[str, InputRange]:
    """By weight: its input's range, from blocks of consecutive layers that are searched together."""
    calls = iter(recorded_calls(model, [path for block in blocks for path, _ in block], passes, PASSES))
    found: dict[str, InputRange] = {}
    for block in blocks:
        chain = [(next(calls), weights) for _, weights in block]
        if all(one.calls for one, _ in chain):
            found |= best_ranges(model, chain, bits, install)[0]
        else:  # no pass reaches it, such as a tower's blocks after the one whose features are read
            found |= {weight.name: InputRange() for _, weights in chain for weight in weights}
    return found


def best_ranges(
    model: nn.Module, block: Sequence[tuple[BlockCalls, Sequence[Weight]]], bits: int, install: Install
) -> tuple[dict[str, InputRange], float]:
    """The ranges of one block with the least squared error of its output, among all combinations; and that error.

    Each layer has one percentile for all of its inputs.
    """
    chain = [calls for calls, _ in block]
    weights = [weight for _, of_layer in block for weight in of_layer]
    target = outputs(chain)
    tables = _tables(model, chain, weights)
    best: dict[str, InputRange] = {}
    least = float("inf")
    for shares in itertools.product(PERCENTILES, repeat=len(block)):
        ranges = {
            weight.name: tables[input_of(weight)][share]
            for (_, of_layer), share in zip(block, shares, strict=True)
            for weight in of_layer
        }
        with install(weights, {name: one.rounded(bits) for name, one in ranges.items()}):
            error = squared_error(outputs(chain), target)
        if error < least:
            best, least = ranges, error
    return best, least


def _tables(
    model: nn.Module, chain: Sequence[BlockCalls], weights: Sequence[Weight]
) -> dict[str, dict[float, InputRange]]:
    """By input: the range at each percentile. In a vision tower, each token's range is found when it is rounded."""
    seen: dict[str, list[Tensor]] = {}
    with ExitStack() as hooks:
        for name, weight in {input_of(w): w for w in weights if w.part != "vision"}.items():

            def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], name: str = name) -> None:
                seen.setdefault(name, []).append(layer_input(args, kwargs).float().flatten(0, -2))

            layer = model.get_submodule(weight.reader)
            hooks.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        outputs(chain)
    found: dict[str, dict[float, InputRange]] = {}
    for weight in weights:
        name = input_of(weight)
        if name in found:
            continue
        if name in seen:
            tokens = torch.cat(seen.pop(name))
            ends = {share: percentiles(tokens, share, 0) for share in PERCENTILES}
            found[name] = {share: InputRange(low[0], high[0]) for share, (low, high) in ends.items()}
        else:
            found[name] = {share: InputRange(share=share) for share in PERCENTILES}
    return found
