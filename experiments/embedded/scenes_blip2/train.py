"""Train embedded:scenes-blip2 and embedded:scenes-blip2-itm, starting from the vision tower of scenes-llava.

    python -m experiments.embedded.scenes_blip2.train            # both; about 45 minutes of one core
    python -m experiments.embedded.scenes_blip2.train --smoke --out OUT --work WORK    # a few steps of every stage

A stage whose checkpoint is in --work is not run again; delete the file to repeat it. The stages' logs are kept there,
too; the last line of each goes into card.json beside the model, which `evaluate` turns into a model card.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, normalize
from transformers import LlavaForConditionalGeneration

from experiments.embedded.batches import Batch, draw_batch
from experiments.embedded.scenes_blip2 import card as model_card
from experiments.embedded.scenes_blip2 import model as blip2
from experiments.embedded.scenes_blip2.training_heads import QuarterHeads, QuarterSymbols, captions, same_caption
from experiments.embedded.training import (
    EMBEDDED,
    WOBBLE,
    Log,
    Optimizer,
    Run,
    answer_loss,
    arguments,
    begin,
    distance,
    learn,
    learn_from_symbols,
    start_card,
)

STEPS = {"eye": 400, "cells": 1000, "contrast": 1200, "match": 500, "symbols": 800, "bridge": 600}
SIZES = {"eye": 48, "cells": 48, "contrast": 96, "match": 48, "symbols": 32, "bridge": 48}


# -- what the stages share


def look(model: Any, batch: Batch) -> Tensor:
    """The hidden states of the patches, from the frozen vision tower."""
    with torch.no_grad():
        seen: Tensor = model.vision_model(batch.pixels).last_hidden_state
    return seen


def query(model: Any, seen: Tensor) -> Tensor:
    """The Q-Former's output for its queries."""
    tokens = model.query_tokens.expand(len(seen), -1, -1)
    found: Tensor = model.qformer(query_embeds=tokens, encoder_hidden_states=seen).last_hidden_state
    return found


def answers(model: Any, batch: Batch, image: Tensor) -> tuple[Tensor, dict[str, float]]:
    words = model.get_input_embeddings().weight
    return answer_loss(model.language_model.model.decoder, words, batch, image, blip2.STYLE)


class Queries(nn.Module):
    """The query tokens as a module, so that they are saved and optimized like the others."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tokens = model.query_tokens


# -- stages of both models


def eye(run: Run) -> None:
    """Train the copied vision tower until it outputs the hidden states of the original."""
    folder = EMBEDDED / "scenes-llava"
    clip = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).model.vision_tower.eval()
    model = blip2.build().vision_model
    blip2.copy_vision_tower(clip, model, draw_batch(0, 64, 1).pixels)
    optimizer = Optimizer(run.total("eye"), (3e-4, [model.embeddings, model.encoder]))
    log = Log(run, "eye")
    for step, _, batch in run.batches("eye", wobble=WOBBLE / 2):
        with torch.no_grad():
            target = layer_norm(clip(batch.pixels).last_hidden_state, (blip2.WIDTH,))
        away = distance(model(batch.pixels).last_hidden_state[:, 1:], target[:, 1:])
        optimizer.step(away)
        log.add(step, distance=float(away.detach()))
    run.save("eye", vision=model)


def cells(run: Run) -> None:
    """Train the Q-Former so that each query describes the digit and its color in one quarter of the scene."""
    model, heads = blip2.build(), QuarterHeads()
    run.restore("eye", vision=model.vision_model)
    optimizer = Optimizer(run.total("cells"), (1.5e-3, [Queries(model), model.qformer, heads]))
    log = Log(run, "cells")
    for step, _, batch in run.batches("cells"):
        loss, right = heads(batch, query(model, look(model, batch)))
        optimizer.step(loss)
        log.add(step, loss=float(loss.detach()), **right)
    run.save("cells", qformer=model.qformer, queries=Queries(model), heads=heads)


# -- retrieval


def similarity(model: Any, image: Tensor, text: Tensor) -> Tensor:
    """Images x texts: the highest cosine similarity over an image's queries, as in BLIP-2."""
    images, texts = normalize(model.vision_projection(image), dim=-1), normalize(model.text_projection(text), dim=-1)
    return torch.einsum("iqd,td->iqt", images, texts).amax(1)


def texts(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    embeds = model.embeddings(input_ids=ids)
    read: Tensor = model.qformer(query_embeds=embeds, query_length=0, attention_mask=mask).last_hidden_state
    return read[:, 0]


def contrast_loss(similar: Tensor, logit_scale: Tensor, alike: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Contrastive loss both ways; other scenes with the same caption are not counted as wrong."""
    scores = (similar * logit_scale.exp()).masked_fill(alike & ~torch.eye(len(alike), dtype=torch.bool), -1e9)
    truth = torch.arange(len(scores))
    loss = (cross_entropy(scores, truth) + cross_entropy(scores.T, truth)) / 2
    found = {name: float((s.argmax(1) == truth).float().mean()) for name, s in (("text", scores), ("image", scores.T))}
    return loss, {f"{name} R@1": share for name, share in found.items()}


def match_loss(model: Any, seen: Tensor, ids: Tensor, mask: Tensor, similar: Tensor, alike: Tensor) -> Any:
    """Loss of the ITM head on the right pairs and on wrong pairs drawn in proportion to their similarity."""
    likely = (similar.detach() * 20).masked_fill(alike, -1e9)
    wrong_text, wrong_image = (torch.multinomial(s.softmax(1), 1)[:, 0] for s in (likely, likely.T))
    own = torch.arange(len(seen))
    images, words = torch.cat([own, own, wrong_image]), torch.cat([own, wrong_text, own])
    scores = matches(model, seen[images], ids[words], mask[words])
    truth = (torch.arange(3 * len(own)) < len(own)).long()
    return cross_entropy(scores, truth), float((scores.argmax(1) == truth).float().mean())


def matches(model: Any, seen: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    tokens = model.query_tokens.expand(len(seen), -1, -1)
    both = torch.cat([torch.ones(tokens.shape[:2], dtype=mask.dtype), mask], 1)
    embeds = model.embeddings(input_ids=ids, query_embeds=tokens)
    read = model.qformer(
        query_embeds=embeds, query_length=blip2.QUERIES, attention_mask=both, encoder_hidden_states=seen
    ).last_hidden_state
    scores: Tensor = model.itm_head(read[:, : blip2.QUERIES]).mean(1)
    return scores


class LogitScale(nn.Module):
    """The factor on similarities in the contrastive loss, as a logarithm; used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(10.0)))


def contrast(run: Run) -> None:
    """Train image and caption embeddings to match, while the loss of the linear heads fades out."""
    model, heads, logit_scale = blip2.build(retrieval=True), QuarterHeads(), LogitScale()
    run.restore("eye", vision=model.vision_model)
    run.restore("cells", qformer=WithoutText(model.qformer), queries=Queries(model), heads=heads)
    learning = [Queries(model), model.qformer, model.embeddings, model.vision_projection, model.text_projection]
    optimizer = Optimizer(run.total("contrast"), (1.5e-3, [*learning, heads, logit_scale]))
    log = Log(run, "contrast")
    for step, done, batch in run.batches("contrast", most=lambda done: 2 if done < 0.1 else 4):
        image = query(model, look(model, batch))
        ids, mask = captions(batch)
        similar = similarity(model, image, texts(model, ids, mask))
        loss, right = contrast_loss(similar, logit_scale.log, same_caption(batch))
        told, looked = heads(batch, image)
        optimizer.step(loss + max(0.0, 0.3 * (1 - done / 0.7)) * told)
        log.add(step, loss=float(loss.detach()), **right, **looked)
    run.save("contrast", model=model, logit_scale=logit_scale)


def match(run: Run) -> None:
    """Train the ITM head, which reads image and caption together, along with the contrastive loss."""
    model, logit_scale = blip2.build(retrieval=True), LogitScale()
    run.restore("contrast", model=model, logit_scale=logit_scale)
    parts = [model.embeddings, model.vision_projection, model.text_projection, model.itm_head]
    optimizer = Optimizer(run.total("match"), (7e-4, [Queries(model), model.qformer, logit_scale, *parts]))
    log = Log(run, "match")
    for step, _, batch in run.batches("match"):
        seen = look(model, batch)
        ids, mask = captions(batch)
        similar, alike = similarity(model, query(model, seen), texts(model, ids, mask)), same_caption(batch)
        loss, right = contrast_loss(similar, logit_scale.log, alike)
        matched, share = match_loss(model, seen, ids, mask, similar, alike)
        optimizer.step(loss + matched)
        log.add(step, loss=float(loss.detach()), match=float(matched.detach()), matched=share, **right)
    run.save("match", model=model)


class WithoutText(nn.Module):
    """Loads weights of a Q-Former without text layers into one that has them."""

    def __init__(self, qformer: nn.Module) -> None:
        super().__init__()
        self.inner = [qformer]

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        loaded = self.inner[0].load_state_dict(state, strict=False)
        assert not loaded.unexpected_keys
        assert all(".intermediate." in key or ".output." in key for key in loaded.missing_keys)
        return loaded


# -- captions and questions


def symbols(run: Run) -> None:
    """Train OPT to answer from symbols instead of queries."""
    model, table = blip2.build(), QuarterSymbols()
    words, learning = model.get_input_embeddings().weight, [model.language_model, table]
    learn_from_symbols(run, "symbols", learning, lambda batch: table(batch, words), partial(answers, model))
    run.save("symbols", language=model.language_model, table=table)


def bridge(run: Run) -> None:
    """Train the Q-Former and its projection to output the symbols that describe the image."""
    model, table = blip2.build(), QuarterSymbols()
    run.restore("eye", vision=model.vision_model)
    run.restore("cells", qformer=model.qformer, queries=Queries(model))
    run.restore("symbols", language=model.language_model, table=table)
    optimizer = Optimizer(
        run.total("bridge"), (1e-3, [Queries(model), model.qformer]), (3e-3, [model.language_projection])
    )
    log = Log(run, "bridge")
    for step, _, batch in run.batches("bridge"):
        with torch.no_grad():
            target = table(batch, model.get_input_embeddings().weight)
        image = model.language_projection(query(model, look(model, batch)))
        loss = distance(image, target)
        optimizer.step(loss)
        log.add(step, distance=float(loss.detach()))
        if step % log.every == 0:
            with torch.no_grad():
                log.add(step, **answers(model, batch, image)[1])
    run.save("bridge", model=model)


STAGES: dict[str, Callable[[Run], None]] = {
    "eye": eye,
    "cells": cells,
    "contrast": contrast,
    "match": match,
    "symbols": symbols,
    "bridge": bridge,
}
LAST = {"scenes-blip2-itm": "match", "scenes-blip2": "bridge"}


def main() -> None:
    args = arguments(__doc__, "train-scenes-blip2", EMBEDDED, STAGES, threads=1)
    run = begin(args, STEPS, SIZES, blip2.STYLE)
    learn(run, STAGES, args.only or STAGES)
    if args.only:
        return
    for name, stage in LAST.items():
        model = blip2.build(retrieval=name.endswith("itm"))
        run.restore(stage, model=model)
        blip2.save(model, args.out / name)
        start_card(args.out / name, args.work, model_card.LEARNS[name])


if __name__ == "__main__":
    main()
