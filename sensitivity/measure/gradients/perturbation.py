"""Perturbation of each token: how much of a layer's rounding error its input causes, by integrated gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sensitivity.measure.gradients.backward import RunsOnce, add_per_token
from sensitivity.measure.passes.block_modules import layer_input
from sensitivity.measure.passes.token_batches import TokenBatch, calibration_pass
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solving import fake_quantize
from sensitivity.spec.components import Weight

PROBE = scheme("rtn", 3)  # rounds weights where importance needs an error before a method has made one


def probe_error(weight: Tensor) -> Tensor:
    """The error of a weight that is rounded by PROBE, in float32."""
    return fake_quantize(weight, PROBE).float() - weight.float()


def token_attribution(inputs: Tensor, error: Tensor) -> Tensor:
    """Integrated gradients of mean |E x| from a zero input to each token's x, as the mean |share| of its channels.

    On the path a x, 0 < a < 1, the signs of E x do not change, so neither does the gradient: the integral is exact.
    """
    sign = (inputs @ error.T).sign()
    return (inputs * (sign @ error)).abs().mean(1) / len(error)


def perturbations(vlm: VLM, weights: Sequence[Weight], batch: TokenBatch) -> dict[str, Tensor]:
    """The attribution of each token, summed over the layers that read it, from one forward pass.

    QIG's code takes the error of a whole module, whose integral needs 32 steps. Here each layer has its own error.
    """
    attributions: dict[str, Tensor] = {}
    once = RunsOnce()

    def hook_of(weight: Weight) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            once.check(weight)
            inputs = layer_input(args, kwargs).flatten(0, -2).float()
            error = probe_error(vlm.model.get_parameter(weight.name).detach())
            add_per_token(attributions, weight, token_attribution(inputs, error))

        return hook

    with ExitStack() as hooks, torch.inference_mode():
        for weight in weights:
            layer = vlm.model.get_submodule(weight.reader)
            hooks.callback(layer.register_forward_pre_hook(hook_of(weight), with_kwargs=True).remove)
        calibration_pass(vlm, batch)
    return attributions
