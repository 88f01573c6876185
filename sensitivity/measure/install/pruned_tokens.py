"""Prunes image tokens from the blocks of a language model, as the schemes of a plan ask for it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from torch import nn
from torch.utils.hooks import RemovableHandle

from sensitivity.measure.passes.attention_hooks import attention_modules, check_seen, mode_hooks
from sensitivity.measure.passes.pruned_attention import PrunedAttention, PruningState, prompt_hooks
from sensitivity.measure.passes.token_batches import image_token
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import PRUNE, PRUNE_AFTER, Scheme


def pruning_hooks(
    model: nn.Module, weights: Iterable[Weight], given: Mapping[str, Scheme]
) -> Iterator[RemovableHandle]:
    """Register hooks that hide image tokens from all blocks after those where a scheme prunes.

    A block prunes if the scheme of its first attention layer says so and names that block (`prune_after`); in other
    blocks and parts, the settings have no effect.
    """
    if not any(scheme.get(PRUNE) for scheme in given.values()):
        return
    attentions = [a for a in attention_modules(model, weights) if a.first.part == "language" and a.first.kind == "attn"]
    shares: dict[int, float] = {}
    for attention in attentions:
        scheme, block = given.get(attention.first.name), int(attention.first.block or 0)
        if scheme is not None and scheme.get(PRUNE) and scheme[PRUNE_AFTER] == block:
            shares[block] = float(scheme[PRUNE] or 0)
    _check_can_prune(model, given, len(attentions))
    if not shares:
        return
    prompts = PruningState(image_token(model))
    yield from prompt_hooks(model, prompts)
    for attention in attentions:
        block = int(attention.first.block or 0)
        if block >= min(shares):
            mode = partial(PrunedAttention, prompts, shares.get(block, 0.0), block > min(shares))
            yield from mode_hooks(model.get_submodule(attention.path), mode, partial(check_seen, attention.path))


def _check_can_prune(model: nn.Module, given: Mapping[str, Scheme], blocks: int) -> None:
    """Raise an error if a model's image tokens cannot be pruned, or if a scheme names a block that it does not have."""
    parameters = inspect.signature(model.forward).parameters
    encoder_decoder = model.config.get_text_config().is_encoder_decoder  # type: ignore[union-attr, operator]
    if image_token(model) < 0 or "logits_to_keep" not in parameters or encoder_decoder or not blocks:
        raise UserError(
            f"{type(model).__name__} does not mark image tokens among those of its prompt, so none can be pruned; "
            "leave out --set prune"
        )
    for scheme in given.values():
        if scheme.get(PRUNE) and int(scheme[PRUNE_AFTER] or 0) >= blocks:
            raise UserError(
                f"{PRUNE_AFTER}={scheme[PRUNE_AFTER]}: the language model has {blocks} blocks, 0 to {blocks - 1}"
            )
