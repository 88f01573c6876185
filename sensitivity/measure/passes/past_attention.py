"""Attention in which a token reads other tokens from a rounded cache, and itself unrounded (WKVQuant)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sensitivity.measure.passes.attention_functions import AttentionMode, masked
from sensitivity.spec.errors import UserError

QUERY, KEY, VALUE = "query", "key", "value"
Change = Callable[[Tensor], Tensor]  # of keys or values, the channels of all heads in the last dimension
NEAR = 0.02  # of the largest value that is compared: two ways to compute it differ by less, also in 16 bits


@dataclass
class Made:
    """What the layers of one attention made in this forward pass, before rotary embedding."""

    path: str
    outputs: dict[str, Tensor] = field(default_factory=dict)  # keys and values as they are stored
    lost: dict[str, Tensor] = field(default_factory=dict)  # their values before rounding, minus the stored ones


class PastAttention(AttentionMode):
    """While it is active, each token reads its own key and value as they are, and those of others as stored."""

    def __init__(self, made: Made) -> None:
        super().__init__()
        self.made = made

    def fused(self, query: Tensor, key: Tensor, value: Tensor, *more: Any, **how: Any) -> Tensor:
        """Attention with each query head by itself.

        For a single token, transformers packs the query heads that share a key into the dimension of tokens.
        """
        shape, tokens = query.shape, next(iter(self.made.outputs.values())).shape[-2]
        if tokens != 1 or shape[2] == 1:
            return self._attend(query, key, value, *more, **how)
        if (mask := how.get("attn_mask")) is not None:
            how["attn_mask"] = mask[..., :1, :] if mask.shape[1] == 1 else mask.reshape(len(mask), -1, 1, mask.shape[3])
        return self._attend(query.reshape(shape[0], -1, 1, shape[3]), key, value, *more, **how).reshape(
            *shape[:3], value.shape[-1]
        )

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Fused attention, whose arguments these are; queries belong to the last of the tokens that have keys."""
        wide = torch.promote_types(query.dtype, torch.float32)
        q, k, v = (_for_heads(one, query.shape[1]).to(wide) for one in (query, key, value))
        queries, start = q.shape[2], k.shape[2] - q.shape[2]
        times = scale or 1 / math.sqrt(q.shape[-1])
        logits = q @ k.mT * times
        logits.diagonal(start, -2, -1).add_(self._own_logits(q, k[:, :, start:]) * times)
        shares = masked(logits, attn_mask, is_causal).softmax(-1).nan_to_num()
        found = shares @ v
        if VALUE in self.made.lost:
            stored, lost = (self._heads(of, q.shape[-2], v.shape[-1]) for of in (self.made.outputs, self.made.lost))
            self._check(stored[VALUE], v[:, :, start:])
            own = shares.diagonal(start, -2, -1)[..., :queries, None]
            found = found + own * _for_heads(lost[VALUE], q.shape[1]).to(wide)
        return found.to(query.dtype)

    def _own_logits(self, query: Tensor, key: Tensor) -> Tensor | float:
        """What rounding takes from the product of each token's own query and key.

        Rotary embedding rotates both alike, so the product is that of what the layers made, times a constant factor.
        """
        if KEY not in self.made.lost:
            return 0.0
        stored, lost = (self._heads(of, query.shape[-2], query.shape[-1]) for of in (self.made.outputs, self.made.lost))
        own = stored[QUERY].to(query)
        factor = query.norm() / own.norm().clamp(min=torch.finfo(query.dtype).tiny)
        self._check((own * _for_heads(stored[KEY], len(own[0]))).sum(-1) * factor, (query * key).sum(-1))
        taken: Tensor = (own * _for_heads(lost[KEY], len(own[0]))).sum(-1) * factor
        return taken

    def _heads(self, made: Mapping[str, Tensor], tokens: int, width: int) -> dict[str, Tensor]:
        """Outputs of layers (examples x tokens x channels) by head, as attention sees them."""
        if any(t.shape[-2] != tokens or t.shape[-1] % width for t in made.values()):
            raise self._foreign()
        return {n: t.reshape(-1, tokens, t.shape[-1] // width, width).transpose(1, 2) for n, t in made.items()}

    def _check(self, ours: Tensor, theirs: Tensor) -> None:
        ours = _for_heads(ours, theirs.shape[1]).to(theirs) if ours.dim() == 4 else ours
        if ours.shape != theirs.shape or (ours - theirs).abs().max() > NEAR * theirs.abs().max().clamp(min=1e-6):
            raise self._foreign()

    def _foreign(self) -> UserError:
        return UserError(
            f"{self.made.path} changes keys or values between the layers that make them and attention, so that a "
            "token's own cannot be kept; leave cache_past out"
        )


def past_hooks(
    model: nn.Module, path: str, layers: Mapping[str, str], changes: Mapping[str, Change]
) -> Iterator[RemovableHandle]:
    """Change the keys and values that one attention stores; each token still reads its own unchanged.

    `layers` has the paths of the layers that make queries, keys and values.
    """
    active: list[PastAttention] = []

    def enter(module: nn.Module, args: object, kwargs: object) -> None:
        active.append(PastAttention(Made(path)))
        active[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(module: nn.Module, args: object, output: object) -> None:
        if not active:  # a hook before this one raised an error
            return
        mode = active.pop()
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if output is not None and not mode.calls:
            raise UserError(
                f"{path} shows no keys that a token could read apart from its own; load the model with "
                "attn_implementation sdpa, or leave cache_past out"
            )

    def makes(name: str) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            stored = changes[name](output) if name in changes else output
            if active:
                active[-1].made.outputs[name] = stored
                if name in changes:
                    active[-1].made.lost[name] = output - stored
            return stored

        return hook

    module = model.get_submodule(path)
    yield module.register_forward_pre_hook(enter, with_kwargs=True)
    yield module.register_forward_hook(leave, always_call=True)
    for name, layer in layers.items():
        yield model.get_submodule(layer).register_forward_hook(makes(name))


def _for_heads(vectors: Tensor, heads: int) -> Tensor:
    """Keys or values for each query head."""
    return vectors.repeat_interleave(heads // vectors.shape[1], 1)
