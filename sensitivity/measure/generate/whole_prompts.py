"""Answers to whole prompts: by generate(), or by drafts that one forward pass verifies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from sensitivity.measure.generate.answer_tokens import (
    Answer,
    cannot_be_right,
    end_tokens,
    logits_from,
    mean_nll,
    right_padded,
    with_answers,
)
from sensitivity.measure.generate.batches import Batch, known_options, on_device
from sensitivity.measure.generate.drafts import Drafts, EarlierAnswers, decided_length
from sensitivity.models.vlm import VLM
from sensitivity.tasks.examples.types import Task
from sensitivity.tasks.scoring.answer_text import without_special


def generated_answers(vlm: VLM, task: Task, batch: Batch) -> tuple[list[Answer], list[float]]:
    """Answers by transformers' own generate(), and likelihoods from one more forward pass."""
    inputs = on_device(vlm, batch.inputs)
    tokens, ends = _generate(vlm, task, inputs), end_tokens(vlm)
    texts = vlm.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    cut = [len(row) >= task.max_new_tokens and ends.isdisjoint(row) for row in tokens.tolist()]
    logits = answer_logits(vlm, inputs, batch.targets)
    nll = mean_nll(logits, right_padded(batch.targets, fill=-100).to(vlm.device))
    return [Answer(without_special(text), short) for text, short in zip(texts, cut, strict=True)], nll


def drafted_answers(
    vlm: VLM,
    task: Task,
    batch: Batch,
    earlier: EarlierAnswers | None,
    reuse: Callable[..., AbstractContextManager[None]],
) -> tuple[list[list[int]], list[float]]:
    """Greedy answers from drafts: the right answers, then a neighboring plan's; only unfinished rows are generated.

    All plans read the right answers, so the prefix cache serves the language model in that pass, too.
    """
    inputs, stop_tokens = on_device(vlm, batch.inputs), end_tokens(vlm)

    def forward(rows: list[int], drafts: list[list[int]], accepted: list[int]) -> Tensor:
        # the pass covers the whole batch, since its image features are cached as one; finished rows carry their targets
        drafts_of_batch = [batch.targets[row] for row in range(len(batch.targets))]
        for row, draft in zip(rows, drafts, strict=True):
            drafts_of_batch[row] = draft
        # only in the first pass do all plans read the same tokens, so only its language states can be shared
        with reuse(*([] if any(accepted) else ["language"])):
            logits = answer_logits(vlm, inputs, drafts_of_batch)[rows]
        return logits_from(logits, accepted, logits.shape[1] - min(accepted)) if any(accepted) else logits

    state = Drafts.of(batch.targets)
    rules = stop_tokens, task.max_new_tokens, cannot_be_right(vlm, task, batch.examples)
    logits = state.verify(forward, *rules)
    nll = mean_nll(logits, right_padded(batch.targets, fill=-100).to(vlm.device))
    if state.take_earlier_answers(earlier):
        # a draft with the image's placeholder token would make the model look for the features of another image
        image = getattr(vlm.model.config, "image_token_id", None)
        with_image_token = [row for row in state.unfinished if image in state.tokens[row]]
        state.unfinished = [row for row in state.unfinished if row not in with_image_token]
        if state.unfinished:
            state.verify(forward, *rules)
        state.unfinished = sorted([*state.unfinished, *with_image_token])
    answers = state.answers
    for row, tokens in _generated_rows(vlm, task, inputs, state, reuse):
        length = next((i + 1 for i, token in enumerate(tokens) if token in stop_tokens), len(tokens))
        answers[row] = tokens[: decided_length(row, tokens[:length], rules[2]) or length]
    return answers, nll


def _generated_rows(
    vlm: VLM,
    task: Task,
    inputs: dict[str, Tensor],
    state: Drafts,
    reuse: Callable[..., AbstractContextManager[None]],
) -> list[tuple[int, list[int]]]:
    """Rows and their tokens, as generate() writes them: the unfinished rows, or the whole batch if it cannot be cut."""
    if not state.unfinished:
        return []
    inputs_left, rows = inputs, list(range(len(state.tokens)))
    # only inputs with one row per example can be cut to the unfinished rows: some families stack all patches
    if all(len(value) == len(rows) for value in inputs.values()):
        rows, inputs_left = state.unfinished, {name: value[state.unfinished] for name, value in inputs.items()}
    # cached image features are those of the whole batch
    with reuse() if inputs_left is inputs else nullcontext():
        written = _generate(vlm, task, inputs_left).tolist()
    return list(zip(rows, written, strict=True))


def _generate(vlm: VLM, task: Task, inputs: dict[str, Tensor]) -> Tensor:
    """The tokens that transformers' own search generates after the prompts: greedy, unless the task sets a search."""
    options = {"do_sample": False, "num_beams": 1, **task.search}
    output: Tensor = vlm.model.generate(**inputs, max_new_tokens=task.max_new_tokens, **options)
    return output[:, 1:] if vlm.encoder_decoder else output[:, inputs["input_ids"].shape[1] :]


def answer_logits(vlm: VLM, inputs: dict[str, Tensor], drafts: Sequence[Sequence[int]]) -> Tensor:
    """Logits for each token of the drafts and the one after, by one forward pass over the whole prompts."""
    end = vlm.processor.tokenizer.eos_token_id
    labels = right_padded([[*draft, end] for draft in drafts], fill=-100).to(vlm.device)
    if vlm.encoder_decoder:
        logits: Tensor = vlm.model(**inputs, labels=labels, use_cache=False).logits
        return logits
    labels = labels[:, :-1]
    # drafts are padded on the right, where causal attention never looks
    longer, keep = with_answers(vlm, inputs, labels.clamp(min=0), labels >= 0), labels.shape[1] + 1
    logits = vlm.model(**longer, **known_options(vlm, use_cache=False, logits_to_keep=keep)).logits[:, -keep:]
    return logits
