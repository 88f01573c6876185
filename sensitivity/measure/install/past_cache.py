"""Rounds keys and values only for later tokens, if asked with channels divided by their magnitudes (WKVQuant)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sensitivity.measure.passes.past_attention import KEY, QUERY, VALUE, Change, past_hooks
from sensitivity.quantize.run_time.keys_and_values import round_cached
from sensitivity.spec.components import Weight
from sensitivity.spec.plan import CACHE_GROUP, CACHE_PAST, CACHE_SMOOTH, NOT_ROUNDED, Scheme

Magnitudes = Mapping[str, Tensor]  # by the path of a layer that returns keys or values: the largest |x| of each channel


def reads_own_unrounded(scheme: Scheme, weight: Weight) -> bool:
    """Whether a token reads its own key and value as they are; in cross-attention no key is a token's own."""
    return scheme.cache != NOT_ROUNDED and bool(scheme.get(CACHE_PAST)) and weight.cached and weight.kind == "attn"


def past_cache_hooks(
    model: nn.Module, weights: Iterable[Weight], given: Mapping[str, Scheme], magnitudes: Magnitudes
) -> Iterator[RemovableHandle]:
    """Register hooks that round what each attention caches for later tokens, where a plan's schemes say so."""
    for path, layers in cached_attentions(weights).items():
        rounded_layers = {n: w for n, w in layers.items() if w.name in given and reads_own_unrounded(given[w.name], w)}
        if not rounded_layers:
            continue
        changes: dict[str, Change] = {}
        for name, weight in rounded_layers.items():
            scheme = given[weight.name]
            rounded = partial(round_cached, bits=scheme.cache, group=int(scheme[CACHE_GROUP] or 0))
            changes[name] = _divided(magnitudes[weight.module], rounded) if scheme.get(CACHE_SMOOTH) else rounded
        yield from past_hooks(model, path, {name: weight.module for name, weight in layers.items()}, changes)


def cached_attentions(weights: Iterable[Weight]) -> dict[str, dict[str, Weight]]:
    """By the path of each self-attention with a cache, the layers that return its queries, keys and values."""
    found: dict[str, dict[str, Weight]] = {}
    for weight in weights:
        path, _, name = weight.module.rpartition(".")
        if weight.part == "language" and weight.kind == "attn" and (weight.cached or name[:1] == "q"):
            found.setdefault(path, {})[{"q": QUERY, "k": KEY}.get(name[0], VALUE)] = weight
    return {path: layers for path, layers in found.items() if len(layers) == len((QUERY, KEY, VALUE))}


def cache_magnitudes(model: nn.Module, weights: Iterable[Weight], passes: Callable[[], Iterable[object]]) -> Magnitudes:
    """The largest magnitude of each channel of the keys and values that are cached, over all passes."""
    largest: dict[str, Tensor] = {}

    def watch(path: str) -> RemovableHandle:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            seen = output.detach().abs().flatten(0, -2).amax(0)
            largest[path] = torch.maximum(largest.get(path, seen), seen)

        return model.get_submodule(path).register_forward_hook(hook)

    with ExitStack() as hooks:
        for weight in weights:
            if weight.cached:
                hooks.callback(watch(weight.module).remove)
        for _ in passes():
            pass
    return largest


def _divided(magnitude: Tensor, rounded: Change) -> Change:
    """Rounds channels divided by their magnitude, then multiplies back; one that was always zero is not divided."""

    def change(vectors: Tensor) -> Tensor:
        by = torch.where(magnitude > 0, magnitude, torch.ones_like(magnitude)).half().to(vectors)  # stored in 16 bits
        return rounded(vectors / by) * by

    return change
