"""Watches and replaces attention's probabilities, whether attention is fused or a softmax of a 4-D tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FUSED = torch.nn.functional.scaled_dot_product_attention
SOFTMAX = (torch.softmax, torch.nn.functional.softmax, torch.Tensor.softmax)
# gets masked logits (examples x heads x queries x keys) and the values, or None for them where attention is not fused;
# returns the probabilities to use, or None for the model's own
Attend = Callable[[Tensor, Tensor | None], Tensor | None]


class AttentionMode(TorchFunctionMode):
    """While it is active, its `fused` and `softmax` compute attention; `calls` counts the attentions that it saw.

    A subclass counts the softmaxes that it handles.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is FUSED:
            self.calls += 1
            return self.fused(*args, **kwargs)
        if func in SOFTMAX:
            logits, *rest = args if args else (kwargs["input"],)
            if logits.dim() == 4:
                return self.softmax(func, logits, rest, {k: v for k, v in kwargs.items() if k != "input"})
        return func(*args, **kwargs)

    def fused(self, *args: Any, **kwargs: Any) -> Tensor:
        """Fused attention, with torch's own arguments."""
        return FUSED(*args, **kwargs)

    def softmax(
        self, func: Callable[..., Tensor], logits: Tensor, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Tensor:
        """A softmax of masked logits (examples x heads x queries x keys), with its other arguments."""
        return func(logits, *args, **kwargs)


class AttentionFunctions(AttentionMode):
    """While it is active, `attend` is called in each attention."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def fused(self, *args: Any, **kwargs: Any) -> Tensor:
        """Fused attention with the probabilities that `attend` gives."""
        logits, value = _logits_and_value(*args, **kwargs)
        chosen = self.attend(logits, value)
        return super().fused(*args, **kwargs) if chosen is None else chosen.to(value.dtype) @ value

    def softmax(
        self, func: Callable[..., Tensor], logits: Tensor, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Tensor:
        """The probabilities that `attend` gives, or the softmax itself."""
        self.calls += 1
        result = super().softmax(func, logits, args, kwargs)
        chosen = self.attend(logits, None)
        return result if chosen is None else chosen.to(result.dtype)


def probabilities_of(logits: Tensor) -> Tensor:
    """The softmax in at least float32; a token that may attend to nothing gets zeros."""
    return at_least_float32(logits).softmax(-1).nan_to_num()


def at_least_float32(values: Tensor) -> Tensor:
    """Values in float32, or as they are where their dtype is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def masked(logits: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Logits masked as fused attention does it: a boolean mask hides keys, and any other mask is added."""
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is None:
        return logits
    return logits.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else logits + attn_mask


def _logits_and_value(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """The logits and the values for each query head; the arguments are those of fused attention."""
    if (repeats := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    logits = at_least_float32(query) @ at_least_float32(key).mT * (scale or 1 / math.sqrt(query.shape[-1]))
    return masked(logits, attn_mask, is_causal), value
