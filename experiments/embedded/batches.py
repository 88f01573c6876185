"""Training batches of both embedded models: an image, then questions that do not attend to each other."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from experiments.embedded.scenes_llava.model import GRID, PATCHES, tokenizer
from sensitivity.tasks import scenes as S

KINDS = ("position", "colour", "digit", "exists", "exists", "count", "scene", "caption", "ground")
WEIGHTS = {"position": 1.0, "colour": 1.0, "digit": 1.0, "exists": 1.0, "count": 0.5, "scene": 0.5, "caption": 2.0}
WEIGHTS["ground"] = 2.0


@dataclass(frozen=True)
class PromptStyle:
    """How a model's training rows are written."""

    image_tokens: int
    kinds: tuple[str, ...]  # the kinds of question in a row, in this order
    template: Callable[[S.SceneQuestion], str]
    extra_words: tuple[str, ...] = ()  # beyond the vocabulary of scenes-llava

    def encode(self, text: str) -> tuple[int, ...]:
        return encode(text, self.extra_words)


LLAVA_STYLE = PromptStyle(PATCHES, KINDS, lambda question: f"{question.prompt}<answer>")


@functools.lru_cache(maxsize=100_000)
def encode(text: str, extra_words: tuple[str, ...] = ()) -> tuple[int, ...]:
    return tuple(tokenizer(extra_words).encode(text, add_special_tokens=False))


@functools.cache
def lengths(style: PromptStyle = LLAVA_STYLE) -> tuple[int, ...]:
    """The longest question of each kind in tokens, with its answer and end token; rows are padded to these lengths."""
    most = dict.fromkeys(S.KINDS, 0)
    for index in itertools.count():
        scene = S.scene("train", 0, index, draw=False)
        for q in S.questions_about(scene):
            most[q.kind] = max(most[q.kind], len(style.encode(style.template(q))) + len(encode(q.answer)) + 1)
        if len(scene.digits) == 4:
            return tuple(most[kind] for kind in style.kinds)
    raise AssertionError


@functools.cache
def attention_layout(style: PromptStyle = LLAVA_STYLE) -> tuple[torch.Tensor, torch.Tensor]:
    """A row's attention mask (added to the scores) and position ids: every question follows the image directly.

    A question attends to the image and to itself, so that it is read as if it were the only one; packing nine of them
    into a row saves eight passes over the image.
    """
    total = style.image_tokens + sum(lengths(style))
    segment = torch.zeros(total, dtype=torch.long)
    positions = torch.arange(total)
    start = style.image_tokens
    for number, length in enumerate(lengths(style), 1):
        segment[start : start + length] = number
        positions[start : start + length] = torch.arange(style.image_tokens, style.image_tokens + length)
        start += length
    causal = torch.arange(total)[:, None] >= torch.arange(total)[None, :]
    seen = causal & ((segment[:, None] == segment[None, :]) | (segment[None, :] == 0))
    return torch.zeros(total, total).masked_fill(~seen, -1e9)[None, None], positions[None]


@dataclass
class Batch:
    scenes: list[S.Scene]
    pixels: torch.Tensor  # scenes x 3 x 48 x 48, from -1 to 1
    ids: torch.Tensor  # scenes x text
    labels: torch.Tensor  # scenes x text: the token that follows, or -100
    weights: torch.Tensor  # scenes x text: the weight of a question's kind, divided among its answer's tokens
    background: torch.Tensor  # scenes: token id
    filled: torch.Tensor  # scenes x patches: whether a digit lies here
    words: torch.Tensor  # scenes x patches x 2: token ids of the digit and its color
    corners: torch.Tensor  # scenes x patches x 4: the box, in steps
    angle: torch.Tensor  # scenes x patches: index into scenes.ANGLES


def _pick(scene: S.Scene, rng: np.random.Generator, kinds: tuple[str, ...]) -> list[S.SceneQuestion]:
    """One question of each kind at random; of `exists` both, the one answered yes and the one answered no."""
    found: dict[str, list[S.SceneQuestion]] = {}
    for q in S.questions_about(scene, int(rng.integers(2**31))):
        found.setdefault(q.kind, []).append(q)
    picked = {kind: questions[int(rng.integers(len(questions)))] for kind, questions in found.items()}
    both = iter(found["exists"])
    return [next(both) if kind == "exists" else picked[kind] for kind in kinds]


def _text(scene: S.Scene, rng: np.random.Generator, style: PromptStyle) -> tuple[list[int], list[int], list[float]]:
    ids: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    for q, length in zip(_pick(scene, rng, style.kinds), lengths(style), strict=True):
        prompt = style.encode(style.template(q))
        answer = (*encode(q.answer), tokenizer().eos_token_id)
        rest = length - len(prompt) - len(answer)
        ids += [*prompt, *answer, *[0] * rest]
        labels += [*[-100] * (len(prompt) - 1), *answer, *[-100] * (rest + 1)]
        weights += [WEIGHTS[q.kind] / len(answer)] * length
    return ids, labels, weights


def _patches(scene: S.Scene) -> tuple[np.ndarray, ...]:
    """What each patch shows: it belongs to a digit when its center lies in the digit's box, widened by one step."""
    filled = np.zeros((GRID, GRID), bool)
    words = np.zeros((GRID, GRID, 2), np.int64)
    corners = np.zeros((GRID, GRID, 4), np.int64)
    angle = np.zeros((GRID, GRID), np.int64)
    centers = (np.arange(GRID) + 0.5) * 100 / GRID
    for d in scene.digits:
        x1, y1, x2, y2 = d.box
        rows = (centers > y1 - S.STEP) & (centers < y2 + S.STEP)
        columns = (centers > x1 - S.STEP) & (centers < x2 + S.STEP)
        here = rows[:, None] & columns[None, :]
        filled |= here
        words[here] = encode(str(d.value))[0], encode(d.color)[0]
        corners[here] = [v // S.STEP for v in d.box]
        angle[here] = S.ANGLES.index(d.angle)
    return filled, words, corners, angle


def draw_batch(
    start: int,
    size: int,
    seed: int,
    most: int = 4,
    hard: float = 1.0,
    draw: bool = True,
    wobble: float = 0.0,
    style: PromptStyle = LLAVA_STYLE,
) -> Batch:
    """Scenes `start` to `start + size` of the training split; the options are those of `scenes.scene`."""
    made = [S.scene("train", seed, start + i, most, hard, draw, wobble) for i in range(size)]
    rng = np.random.default_rng([seed, start])
    ids, labels, weights = zip(*(_text(scene, rng, style) for scene in made), strict=True)
    filled, words, corners, angle = (np.stack(x) for x in zip(*map(_patches, made), strict=True))
    images = torch.from_numpy(np.stack([scene.image for scene in made]))
    return Batch(
        scenes=made,
        pixels=images.permute(0, 3, 1, 2).float() / 127.5 - 1,
        ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        weights=torch.tensor(weights),
        background=torch.tensor([encode(scene.background)[0] for scene in made]),
        filled=torch.from_numpy(filled).flatten(1),
        words=torch.from_numpy(words).flatten(1, 2),
        corners=torch.from_numpy(corners).flatten(1, 2),
        angle=torch.from_numpy(angle).flatten(1),
    )
