"""The attention that each token receives in a block, from one forward pass with whatever attention a model uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sensitivity.measure.passes.block_modules import block_paths
from sensitivity.measure.passes.token_batches import TokenBatch, calibration_pass
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.linears import input_of
from sensitivity.spec.components import Weight

FUSED = torch.nn.functional.scaled_dot_product_attention
SOFTMAX = (torch.softmax, torch.nn.functional.softmax, torch.Tensor.softmax)


def attention_received(vlm: VLM, weights: Sequence[Weight], batch: TokenBatch) -> dict[str, Tensor]:
    """Per token, the sum of its attention probabilities over heads and queries of its block.

    An input that no attention of its block reads token for token has none, such as layers outside blocks.
    """
    received: dict[tuple[str, int], list[Tensor]] = {}
    current: list[tuple[str, int]] = []
    tokens: dict[Weight, int] = {}
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
                tokens[weight] = (args[0] if args else kwargs["input"]).shape[:-1].numel()

            layer = vlm.model.get_submodule(weight.reader)
            hooks.callback(layer.register_forward_pre_hook(count, with_kwargs=True).remove)
        hooks.enter_context(_Probabilities(lambda seen: received.setdefault(current[-1], []).append(seen), current))
        calibration_pass(vlm, batch)
    of_input = {}
    for weight, count_ in tokens.items():
        per_head = received.get((weight.part, weight.block), []) if weight.block is not None else []
        if (values := _of_tokens(per_head, count_)) is not None:
            of_input[input_of(weight)] = values
    return of_input


def _of_tokens(received: Sequence[Tensor], count: int) -> Tensor | None:
    """What so many tokens received: the sum of the attentions over all of them, or the parts of one in turn."""
    if whole := [values for values in received if len(values) == count]:
        return torch.stack(whole).sum(0)
    # a tower may attend to one image after the other
    return torch.cat(list(received)) if received and sum(map(len, received)) == count else None


class _Probabilities(TorchFunctionMode):
    """Watches attention, fused or as a softmax over four dimensions, and notes what each key receives."""

    def __init__(self, note: Callable[[Tensor], None], inside: Sequence[object]) -> None:
        super().__init__()
        self.note, self.inside = note, inside

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.inside and func is FUSED:
            self.note(_received(_probabilities(*args, **(kwargs or {}))))
        elif self.inside and func in SOFTMAX and result.dim() == 4:
            self.note(_received(result))
        return result


def _received(probabilities: Tensor) -> Tensor:
    """Sums over heads and queries, example after example."""
    return probabilities.float().sum((1, 2)).flatten()


def _probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The probabilities behind fused attention, whose arguments these are."""
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.float() @ key.float().mT * (scale or 1 / math.sqrt(query.shape[-1]))
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(-1).nan_to_num()
