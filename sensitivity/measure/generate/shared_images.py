"""Answers on top of an image that questions share: its tokens once, each question and a guess of its answer after."""

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
    """After a pass over a batch's images and what stands before them: keys and values, and the next token's place.

    Where an image takes fewer places than it has tokens, the model leaves behind by how many.
    """
    kept = DynamicCache()  # of all tokens, also where a layer looks back only so far
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
    """Greedy answers on top of the images, from drafts.

    The first draft is the right answer, so its likelihood comes along; where only right answers count, most rows are
    done after one pass. The next are what other plans answered, if that begins like what is accepted; each pass goes on
    from the token that differs.
    """
    found, read = Drafts.of(batch.targets), _Reading(vlm, batch, image, places)
    rules = ends(vlm), task.max_new_tokens, hopeless(vlm, task, batch.examples)
    with first():  # later drafts are a plan's own, and shared with no other
        logits = found.advance(read, *rules)
    nll = mean_nll(logits, padded(batch.targets, fill=-100).to(vlm.device))
    del logits
    while found.left:
        found.guess(known)
        found.advance(read, *rules)
    return found.answers, nll


class _Reading:
    """Passes over questions and drafts on top of their images; what was read and accepted is not read again."""

    def __init__(self, vlm: VLM, batch: Batch, image: Image, places: Tensor) -> None:
        self.vlm, self.batch, self.image, self.places = vlm, batch, image, places
        self.model = vlm.speaker
        # of the last pass: its rows, how many tokens after the image they had read before it, the room for these
        self.rows: list[int] = []
        self.read: list[int] = []
        self.room = 0
        self.cache: Any = None

    def __call__(self, rows: list[int], drafts: list[list[int]], accepted: list[int]) -> Tensor:
        """Logits that predict each draft's tokens from the accepted ones on, and the one after the draft."""
        device, prefix = self.vlm.device, self.batch.prefix
        tails = [[*self.batch.prompts[row], *draft] for row, draft in zip(rows, drafts, strict=True)]
        # the token that was put right last is the first that was never read
        new = [len(self.batch.prompts[row]) + far - 1 for row, far in zip(rows, accepted, strict=True)]
        begins = new if self._covers(prefix + max(new) + max(map(len, drafts))) else [0] * len(rows)
        ids = padded([tail[begin:] for tail, begin in zip(tails, begins, strict=True)], fill=0).to(device)
        owners = torch.tensor([self.batch.owner[row] for row in rows], device=device)
        cache, room = self._cache(rows, begins, owners), max(begins)
        start = torch.tensor(begins, device=device)[:, None]
        how: dict[str, Any] = {}
        if room:  # rows that have read less leave places empty; what stands to the right, causal attention never sees
            seen = torch.ones(len(rows), prefix + room + ids.shape[1], dtype=torch.long, device=device)
            seen[:, prefix : prefix + room] = torch.arange(room, device=device) < start
            how["attention_mask"] = seen
        wanted = [first - begin for first, begin in zip(new, begins, strict=True)]
        logits: Tensor = self.model(
            input_ids=ids,
            past_key_values=cache,
            position_ids=self.places[owners] + start + torch.arange(ids.shape[1], device=device),
            use_cache=True,
            logits_to_keep=ids.shape[1] - min(wanted),
            **how,
        ).logits
        self.rows, self.read, self.room, self.cache = list(rows), begins, room, cache
        longest = max(len(draft) - far for draft, far in zip(drafts, accepted, strict=True)) + 1
        return logits_from(logits, [place - min(wanted) for place in wanted], longest)

    def _covers(self, longest: int) -> bool:
        """Whether the last pass left keys and values in every layer, and empty places among them do no harm.

        A layer that was replayed has none; one that looks back only so far counts empty places, too.
        """
        window = getattr(self.vlm.model.config.get_text_config(), "sliding_window", None)
        if self.cache is None or (window and longest > window):
            return False
        return all(layer.get_seq_length() > self.batch.prefix for layer in self.cache.layers)

    def _cache(self, rows: Sequence[int], begins: Sequence[int], owners: Tensor) -> DynamicCache:
        """Keys and values of the rows' images, and of so many tokens after them that were read before."""
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
            layer.keys, layer.values = both  # its update() would copy them once more
            cache.layers.append(layer)
        self.cache = None
        return cache

    def _picked(self, rows: Sequence[int], room: int) -> tuple[Tensor, Tensor]:
        """Where in the last pass's cache the tokens after the image stand, row by row: first those that were there
        before it, then, behind the empty places, those that it added."""
        at = [self.rows.index(row) for row in rows]
        before = torch.tensor([self.read[place] for place in at])[:, None]
        order = torch.arange(room).expand(len(rows), -1)
        place = self.batch.prefix + torch.where(order < before, order, self.room + order - before)
        return torch.tensor(at)[:, None], place.clamp(max=self.cache.get_seq_length() - 1)
