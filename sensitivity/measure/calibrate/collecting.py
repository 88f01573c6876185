"""collect(): statistics of the inputs of some layers, summed over the tokens of forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sensitivity.measure.gradients.token_importance import TokenWeights, weights_of_batch
from sensitivity.measure.passes.block_modules import layer_input
from sensitivity.measure.passes.token_batches import PADDING, VISION, TokenBatch, calibration_pass
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import input_of
from sensitivity.quantize.layer.two_paths import TwoPaths
from sensitivity.spec.components import Weight

Data = Callable[[int], Iterable[TokenBatch]]  # calibration data in batches of at most so many rows


def collect(
    vlm: VLM,
    weights: Iterable[Weight],
    data: Iterable[TokenBatch],
    forward: Callable[[VLM, TokenBatch], object] = calibration_pass,
    token_weights: TokenWeights | None = None,
    unquantized: Mapping[tuple[int, str], list[Tensor]] | None = None,
) -> dict[str, Curvature]:
    """Statistics of the inputs of some weights, in the model with its present weights, summed over the batches.

    Without `token_weights` every token counts 1. `unquantized` has what the same layers read in the float model, by
    id(batch) and name of the input.
    """
    one_per_input = {input_of(weight): weight for weight in weights}
    curvatures = {name: Curvature(w.cols, vlm.device) for name, w in one_per_input.items()}
    if unquantized is not None:
        for curvature in curvatures.values():
            curvature.paths = TwoPaths(curvature.width, vlm.device)
    # the batch of the current forward pass, for the hooks
    current: list[TokenBatch] = []

    def hook_of(name: str, part: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = layer_input(args, kwargs)
            modality, counts = current[0].modality(part, x.shape[:-1])
            # padding tokens are left out of the sums: no answer depends on them
            flat = x.reshape(-1, x.shape[-1])
            weights = None if token_weights is None else weights_of_batch(token_weights, current[0], name)
            kept = modality != PADDING if modality is not None and counts[PADDING] else slice(None)
            weights = None if weights is None else weights[kept]
            curvatures[name].add(flat[kept], weights)
            if unquantized is not None and (paths := curvatures[name].paths) is not None:
                other = unquantized[id(current[0]), name].pop(0).reshape(flat.shape)
                paths.add(flat[kept], other[kept], weights, None if modality is None else (modality == VISION)[kept])
            curvatures[name].modalities += counts

        return hook

    with ExitStack() as hooks, torch.inference_mode():
        for name, weight in one_per_input.items():
            module = vlm.model.get_submodule(weight.reader)
            handle = module.register_forward_pre_hook(hook_of(name, weight.part), with_kwargs=True)
            hooks.callback(handle.remove)
        for batch in data:
            current[:] = [batch]
            forward(vlm, batch)
    for name, weight in one_per_input.items():
        curvatures[name].check(weight.name)
    return curvatures
