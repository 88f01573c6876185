"""The model cards of embedded:scenes-blip2 and embedded:scenes-blip2-itm, written from the numbers in card.json."""

from __future__ import annotations

from typing import Any

from experiments.embedded.card import score_rows, stage_rows, targets_met

FRONT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: {tag}
---

# {name}
"""

ASKING = """
A `Blip2ForConditionalGeneration` of 3.16 million parameters ({size:.1f} MB in fp16) that describes 48 x 48 images of
one to four handwritten digits and answers six kinds of question about them. It exists so that a sensitivity analysis of
a model with three parts (vision tower, Q-Former, language model) can be run, tested and taught in minutes on two cores.
It has no other use.

* Vision: ViT, 6 blocks of width 128, patch size 8: 36 patches and a class token. Q-Former: 4 blocks of width 128, 16
  queries, cross-attention in every second block. Language: OPT, 4 blocks of width 192, tied embeddings, a vocabulary of
  {words} tokens.
* Loads with `AutoProcessor` and `Blip2ForConditionalGeneration.from_pretrained` on this folder, offline, without
  torchvision.
* Prompts are those of the published BLIP-2: `Question: where is the 3? Short answer:`, and an empty one for a caption.
  The processor puts 16 image tokens and `<s>` before the prompt; an answer ends with `</s>`. Padding is on the left.
* Call `generate` with `max_new_tokens=40`: the class does not pass the limit in `generation_config.json` to its
  language model, whose own default cuts long captions.
* Questions and answers are those of `embedded:scenes-llava`, without boxes.
"""

SEARCHING = """
A `Blip2ForImageTextRetrieval` of 2.19 million parameters ({size:.1f} MB in fp16) that finds the caption of a 48 x 48
image of handwritten digits, and the image of a caption, among many: it ranks all by the similarity of their embeddings
(ITC), then ranks the best again with a head that reads image and text together (ITM). It exists so that a sensitivity
analysis of retrieval can be run, tested and taught in minutes on two cores. It has no other use.

* Vision: ViT, 6 blocks of width 128, patch size 8: 36 patches and a class token. Q-Former: 4 blocks of width 128, 16
  queries, cross-attention in every second block, separate feed-forward layers for text. Embeddings of width 64. A
  vocabulary of {words} tokens.
* Loads with `AutoProcessor` and `Blip2ForImageTextRetrieval.from_pretrained` on this folder, offline, without
  torchvision. The forward pass has neither a loss nor a temperature. `config.json` describes a small OPT that this
  class does not build.
* A text begins with `<s>`, whose hidden state is the embedding of the text, and ends with `</s>`. Padding is on the
  right.
"""

MEASURED = """
## What it scores

{scenes:,} scenes of the evaluation split (397 handwritten digits that training never saw) in fp32, 95 % intervals
clustered by scene. *Shuffled*: the same {what} with another scene's image. *Blind guess*:
{blind}.
{more}

| kind | metric | n | score | 95 % | shuffled | blind guess | target |
|---|---|---|---|---|---|---|---|
{rows}

{verdict}

Made by `python -m experiments.embedded.scenes_blip2.evaluate`; the same numbers are in `card.json`.

## How it was trained

`python -m experiments.embedded.scenes_blip2.train`, seed 0, one thread on two CPU cores that other work used too, fp32,
new scenes at every step. The last column is the last line of the stage's log, on training handwriting; `card.json` has
it under `training`.

| stage | steps | what is trained | at its end |
|---|---|---|---|
{stages}

The vision tower ("eye") starts from the weights of `embedded:scenes-llava`. They fit except for the norm before the
first block, which BLIP-2 does not have: it is folded into the patch and position embeddings as far as that is possible,
and stage `eye` trains away the difference. From then on the tower is frozen. Values that begin with "query" are the
share of queries from which a linear head reads what lies in the query's quarter of the image.{tried}
"""

TAIL = """
## What to know

* The digits are scikit-learn's `load_digits` (UCI optical recognition of handwritten digits, CC BY 4.0), split by
  sample as for `embedded:scenes-llava`. The samples in the evaluation are unseen; **their writers may not be**.
* Training uses labels that only the generator of scenes knows: the vision tower's own training did, and stage `cells`
  is given the content of each quarter of the image{symbols}.
* Nothing is claimed about photographs, other fonts, sizes or angles.
"""

SHARED = {
    "eye": "vision tower, to output the same hidden states as that of scenes-llava",
    "cells": "Q-Former, with linear heads that read the content of a quarter of the image from each query",
}
LEARNS = {
    "scenes-blip2": {
        **SHARED,
        "symbols": "OPT, on symbols instead of queries",
        "bridge": "Q-Former and projection, to output the symbols",
    },
    "scenes-blip2-itm": {
        **SHARED,
        "contrast": "Q-Former and both projections: find an image's caption in a batch of 96",
        "match": "the head that reads image and caption together (ITM); batches of 48, with the loss of `contrast`",
    },
}
WORDS: dict[str, dict[str, str]] = {
    "scenes-blip2": {
        "what": "questions",
        "blind": "always the most common answer to this kind of question",
        "more": "VQA: the mean of position, colour, digit, exists and count. Answers are those of greedy `generate`.",
        "symbols": ".\n  Stage `symbols` trains OPT on symbols, and `bridge` trains queries to equal them",
        "tag": "image-text-to-text",
    },
    "scenes-blip2-itm": {
        "what": "captions",
        "blind": "chance",
        "more": "Four pools of 256 scenes with different captions. *Compared*: ranked by similarity alone. *Read "
        "together*:\nthe 16 most similar ranked again, by similarity plus the ITM head's score.",
        "symbols": "",
        "tag": "zero-shot-image-classification",
    },
}
TRIED = {
    "scenes-blip2": """

There is no stage that trains all parts together on images, because after `bridge` OPT reads the queries almost as well
as it reads symbols. Such a stage (Q-Former, projection and OPT on questions and answers) was stopped after 100 of 700
steps: captions were at .915, down from .958 at the end of `bridge`, both on training handwriting.""",
    "scenes-blip2-itm": """

Ranking again with the ITM head finds fewer at rank one than similarity alone: the head was trained for fewer steps, and
its score is added to similarities that were already right. It is kept because the published model works in this order.
With shuffled images the right image is still in the pool as another scene's, and takes rank one; hence 0, not chance.
""".rstrip(),
}


def text(name: str, card: dict[str, Any]) -> str:
    """The model card of one of the two models."""
    words = WORDS[name]
    about = ASKING if name == "scenes-blip2" else SEARCHING
    measured = MEASURED.format(
        scenes=card["scenes"],
        rows=score_rows(card),
        verdict=targets_met(card),
        stages=stage_rows(card, LEARNS[name]),
        tried=TRIED[name],
        **{key: words[key] for key in ("what", "blind", "more")},
    )
    head = FRONT.format(name=name, tag=words["tag"]) + about.format(size=card["bytes"] / 1e6, words=card["words"])
    return head + measured + TAIL.format(symbols=words["symbols"])
