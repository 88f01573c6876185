"""Removes special tokens and decoration from an answer before it is scored."""

from __future__ import annotations

import re

from sensitivity.tasks.examples.types import Example

# </s>, <pad>, <image>, <image_3>, <|im_end|>, <end_of_turn>, but not <p> and not the <12> of boxes
_SPECIAL = re.compile(
    r"</?s>|<(?:pad|unk|bos|eos|image|image_\d+|end_of_utterance|fake_token_around_image|(?:start|end)_of_turn)>|<\|[^<>|]*\|>"
)
_PHRASE = re.compile(r"</?p>")


def without_special(text: str) -> str:
    """The text without special tokens that a tokenizer has left in it."""
    return _SPECIAL.sub("", text).strip()


def squeezed(text: str) -> str:
    """Lower case without spaces and full stops, the only rule of the published remote sensing code."""
    return text.lower().replace(" ", "").replace(".", "").strip()


def equals_squeezed(answer: str, example: Example) -> float:
    """1 if the answer equals a right one apart from case, spaces and full stops."""
    return float(squeezed(answer) in {squeezed(one) for one in example.answers})


def phrase(text: str) -> str:
    """Lower case without full stops and <p> tags, as GeoChat compares captions of regions."""
    return " ".join(_PHRASE.sub("", text).lower().replace(".", "").split())
