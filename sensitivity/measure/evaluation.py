"""Runs a model on a task: greedy answers, their scores, and the likelihood of each right answer."""

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
    """One row per example: its answer, its score, and the right answer's negative log-likelihood per token."""
    rows: Rows = {}
    for batch in batches(vlm, task, plain):
        for name, values in rows_of(task, batch, *answer(vlm, task, batch)).items():
            rows.setdefault(name, []).extend(values)
    return rows


def rows_of(task: Task, batch: Batch, answers: list[str], nll: list[float]) -> Rows:
    """The results of one batch as columns of the examples table, with every answer scored."""
    return {
        "task": [task.name] * len(answers),
        "example": [example.id for example in batch.examples],
        "cluster": [example.cluster for example in batch.examples],
        "kind": [example.kind for example in batch.examples],
        "score": [
            task.score(given, example) if math.isfinite(surprise) else 0.0  # NaN logits: the text means nothing
            for given, example, surprise in zip(answers, batch.examples, nll, strict=True)
        ],
        "nll": nll,
        "answer": answers,
    }


def answer(
    vlm: VLM, task: Task, batch: Batch, replay: PrefixCache | None = None, name: Hashable = None
) -> tuple[list[str], list[float]]:
    """Greedy answers of a batch, and the negative log-likelihood per token of each right answer.

    A batch that runs out of memory is split in two, and stays split for this plan and all later ones. With `replay`,
    forward passes reuse the hidden states that this plan shares with the last one; `name` is the batch's key there.
    """
    if not batch.halves:
        once = partial(_answered, vlm, task, batch, replay, name)
        found = run_or_halve(once, batch.at_once or len(batch.examples), task.name, vlm.device)
        if found is not None:
            return found
        # a gallery is never split, since every image is compared with every caption: only its chunks shrink
        if batch.at_once:
            batch.at_once //= 2
            if replay:
                replay.clear()  # its hidden states belong to chunks of the old size
            return answer(vlm, task, batch, replay, name)
        if replay:
            # the halves have names of their own, so entries under this one would never be read again
            replay.leave_out(name)
            replay.leave_out((name, "questions"))
        _halve(vlm, task, batch)
    halves = [answer(vlm, task, half, replay, (name, i)) for i, half in enumerate(batch.halves)]
    return [one for answers, _ in halves for one in answers], [one for _, nll in halves for one in nll]


def _halve(vlm: VLM, task: Task, batch: Batch) -> None:
    """Replace a batch by two halves; questions of one image stay together where there is more than one image."""
    clusters = list(dict.fromkeys(example.cluster for example in batch.examples))
    first = set(clusters[: (len(clusters) + 1) // 2])
    middle = sum(example.cluster in first for example in batch.examples)
    middle = middle if len(clusters) > 1 else len(batch.examples) // 2
    for some in (batch.examples[:middle], batch.examples[middle:]):
        # a batch of whole prompts is halved into batches of whole prompts, so that `_answered` takes the same path
        batch.halves += batches(vlm, replace(task, examples=some), plain=not batch.prefix)
    batch.inputs.clear()


@torch.inference_mode()
def _answered(
    vlm: VLM, task: Task, batch: Batch, replay: PrefixCache | None, name: Hashable
) -> tuple[list[str], list[float]]:
    """Answers and likelihoods of one batch, by the fastest path that the batch was built for."""
    over = replay.over if replay else lambda *_: nullcontext()
    if task.gallery:
        return retrieval.ranked(vlm, task, batch.examples, lambda number: over((name, number), "vision"), batch.at_once)
    known = replay.answers.get(name) if replay else None
    if not batch.prefix:
        # drafts are checked against the argmax of the logits, which generate() takes only without penalties and
        # forced tokens
        if replay is None or not plainly_greedy(vlm):
            with over(name, "vision"):
                return whole_prompts.generated(vlm, task, batch)
        tokens, nll = whole_prompts.guessed(vlm, task, batch, known, partial(over, name, "vision", "connector"))
        replay.answers[name] = with_earlier_answers(known, tokens)
        return said_by(vlm, tokens, task), nll
    with over(name, "vision", "connector", "language"):
        cache, places = shared_images.looked_at(vlm, batch)
    # layers that were skipped wrote no keys and values: the prefix cache has those of an earlier plan
    image = replay.caches(name, cache) if replay else [(layer.keys, layer.values) for layer in cache.layers]
    questions = partial(over, (name, "questions"), "language")
    tokens, nll = shared_images.drafted(vlm, task, batch, image, places, known, questions)
    if replay:
        replay.answers[name] = with_earlier_answers(known, tokens)
    return said_by(vlm, tokens, task), nll
