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
from sensitivity.measure.passes.attention_hooks import mode_hooks
from sensitivity.spec.errors import UserError

QUERY, KEY, VALUE = "query", "key", "value"
Change = Callable[[Tensor], Tensor]  # of keys or values, the channels of all heads in the last dimension
# as a share of the largest value that is compared: two ways to compute it differ by less, also in 16 bits
TOLERANCE = 0.02


@dataclass
class LayerOutputs:
    """The queries, keys and values that an attention's layers return in a forward pass, before rotary embedding."""

    path: str
    stored: dict[str, Tensor] = field(default_factory=dict)  # queries, and keys and values after rounding
    lost: dict[str, Tensor] = field(default_factory=dict)  # keys and values before rounding, minus the stored ones


class PastAttention(AttentionMode):
    """While it is active, each token reads its own key and value as they are, and those of others as stored."""

    def __init__(self, outputs: LayerOutputs) -> None:
        super().__init__()
        self.outputs = outputs

    def fused(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Fused attention, after each query head got a dimension of its own.

        For a single token, transformers packs the query heads that share a key into the dimension of tokens.
        """
        shape, tokens = query.shape, next(iter(self.outputs.stored.values())).shape[-2]
        if tokens != 1 or shape[2] == 1:
            return self._attend(query, key, value, *args, **kwargs)
        if (mask := kwargs.get("attn_mask")) is not None:
            for_all_heads = mask.shape[1] == 1
            kwargs["attn_mask"] = mask[..., :1, :] if for_all_heads else mask.reshape(len(mask), -1, 1, mask.shape[3])
        unpacked = query.reshape(shape[0], -1, 1, shape[3])
        return self._attend(unpacked, key, value, *args, **kwargs).reshape(*shape[:3], value.shape[-1])

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
        """Attention with the arguments of fused attention; queries belong to the last of the tokens that have keys."""
        wide = torch.promote_types(query.dtype, torch.float32)
        q, k, v = (_for_heads(one, query.shape[1]).to(wide) for one in (query, key, value))
        queries, start = q.shape[2], k.shape[2] - q.shape[2]
        factor = scale or 1 / math.sqrt(q.shape[-1])
        logits = q @ k.mT * factor
        logits.diagonal(start, -2, -1).add_(self._own_logits(q, k[:, :, start:]) * factor)
        probabilities = masked(logits, attn_mask, is_causal).softmax(-1).nan_to_num()
        output = probabilities @ v
        if VALUE in self.outputs.lost:
            stored, lost = self._by_head(q.shape[-2], v.shape[-1])
            self._check(stored[VALUE], v[:, :, start:])
            own = probabilities.diagonal(start, -2, -1)[..., :queries, None]
            output = output + own * _for_heads(lost[VALUE], q.shape[1]).to(wide)
        return output.to(query.dtype)

    def _own_logits(self, query: Tensor, key: Tensor) -> Tensor | float:
        """What rounding takes from the product of each token's own query and key.

        Rotary embedding rotates both alike, so the product is that of the layers' outputs, times a constant factor.
        """
        if KEY not in self.outputs.lost:
            return 0.0
        stored, lost = self._by_head(query.shape[-2], query.shape[-1])
        own = stored[QUERY].to(query)
        factor = query.norm() / own.norm().clamp(min=torch.finfo(query.dtype).tiny)
        self._check((own * _for_heads(stored[KEY], len(own[0]))).sum(-1) * factor, (query * key).sum(-1))
        taken: Tensor = (own * _for_heads(lost[KEY], len(own[0]))).sum(-1) * factor
        return taken

    def _by_head(self, tokens: int, width: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The layers' outputs (examples x tokens x channels), stored and lost, by head as attention sees them."""
        both = self.outputs.stored, self.outputs.lost
        if any(t.shape[-2] != tokens or t.shape[-1] % width for flat in both for t in flat.values()):
            raise self._foreign()
        stored, lost = (
            {name: t.reshape(-1, tokens, t.shape[-1] // width, width).transpose(1, 2) for name, t in flat.items()}
            for flat in both
        )
        return stored, lost

    def _check(self, ours: Tensor, theirs: Tensor) -> None:
        """Raise an error unless what attention reads is what its layers returned."""
        ours = _for_heads(ours, theirs.shape[1]).to(theirs) if ours.dim() == 4 else ours
        if ours.shape != theirs.shape or (ours - theirs).abs().max() > TOLERANCE * theirs.abs().max().clamp(min=1e-6):
            raise self._foreign()

    def _foreign(self) -> UserError:
        return UserError(
            f"{self.outputs.path} changes keys or values between the layers that make them and attention, so that a "
            "token's own cannot be kept; leave cache_past out"
        )


def past_hooks(
    model: nn.Module, path: str, layers: Mapping[str, str], changes: Mapping[str, Change]
) -> Iterator[RemovableHandle]:
    """Change the keys and values that one attention stores; each token still reads its own unchanged.

    `layers` has the paths of the layers whose outputs are queries, keys and values.
    """
    active: list[PastAttention] = []

    def check(calls: int) -> None:
        if not calls:
            raise UserError(
                f"{path} shows no keys that a token could read apart from its own; load the model with "
                "attn_implementation sdpa, or leave cache_past out"
            )

    def rounded(name: str) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            stored = changes[name](output) if name in changes else output
            if active:
                active[-1].outputs.stored[name] = stored
                if name in changes:
                    active[-1].outputs.lost[name] = output - stored
            return stored

        return hook

    yield from mode_hooks(model.get_submodule(path), lambda: PastAttention(LayerOutputs(path)), check, active)
    for name, layer in layers.items():
        yield model.get_submodule(layer).register_forward_hook(rounded(name))


def _for_heads(vectors: Tensor, heads: int) -> Tensor:
    """Keys or values, repeated for each query head."""
    return vectors.repeat_interleave(heads // vectors.shape[1], 1)
