"""The gradient of a block's own error at the outputs of its layers, where the block's weights are rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from sensitivity.measure.gradients.backward import RunsOnce, add_per_token
from sensitivity.measure.gradients.perturbation import probe_error
from sensitivity.measure.passes.block_modules import block_paths, hidden_states, layer_input, replaced_forward
from sensitivity.measure.passes.token_batches import TokenBatch, calibration_pass
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import Weight


def block_errors(vlm: VLM, weights: Sequence[Weight], batch: TokenBatch) -> dict[str, Tensor]:
    """Per token, the mean |gradient| of |block_q(x) - block(x)|^2, summed over the layers that read an input.

    Each block runs twice on its float inputs, with its own weights and with rounded ones, as the forward pass comes to
    it; only the second run is differentiated, so that one block's activations are in memory. A layer outside blocks is
    its own block, and its gradient is 2 E x for an error E of its weight. With its own weights a block has no error and
    so no gradient: they are rounded by PROBE, whatever the method will be.
    """
    errors: dict[str, Tensor] = {}
    once = RunsOnce()
    paths = block_paths(vlm.model, weights)
    inside = {path: [w for w in weights if (w.part, w.block) == block] for block, path in paths.items()}

    def gradient_at(weight: Weight, gradient: Tensor) -> None:
        once.check(weight)
        add_per_token(errors, weight, gradient.float().flatten(0, -2).abs().mean(1))

    with ExitStack() as patches, torch.no_grad():
        for path, inner in inside.items():
            module = vlm.model.get_submodule(path)
            forward = _with_error_gradient(vlm, module.forward, inner, gradient_at)
            patches.enter_context(replaced_forward(module, forward))
        for weight in (w for w in weights if w.block is None):

            def hook(
                module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], weight: Weight = weight
            ) -> None:
                inputs = layer_input(args, kwargs).float()
                error = probe_error(vlm.model.get_parameter(weight.name).detach())
                gradient_at(weight, 2 * inputs @ error.T)

            layer = vlm.model.get_submodule(weight.reader)
            patches.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        calibration_pass(vlm, batch)
    return errors


def _with_error_gradient(
    vlm: VLM,
    forward: Callable[..., object],
    weights: Sequence[Weight],
    gradient_at: Callable[[Weight, Tensor], None],
) -> Callable[..., object]:
    """The same forward, after which the block runs again with rounded weights and its error is differentiated."""
    zero = torch.zeros((), device=vlm.device, dtype=vlm.model.dtype, requires_grad=True)

    def watch(weight: Weight) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            output = output if output.requires_grad else output + zero
            output.register_hook(lambda gradient: gradient_at(weight, gradient))  # type: ignore[no-untyped-call]
            return output

        return hook

    def run(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        with torch.enable_grad(), ExitStack() as patches:
            patches.enter_context(_rounded(vlm, weights))
            for weight in weights:
                layer = vlm.model.get_submodule(weight.reader)
                patches.callback(layer.register_forward_hook(watch(weight)).remove)
            again = hidden_states(forward(*args, **kwargs))
            if again.requires_grad:
                torch.autograd.backward((again.float() - hidden_states(output).float()).square().sum())
        return output

    return run


@contextmanager
def _rounded(vlm: VLM, weights: Sequence[Weight]) -> Iterator[None]:
    """Inside the `with` block, these weights are rounded by PROBE."""
    parameters = [vlm.model.get_parameter(weight.name) for weight in weights]
    held = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = (parameter.data.float() + probe_error(parameter.data)).to(parameter.dtype)
        yield
    finally:
        for parameter, float_weight in zip(parameters, held, strict=True):
            parameter.data = float_weight
