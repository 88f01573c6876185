"""Runs a model on a task: its answers, their scores, and the likelihood of each right answer."""

from __future__ import annotations

import math
from collections.abc import Hashable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial

import torch

from sensitivity.measure.generate import retrieval, shared_images, whole_prompts
from sensitivity.measure.generate.answer_tokens import Answer, decoded_answers, greedy_takes_argmax
from sensitivity.measure.generate.batches import Batch, batches_by_image
from sensitivity.measure.generate.drafts import with_earlier_answers
from sensitivity.measure.memory.out_of_memory import run_or_halve
from sensitivity.measure.memory.prefix_cache import PrefixCache
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples.types import Example, Task

Rows = dict[str, list[str | float | bool]]  # rows of the examples table, stored by column


def evaluate(vlm: VLM, task: Task, plain: bool = False) -> Rows:
    """One row per example: its answer, its score, and the right answer's negative log-likelihood per token."""
    rows: Rows = {}
    for batch in batches_by_image(vlm, task, plain):
        for name, values in example_rows(task, batch, *answer(vlm, task, batch)).items():
            rows.setdefault(name, []).extend(values)
    return rows


def example_rows(task: Task, batch: Batch, answers: list[Answer], nll: list[float]) -> Rows:
    """The results of one batch as columns of the examples table, with every answer scored."""
    given = zip(task.scores([one.text for one in answers], batch.examples), batch.examples, strict=True)
    scores = [
        score if math.isfinite(one_nll) else 0.0  # NaN logits: the text means nothing
        for score, one_nll in zip([_number(task, *pair) for pair in given], nll, strict=True)
    ]
    return {
        "task": [task.name] * len(answers),
        "example": [example.id for example in batch.examples],
        "cluster": [example.cluster for example in batch.examples],
        "kind": [example.kind for example in batch.examples],
        "score": [*scores],
        "nll": [*nll],
        "answer": [given.text for given in answers],
        "cut": [given.cut for given in answers],
        "malformed": [task.is_malformed(given.text, score) for given, score in zip(answers, scores, strict=True)],
    }


def _number(task: Task, score: object, example: Example) -> float:
    """A score as a number; an error names the scorer of a task that returns another thing."""
    if not isinstance(score, str):
        with suppress(TypeError, ValueError, RuntimeError):  # each kind of array has an error of its own
            if math.isfinite(number := float(score)):  # type: ignore[arg-type]
                return number
    raise UserError(f"the scorer of {task.name} gave {score!r} for the example {example.id}, which is no number")


def answer(
    vlm: VLM, task: Task, batch: Batch, prefix_cache: PrefixCache | None = None, name: Hashable = None
) -> tuple[list[Answer], list[float]]:
    """Answers of a batch, greedy unless the task sets a search, and right answers' negative log-likelihood per token.

    A batch that runs out of memory is split in two, and stays split for this plan and all later ones; where a single
    example does, the hidden states that plans share are freed for good. With a prefix cache, forward passes reuse the
    hidden states that this plan shares with the previous one; `name` is the batch's key in that cache.
    """
    if not batch.halves:
        attempt = partial(_answered, vlm, task, batch, prefix_cache, name)
        at_once, release = batch.chunk_size or len(batch.examples), prefix_cache.release if prefix_cache else None
        answered = run_or_halve(attempt, at_once, task.name, vlm.device, release)
        if answered is not None:
            return answered
        if at_once == 1:  # hidden states were freed: the example may fit now
            return answer(vlm, task, batch, prefix_cache, name)
        # a gallery is never split, since every image is compared with every caption: only its chunks shrink
        if batch.chunk_size:
            batch.chunk_size //= 2
            if prefix_cache:
                prefix_cache.clear()  # its hidden states belong to chunks of the old size
            return answer(vlm, task, batch, prefix_cache, name)
        if prefix_cache:
            # the halves have names of their own, so entries under this one would never be read again
            prefix_cache.exclude(name)
            prefix_cache.exclude((name, "questions"))
        _halve(vlm, task, batch)
    halves = [answer(vlm, task, half, prefix_cache, (name, i)) for i, half in enumerate(batch.halves)]
    return [one for answers, _ in halves for one in answers], [one for _, nll in halves for one in nll]


def _halve(vlm: VLM, task: Task, batch: Batch) -> None:
    """Replace a batch by two halves; questions of one image stay together where there is more than one image."""
    clusters = list(dict.fromkeys(example.cluster for example in batch.examples))
    first = set(clusters[: (len(clusters) + 1) // 2])
    middle = sum(example.cluster in first for example in batch.examples)
    middle = middle if len(clusters) > 1 else len(batch.examples) // 2
    for examples in (batch.examples[:middle], batch.examples[middle:]):
        # a batch of whole prompts is halved into batches of whole prompts, so that `_answered` takes the same path
        batch.halves += batches_by_image(vlm, replace(task, examples=examples), plain=not batch.prefix)
    batch.inputs.clear()


@torch.inference_mode()
def _answered(
    vlm: VLM, task: Task, batch: Batch, prefix_cache: PrefixCache | None, name: Hashable
) -> tuple[list[Answer], list[float]]:
    """Answers and likelihoods of one batch, by the fastest path that the batch was built for."""
    reuse = prefix_cache.reuse if prefix_cache else lambda *_: nullcontext()
    if task.gallery:
        return retrieval.rank_matches(
            vlm, task, batch.examples, lambda number: reuse((name, number), "vision"), batch.chunk_size
        )
    earlier = prefix_cache.answers.get(name) if prefix_cache else None
    if not batch.prefix:
        # drafts are verified against the argmax of the logits, and generate() takes the argmax only if it has no
        # penalties and no forced tokens
        if prefix_cache is None or task.search or not greedy_takes_argmax(vlm):
            with reuse(name, "vision"):
                return whole_prompts.generated_answers(vlm, task, batch)
        tokens, nll = whole_prompts.drafted_answers(
            vlm, task, batch, earlier, partial(reuse, name, "vision", "connector")
        )
        prefix_cache.answers[name] = with_earlier_answers(earlier, tokens)
        return decoded_answers(vlm, tokens, task), nll
    with reuse(name, "vision", "connector", "language"):
        layers, positions = shared_images.prefill_images(vlm, batch)
    # layers that were skipped wrote no keys and values: the prefix cache has those of an earlier plan
    image = (
        prefix_cache.image_keys_and_values(name, layers)
        if prefix_cache
        else [layer for layer in layers if layer is not None]
    )
    questions = partial(reuse, (name, "questions"), "language")
    tokens, nll = shared_images.drafted_answers(vlm, task, batch, image, positions, earlier, questions)
    if prefix_cache:
        prefix_cache.answers[name] = with_earlier_answers(earlier, tokens)
    return decoded_answers(vlm, tokens, task), nll
