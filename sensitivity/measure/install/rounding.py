"""Rounds the inputs of layers, and attention's keys and values, in every forward pass, by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sensitivity.measure.install.past_cache import reads_own_unrounded
from sensitivity.measure.passes.block_modules import layer_input
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
    """Register hooks for what a scheme rounds at one linear layer: its input, and its output where that is cached.

    `transform` is applied to inputs before they are rounded, and undone afterwards; `rounded` replaces the default
    rounding, which has a scale for each token. Of a `low_rank` weight, the latent vector is cached, not the output.
    """
    if weight.is_embedding:  # rows of an embedding are looked up: there is no input to round
        return
    if (change := method_of(scheme).inputs) is not None:
        yield _input_hook(model.get_submodule(weight.reader), lambda x: change(x, scheme))
    if scheme.activations != NOT_ROUNDED:
        bits = scheme.activations
        rounding = rounded or (lambda x: round_inputs(x, bits))
        change_input = rounding if transform is None else _transformed(transform, rounding)
        yield _input_hook(model.get_submodule(weight.reader), change_input)
    if low_rank is not None:
        yield _latent_hook(model.get_submodule(weight.module), weight, scheme, low_rank)
    elif scheme.cache != NOT_ROUNDED and weight.cached and not reads_own_unrounded(scheme, weight):
        cache, group = scheme.cache, int(scheme[CACHE_GROUP] or 0)
        layer = model.get_submodule(weight.module)
        yield layer.register_forward_hook(lambda _, __, output: round_cached(output, cache, group))


def _latent_hook(layer: nn.Module, weight: Weight, scheme: Scheme, stored: LowRankWeight) -> RemovableHandle:
    """Round the latent vector of a weight of low rank: as the input of its second factor, and as what is cached."""
    device = layer.get_parameter("weight").device
    up, down = (factor.dequantize().to(device) for factor in (stored.up, stored.down))

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        latent = layer_input(args, kwargs).float() @ down.T
        if scheme.activations != NOT_ROUNDED:
            latent = round_inputs(latent, scheme.activations)
        if scheme.cache != NOT_ROUNDED and weight.cached:
            latent = round_cached(latent, scheme.cache, int(scheme[CACHE_GROUP] or 0))
        result = latent @ up.T
        bias = getattr(module, "bias", None)
        return torch.as_tensor(result if bias is None else result + bias.float()).to(output.dtype)

    return layer.register_forward_hook(hook, with_kwargs=True)


def check_cache(name: str, scheme: Scheme, weights: tuple[Weight, ...]) -> None:
    """Raise an error for a plan that asks a component without keys and values to round them."""
    if scheme.cache != NOT_ROUNDED and not any(weight.cached for weight in weights):
        raise UserError(f"{name} has no keys and values that are cached; leave its cache at 16 bits")


def _transformed(transform: InputTransform, change: Change) -> Change:
    """Change inputs in the transformed space, in which the stored weight reads them."""
    return lambda x: transform.back(change(transform.forward(x))).to(x.dtype)


def _input_hook(module: nn.Module, change: Change) -> RemovableHandle:
    """Change a layer's input, however it is passed."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": change(kwargs["input"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)
