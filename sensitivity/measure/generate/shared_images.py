"""Answers to questions that share an image: its tokens are read once, then each question with a draft."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from sensitivity.measure.generate.answer_tokens import ends, hopeless, logits_from, mean_nll, padded
from sensitivity.measure.generate.batches import Batch, placed
from sensitivity.measure.generate.drafts import Drafts, Known
from sensitivity.models.vlm import VLM
from sensitivity.tasks.examples.types import Task

Image = list[tuple[Tensor, Tensor]]  # keys and values of each layer for the images of a batch


def looked_at(vlm: VLM, batch: Batch) -> tuple[Any, Tensor]:
    """One pass over a batch's images and the prompt before them: keys and values, and the next token's position.

    Where an image takes fewer positions than it has tokens, the model leaves the difference in `rope_deltas`.
    """
    kept = DynamicCache()  # keeps all tokens, also in layers with a sliding window
    found = vlm.model(**placed(vlm, batch.inputs), past_key_values=kept, use_cache=True, logits_to_keep=1)
    places = torch.full((len(batch.inputs["input_ids"]), 1), batch.prefix, device=vlm.device)
    fewer = getattr(getattr(vlm.model, "model", None), "rope_deltas", None)
    cache = found.get("language_model_outputs", found).past_key_values
    return cache, places if fewer is None else places + fewer.to(places.device)


def drafted(
    vlm: VLM,
    task: Task,
    batch: Batch,
    image: Image,
    places: Tensor,
    known: Known | None,
    first: Callable[[], AbstractContextManager[None]],
) -> tuple[list[list[int]], list[float]]:
    """Greedy answers to the questions after their images, from drafts.

    The first draft is the right answer, so its likelihood comes from the same pass; where only right answers count,
    most rows are finished after it. The next drafts are what other plans answered, if that begins with the accepted
    tokens; each pass continues from the token that differed.
    """
    found, read = Drafts.of(batch.targets), _Reading(vlm, batch, image, places)
    rules = ends(vlm), task.max_new_tokens, hopeless(vlm, task, batch.examples)
    with first():  # later drafts depend on this plan's answers, so their hidden states are shared with no other plan
        logits = found.advance(read, *rules)
    nll = mean_nll(logits, padded(batch.targets, fill=-100).to(vlm.device))
    del logits
    while found.left:
        found.guess(known)
        found.advance(read, *rules)
    return found.answers, nll


class _Reading:
    """Forward passes over questions and drafts after their images; a cache saves reading tokens twice."""

    def __init__(self, vlm: VLM, batch: Batch, image: Image, places: Tensor) -> None:
        self.vlm, self.batch, self.image, self.places = vlm, batch, image, places
        self.model = vlm.speaker
        # The last pass. A row of its cache is: image tokens | earlier tokens, a gap up to `room` | tokens of that pass.
        # `read` counts the earlier tokens of each row.
        self.rows: list[int] = []
        self.read: list[int] = []
        self.room = 0
        self.cache: Any = None

    def __call__(self, rows: list[int], drafts: list[list[int]], accepted: list[int]) -> Tensor:
        """Logits for each draft's tokens from the accepted ones on, and for the token after the draft."""
        device, prefix = self.vlm.device, self.batch.prefix
        tails = [[*self.batch.prompts[row], *draft] for row, draft in zip(rows, drafts, strict=True)]
        # the last accepted token was predicted and never read, so the next pass begins with it
        new = [len(self.batch.prompts[row]) + far - 1 for row, far in zip(rows, accepted, strict=True)]
        begins = new if self._covers(prefix + max(new) + max(map(len, drafts))) else [0] * len(rows)
        ids = padded([tail[begin:] for tail, begin in zip(tails, begins, strict=True)], fill=0).to(device)
        owners = torch.tensor([self.batch.owner[row] for row in rows], device=device)
        cache, room = self._cache(rows, begins, owners), max(begins)
        start = torch.tensor(begins, device=device)[:, None]
        how: dict[str, Any] = {}
        if room:  # the mask hides gaps; padding on the right needs none, since causal attention never looks there
            seen = torch.ones(len(rows), prefix + room + ids.shape[1], dtype=torch.long, device=device)
            seen[:, prefix : prefix + room] = torch.arange(room, device=device) < start
            how["attention_mask"] = seen
        wanted = [first - begin for first, begin in zip(new, begins, strict=True)]
        logits: Tensor = self.model(
            input_ids=ids,
            past_key_values=cache,
            # positions count tokens and not cache entries, so gaps change nothing
            position_ids=self.places[owners] + start + torch.arange(ids.shape[1], device=device),
            use_cache=True,
            logits_to_keep=ids.shape[1] - min(wanted),
            **how,
        ).logits
        self.rows, self.read, self.room, self.cache = list(rows), begins, room, cache
        longest = max(len(draft) - far for draft, far in zip(drafts, accepted, strict=True)) + 1
        return logits_from(logits, [place - min(wanted) for place in wanted], longest)

    def _covers(self, longest: int) -> bool:
        """Whether the last pass's cache can be continued: every layer has entries, and gaps between them do no harm.

        A layer that the prefix cache replayed has none; a layer with a sliding window would count gaps as tokens.
        """
        window = getattr(self.vlm.model.config.get_text_config(), "sliding_window", None)
        if self.cache is None or (window and longest > window):
            return False
        return all(layer.get_seq_length() > self.batch.prefix for layer in self.cache.layers)

    def _cache(self, rows: Sequence[int], begins: Sequence[int], owners: Tensor) -> DynamicCache:
        """Keys and values of the rows' images, and of the tokens after them that earlier passes read."""
        cache, room = DynamicCache(), max(begins)
        picked = self._picked(rows, room) if room else None
        for number, (keys, values) in enumerate(self.image):
            both = [half[owners.to(half.device)] for half in (keys, values)]  # a model may lie on several devices
            if picked:
                last, (row, place) = self.cache.layers[number], (index.to(keys.device) for index in picked)
                added = (half[row, :, place].transpose(1, 2) for half in (last.keys, last.values))
                both = [torch.cat([one, more], dim=2) for one, more in zip(both, added, strict=True)]
            layer = DynamicLayer()  # type: ignore[no-untyped-call]
            layer.lazy_initialization(*both)
            layer.keys, layer.values = both  # set directly, since update() would copy them once more
            cache.layers.append(layer)
        self.cache = None  # frees the last pass's keys and values before the next are computed
        return cache

    def _picked(self, rows: Sequence[int], room: int) -> tuple[Tensor, Tensor]:
        """Row and position in the last pass's cache of each token after the image.

        First come those that were there before that pass, then, after the gap, those that it added.
        """
        at = [self.rows.index(row) for row in rows]
        before = torch.tensor([self.read[place] for place in at])[:, None]
        order = torch.arange(room).expand(len(rows), -1)
        place = self.batch.prefix + torch.where(order < before, order, self.room + order - before)
        # shorter rows point beyond their tokens here; the caller masks those entries
        return torch.tensor(at)[:, None], place.clamp(max=self.cache.get_seq_length() - 1)
