"""The root mean square of the hidden states that enter each block, example by example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sensitivity.measure.passes.block_modules import block_paths, hidden_states
from sensitivity.measure.passes.token_batches import TokenBatch, calibration_pass
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.linears import input_of
from sensitivity.spec.components import Weight


def block_input_rms(vlm: VLM, weights: Sequence[Weight], batch: TokenBatch) -> dict[str, Tensor]:
    """For each token of each layer's input: the root mean square of its example's hidden states before the block.

    The block's first norm reads these hidden states. Their root mean square covers both the mean and the deviation that
    QuantVGGT looks at. For a layer outside blocks it is that of its own input.
    """
    rms: dict[str, Tensor] = {}  # by path of a block or layer, one for each example
    token_counts: dict[str, int] = {}
    examples = len(batch.examples)

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            states = hidden_states((args, kwargs))
            # a tower may read all images as one sequence; their shapes are equal, so each has an equal share of it
            rms[path] = states.float().reshape(examples, -1).square().mean(1).sqrt()
            token_counts[path] = states.shape[:-1].numel()

        return hook

    paths = block_paths(vlm.model, weights)
    observed = {w: paths.get((w.part, w.block), w.reader) if w.block is not None else w.reader for w in weights}
    with ExitStack() as hooks, torch.inference_mode():
        for path in {*observed.values(), *(weight.reader for weight in weights)}:
            handle = vlm.model.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True)
            hooks.callback(handle.remove)
        calibration_pass(vlm, batch)
    found = {}
    for weight, path in observed.items():
        if path in rms and (count := token_counts.get(weight.reader)) is not None and count % examples == 0:
            found[input_of(weight)] = rms[path].repeat_interleave(count // examples)
    return found
