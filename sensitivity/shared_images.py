"""Answers on top of an image that questions share: its tokens once, each question and a guess of its answer after."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from sensitivity.answer_tokens import ends, mean_nll, padded
from sensitivity.batches import Batch
from sensitivity.drafts import Drafts, Known
from sensitivity.models import VLM
from sensitivity.tasks import Task

Image = list[tuple[Tensor, Tensor]]  # keys and values of each layer for the images of a batch


def drafted(
    vlm: VLM,
    task: Task,
    batch: Batch,
    image: Image,
    known: Known | None,
    first: Callable[[], AbstractContextManager[None]],
) -> tuple[list[list[int]], list[float]]:
    """Greedy answers on top of the images, from drafts.

    The first draft is the right answer, so its likelihood comes along; where only that answer scores, a row is done
    after one pass. The next are what other plans answered, if that begins like what is accepted; each pass goes on
    from the token that differs.
    """
    ending, found = ends(vlm), Drafts.of(batch.targets)
    read = partial(_continue, vlm, batch, image)
    with first():  # later drafts are a plan's own, and shared with no other
        logits = found.advance(read, ending, task.max_new_tokens, once=task.exact)
    nll = mean_nll(logits, padded(batch.targets, fill=-100).to(vlm.device))
    while found.left:
        found.guess(known)
        found.advance(read, ending, task.max_new_tokens)
    return found.answers, nll


def _continue(vlm: VLM, batch: Batch, image: Image, rows: list[int], drafts: list[list[int]]) -> Tensor:
    """Logits that predict each draft token and the one after the draft, for some rows, on top of their images."""
    tails = [batch.prompts[row] + draft for row, draft in zip(rows, drafts, strict=True)]
    ids = padded(tails, fill=0).to(vlm.device)  # to the right, where causal attention does not see it
    owners = torch.tensor([batch.owner[row] for row in rows], device=vlm.device)
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(image):
        cache.update(keys[owners], values[owners], layer)
    positions = torch.arange(batch.prefix, batch.prefix + ids.shape[1], device=vlm.device).expand(len(rows), -1)
    logits: Tensor = vlm.model(input_ids=ids, past_key_values=cache, position_ids=positions, use_cache=True).logits
    longest = max(len(draft) for draft in drafts) + 1
    starts = torch.tensor([len(batch.prompts[row]) - 1 for row in rows], device=vlm.device)
    where = (starts[:, None] + torch.arange(longest, device=vlm.device)).clamp(max=ids.shape[1] - 1)
    return logits.gather(1, where[:, :, None].expand(-1, -1, logits.shape[-1]))
