"""Ranks a gallery for each image and caption: by embeddings, then by reading the best pairs together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from sensitivity.models.families import SEARCHERS
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples.images import open_image
from sensitivity.tasks.examples.types import Example, Task
from sensitivity.tasks.retrieval import ranks, reranked

CHUNK = 64  # images or captions in a forward pass, or four times as many pairs
WORDS = 35  # tokens of a caption, at most, as in the published evaluation
WARMTH = 0.07  # temperature of the softmax over similarities: where BLIP-2's training begins
Over = Callable[[Hashable], AbstractContextManager[None]]


def check(vlm: VLM) -> None:
    """Raise an error if the model has no head that matches images with texts."""
    if not hasattr(vlm.model, "itm_head"):
        raise UserError(f"{vlm.name} cannot search, having no head that matches images with texts; take {SEARCHERS}")


def pair(vlm: VLM, example: Example) -> dict[str, Tensor]:
    """An image with its caption, as the model's own forward reads them in calibration."""
    return dict(vlm.processor(images=[open_image(example.image)], text=[example.answers[0]], return_tensors="pt"))


@torch.inference_mode()
def ranked(
    vlm: VLM, task: Task, examples: Sequence[Example], over: Over, at_once: int = CHUNK
) -> tuple[list[str], list[float]]:
    """For each example the rank of its first right match, and the right matches' negative log-likelihood.

    `over` lets the vision tower reuse hidden states of images under the same name; `at_once` images or captions, and
    four times as many pairs, share a forward pass.
    """
    assert task.gallery is not None
    found: dict[str, tuple[str, float]] = {}
    for number, pool in enumerate(_pools(examples, task.gallery.pool)):
        found |= _searched(vlm, pool, task.gallery.top, partial(_named, over, number), at_once)
    return [found[e.id][0] for e in examples], [found[e.id][1] for e in examples]


def _named(over: Over, pool: int, chunk: Hashable) -> AbstractContextManager[None]:
    """The prefix cache for one chunk of one pool."""
    return over((pool, chunk))


def _pools(examples: Sequence[Example], images: int) -> Iterator[list[Example]]:
    """The examples of so many images at a time; each pool is searched by itself."""
    clusters = list(dict.fromkeys(example.cluster for example in examples))
    for start in range(0, len(clusters), images):
        here = set(clusters[start : start + images])
        yield [example for example in examples if example.cluster in here]


def _searched(vlm: VLM, pool: Sequence[Example], top: int, over: Over, at_once: int) -> dict[str, tuple[str, float]]:
    """Rank and negative log-likelihood of each example in one pool."""
    images = list({example.cluster: example for example in pool}.values())
    place = {example.cluster: i for i, example in enumerate(images)}
    asked = {"text": [e for e in pool if e.kind == "text"], "image": [e for e in pool if e.kind == "image"]}
    owner = np.array([place[example.cluster] for example in asked["image"]])
    seen, pictured = _looked(vlm, images, over, at_once)
    ids, mask, meant = _read(vlm, [example.prompt for example in asked["image"]], at_once)
    similar = np.concatenate([_similar(chunk, meant) for chunk in torch.split(pictured, at_once)])
    again = _together(vlm, seen, ids, mask, _first(similar, top), at_once)
    result: dict[str, tuple[str, float]] = {}
    for way, scores, again_scores in (("text", similar, again), ("image", similar.T, again.T)):
        rows = np.array([place[e.cluster] for e in asked["text"]]) if way == "text" else np.arange(len(owner))
        mine = owner[None, :] == rows[:, None] if way == "text" else owner[:, None] == np.arange(len(images))[None, :]
        last = reranked(scores[rows], again_scores[rows], top) if top else scores[rows]
        order = ranks(last, mine)
        surprise = _surprise(scores[rows], mine)
        result |= {e.id: (str(r + 1), float(s)) for e, r, s in zip(asked[way], order, surprise, strict=True)}
    return result


def _looked(vlm: VLM, images: Sequence[Example], over: Over, at_once: int) -> tuple[list[Tensor], Tensor]:
    """The patch features of every image, and its queries' embeddings in the space shared with captions."""
    seen, pictured = [], []
    for number, chunk in enumerate(_chunks(images, at_once)):
        pictures = [open_image(example.image) for example in chunk]
        pixels = vlm.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        with over(number):
            patches = vlm.model.vision_model(pixel_values=pixels.to(vlm.device, vlm.model.dtype)).last_hidden_state
        tokens = vlm.model.query_tokens.expand(len(chunk), -1, -1)
        queries = vlm.model.qformer(query_embeds=tokens, encoder_hidden_states=patches).last_hidden_state
        seen.append(patches)
        pictured.append(_projected(vlm.model.vision_projection, queries))
    return seen, torch.cat(pictured)


def _read(vlm: VLM, captions: Sequence[str], at_once: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and mask of every caption, and its embedding in the shared space: that of its first token."""
    tokenizer = vlm.processor.tokenizer
    tokenizer.padding_side = "right"  # the first token's embedding stands for the text
    encoded = tokenizer(list(captions), padding=True, truncation=True, max_length=WORDS, return_tensors="pt")
    ids, mask = encoded["input_ids"].to(vlm.device), encoded["attention_mask"].to(vlm.device)
    meant = []
    for some, there in zip(torch.split(ids, at_once), torch.split(mask, at_once), strict=True):
        words = vlm.model.embeddings(input_ids=some)
        read = vlm.model.qformer(query_embeds=words, query_length=0, attention_mask=there).last_hidden_state
        meant.append(_projected(vlm.model.text_projection, read[:, 0]))
    return ids, mask, torch.cat(meant)


def _projected(linear: Any, features: Tensor) -> Tensor:
    """Features projected into the shared space, at unit length."""
    placed: Tensor = normalize(linear(features.to(linear.weight.dtype)), dim=-1)
    return placed


def _similar(pictured: Tensor, meant: Tensor) -> NDArray[np.float64]:
    """Images by captions: the similarity of the query that is closest to the caption."""
    found: NDArray[np.float64] = torch.einsum("iqd,td->iqt", pictured, meant).amax(1).double().cpu().numpy()
    return found


def _first(similar: NDArray[np.float64], top: int) -> NDArray[np.bool_]:
    """The pairs to read together: the most similar of each image, and of each caption."""
    chosen = np.zeros(similar.shape, bool)
    np.put_along_axis(chosen, np.argsort(-similar, axis=1, kind="stable")[:, :top], True, axis=1)
    np.put_along_axis(chosen, np.argsort(-similar, axis=0, kind="stable")[:top], True, axis=0)
    return chosen


def _together(
    vlm: VLM, seen: Sequence[Tensor], ids: Tensor, mask: Tensor, chosen: NDArray[np.bool_], at_once: int
) -> NDArray[np.float64]:
    """Matching scores of the chosen pairs: the mean over queries that read image and caption together."""
    scores = np.zeros(chosen.shape)
    pairs = np.argwhere(chosen)
    for start in range(0, len(pairs), 4 * at_once):
        rows, columns = pairs[start : start + 4 * at_once].T
        patches = torch.stack([seen[row // at_once][row % at_once] for row in rows.tolist()])
        words, there = ids[columns.tolist()], mask[columns.tolist()]
        tokens = vlm.model.query_tokens.expand(len(rows), -1, -1)
        queries = tokens.shape[1]
        read = vlm.model.qformer(
            query_embeds=vlm.model.embeddings(input_ids=words, query_embeds=tokens),
            query_length=queries,
            attention_mask=torch.cat([there.new_ones(len(rows), queries), there], dim=1),
            encoder_hidden_states=patches,
        ).last_hidden_state[:, :queries]
        head = vlm.model.itm_head
        scores[rows, columns] = head(read.to(head.weight.dtype)).mean(1)[:, 1].double().cpu().numpy()
    return scores


def _surprise(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The right matches' negative log-likelihood under a softmax over similarities."""
    warm = scores / WARMTH
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        every: NDArray[np.float64] = np.logaddexp.reduce(warm, axis=1)
        mine: NDArray[np.float64] = np.logaddexp.reduce(np.where(right, warm, -np.inf), axis=1)
        surprise: NDArray[np.float64] = every - mine
    return surprise


def _chunks(examples: Sequence[Example], at_once: int) -> Iterator[Sequence[Example]]:
    """The examples in portions of `at_once`."""
    for start in range(0, len(examples), at_once):
        yield examples[start : start + at_once]
