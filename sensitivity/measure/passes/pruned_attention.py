"""Attention with pruned image tokens: blocks after a chosen one see only those that got most attention there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sensitivity.measure.passes.attention_functions import (
    FUSED,
    AttentionMode,
    at_least_float32,
    masked,
    probabilities_of,
)
from sensitivity.spec.errors import UserError


class PruningState:
    """The prompts that a model reads, and which of their image tokens later blocks do not see.

    A token of the answer sees what its prompt sees: the last token of the prompt decides. In a pass without a cache
    that is the first token that gets logits.
    """

    def __init__(self, image_token: int) -> None:
        self.image_token = image_token
        self.image = self.hidden = torch.zeros(0, 0, dtype=torch.bool)  # rows x tokens of the prompts
        self.end = 0  # position of the last token of each prompt
        self.keys = 0  # tokens that attention sees in this pass
        self.reading = False  # a forward pass is under way
        self.deciding = False  # ... over whole prompts, so that tokens can be chosen for pruning
        self.hides = False  # some token is hidden

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pass begins, over prompts or over one more token of each answer."""
        ids, cache = kwargs.get("input_ids", args[0] if args else None), kwargs.get("past_key_values")
        read = 0 if cache is None else int(cache.get_seq_length())
        if ids is None or (read and ids.shape[1] > 1):
            raise UserError(
                "image tokens are pruned by the last token of a whole prompt, and this prompt is read in pieces; "
                "evaluate with plain=True"
            )
        self.reading, self.deciding, self.keys = True, not read, read + ids.shape[1]
        if not read:
            self.image = ids == self.image_token
            self.hidden, self.hides = torch.zeros_like(self.image), False
            self.end = ids.shape[1] - max(int(kwargs.get("logits_to_keep") or 0), 1)

    def finish(self, module: nn.Module, args: object, output: object) -> None:
        """A forward pass ended."""
        self.reading = False

    def decide(self, received: Tensor, share: float) -> None:
        """Hide the image tokens that received least attention, so that this share of each image is hidden."""
        hidden_count = (share * self.image.sum(1)).round()
        # image tokens that are hidden already come first, and tokens that are not of the image last
        order = received.masked_fill(self.hidden, -1.0).masked_fill(~self.image, math.inf)
        rank = order.argsort(dim=1, stable=True).argsort(dim=1)
        self.hidden = self.hidden | (rank < hidden_count[:, None])
        self.hides = bool(self.hidden.any())

    def visible(self, rows: int, keys: int) -> Tensor | None:
        """Which keys a query sees, rows x 1 x queries (or 1) x keys; None if it sees all."""
        if not self.hides:
            return None
        self.check(rows, keys)
        seen = ~nn.functional.pad(self.hidden, (0, keys - self.hidden.shape[1]))[:, None, None]
        # a hidden token sees itself, since a row without any key has no softmax
        return seen | torch.eye(keys, dtype=torch.bool, device=seen.device) if self.deciding else seen

    def check(self, rows: int, keys: int) -> None:
        """Raise an error where attention does not read the tokens that the prompts have."""
        if not self.reading or (rows, keys) != (len(self.image), self.keys):
            raise UserError(
                "attention does not read all tokens of a prompt at once, as with a sliding window or a question apart "
                "from its image, so image tokens cannot be pruned; leave out --set prune"
            )


class PrunedAttention(AttentionMode):
    """A block's attention: it sees no hidden token if it `prunes`; with a `share`, it decides what later blocks see."""

    def __init__(self, prompts: PruningState, share: float, prunes: bool) -> None:
        super().__init__()
        self.prompts, self.share, self.prunes = prompts, share, prunes

    def fused(
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
        """Fused attention, with its own arguments and a narrower mask."""
        rows, keys = key.shape[0], key.shape[2]
        if (seen := self.prompts.visible(rows, keys) if self.prunes else None) is not None:
            if is_causal:
                seen = seen & torch.ones(query.shape[2], keys, dtype=torch.bool, device=key.device).tril()
            attn_mask, is_causal = _narrower(attn_mask, seen), False
        if self.share and self.prompts.deciding:
            self.prompts.check(rows, keys)
            last = slice(self.prompts.end, self.prompts.end + 1)
            mask = attn_mask if attn_mask is None or attn_mask.shape[-2] == 1 else attn_mask[..., last, :]
            heads = at_least_float32(key).repeat_interleave(query.shape[1] // key.shape[1], 1)
            logits = at_least_float32(query[:, :, last]) @ heads.mT * (scale or 1 / math.sqrt(query.shape[-1]))
            self._decide(masked(logits, mask, False))
        return FUSED(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def softmax(
        self, func: Callable[..., Tensor], logits: Tensor, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Tensor:
        """A softmax of logits, which have attention's own mask, with a narrower one."""
        self.calls += 1
        rows, keys = logits.shape[0], logits.shape[3]
        if (seen := self.prompts.visible(rows, keys) if self.prunes else None) is not None:
            logits = _narrower(logits, seen)
        if self.share and self.prompts.deciding:
            self.prompts.check(rows, keys)
            self._decide(logits[:, :, self.prompts.end : self.prompts.end + 1])
        return func(logits, *args, **kwargs)

    def _decide(self, logits: Tensor) -> None:
        """Decide by the attention of the prompts' last tokens (rows x heads x 1 x keys), the mean over heads."""
        later = torch.arange(logits.shape[-1], device=logits.device) > self.prompts.end
        received = probabilities_of(logits.masked_fill(later, -math.inf))
        self.prompts.decide(received.mean(1)[:, 0], self.share)


def _narrower(mask: Tensor | None, seen: Tensor) -> Tensor:
    """A mask, or masked logits, in which what is not seen is masked, too."""
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def prompt_hooks(model: nn.Module, prompts: PruningState) -> Iterator[RemovableHandle]:
    """Tell `prompts` when a forward pass of the model begins and ends."""
    yield model.register_forward_pre_hook(prompts.begin, with_kwargs=True)
    yield model.register_forward_hook(prompts.finish, always_call=True)
