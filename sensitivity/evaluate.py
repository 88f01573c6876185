"""Model x task -> per-example answers and scores: greedy answers, and how likely the right one was."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sensitivity import searching
from sensitivity.drafts import Drafts
from sensitivity.errors import Notice, UserError
from sensitivity.models import VLM
from sensitivity.replay import Replay
from sensitivity.tasks import GALLERIES, SEARCHES, SHORT, Example, Task, open_image
from sensitivity.tasks.answers import without_special

Rows = dict[str, list[Any]]
Image = list[tuple[Tensor, Tensor]]  # keys and values of each layer for the images of a batch
IMAGES_PER_BATCH = 64


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


@dataclass
class Batch:
    """Examples as tensors. Where `prefix` is set, questions of one image share its tokens and are stored once."""

    examples: tuple[Example, ...]
    inputs: dict[str, Tensor]  # of the processor: for the images where there is a prefix, else for the whole prompts
    prefix: int = 0
    owner: list[int] = field(default_factory=list)  # which image each example is about
    prompts: list[list[int]] = field(default_factory=list)  # tokens after the prefix
    targets: list[list[int]] = field(default_factory=list)  # tokens of the first right answer, and the end
    halves: list[Batch] = field(default_factory=list)  # instead of all this, where it did not fit on the device


def answer(
    vlm: VLM, task: Task, batch: Batch, replay: Replay | None = None, name: Hashable = None
) -> tuple[list[str], list[float]]:
    """Greedy answers of a batch; one that does not fit on the device is halved, for this plan and all that follow.

    With `replay`, what this plan shares with the last one on the batch of this name is not computed again.
    """
    if not batch.halves:
        try:
            return _answered(vlm, task, batch, replay, name)
        except torch.OutOfMemoryError as error:
            if len(batch.examples) == 1 or task.gallery:
                why = f"a single example of {task.name} does not fit into the memory of {vlm.device}"
                raise UserError(f"{why}; choose a narrower --dtype or another --device") from error
        if replay:
            replay.leave_out(name)
            replay.leave_out((name, "questions"))
        _halve(vlm, task, batch)  # not while the error is handled: it holds on to the tensors that did fit
    found = [answer(vlm, task, half, replay, (name, i)) for i, half in enumerate(batch.halves)]
    return [one for answers, _ in found for one in answers], [one for _, nll in found for one in nll]


def _halve(vlm: VLM, task: Task, batch: Batch) -> None:
    """Two batches in the place of one, questions of one image together where there is more than one image."""
    if vlm.device.type == "cuda":
        torch.cuda.empty_cache()
    clusters = list(dict.fromkeys(example.cluster for example in batch.examples))
    first = set(clusters[: (len(clusters) + 1) // 2])
    middle = sum(example.cluster in first for example in batch.examples)
    middle = middle if len(clusters) > 1 else len(batch.examples) // 2
    for some in (batch.examples[:middle], batch.examples[middle:]):
        batch.halves += batches(vlm, replace(task, examples=some), plain=not batch.prefix)
    batch.inputs.clear()
    warnings.warn(f"out of memory on {vlm.device}: batches of {task.name} are halved", Notice, stacklevel=2)


@torch.inference_mode()
def _answered(
    vlm: VLM, task: Task, batch: Batch, replay: Replay | None, name: Hashable
) -> tuple[list[str], list[float]]:
    """By the fast path where the batch is made for it."""
    over = replay.over if replay else lambda *_: nullcontext()
    if task.gallery:
        return searching.ranked(vlm, task, batch.examples, lambda number: over((name, number), "vision"))
    earlier = replay.drafts.get(name) if replay else None
    if not batch.prefix:
        if replay is None or not _plainly_greedy(vlm):
            with over(name, "vision"):
                return _generated(vlm, task, batch)
        tokens, nll = _guessed(vlm, task, batch, earlier, partial(over, name, "vision", "connector"))
        replay.drafts[name] = tokens
        return [_said(vlm, draft, task) for draft in tokens], nll
    with over(name, "vision", "connector", "language"):
        cache = vlm.model(**_placed(vlm, batch.inputs), use_cache=True, logits_to_keep=1).past_key_values
    image = replay.caches(name, cache) if replay else [(layer.keys, layer.values) for layer in cache.layers]
    tokens, nll = _drafted(vlm, task, batch, image, earlier, lambda: over((name, "questions"), "language"))
    if replay:
        replay.drafts[name] = tokens
    return [_said(vlm, draft, task) for draft in tokens], nll


def batches(vlm: VLM, task: Task, plain: bool = False) -> Iterator[Batch]:
    """The task's examples as tensors, image by image; independent of any plan, so they can be kept."""
    if vlm.processor is None:
        raise UserError(f"{vlm.name} has no processor or tokenizer files; they are needed to run a task")
    if task.gallery:
        yield _gallery(vlm, task)
        return
    if not vlm.model.can_generate():
        searches = " and ".join([*SEARCHES, *(f"{name}:FOLDER" for name in GALLERIES)])
        raise UserError(f"{vlm.name} answers nothing: its tasks are {searches}")
    groups: dict[str, list[Example]] = {}
    for example in task.examples:
        groups.setdefault(example.cluster, []).append(example)
    clusters = list(groups.values())
    for start in range(0, len(clusters), IMAGES_PER_BATCH):
        chunk = clusters[start : start + IMAGES_PER_BATCH]
        shared = None if plain or not vlm.family.shares_prefix else _with_prefix(vlm, chunk)
        if shared is not None:
            yield shared
        else:
            examples = [example for cluster in chunk for example in cluster]
            for i in range(0, len(examples), IMAGES_PER_BATCH):
                yield _whole(vlm, tuple(examples[i : i + IMAGES_PER_BATCH]))


def _gallery(vlm: VLM, task: Task) -> Batch:
    """All that is looked for at once, read when it is needed; one example alone is a calibration's, as tensors."""
    searching.check(vlm)
    alone = searching.pair(vlm, task.examples[0]) if len(task.examples) == 1 else {}
    return Batch(task.examples, alone, targets=[[0]] * len(task.examples))


def prompt_text(vlm: VLM, example: Example) -> str:
    """The prompt as the model's own chat template or family wants it, with a place for one image."""
    if getattr(vlm.processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": example.prompt}]
        chat = [{"role": "user", "content": content}]
        return str(vlm.processor.apply_chat_template(chat, add_generation_prompt=True))
    if example.kind == "caption" and vlm.family.caption is not None:
        return vlm.family.caption
    question = example.prompt.removesuffix(SHORT) if vlm.family.brief else example.prompt
    return vlm.family.prompt.format(question)


# -- the plain path: one prompt per row, generated by transformers


def _whole(vlm: VLM, examples: tuple[Example, ...]) -> Batch:
    vlm.processor.tokenizer.padding_side = "left"
    inputs = vlm.processor(
        images=[[open_image(example.image)] for example in examples],
        text=[prompt_text(vlm, example) for example in examples],
        padding=True,
        return_tensors="pt",
    )
    return Batch(examples, dict(inputs), targets=[_target(vlm, example) for example in examples])


def _generated(vlm: VLM, task: Task, batch: Batch) -> tuple[list[str], list[float]]:
    inputs = _placed(vlm, batch.inputs)
    answers = vlm.processor.tokenizer.batch_decode(_generate(vlm, task, inputs), skip_special_tokens=True)
    logits = _predicted(vlm, inputs, batch.targets)
    return [without_special(text) for text in answers], _mean_nll(logits, _padded(batch.targets, -100).to(vlm.device))


def _generate(vlm: VLM, task: Task, inputs: dict[str, Tensor]) -> Tensor:
    """The tokens that transformers' own greedy search writes after the prompts."""
    output: Tensor = vlm.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=task.max_new_tokens)
    return output[:, 1:] if vlm.encoder_decoder else output[:, inputs["input_ids"].shape[1] :]


def _predicted(vlm: VLM, inputs: dict[str, Tensor], drafts: Sequence[Sequence[int]]) -> Tensor:
    """Logits that predict each token of the drafts and the one after, one forward pass over the whole prompts."""
    end = vlm.processor.tokenizer.eos_token_id
    words = _padded([[*draft, end] for draft in drafts], fill=-100).to(vlm.device)
    if vlm.encoder_decoder:
        logits: Tensor = vlm.model(**inputs, labels=words, use_cache=False).logits
        return logits
    words = words[:, :-1]
    longer, ids = dict(inputs), words.clamp(min=0)
    longer["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    for name, value in inputs.items():  # masks and token types grow with the text
        if name != "input_ids" and value.shape == inputs["input_ids"].shape:
            tail = (words >= 0).to(value.dtype) if name == "attention_mask" else torch.zeros_like(ids)
            longer[name] = torch.cat([value, tail], dim=1)
        elif value.ndim > 2 and value.shape[:2] == inputs["input_ids"].shape:  # which image each token may look at
            longer[name] = torch.cat([value, value[:, -1:].expand(-1, ids.shape[1], *value.shape[2:])], dim=1)
    logits = vlm.model(**longer, use_cache=False).logits[:, -ids.shape[1] - 1 :]
    return logits


# -- the fast path where prompts are whole: drafts, and generation for the rows whose drafts were wrong

HARMLESS = {  # settings of generation that do not touch greedy logits
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "do_sample",
    "temperature", "top_p", "top_k", "max_length", "max_new_tokens", "use_cache", "num_beams", "_from_model_config",
    "early_stopping", "length_penalty", "output_attentions", "output_hidden_states", "return_dict_in_generate",
}  # fmt: skip


def _plainly_greedy(vlm: VLM) -> bool:
    """Whether the likeliest token is what generation takes: no penalties, no forced or forbidden tokens."""
    return set(vlm.model.generation_config.to_diff_dict()) <= HARMLESS


def _guessed(
    vlm: VLM,
    task: Task,
    batch: Batch,
    earlier: list[list[int]] | None,
    over: Callable[..., AbstractContextManager[None]],
) -> tuple[list[list[int]], list[float]]:
    """Greedy answers by reading the right ones, then a neighbour's; only rows that differ from both are generated.

    All plans read the right answers, so that pass shares the language model's hidden states too.
    """
    inputs, ends = _placed(vlm, batch.inputs), _ends(vlm)

    def read(rows: list[int], drafts: list[list[int]]) -> Tensor:
        every = [batch.targets[row] for row in range(len(batch.targets))]
        for row, draft in zip(rows, drafts, strict=True):
            every[row] = draft
        with over(*([] if found.accepted[0] else ["language"])):
            return _predicted(vlm, inputs, every)[rows]

    found = Drafts.of(batch.targets)
    logits = found.advance(read, ends, task.max_new_tokens, once=task.exact)
    nll = _mean_nll(logits, _padded(batch.targets, fill=-100).to(vlm.device))
    if found.guess(earlier):
        # a model that says the image's own word would be sent looking for the features of another image
        image = getattr(vlm.model.config, "image_token_id", None)
        aside = [row for row in found.left if image in found.tokens[row]]
        found.left = [row for row in found.left if row not in aside]
        if found.left:
            found.advance(read, ends, task.max_new_tokens)
        found.left = sorted([*found.left, *aside])
    answers = found.answers
    if found.left:
        some, rows = inputs, list(range(len(answers)))
        if all(len(value) == len(answers) for value in inputs.values()):
            rows, some = found.left, {name: value[found.left] for name, value in inputs.items()}
        with over() if some is inputs else nullcontext():
            written = _generate(vlm, task, some).tolist()
        for row, tokens in zip(rows, written, strict=True):
            length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
            answers[row] = tokens[:length]
    return answers, nll


def _ends(vlm: VLM) -> set[int]:
    """The tokens that end an answer."""
    named = vlm.model.generation_config.eos_token_id
    return {vlm.processor.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}


# -- the fast path: an image's tokens once, its questions after them, the right answer as a draft


def _with_prefix(vlm: VLM, clusters: Sequence[Sequence[Example]]) -> Batch | None:
    """Images with their questions, if every prompt starts with the image; None where that does not hold."""
    image_token = vlm.model.config.image_token_id
    owner, prompts, pictures, prefix = [], [], [], None
    for index, cluster in enumerate(clusters):
        picture = open_image(cluster[0].image)
        texts = [prompt_text(vlm, example) for example in cluster]
        encoded = vlm.processor(images=[[picture]] * len(texts), text=texts)
        pictures.append(torch.as_tensor(encoded["pixel_values"][0]))
        for ids in encoded["input_ids"]:
            end = len(ids) - ids[::-1].index(image_token) if image_token in ids else 0
            head = list(ids[:end])
            prefix = prefix or head
            if head != prefix or not head:
                return None
            owner.append(index)
            prompts.append(list(ids[end:]))
    if prefix is None:
        return None
    inputs = {"pixel_values": torch.stack(pictures), "input_ids": torch.tensor([prefix] * len(clusters))}
    examples = tuple(example for cluster in clusters for example in cluster)
    return Batch(examples, inputs, len(prefix), owner, prompts, [_target(vlm, example) for example in examples])


def _drafted(
    vlm: VLM,
    task: Task,
    batch: Batch,
    image: Image,
    earlier: list[list[int]] | None,
    first: Callable[[], AbstractContextManager[None]],
) -> tuple[list[list[int]], list[float]]:
    """Greedy answers on top of the images, from drafts.

    The first draft is the right answer, so its likelihood comes along; where only that answer scores, a row is done
    after one pass. The second is what a neighbouring plan answered; then each pass goes on from the token that differs.
    """
    ends, found = _ends(vlm), Drafts.of(batch.targets)
    read = partial(_continue, vlm, batch, image)
    with first():  # later drafts are a plan's own, and shared with no other
        logits = found.advance(read, ends, task.max_new_tokens, once=task.exact)
    nll = _mean_nll(logits, _padded(batch.targets, fill=-100).to(vlm.device))
    while found.left:
        found.guess(earlier)
        found.advance(read, ends, task.max_new_tokens)
    return found.answers, nll


def _continue(vlm: VLM, batch: Batch, image: Image, rows: list[int], drafts: list[list[int]]) -> Tensor:
    """Logits that predict each draft token and the one after the draft, for some rows, on top of their images."""
    tails = [batch.prompts[row] + draft for row, draft in zip(rows, drafts, strict=True)]
    ids = _padded(tails, fill=0).to(vlm.device)  # to the right, where causal attention does not see it
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


def _said(vlm: VLM, tokens: list[int], task: Task) -> str:
    """The answer as text; an ellipsis where it was left off because it could no longer be right."""
    text = without_special(str(vlm.processor.tokenizer.decode(tokens, skip_special_tokens=True)))
    return text if tokens[-1] in _ends(vlm) or len(tokens) >= task.max_new_tokens else text + "…"


# -- shared


def _target(vlm: VLM, example: Example) -> list[int]:
    tokenizer = vlm.processor.tokenizer
    return [*tokenizer(example.answers[0], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def _mean_nll(logits: Tensor, targets: Tensor) -> list[float]:
    wide = logits[:, : targets.shape[1]].float()
    loss = torch.nn.functional.cross_entropy(wide.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    means: list[float] = (loss.sum(1) / (targets >= 0).sum(1)).tolist()
    return means


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def _placed(vlm: VLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    floats = vlm.model.dtype
    return {k: v.to(vlm.device, floats) if v.is_floating_point() else v.to(vlm.device) for k, v in inputs.items()}
