"""The attention that each token of a block receives, recorded in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sensitivity.measure.passes.attention_functions import AttentionFunctions, probabilities_of
from sensitivity.measure.passes.block_modules import block_paths, layer_input
from sensitivity.measure.passes.token_batches import TokenBatch, calibration_pass
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.linears import input_of
from sensitivity.spec.components import Weight


def attention_received(vlm: VLM, weights: Sequence[Weight], batch: TokenBatch) -> dict[str, Tensor]:
    """Per token, the sum of its attention probabilities over heads and queries of its block.

    An input is left out if no attention of its block has the same tokens, or if its layer is outside blocks.
    """
    received: dict[tuple[str, int], list[Tensor]] = {}
    current: list[tuple[str, int]] = []
    token_counts: dict[Weight, int] = {}
    with ExitStack() as hooks, torch.inference_mode():
        for block, path in block_paths(vlm.model, weights).items():

            def enter(module: nn.Module, args: object, block: tuple[str, int] = block) -> None:
                current.append(block)

            def leave(module: nn.Module, args: object, output: object) -> None:
                current.pop()

            module = vlm.model.get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        for weight in weights:

            def count(
                module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], weight: Weight = weight
            ) -> None:
                token_counts[weight] = layer_input(args, kwargs).shape[:-1].numel()

            layer = vlm.model.get_submodule(weight.reader)
            hooks.callback(layer.register_forward_pre_hook(count, with_kwargs=True).remove)

        def note(logits: Tensor, value: Tensor | None) -> None:
            if current:
                received.setdefault(current[-1], []).append(_received(probabilities_of(logits)))

        hooks.enter_context(AttentionFunctions(note))
        calibration_pass(vlm, batch)
    of_input = {}
    for weight, token_count in token_counts.items():
        in_block = received.get((weight.part, weight.block), []) if weight.block is not None else []
        if (values := _per_token(in_block, token_count)) is not None:
            of_input[input_of(weight)] = values
    return of_input


def _per_token(received: Sequence[Tensor], count: int) -> Tensor | None:
    """What each of `count` tokens received: the sum over attentions to all of them, or attentions to parts, joined."""
    if whole := [values for values in received if len(values) == count]:
        return torch.stack(whole).sum(0)
    # a tower may attend to one image after the other
    return torch.cat(list(received)) if received and sum(map(len, received)) == count else None


def _received(probabilities: Tensor) -> Tensor:
    """Sums over heads and queries, example after example."""
    return probabilities.float().sum((1, 2)).flatten()
