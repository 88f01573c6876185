"""Q-VLM: the entropy of a layer's rounded inputs given those of the layer before, and which layers form a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DEPTH = 3  # at most this many layers form a block, as in the paper


def codes_of(values: Tensor, bits: int) -> Tensor:
    """The code of each number on one grid, which reaches from the smallest number to the largest."""
    low, high = values.min(), values.max()
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    found: Tensor = ((values - low) / step).round().long()
    return found


def conditional_entropy(before: Tensor, after: Tensor, bits: int) -> float:
    """D = -sum p(x, y) log p(y | x) over the codes x of one layer's inputs and y of the next, number by number.

    This is an entropy, and 0 where x determines y, although Q-VLM calls it dependency. In the paper a number has soft
    shares of several levels, so that D has a gradient; here nothing is trained with D, and each number has one code.
    """
    first, second = codes_of(before.float(), bits).flatten(), codes_of(after.float(), bits).flatten()
    levels = 2**bits
    joint = torch.bincount(first * levels + second, minlength=levels * levels).double().reshape(levels, levels)
    joint /= joint.sum()
    given = joint / joint.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return max(0.0, -float((joint * given.clamp(min=torch.finfo(torch.float64).tiny).log()).sum()))


def entropy(codes: Tensor) -> float:
    """The entropy of |codes| (tokens x channels), each channel divided by its norm over tokens, as in Q-VLM's code."""
    sizes = codes.double().abs()
    shares = sizes / sizes.norm(dim=0, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return float(-(shares * shares.clamp(min=torch.finfo(torch.float64).tiny).log()).sum(0).mean())


def blocks_of(dependencies: Sequence[float], cuts: Sequence[bool] = (), depth: int = DEPTH) -> list[list[int]]:
    """Layers 0 to n in blocks: a layer joins the last block if the block's mean dependency then exceeds the threshold.

    The threshold is the mean of all dependencies, as in the released code; the paper gives none. `dependencies` are
    those between each layer and the next; `cuts` says after which layers a block must end, whatever the dependency.
    """
    threshold = sum(dependencies) / max(len(dependencies), 1)
    found, inside = [[0]], 0.0
    for layer, value in enumerate(dependencies, start=1):
        start = found[-1][0]
        joined = (inside + value) / (layer - start) > threshold
        if joined and len(found[-1]) < depth and not (cuts and cuts[layer - 1]):
            found[-1].append(layer)
            inside += value
        else:
            found.append([layer])
            inside = 0.0
    return found
