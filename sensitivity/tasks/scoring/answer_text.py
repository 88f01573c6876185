"""What a model says to what is judged: prompts, special tokens and decoration are taken off, nothing else."""

from __future__ import annotations

import re

# </s>, <pad>, <image>, <image_3>, <|im_end|>, <end_of_turn>, but neither <p> nor the <12> of boxes
_SPECIAL = re.compile(
    r"</?s>|<(?:pad|unk|bos|eos|image|image_\d+|end_of_utterance|fake_token_around_image|(?:start|end)_of_turn)>|<\|[^<>|]*\|>"
)
_PHRASE = re.compile(r"</?p>")


def without_special(text: str) -> str:
    """Without the tokens that end, pad or frame a text, where a tokenizer has left them in."""
    return _SPECIAL.sub("", text).strip()


def without_prompt(text: str, prompt: str) -> str:
    """Without the prompt at the start, where a model echoes it; white space and special tokens do not count."""
    text, words = without_special(text), without_special(prompt).split()
    echo = re.match(r"\s*".join(map(re.escape, words)), text) if words else None
    return text[echo.end() :].strip() if echo else text


def after(text: str, mark: str) -> str:
    """What follows the last mark, such as ASSISTANT:, or everything where there is none."""
    return text.rpartition(mark)[2].strip()


def squeezed(text: str) -> str:
    """Lower case without spaces and full stops: the only rule that the published remote sensing code applies."""
    return text.lower().replace(" ", "").replace(".", "").strip()


def phrase(text: str) -> str:
    """Lower case without full stops and <p> tags: how captions of regions are compared (GeoChat)."""
    return " ".join(_PHRASE.sub("", text).lower().replace(".", "").split())
