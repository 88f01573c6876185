"""Finds the grid for attention probabilities that changes the attention's output least (PTQ4SAM)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sensitivity.measure.passes.attention_functions import at_least_float32, probabilities_of
from sensitivity.measure.passes.attention_hooks import attending_hooks
from sensitivity.quantize.run_time.probabilities import round_probabilities

LEVELS_PER_HALVING = (1, 2, 4)  # levels each time that a probability halves, as in PTQ4SAM
# the largest level, as a share of the largest probability; we infer that PTQ4SAM takes these steps
LARGEST_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6)
Grid = tuple[int, float]  # levels per halving, and the largest level


def adaptive_grids(
    model: nn.Module, wanted: Mapping[str, Iterable[int]], passes: Callable[[], Iterable[object]]
) -> dict[tuple[str, int], Grid]:
    """By path of an attention and bits: the grid with the least |p_q V - p V|^2 over all passes.

    Where attention is not fused, its values are not seen, and the error is that of the probabilities themselves.
    """
    largest = dict.fromkeys(wanted, 0.0)
    errors: dict[tuple[str, int], dict[Grid, float]] = {(path, bits): {} for path in wanted for bits in wanted[path]}

    def find_largest(path: str) -> Callable[[Tensor, Tensor | None], None]:
        def attend(logits: Tensor, value: Tensor | None) -> None:
            largest[path] = max(largest[path], float(probabilities_of(logits).max()))

        return attend

    def compare(path: str) -> Callable[[Tensor, Tensor | None], None]:
        def attend(logits: Tensor, value: Tensor | None) -> None:
            exact = probabilities_of(logits)
            for bits in wanted[path]:
                of_bits = errors[path, bits]
                for levels, share in itertools.product(LEVELS_PER_HALVING, LARGEST_SHARES):
                    grid = levels, largest[path] * share
                    error = round_probabilities(exact, bits, *grid) - exact
                    error = error if value is None else error @ at_least_float32(value)
                    of_bits[grid] = of_bits.get(grid, 0.0) + float(error.square().sum(dtype=torch.float64))

        return attend

    for observe in (find_largest, compare):
        with ExitStack() as hooks:
            for path in wanted:
                for hook in attending_hooks(model.get_submodule(path), observe(path)):
                    hooks.callback(hook.remove)
            for _ in passes():
                pass
    # an attention that no pass reaches, or that shows no probabilities, gets the log2 grid; in the latter case its hook
    # raises an error when it is called
    return {key: min(seen, key=lambda grid: seen[grid]) if seen else (1, 1.0) for key, seen in errors.items()}
