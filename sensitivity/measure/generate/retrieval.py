"""Ranks a gallery for each image and caption: by embeddings, then by reading the best pairs together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from sensitivity.measure.generate.answer_tokens import Answer
from sensitivity.models.families import RETRIEVAL_MODELS
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples.images import open_image
from sensitivity.tasks.examples.types import Example, Task
from sensitivity.tasks.retrieval import ranks, reranked

CHUNK = 64  # images or captions in a forward pass, or four times as many pairs
CAPTION_TOKENS = 35  # tokens of a caption, at most, as in BLIP-2's published evaluation
TEMPERATURE = 0.07  # of the softmax over similarities: the value that BLIP-2's training starts with
Reuse = Callable[[Hashable], AbstractContextManager[None]]


def check_retrieval_model(vlm: VLM) -> None:
    """Raise an error if the model has no head that matches images with texts."""
    if not hasattr(vlm.model, "itm_head"):
        raise UserError(
            f"{vlm.name} cannot search, having no head that matches images with texts; take {RETRIEVAL_MODELS}"
        )


def pair(vlm: VLM, example: Example) -> dict[str, Tensor]:
    """An image with its caption, as the model's own forward reads them in calibration."""
    return dict(vlm.processor(images=[open_image(example.image)], text=[example.answers[0]], return_tensors="pt"))


@torch.inference_mode()
def rank_matches(
    vlm: VLM, task: Task, examples: Sequence[Example], reuse: Reuse, chunk_size: int = CHUNK
) -> tuple[list[Answer], list[float]]:
    """For each example the rank of its first right match, and the right matches' negative log-likelihood.

    `reuse` lets the vision tower reuse hidden states of images under the same name; `chunk_size` images or captions,
    and four times as many pairs, share a forward pass.
    """
    assert task.gallery is not None
    best: dict[str, tuple[str, float]] = {}
    for number, pool in enumerate(_pools(examples, task.gallery.pool)):
        best |= _rank_pool(vlm, pool, task.gallery.top, partial(_reuse_in_pool, reuse, number), chunk_size)
    return [Answer(best[e.id][0]) for e in examples], [best[e.id][1] for e in examples]


def _reuse_in_pool(reuse: Reuse, pool: int, chunk: Hashable) -> AbstractContextManager[None]:
    """`reuse`, under a name that no chunk of another pool has."""
    return reuse((pool, chunk))


def _pools(examples: Sequence[Example], images: int) -> Iterator[list[Example]]:
    """The examples in pools of so many images; each pool is searched by itself."""
    clusters = list(dict.fromkeys(example.cluster for example in examples))
    for start in range(0, len(clusters), images):
        here = set(clusters[start : start + images])
        yield [example for example in examples if example.cluster in here]


def _rank_pool(
    vlm: VLM, pool: Sequence[Example], top: int, reuse: Reuse, chunk_size: int
) -> dict[str, tuple[str, float]]:
    """Rank and negative log-likelihood of each example in one pool."""
    images = list({example.cluster: example for example in pool}.values())
    image_index = {example.cluster: i for i, example in enumerate(images)}
    examples_by_kind = {"text": [e for e in pool if e.kind == "text"], "image": [e for e in pool if e.kind == "image"]}
    image_of_caption = np.array([image_index[example.cluster] for example in examples_by_kind["image"]])
    patches_of, image_embeddings = _embed_images(vlm, images, reuse, chunk_size)
    ids, mask, caption_embeddings = _embed_captions(
        vlm, [example.prompt for example in examples_by_kind["image"]], chunk_size
    )
    similarity = np.concatenate(
        [_similarity(chunk, caption_embeddings) for chunk in torch.split(image_embeddings, chunk_size)]
    )
    match_scores = _match_scores(vlm, patches_of, ids, mask, _pairs_to_match(similarity, top), chunk_size)
    result: dict[str, tuple[str, float]] = {}
    # an example of kind "text" ranks the captions for its image, and one of kind "image" the images for its caption
    for kind, scores, matched in (("text", similarity, match_scores), ("image", similarity.T, match_scores.T)):
        if kind == "text":
            rows = np.array([image_index[example.cluster] for example in examples_by_kind["text"]])
            right = image_of_caption[None, :] == rows[:, None]
        else:
            rows = np.arange(len(image_of_caption))
            right = image_of_caption[:, None] == np.arange(len(images))[None, :]
        final_scores = reranked(scores[rows], matched[rows], top) if top else scores[rows]
        order = ranks(final_scores, right)
        nll = _negative_log_likelihood(scores[rows], right)
        result |= {e.id: (str(r + 1), float(s)) for e, r, s in zip(examples_by_kind[kind], order, nll, strict=True)}
    return result


def _embed_images(vlm: VLM, images: Sequence[Example], reuse: Reuse, chunk_size: int) -> tuple[list[Tensor], Tensor]:
    """The patch features of every image, and its queries' embeddings in the space shared with captions."""
    patches_of, image_embeddings = [], []
    for number, chunk in enumerate(_chunks(images, chunk_size)):
        pictures = [open_image(example.image) for example in chunk]
        pixels = vlm.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        with reuse(number):
            patches = vlm.model.vision_model(pixel_values=pixels.to(vlm.device, vlm.model.dtype)).last_hidden_state
        tokens = vlm.model.query_tokens.expand(len(chunk), -1, -1)
        queries = vlm.model.qformer(query_embeds=tokens, encoder_hidden_states=patches).last_hidden_state
        patches_of.append(patches)
        image_embeddings.append(_projected(vlm.model.vision_projection, queries))
    return patches_of, torch.cat(image_embeddings)


def _embed_captions(vlm: VLM, captions: Sequence[str], chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and mask of every caption, and its embedding in the shared space: that of its first token."""
    encoded = vlm.processor.tokenizer(
        list(captions),
        padding=True,
        padding_side="right",  # the first token's embedding stands for the text
        truncation=True,
        max_length=CAPTION_TOKENS,
        return_tensors="pt",
    )
    ids, mask = encoded["input_ids"].to(vlm.device), encoded["attention_mask"].to(vlm.device)
    caption_embeddings = []
    for some, token_mask in zip(torch.split(ids, chunk_size), torch.split(mask, chunk_size), strict=True):
        embedded = vlm.model.embeddings(input_ids=some)
        states = vlm.model.qformer(query_embeds=embedded, query_length=0, attention_mask=token_mask).last_hidden_state
        caption_embeddings.append(_projected(vlm.model.text_projection, states[:, 0]))
    return ids, mask, torch.cat(caption_embeddings)


def _projected(linear: nn.Linear, features: Tensor) -> Tensor:
    """Features projected into the shared space, at unit length."""
    embeddings: Tensor = normalize(linear(features.to(linear.weight.dtype)), dim=-1)
    return embeddings


def _similarity(image_embeddings: Tensor, caption_embeddings: Tensor) -> NDArray[np.float64]:
    """Images by captions: the similarity of the query that is closest to the caption."""
    similarity: NDArray[np.float64] = (
        torch.einsum("iqd,td->iqt", image_embeddings, caption_embeddings).amax(1).double().cpu().numpy()
    )
    return similarity


def _pairs_to_match(similarity: NDArray[np.float64], top: int) -> NDArray[np.bool_]:
    """The pairs to read together: the most similar of each image, and of each caption."""
    to_match = np.zeros(similarity.shape, bool)
    np.put_along_axis(to_match, np.argsort(-similarity, axis=1, kind="stable")[:, :top], True, axis=1)
    np.put_along_axis(to_match, np.argsort(-similarity, axis=0, kind="stable")[:top], True, axis=0)
    return to_match


def _match_scores(
    vlm: VLM, patches_of: Sequence[Tensor], ids: Tensor, mask: Tensor, to_match: NDArray[np.bool_], chunk_size: int
) -> NDArray[np.float64]:
    """Matching scores of the chosen pairs: the mean over queries that read image and caption together."""
    scores = np.zeros(to_match.shape)
    pairs = np.argwhere(to_match)
    for start in range(0, len(pairs), 4 * chunk_size):
        rows, columns = pairs[start : start + 4 * chunk_size].T
        patches = torch.stack([patches_of[row // chunk_size][row % chunk_size] for row in rows.tolist()])
        embedded, token_mask = ids[columns.tolist()], mask[columns.tolist()]
        tokens = vlm.model.query_tokens.expand(len(rows), -1, -1)
        queries = tokens.shape[1]
        states = vlm.model.qformer(
            query_embeds=vlm.model.embeddings(input_ids=embedded, query_embeds=tokens),
            query_length=queries,
            attention_mask=torch.cat([token_mask.new_ones(len(rows), queries), token_mask], dim=1),
            encoder_hidden_states=patches,
        ).last_hidden_state[:, :queries]
        head = vlm.model.itm_head
        scores[rows, columns] = head(states.to(head.weight.dtype)).mean(1)[:, 1].double().cpu().numpy()
    return scores


def _negative_log_likelihood(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The right matches' negative log-likelihood under a softmax over similarities."""
    logits = scores / TEMPERATURE
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        every: NDArray[np.float64] = np.logaddexp.reduce(logits, axis=1)
        of_right: NDArray[np.float64] = np.logaddexp.reduce(np.where(right, logits, -np.inf), axis=1)
        nll: NDArray[np.float64] = every - of_right
    return nll


def _chunks(examples: Sequence[Example], chunk_size: int) -> Iterator[Sequence[Example]]:
    """The examples in portions of `chunk_size`."""
    for start in range(0, len(examples), chunk_size):
        yield examples[start : start + chunk_size]
