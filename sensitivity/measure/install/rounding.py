"""Rounds the inputs of layers, and attention's keys and values, in every forward pass, by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sensitivity.measure.install.past_cache import keeps_own
from sensitivity.quantize.methods import method_of
from sensitivity.quantize.run_time.inputs import round_inputs
from sensitivity.quantize.run_time.keys_and_values import round_cached
from sensitivity.quantize.stored.low_rank import LowRankWeight
from sensitivity.quantize.stored.rotated import InputTransform
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import CACHE_GROUP, NOT_ROUNDED, Scheme

Change = Callable[[Tensor], Tensor]


def rounding_hooks(
    model: nn.Module,
    weight: Weight,
    scheme: Scheme,
    transform: InputTransform | None = None,
    rounded: Change | None = None,
    low_rank: LowRankWeight | None = None,
) -> Iterator[RemovableHandle]:
    """Register what a scheme rounds around one linear layer: its input, and its output where that is cached.

    `transform` is applied to inputs before they are rounded, and undone afterwards; `rounded` replaces the default
    rounding, which has a scale for each token. Behind a `low_rank` weight, its latent vector is cached, not its output.
    """
    if weight.is_embedding:  # rows of an embedding are looked up: there is no input to round
        return
    if (change := method_of(scheme).inputs) is not None:
        yield _before(model.get_submodule(weight.reader), lambda x: change(x, scheme))
    if scheme.activations != NOT_ROUNDED:
        bits = scheme.activations
        how = rounded or (lambda x: round_inputs(x, bits))
        yield _before(model.get_submodule(weight.reader), how if transform is None else _behind(transform, how))
    if low_rank is not None:
        yield _latent_hook(model.get_submodule(weight.module), weight, scheme, low_rank)
    elif scheme.cache != NOT_ROUNDED and weight.cached and not keeps_own(scheme, weight):
        cache, group = scheme.cache, int(scheme[CACHE_GROUP] or 0)
        layer = model.get_submodule(weight.module)
        yield layer.register_forward_hook(lambda _, __, output: round_cached(output, cache, group))


def _latent_hook(layer: nn.Module, weight: Weight, scheme: Scheme, stored: LowRankWeight) -> RemovableHandle:
    """Round the latent vector of a weight of low rank, as an input of its second factor and as what is cached."""
    device = layer.get_parameter("weight").device
    up, down = (factor.dequantize().to(device) for factor in (stored.up, stored.down))

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        latent = (args[0] if args else kwargs["input"]).float() @ down.T
        if scheme.activations != NOT_ROUNDED:
            latent = round_inputs(latent, scheme.activations)
        if scheme.cache != NOT_ROUNDED and weight.cached:
            latent = round_cached(latent, scheme.cache, int(scheme[CACHE_GROUP] or 0))
        found = latent @ up.T
        bias = getattr(module, "bias", None)
        return torch.as_tensor(found if bias is None else found + bias.float()).to(output.dtype)

    return layer.register_forward_hook(hook, with_kwargs=True)


def check_cache(name: str, scheme: Scheme, weights: tuple[Weight, ...]) -> None:
    """Raise an error for a plan that asks a component without keys and values to round them."""
    if scheme.cache != NOT_ROUNDED and not any(weight.cached for weight in weights):
        raise UserError(f"{name} has no keys and values that are cached; leave its cache at 16 bits")


def _behind(transform: InputTransform, change: Change) -> Change:
    """A change of transformed inputs, as the stored weight reads them."""
    return lambda x: transform.back(change(transform.forward(x))).to(x.dtype)


def _before(module: nn.Module, change: Change) -> RemovableHandle:
    """Change a layer's input, however it is passed."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": change(kwargs["input"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)
