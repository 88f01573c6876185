"""Calibration data as model inputs, in batches of equal shapes, with the modality of every token."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sensitivity.measure.generate import batches as evaluated
from sensitivity.measure.generate.answer_tokens import with_answers
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples.images import image_key
from sensitivity.tasks.examples.types import Task

MODALITIES = ("padding", "vision", "prompt", "answer")
PADDING, VISION, PROMPT, ANSWER = range(4)
ROWS = 16  # examples in a batch, at most, so that memory does not grow with the data
Answered = tuple[int, dict[str, Tensor], list[int]]  # an example: its number in the data, its inputs, its right answer


@dataclass
class TokenBatch:
    """Inputs of a forward pass, the right answers included, and the modality of each position of its sequences."""

    inputs: dict[str, Tensor]
    sequences: Sequence[tuple[str, Tensor]]  # part, and its tokens' modalities (rows x positions)
    logits_to_keep: int = 1  # positions from the end that get logits: the input of an output head
    targets: Tensor | None = None  # the tokens of the right answers, end included, that the logits should predict
    examples: tuple[int, ...] = ()  # which examples of the data these are, in their order
    # what `modality` returned, by part and shape
    counted: dict[tuple[str, tuple[int, ...]], tuple[Tensor | None, Tensor]] = field(default_factory=dict)

    @property
    def prompts(self) -> list[list[int]]:
        """The tokens of each row's question, without the placeholders of the image."""
        _, kinds = self.sequences[0]
        rows = zip(self.inputs["input_ids"], kinds, strict=True)
        return [ids[kind == PROMPT].tolist() for ids, kind in rows]

    def modality(self, part: str, shape: torch.Size) -> tuple[Tensor | None, Tensor]:
        """The modality of each token of a layer's input (None if all are vision), and how many tokens each has.

        A layer whose input has the shape of one of its part's sequences reads that sequence; any other reads the image.
        """
        key = part, tuple(shape)
        if key not in self.counted:
            fits = (t for of, t in self.sequences if of == part and (t.shape == shape or (t.numel(),) == tuple(shape)))
            flat = next((t.reshape(-1) for t in fits), None)
            counts = torch.zeros(len(MODALITIES), dtype=torch.long)
            if flat is None:
                counts[VISION] = shape.numel()
            else:
                counts += torch.bincount(flat.cpu(), minlength=len(MODALITIES))
            self.counted[key] = flat, counts
        return self.counted[key]


def answer_batches(vlm: VLM, tasks: Sequence[Task], rows: int = ROWS) -> Iterator[TokenBatch]:
    """All examples with their first right answers; only examples of equal shapes share a batch, so none is padded."""
    waiting: dict[Hashable, list[Answered]] = {}
    number = 0
    for task in tasks:
        for example in task.examples:
            (one,) = evaluated.batches_by_image(vlm, replace(task, examples=(example,)), plain=True)
            target_tokens = one.targets[0]
            shapes = tuple((name, tuple(value.shape)) for name, value in sorted(one.inputs.items()))
            group = waiting.setdefault((shapes, len(target_tokens)), [])
            group.append((number, one.inputs, target_tokens))
            number += 1
            if len(group) == min(rows, evaluated.images_at_once(one.inputs["pixel_values"].numel())):
                yield _stacked(vlm, waiting.pop((shapes, len(target_tokens))))
    for group in waiting.values():
        yield _stacked(vlm, group)


def _stacked(vlm: VLM, group: Sequence[Answered]) -> TokenBatch:
    """One batch of examples with equal shapes, with the answers appended to the prompts."""
    inputs = {name: torch.cat([one[name] for _, one, _ in group]) for name in group[0][1]}
    targets = torch.tensor([target_tokens for _, _, target_tokens in group], dtype=torch.long)
    answers = targets[:, :-1]  # the end token is predicted, never read
    prompt = inputs["input_ids"]
    text = torch.full_like(prompt, PROMPT)
    text[prompt == image_token(vlm.model)] = VISION
    if "attention_mask" in inputs:
        text[inputs["attention_mask"] == 0] = PADDING
    answer_modalities = torch.full_like(answers, ANSWER)
    # positions that get logits: the last of the prompt, and the answer
    logit_modalities = torch.cat([torch.full_like(prompt[:, :1], PROMPT), answer_modalities], dim=1)
    inputs = evaluated.on_device(vlm, inputs)
    answers = answers.to(vlm.device)
    if vlm.encoder_decoder:
        start = torch.full((len(answers), 1), vlm.model.config.get_text_config().decoder_start_token_id or 0)
        inputs["decoder_input_ids"] = torch.cat([start.to(answers), answers], dim=1)
        answer_modalities = torch.full(inputs["decoder_input_ids"].shape, ANSWER)
    else:
        inputs = with_answers(vlm, inputs, answers, torch.ones_like(answers))
        text = torch.cat([text, answer_modalities], dim=1)
    sequences = [
        ("language", text),
        ("language", answer_modalities),
        ("language", logit_modalities),
        *_qformer_sequences(vlm, inputs),
    ]
    placed = [(part, t.to(vlm.device)) for part, t in sequences]
    numbers = tuple(number for number, _, _ in group)
    return TokenBatch(inputs, placed, logit_modalities.shape[1], targets.to(vlm.device), numbers)


def _qformer_sequences(vlm: VLM, inputs: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Sequences of a Q-Former that also reads the question (InstructBLIP): queries with text, and text alone."""
    if "qformer_input_ids" not in inputs:
        return []
    text = torch.full_like(inputs["qformer_input_ids"], PROMPT)
    text[inputs["qformer_attention_mask"] == 0] = PADDING
    queries = torch.full((len(text), vlm.model.config.num_query_tokens), VISION).to(text)
    return [("connector", torch.cat([queries, text], dim=1)), ("connector", text)]


def image_token(model: nn.Module) -> int:
    """The id of the placeholder token for image features; -1 if there is none."""
    ids = [getattr(model.config, name, None) for name in ("image_token_id", "image_token_index")]
    return next((int(token) for token in ids if token is not None), -1)


def calibration_pass(vlm: VLM, batch: TokenBatch) -> Any:  # the class of the output differs by family
    """The output of one forward pass without a cache, with logits of the answer alone where the model offers that."""
    options = evaluated.known_options(vlm, use_cache=False, logits_to_keep=batch.logits_to_keep)
    return vlm.model(**batch.inputs, **options)


def check_disjoint(calibration: Sequence[Task], evaluation: Sequence[Task]) -> None:
    """Raise an error if an example or image of the calibration data is also evaluated."""
    used = {example.id for task in evaluation for example in task.examples}
    images = {image_key(one) for task in evaluation for example in task.examples for one in example.images}
    for task in calibration:
        for example in task.examples:
            if example.id in used or not images.isdisjoint(map(image_key, example.images)):
                raise UserError(
                    f"calibration example {example.id} of {task.name} is also evaluated on, which favors calibrated "
                    'methods; give it a split of its own ("split": "calibration" in a .jsonl file)'
                )
