"""Answers to questions that share an image: its tokens are read once, then each question with a draft."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from sensitivity.measure.generate.answer_tokens import cannot_be_right, end_tokens, logits_from, mean_nll, right_padded
from sensitivity.measure.generate.batches import Batch, on_device
from sensitivity.measure.generate.drafts import Drafts, EarlierAnswers
from sensitivity.models.vlm import VLM
from sensitivity.tasks.examples.types import Task

KeysAndValues = tuple[Tensor, Tensor]  # of one layer, each rows x heads x tokens x width


def prefill_images(vlm: VLM, batch: Batch) -> tuple[list[KeysAndValues | None], Tensor]:
    """One pass over a batch's images and the prompt before them: keys and values, and the next token's position.

    Where an image takes fewer positions than it has tokens, the model leaves the difference in `rope_deltas`.
    """
    all_tokens = DynamicCache()  # keeps all tokens, also in layers with a sliding window
    output = vlm.model(**on_device(vlm, batch.inputs), past_key_values=all_tokens, use_cache=True, logits_to_keep=1)
    positions = torch.full((len(batch.inputs["input_ids"]), 1), batch.prefix, device=vlm.device)
    offset = getattr(getattr(vlm.model, "model", None), "rope_deltas", None)
    cache = output.get("language_model_outputs", output).past_key_values
    return cached_keys_and_values(cache), positions if offset is None else positions + offset.to(positions.device)


def cached_keys_and_values(cache: Cache) -> list[KeysAndValues | None]:
    """Each layer's keys and values; None for a layer that wrote none, since the prefix cache skipped its block."""
    per_layer: list[KeysAndValues | None] = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer), f"{type(layer).__name__} is no layer of plain attention"
        keys, values = layer.keys, layer.values
        per_layer.append(None if keys is None or values is None or not keys.numel() else (keys, values))
    return per_layer


def drafted_answers(
    vlm: VLM,
    task: Task,
    batch: Batch,
    image: Sequence[KeysAndValues],
    positions: Tensor,
    earlier: EarlierAnswers | None,
    reuse: Callable[[], AbstractContextManager[None]],
) -> tuple[list[list[int]], list[float]]:
    """Greedy answers to the questions after their images, from drafts.

    The first draft is the right answer, so its likelihood comes from the same pass; where only right answers count,
    most rows are finished after it. The next drafts are what other plans answered, if that begins with the accepted
    tokens; each pass continues from the token that differed. `reuse` lets the first pass reuse hidden states.
    """
    drafts, forward = Drafts.of(batch.targets), _QuestionPasses(vlm, batch, image, positions)
    rules = end_tokens(vlm), task.max_new_tokens, cannot_be_right(vlm, task, batch.examples)
    with reuse():  # later drafts depend on this plan's answers, so their hidden states are shared with no other plan
        logits = drafts.verify(forward, *rules)
    nll = mean_nll(logits, right_padded(batch.targets, fill=-100).to(vlm.device))
    del logits
    while drafts.unfinished:
        drafts.take_earlier_answers(earlier)
        drafts.verify(forward, *rules)
    return drafts.answers, nll


class _QuestionPasses:
    """Forward passes over questions and drafts after their images, with a cache so that few tokens are read twice."""

    def __init__(self, vlm: VLM, batch: Batch, image: Sequence[KeysAndValues], positions: Tensor) -> None:
        self.vlm, self.batch, self.image, self.positions = vlm, batch, image, positions
        self.model = vlm.text_generator
        # The last pass. A row of its cache is: image tokens | earlier tokens, a gap up to `gap_end` | tokens of that
        # pass. `tokens_read` counts the earlier tokens of each row.
        self.rows: list[int] = []
        self.tokens_read: list[int] = []
        self.gap_end = 0
        self.layers: list[KeysAndValues | None] = []

    def __call__(self, rows: list[int], drafts: list[list[int]], accepted: list[int]) -> Tensor:
        """Logits for each draft's tokens from the accepted ones on, and for the token after the draft."""
        device, prefix = self.vlm.device, self.batch.prefix
        questions = [[*self.batch.prompts[row], *draft] for row, draft in zip(rows, drafts, strict=True)]
        # the last accepted token was predicted and never read, so the next pass begins with it
        unread = [len(self.batch.prompts[row]) + count - 1 for row, count in zip(rows, accepted, strict=True)]
        starts = unread if self._can_continue(prefix + max(unread) + max(map(len, drafts))) else [0] * len(rows)
        ids = right_padded([tokens[begin:] for tokens, begin in zip(questions, starts, strict=True)], fill=0).to(device)
        images = torch.tensor([self.batch.image_index[row] for row in rows], device=device)
        cache, gap_end = self._cache(rows, starts, images), max(starts)
        start = torch.tensor(starts, device=device)[:, None]
        masked: dict[str, Tensor] = {}
        if gap_end:  # the mask hides gaps; padding on the right needs none, since causal attention never looks there
            seen = torch.ones(len(rows), prefix + gap_end + ids.shape[1], dtype=torch.long, device=device)
            seen[:, prefix : prefix + gap_end] = torch.arange(gap_end, device=device) < start
            masked["attention_mask"] = seen
        # logits begin where the first row needs them; `logits_from` gives every row those from its own start
        logit_starts = [first - begin for first, begin in zip(unread, starts, strict=True)]
        logits: Tensor = self.model(
            input_ids=ids,
            past_key_values=cache,
            # positions count tokens and not cache entries, so gaps change nothing
            position_ids=self.positions[images] + start + torch.arange(ids.shape[1], device=device),
            use_cache=True,
            logits_to_keep=ids.shape[1] - min(logit_starts),
            **masked,
        ).logits
        self.rows, self.tokens_read, self.gap_end, self.layers = (
            list(rows),
            starts,
            gap_end,
            cached_keys_and_values(cache),
        )
        longest = max(len(draft) - count for draft, count in zip(drafts, accepted, strict=True)) + 1
        return logits_from(logits, [place - min(logit_starts) for place in logit_starts], longest)

    def _can_continue(self, longest: int) -> bool:
        """Whether the last pass's cache can be continued: every layer has entries, and gaps between them do no harm.

        A layer that the prefix cache replayed has none; a layer with a sliding window would count gaps as tokens.
        """
        window = getattr(self.vlm.model.config.get_text_config(), "sliding_window", None)
        if not self.layers or (window and longest > window):
            return False
        return all(layer is not None and layer[0].shape[2] > self.batch.prefix for layer in self.layers)

    def _cache(self, rows: Sequence[int], starts: Sequence[int], images: Tensor) -> DynamicCache:
        """Keys and values of the rows' images, and of the tokens after them that earlier passes read."""
        cache, gap_end = DynamicCache(), max(starts)
        cached = self._cached_positions(rows, gap_end) if gap_end else None
        for number, (keys, values) in enumerate(self.image):
            both = [one[images.to(one.device)] for one in (keys, values)]  # a model may lie on several devices
            if cached:
                last, (row, place) = self._last(number), (index.to(keys.device) for index in cached)
                # two index tensors around a slice come first: rows x tokens x heads x width
                added = (one[row, :, place].transpose(1, 2) for one in last)
                both = [torch.cat([one, more], dim=2) for one, more in zip(both, added, strict=True)]
            layer = DynamicLayer()  # type: ignore[no-untyped-call]
            layer.lazy_initialization(*both)
            layer.keys, layer.values = both  # set directly, since update() would copy them once more
            cache.layers.append(layer)
        self.layers = []  # frees the last pass's keys and values before the next are computed
        return cache

    def _cached_positions(self, rows: Sequence[int], gap_end: int) -> tuple[Tensor, Tensor]:
        """Row and position in the last pass's cache of each token after the image.

        First come those that were there before that pass, then, after the gap, those that it added.
        """
        at = [self.rows.index(row) for row in rows]
        before = torch.tensor([self.tokens_read[place] for place in at])[:, None]
        order = torch.arange(gap_end).expand(len(rows), -1)
        # token t of a row stands at t if it was there before the last pass, and else behind the gap, which ended at
        # `self.gap_end`: the first token of that pass, number `before`, is at `self.gap_end`
        place = self.batch.prefix + torch.where(order < before, order, self.gap_end + order - before)
        # shorter rows point beyond their tokens here; the caller masks those entries
        return torch.tensor(at)[:, None], place.clamp(max=self._last(0)[0].shape[2] - 1)

    def _last(self, number: int) -> KeysAndValues:
        """A layer's keys and values after the last pass; `_can_continue` made sure that there are some."""
        layer = self.layers[number]
        assert layer is not None
        return layer
