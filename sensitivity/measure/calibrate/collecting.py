"""collect(): statistics of the inputs of some layers, summed over the tokens of forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial

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
    sums = _InputSums(token_weights, unquantized)
    for name, weight in one_per_input.items():
        sums.curvatures[name] = curvature = Curvature(weight.cols, vlm.device)
        if unquantized is not None:
            curvature.paths = TwoPaths(curvature.width, vlm.device)
    with ExitStack() as hooks, torch.inference_mode():
        for name, weight in one_per_input.items():
            module = vlm.model.get_submodule(weight.reader)
            handle = module.register_forward_pre_hook(partial(sums.add, name, weight.part), with_kwargs=True)
            hooks.callback(handle.remove)
        for batch in data:
            sums.batch = batch
            forward(vlm, batch)
    for name, weight in one_per_input.items():
        sums.curvatures[name].check(weight.name)
    return sums.curvatures


class _InputSums:
    """The statistics of some layers' inputs, to which hooks add what the layers read."""

    batch: TokenBatch  # of the current forward pass

    def __init__(
        self, token_weights: TokenWeights | None, unquantized: Mapping[tuple[int, str], list[Tensor]] | None
    ) -> None:
        self.token_weights, self.unquantized = token_weights, unquantized
        self.curvatures: dict[str, Curvature] = {}

    def add(self, name: str, part: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        """Add a layer's input to the statistics of that name."""
        x, curvature = layer_input(args, kwargs), self.curvatures[name]
        modality, counts = self.batch.modality(part, x.shape[:-1])
        flat = x.reshape(-1, x.shape[-1])
        weights = None if self.token_weights is None else weights_of_batch(self.token_weights, self.batch, name)
        # padding tokens are left out of the sums: no answer depends on them
        kept = modality != PADDING if modality is not None and counts[PADDING] else slice(None)
        weights = None if weights is None else weights[kept]
        curvature.add(flat[kept], weights)
        if self.unquantized is not None and curvature.paths is not None:
            other = self.unquantized[id(self.batch), name].pop(0).reshape(flat.shape)
            is_image = None if modality is None else (modality == VISION)[kept]
            curvature.paths.add(flat[kept], other[kept], weights, is_image)
        curvature.modalities += counts
