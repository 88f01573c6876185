"""Answers as tokens: right answers, end tokens, decoding to text, and likelihoods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples.types import Example, Task
from sensitivity.tasks.scoring.answer_text import without_special

WITHOUT_EFFECT = {  # generation settings that leave greedy decoding as it is: the argmax of the logits
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "do_sample",
    "temperature", "top_p", "top_k", "max_length", "max_new_tokens", "use_cache", "num_beams", "_from_model_config",
    "early_stopping", "length_penalty", "output_attentions", "output_hidden_states", "return_dict_in_generate",
}  # fmt: skip


class Answer(NamedTuple):
    """An answer as text, and whether generation stopped at the limit of tokens instead of at an end token."""

    text: str
    cut: bool = False


def target_tokens(vlm: VLM, example: Example) -> list[int]:
    """The tokens of an example's first right answer, with the end token."""
    tokenizer = vlm.processor.tokenizer
    check_no_image_token(vlm, example.answers[0], f"the first right answer of example {example.id}")
    return [*tokenizer(example.answers[0], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def check_no_image_token(vlm: VLM, text: str, what: str) -> None:
    """Raise an error if a text holds the token that stands for image features: it would be taken for an image."""
    token = getattr(vlm.processor, "image_token", None)
    if isinstance(token, str) and token and token in text:
        raise UserError(f"{what} holds {token}, by which {vlm.name} marks images; write it differently")


def end_tokens(vlm: VLM) -> set[int]:
    """The tokens that end a generated answer."""
    named = vlm.text_generator.generation_config.eos_token_id
    return {*(named if isinstance(named, list) else [named])} - {None}


def greedy_takes_argmax(vlm: VLM) -> bool:
    """Whether generation takes the most likely token: no penalties, no forced or forbidden tokens."""
    config = vlm.text_generator.generation_config
    # right answers are read after the start token of config.json, so generate() must begin with the same one
    if vlm.encoder_decoder:
        starts = {config.decoder_start_token_id, vlm.model.config.get_text_config().decoder_start_token_id}
        if len(starts - {None}) > 1:
            return False
    return set(config.to_diff_dict()) <= WITHOUT_EFFECT


def continued(vlm: VLM, name: str, value: Tensor, ids: Tensor) -> Tensor:
    """A mask or token types for the text tokens `ids` after a prompt, as generate() itself continues them."""
    if not vlm.model.can_generate():  # a retrieval model, which reads plain text
        return torch.full_like(ids, int(name == "attention_mask"), dtype=value.dtype)
    more = vlm.model._update_model_kwargs_for_generation({}, {name: value}, is_encoder_decoder=False)
    last: Tensor = more[name][:, -1:]
    return last.expand(ids.shape)


def with_answers(vlm: VLM, inputs: Mapping[str, Tensor], answers: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The inputs of whole prompts with answers after them; masks and token types grow with the text.

    `mask` is 0 where answers are padded on the right.
    """
    longer, prompts = dict(inputs), inputs["input_ids"]
    for name, value in inputs.items():
        if value.shape == prompts.shape:
            more = {"input_ids": answers, "attention_mask": mask}.get(name)
            more = continued(vlm, name, value, answers) if more is None else more
            longer[name] = torch.cat([value, more.to(value.dtype)], dim=1)
        elif value.ndim > 2 and value.shape[:2] == prompts.shape and name.endswith("mask"):
            # which image each token may attend to (Mllama): an answer sees what the last token of its prompt sees
            last = value[:, -1:].expand(-1, answers.shape[1], *value.shape[2:])
            longer[name] = torch.cat([value, last], dim=1)
    return longer


def cannot_be_right(vlm: VLM, task: Task, examples: Sequence[Example]) -> Callable[[int, list[int]], bool] | None:
    """A test whether a row's tokens can no longer become a right answer; None unless only exact answers count."""
    if not task.exact:
        return None
    right = [[_squeezed(answer) for answer in example.answers] for example in examples]
    squeezed = cache(lambda tokens: _squeezed(_text(vlm, tokens)))  # rows share the same few answers

    def test(row: int, tokens: list[int]) -> bool:
        text = squeezed(tuple(tokens))
        # the last token may be part of a character, or of a special token that is removed: then it proves nothing
        unsettled = text.endswith("\N{REPLACEMENT CHARACTER}") or text.rfind("<") > text.rfind(">")
        return not unsettled and not any(answer.startswith(text) for answer in right[row])

    return test


def _squeezed(text: str) -> str:
    """A text in lower case without white space, some of which a tokenizer may strip later."""
    return "".join(text.casefold().split())


def _text(vlm: VLM, tokens: list[int]) -> str:
    """Tokens as text, without special tokens."""
    return without_special(str(vlm.processor.tokenizer.decode(tokens, skip_special_tokens=True)))


def answer_of(vlm: VLM, tokens: list[int], task: Task) -> Answer:
    """The answer, with an ellipsis where decoding stopped because it could no longer be right."""
    text, ended = _text(vlm, tokens), tokens[-1] in end_tokens(vlm)
    if ended or len(tokens) >= task.max_new_tokens:
        return Answer(text, cut=not ended)
    return Answer(text + "…")


def decoded_answers(vlm: VLM, rows: Sequence[Sequence[int]], task: Task) -> list[Answer]:
    """Each row's answer; equal rows are decoded once."""
    once = cache(lambda tokens: answer_of(vlm, list(tokens), task))
    return [once(tuple(tokens)) for tokens in rows]


def mean_nll(logits: Tensor, targets: Tensor) -> list[float]:
    """The mean negative log-likelihood of each row's target tokens; a target of -100 is padding."""
    wide = logits[:, : targets.shape[1]].float()
    loss = torch.nn.functional.cross_entropy(wide.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    means: list[float] = (loss.sum(1) / (targets >= 0).sum(1)).tolist()
    return means


def logits_from(logits: Tensor, starts: Sequence[int], count: int) -> Tensor:
    """`count` positions of each row's logits, from the row's own start; the last one repeats beyond the end."""
    first = torch.tensor(starts, device=logits.device)[:, None]
    where = (first + torch.arange(count, device=logits.device)).clamp(max=logits.shape[1] - 1)
    return logits.gather(1, where[:, :, None].expand(-1, -1, logits.shape[-1]))


def right_padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Rows of tokens as one tensor, padded on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])
