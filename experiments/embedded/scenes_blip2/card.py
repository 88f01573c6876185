"""The model cards of embedded:scenes-blip2 and its sibling, from what evaluate_scenes_blip2.py measured."""

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
A `Blip2ForConditionalGeneration` of 3.16 million parameters ({size:.1f} MB in fp16) that describes 48 x 48 scenes of
one to four handwritten digits and answers six kinds of question about them. It exists so that a sensitivity analysis of
a model in three parts (eye, Q-Former, language model) can be run, tested and taught in minutes on two cores. It is of
no other use.

* Vision: ViT, 6 blocks of 128, patch 8: 36 patches and a class token. Q-Former: 4 blocks of 128, 16 queries,
  cross-attention in every second block. Language: OPT, 4 blocks of 192, tied embeddings. {words} words.
* Loads with `AutoProcessor` and `Blip2ForConditionalGeneration.from_pretrained` on this folder, offline, without
  torchvision.
* Prompts as the published BLIP-2 wants them: `Question: where is the 3? Short answer:`, and an empty one for a caption.
  The processor puts 16 image tokens and `<s>` before it; an answer ends with `</s>`. Padding is on the left.
* Give `generate` a limit (`max_new_tokens=40`): the class does not hand the one in `generation_config.json` to its
  language model, whose own default cuts long captions.
* Kinds of question and their answers are those of `embedded:scenes-llava`, without boxes.
"""

SEARCHING = """
A `Blip2ForImageTextRetrieval` of 2.19 million parameters ({size:.1f} MB in fp16) that finds the caption of a 48 x 48
scene of handwritten digits among others, and the scene of a caption: it compares all (ITC), then reads the most similar
together with the image (ITM). It exists so that a sensitivity analysis of retrieval can be run, tested and taught in
minutes on two cores. It is of no other use.

* Vision: ViT, 6 blocks of 128, patch 8: 36 patches and a class token. Q-Former: 4 blocks of 128, 16 queries,
  cross-attention in every second block, feed-forward layers of its own for text. Comparison: 64 wide. {words} words.
* Loads with `AutoProcessor` and `Blip2ForImageTextRetrieval.from_pretrained` on this folder, offline, without
  torchvision. The forward pass has neither a loss nor a temperature. Its `config.json` names a small OPT that the class
  does not build.
* A text begins with `<s>`, which stands for all of it, and ends with `</s>`. Padding is on the right.
"""

MEASURED = """
## What it scores

{scenes:,} scenes of the evaluation split (397 handwritten digits the training never saw), this folder in fp32,
intervals of 95 % clustered by scene. *Shuffled*: the same {what} with another scene's image. *Blind guess*:
{blind}. {more}

| kind | measure | n | score | 95 % | shuffled | blind guess | target |
|---|---|---|---|---|---|---|---|
{rows}

{verdict}

Made by `python -m experiments.embedded.scenes_blip2.evaluate`; the same numbers are in `card.json`.

## How it was trained

`python -m experiments.embedded.scenes_blip2.train`, seed 0, one thread on two CPU cores that other work used too, fp32, all
scenes new at each step. Last line of each stage's log, on training handwriting; `card.json` has it as `training`:

| stage | steps | what learns | at its end |
|---|---|---|---|
{stages}

The eye is that of `embedded:scenes-llava`: its weights fit, but for the norm before the first block, which BLIP-2 lacks
and which is folded into patches and positions on average; `eye` repairs the rest, and is frozen from then on. `query`
is the share of queries from which a linear head reads what lies in their quarter of the scene.{tried}
"""

TAIL = """
## What to know

* The digits are scikit-learn's `load_digits` (UCI optical recognition of handwritten digits, CC BY 4.0), split by
  sample as for `embedded:scenes-llava`. The samples of the evaluation are unseen; **their writers may not be**.
* Training uses privileged labels of its own generator: the eye's own training did, `cells` is told what lies in each
  quarter{symbols}. Nothing is claimed about photographs, other fonts, sizes or angles.
"""

SHARED = {
    "eye": "vision tower, to see what that of scenes-llava sees",
    "cells": "Q-Former: each query is asked about its quarter",
}
LEARNS = {
    "scenes-blip2": {
        **SHARED,
        "symbols": "OPT, on symbols in place of queries",
        "bridge": "Q-Former and projection, towards the symbols",
    },
    "scenes-blip2-itm": {
        **SHARED,
        "contrast": "Q-Former and both projections: an image's caption among those of a batch of 96",
        "match": "the head that reads image and caption together, beside the contrast, in batches of 48",
    },
}
WORDS: dict[str, dict[str, str]] = {
    "scenes-blip2": {
        "what": "questions",
        "blind": "the most common answer of the kind, always",
        "more": "VQA: the mean of position, colour, digit, exists\nand count. Answers are those of greedy `generate`.",
        "symbols": ", OPT never sees an image, and `bridge` copies symbols",
        "tag": "image-text-to-text",
    },
    "scenes-blip2-itm": {
        "what": "captions",
        "blind": "chance",
        "more": "Four pools of 256 scenes, no two of one caption.\n*Compared*: by similarity alone. *Read together*: "
        "the 16 most similar again, by similarity plus the score of a match.",
        "symbols": "",
        "tag": "zero-shot-image-classification",
    },
}
TRIED = {
    "scenes-blip2": """

There is no stage in which all parts learn together from images: after `bridge`, OPT reads the queries almost as it
reads symbols. One was begun (Q-Former, projection and OPT on questions and answers) and stopped after 100 of 700 steps;
by then captions stood at .915, after .958 at the end of `bridge`, both on training handwriting. The first lines of the
log of `symbols` were overwritten by another call and are lost; the stage itself ran undisturbed.""",
    "scenes-blip2-itm": """

Reading together finds fewer at rank one than comparing alone: the head is younger than the comparison, and adds its
score to similarities that were already right. It is kept, since the published model works in this order. With other
scenes' images the right image is still in the pool, under another's name, and takes rank one; hence 0 and not chance.
""".rstrip(),
}


def text(name: str, card: dict[str, Any]) -> str:
    """The whole card of one of the two."""
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
