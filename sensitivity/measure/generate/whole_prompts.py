"""Answers to whole prompts: by generate(), or by drafts that one forward pass verifies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sensitivity.measure.generate.answer_tokens import ends, hopeless, logits_from, mean_nll, padded, tail
from sensitivity.measure.generate.batches import Batch, placed
from sensitivity.measure.generate.drafts import Drafts, Known, left_off
from sensitivity.models.vlm import VLM
from sensitivity.tasks.examples.types import Task
from sensitivity.tasks.scoring.answer_text import without_special


def generated(vlm: VLM, task: Task, batch: Batch) -> tuple[list[str], list[float]]:
    """Answers by transformers' own generate(), and likelihoods by one more forward pass."""
    inputs = placed(vlm, batch.inputs)
    answers = vlm.processor.tokenizer.batch_decode(_generate(vlm, task, inputs), skip_special_tokens=True)
    logits = _predicted(vlm, inputs, batch.targets)
    return [without_special(text) for text in answers], mean_nll(logits, padded(batch.targets, -100).to(vlm.device))


def guessed(
    vlm: VLM,
    task: Task,
    batch: Batch,
    known: Known | None,
    over: Callable[..., AbstractContextManager[None]],
) -> tuple[list[list[int]], list[float]]:
    """Greedy answers from drafts: the right answers, then a neighboring plan's; only the other rows are generated.

    All plans read the right answers, so the prefix cache serves the language model in that pass, too.
    """
    inputs, ending = placed(vlm, batch.inputs), ends(vlm)

    def read(rows: list[int], drafts: list[list[int]], accepted: list[int]) -> Tensor:
        # the pass covers the whole batch, since its image features are cached as one; finished rows carry their targets
        every = [batch.targets[row] for row in range(len(batch.targets))]
        for row, draft in zip(rows, drafts, strict=True):
            every[row] = draft
        # only in the first pass do all plans read the same tokens, so only its language states can be shared
        with over(*([] if any(accepted) else ["language"])):
            logits = _predicted(vlm, inputs, every)[rows]
        return logits_from(logits, accepted, logits.shape[1] - min(accepted)) if any(accepted) else logits

    found, rules = Drafts.of(batch.targets), (ending, task.max_new_tokens, hopeless(vlm, task, batch.examples))
    logits = found.advance(read, *rules)
    nll = mean_nll(logits, padded(batch.targets, fill=-100).to(vlm.device))
    if found.guess(known):
        # a draft with the image's placeholder token would make the model look for the features of another image
        image = getattr(vlm.model.config, "image_token_id", None)
        aside = [row for row in found.left if image in found.tokens[row]]
        found.left = [row for row in found.left if row not in aside]
        if found.left:
            found.advance(read, *rules)
        found.left = sorted([*found.left, *aside])
    answers = found.answers
    if found.left:
        some, rows = inputs, list(range(len(answers)))
        # only inputs with one row per example can be cut to the unfinished rows: some families stack all patches
        if all(len(value) == len(answers) for value in inputs.values()):
            rows, some = found.left, {name: value[found.left] for name, value in inputs.items()}
        # cached image features are those of the whole batch
        with over() if some is inputs else nullcontext():
            written = _generate(vlm, task, some).tolist()
        for row, tokens in zip(rows, written, strict=True):
            length = next((i + 1 for i, token in enumerate(tokens) if token in ending), len(tokens))
            answers[row] = tokens[: left_off(row, tokens[:length], rules[2]) or length]
    return answers, nll


def _generate(vlm: VLM, task: Task, inputs: dict[str, Tensor]) -> Tensor:
    """The tokens that transformers' own greedy search generates after the prompts."""
    output: Tensor = vlm.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=task.max_new_tokens)
    return output[:, 1:] if vlm.encoder_decoder else output[:, inputs["input_ids"].shape[1] :]


def _predicted(vlm: VLM, inputs: dict[str, Tensor], drafts: Sequence[Sequence[int]]) -> Tensor:
    """Logits for each token of the drafts and the one after, by one forward pass over the whole prompts."""
    end = vlm.processor.tokenizer.eos_token_id
    words = padded([[*draft, end] for draft in drafts], fill=-100).to(vlm.device)
    if vlm.encoder_decoder:
        logits: Tensor = vlm.model(**inputs, labels=words, use_cache=False).logits
        return logits
    words = words[:, :-1]
    longer, ids = dict(inputs), words.clamp(min=0)
    longer["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    # masks and token types grow with the text; padding of drafts is on the right, out of causal sight
    for name, value in inputs.items():
        if name != "input_ids" and value.shape == inputs["input_ids"].shape:
            more = (words >= 0).to(value.dtype) if name == "attention_mask" else tail(vlm, name, value, ids)
            longer[name] = torch.cat([value, more], dim=1)
        elif value.ndim > 2 and value.shape[:2] == inputs["input_ids"].shape:  # which image each token may attend to
            longer[name] = torch.cat([value, value[:, -1:].expand(-1, ids.shape[1], *value.shape[2:])], dim=1)
    logits = vlm.model(**longer, use_cache=False).logits[:, -ids.shape[1] - 1 :]
    return logits
