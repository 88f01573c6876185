"""Model x task -> per-example answers and scores: greedy answers, and how likely the right one was."""

from __future__ import annotations

import math
from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from sensitivity.measure.generate import retrieval, shared_images, whole_prompts
from sensitivity.measure.generate.answer_tokens import plainly_greedy, said_by
from sensitivity.measure.generate.batches import Batch, batches
from sensitivity.measure.generate.drafts import with_earlier_answers
from sensitivity.measure.memory.out_of_memory import run_or_halve
from sensitivity.measure.memory.prefix_cache import PrefixCache
from sensitivity.models.vlm import VLM
from sensitivity.tasks.examples.types import Task

Rows = dict[str, list[Any]]


def evaluate(vlm: VLM, task: Task, plain: bool = False) -> Rows:
    """One row per example: what was answered, its score, and the right answer's negative log-likelihood per token."""
    rows: Rows = {}
    for batch in batches(vlm, task, plain):
        for name, values in rows_of(task, batch, *answer(vlm, task, batch)).items():
            rows.setdefault(name, []).extend(values)
    return rows


def rows_of(task: Task, batch: Batch, answers: list[str], nll: list[float]) -> Rows:
    return {
        "task": [task.name] * len(answers),
        "example": [example.id for example in batch.examples],
        "cluster": [example.cluster for example in batch.examples],
        "kind": [example.kind for example in batch.examples],
        "score": [
            task.score(given, example) if math.isfinite(surprise) else 0.0  # NaN logits: what is written is no answer
            for given, example, surprise in zip(answers, batch.examples, nll, strict=True)
        ],
        "nll": nll,
        "answer": answers,
    }


def answer(
    vlm: VLM, task: Task, batch: Batch, replay: PrefixCache | None = None, name: Hashable = None
) -> tuple[list[str], list[float]]:
    """Greedy answers of a batch; one that does not fit on the device is halved, for this plan and all that follow.

    With `replay`, what this plan shares with the last one on the batch of this name is not computed again.
    """
    if not batch.halves:
        once = partial(_answered, vlm, task, batch, replay, name)
        found = run_or_halve(once, batch.at_once or len(batch.examples), task.name, vlm.device)
        if found is not None:
            return found
        if batch.at_once:
            batch.at_once //= 2
            if replay:
                replay.clear()  # what it holds belongs to other portions
            return answer(vlm, task, batch, replay, name)
        if replay:
            replay.leave_out(name)
            replay.leave_out((name, "questions"))
        _halve(vlm, task, batch)
    halves = [answer(vlm, task, half, replay, (name, i)) for i, half in enumerate(batch.halves)]
    return [one for answers, _ in halves for one in answers], [one for _, nll in halves for one in nll]


def _halve(vlm: VLM, task: Task, batch: Batch) -> None:
    """Two batches in the place of one, questions of one image together where there is more than one image."""
    clusters = list(dict.fromkeys(example.cluster for example in batch.examples))
    first = set(clusters[: (len(clusters) + 1) // 2])
    middle = sum(example.cluster in first for example in batch.examples)
    middle = middle if len(clusters) > 1 else len(batch.examples) // 2
    for some in (batch.examples[:middle], batch.examples[middle:]):
        batch.halves += batches(vlm, replace(task, examples=some), plain=not batch.prefix)
    batch.inputs.clear()


@torch.inference_mode()
def _answered(
    vlm: VLM, task: Task, batch: Batch, replay: PrefixCache | None, name: Hashable
) -> tuple[list[str], list[float]]:
    """By the fast path where the batch is made for it."""
    over = replay.over if replay else lambda *_: nullcontext()
    if task.gallery:
        return retrieval.ranked(vlm, task, batch.examples, lambda number: over((name, number), "vision"), batch.at_once)
    known = replay.answers.get(name) if replay else None
    if not batch.prefix:
        if replay is None or not plainly_greedy(vlm):
            with over(name, "vision"):
                return whole_prompts.generated(vlm, task, batch)
        tokens, nll = whole_prompts.guessed(vlm, task, batch, known, partial(over, name, "vision", "connector"))
        replay.answers[name] = with_earlier_answers(known, tokens)
        return said_by(vlm, tokens, task), nll
    with over(name, "vision", "connector", "language"):
        cache, places = shared_images.looked_at(vlm, batch)
    image = replay.caches(name, cache) if replay else [(layer.keys, layer.values) for layer in cache.layers]
    questions = partial(over, (name, "questions"), "language")
    tokens, nll = shared_images.drafted(vlm, task, batch, image, places, known, questions)
    if replay:
        replay.answers[name] = with_earlier_answers(known, tokens)
    return said_by(vlm, tokens, task), nll
