"""Scenes of handwritten digits and questions about them, generated from a seed; splits share no handwriting."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 48  # pixels
STEP = 4  # of the grid for boxes, in percent of the image
SPLITS = {"train": 1300, "calibration": 100, "evaluation": 397}  # of the 1,797 digits in scikit-learn
COLORS = {
    "red": (225, 25, 30),
    "green": (25, 180, 50),
    "blue": (45, 80, 240),
    "yellow": (250, 230, 20),
    "purple": (200, 50, 225),
    "cyan": (40, 225, 235),
}
BACKGROUNDS = {
    "paper": (178, 174, 168),
    "slate": (52, 56, 62),
    "brick": (100, 76, 68),
    "wood": (138, 112, 84),
    "cloth": (92, 98, 110),
}
CELLS = ("top left", "top right", "bottom left", "bottom right")
ANGLES = (-30, -15, 0, 15, 30)
COUNTS = ("one", "two", "three", "four")
# "colour" is spelled as in the vocabulary of the embedded models and in the studies that exist
VQA_KINDS = ("position", "colour", "digit", "exists", "count")
KINDS = (*VQA_KINDS, "caption", "scene", "ground")

Array = NDArray[np.uint8]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Digit:
    """One digit: its upright box in percent of the image, rotated counterclockwise by `angle` about its center."""

    value: int
    color: str
    cell: int
    box: Box
    angle: int

    @property
    def text(self) -> str:
        """The box as the model writes it, in GeoChat's format."""
        return "{" + "".join(f"<{x}>" for x in self.box) + f"|<{self.angle}>}}"


@dataclass(frozen=True, eq=False)
class Scene:
    """An image with what was drawn into it."""

    id: str
    image: Array
    background: str
    digits: tuple[Digit, ...]


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene, and its answer."""

    kind: str
    prompt: str
    answer: str


# -- handwriting


@functools.cache
def _handwriting() -> tuple[Array, NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images * (255 / 16)).round().astype(np.uint8), data.target.astype(np.int64)


@functools.cache
def split_indices(split: str) -> NDArray[np.int64]:
    """Which of scikit-learn's digits belong to a split: a fixed permutation, stratified by the digit's value."""
    _, target = _handwriting()
    order = np.random.default_rng(1797).permutation(len(target))
    # The rank of a digit among those of its value, as a fraction: sorted by it, every prefix is balanced by value.
    rank = np.empty(len(target))
    for value in range(10):
        mine = order[target[order] == value]
        rank[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    order = order[np.argsort(rank[order], kind="stable")]
    evaluation, calibration = SPLITS["evaluation"], SPLITS["calibration"]
    cuts = {
        "evaluation": order[:evaluation],
        "calibration": order[evaluation : evaluation + calibration],
        "train": order[evaluation + calibration :],
    }
    return np.sort(cuts[split])


@functools.cache
def _samples(split: str) -> tuple[tuple[Array, ...], ...]:
    """The split's bitmaps by value, cropped to their ink, so that a digit fills the box that it is given."""
    images, target = _handwriting()
    return tuple(tuple(_cut(images[i]) for i in split_indices(split) if target[i] == value) for value in range(10))


def _cut(bitmap: Array) -> Array:
    ink = bitmap >= 48
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return bitmap[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _wobble(rng: np.random.Generator, bitmap: Array, amount: float) -> Array:
    """The digit, slanted and squeezed as in another handwriting: its four corners are moved at random."""
    large = Image.fromarray(np.pad(bitmap, 1))
    width, height = 3 * large.width, 3 * large.height
    large = large.resize((width, height), Image.Resampling.BICUBIC)
    corners = np.array([[0, 0], [0, height], [width, height], [width, 0]], float)
    corners += rng.uniform(-amount, amount, (4, 2)) * (width, height)
    return _cut(np.asarray(large.transform((width, height), Image.Transform.QUAD, corners.ravel().tolist(), 2)))


# -- layout: what is where


def _place(rng: np.random.Generator, cell: int, aspect: float, hard: float) -> tuple[Box, int]:
    """A box on the grid of `STEP` inside its quarter of the image, and the angle of its rotation."""
    room = 44 // STEP  # 11 of the 12 steps of a quarter: one stays free at the image's edge for rotated digits
    height = int(rng.integers(8, 11))
    width = int(np.clip(round(height * aspect * rng.uniform(0.85, 1.15)), 5, 9))
    moved = rng.random() < hard
    left = int(rng.integers(0, room - width + 1)) if moved else (room - width) // 2
    top = int(rng.integers(0, room - height + 1)) if moved else (room - height) // 2
    turned = rng.random() < hard
    angle = int(rng.choice(ANGLES)) if turned else 0
    x, y = (52, 4)[cell % 2 == 0] + STEP * left, (52, 4)[cell // 2 == 0] + STEP * top
    return (x, y, x + STEP * width, y + STEP * height), angle


def _layout(
    rng: np.random.Generator, split: str, most: int, hard: float, wobble: float
) -> tuple[str, tuple[Digit, ...], tuple[Array, ...]]:
    """A background, and digits with different values, colors and quarters of the image, with their bitmaps."""
    count = int(rng.integers(1, most + 1))
    background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    values = rng.permutation(10)[:count]
    colors = rng.permutation(len(COLORS))[:count]
    cells = np.sort(rng.permutation(4)[:count])
    digits, bitmaps = [], []
    for value, color, cell in zip(values.tolist(), colors.tolist(), cells.tolist(), strict=True):
        samples = _samples(split)[value]
        bitmap = samples[int(rng.integers(len(samples)))]
        if wobble > 0:
            bitmap = _wobble(rng, bitmap, wobble)
        box, angle = _place(rng, cell, bitmap.shape[1] / bitmap.shape[0], hard)
        digits.append(Digit(value, list(COLORS)[color], cell, box, angle))
        bitmaps.append(bitmap)
    return background, tuple(digits), tuple(bitmaps)


# -- drawing


def _texture(rng: np.random.Generator, background: str) -> NDArray[np.float32]:
    """A background with its pattern. Colors alone would tell the five apart; patterns make that a little harder."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] + rng.integers(0, 24, size=2)[:, None, None]
    match background:
        case "paper":
            shade = np.where(y % 6 == 0, -28.0, 0.0)
        case "slate":
            shade = np.where(rng.random((SIDE, SIDE)) < 0.06, 34.0, 0.0)
        case "brick":
            shade = np.where((y % 8 == 0) | ((x + 6 * (y // 8 % 2)) % 12 == 0), 26.0, 0.0)
        case "wood":
            shade = 14.0 * np.sin(x * 0.9 + np.sin(y * 0.15) * 1.5)
        case _:
            shade = np.where((x // 3 + y // 3) % 2 == 0, -12.0, 12.0)
    shade = shade + rng.normal(0.0, 5.0, (SIDE, SIDE)) + rng.uniform(-10.0, 10.0)
    color = np.asarray(BACKGROUNDS[background], np.float32)
    return (color + shade[:, :, None]).astype(np.float32)


def _mask(bitmap: Array, digit: Digit) -> NDArray[np.float32]:
    """The digit's ink on the whole image, from 0 to 1: stretched to its box, then rotated about the box's center."""
    x1, y1, x2, y2 = (v * SIDE / 100 for v in digit.box)
    rows, columns = bitmap.shape
    padded = np.pad(bitmap, 1)
    across, down = columns / (x2 - x1), rows / (y2 - y1)
    cos, sin = np.cos(np.radians(digit.angle)), np.sin(np.radians(digit.angle))
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    # PIL takes the inverse map, from a pixel of the image to the bitmap; the 1 is the padding around the bitmap.
    a, b = across * cos, -across * sin
    d, e = down * sin, down * cos
    c, f = columns / 2 + 1 - a * cx - b * cy, rows / 2 + 1 - d * cx - e * cy
    drawn = Image.fromarray(padded).transform(
        (SIDE, SIDE), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC
    )
    ink: NDArray[np.float32] = np.clip(np.asarray(drawn, np.float32) / 200.0, 0.0, 1.0)
    return ink


def _draw(rng: np.random.Generator, background: str, digits: tuple[Digit, ...], bitmaps: tuple[Array, ...]) -> Array:
    image = _texture(rng, background)
    for digit, bitmap in zip(digits, bitmaps, strict=True):
        ink = _mask(bitmap, digit)[:, :, None]
        color = np.asarray(COLORS[digit.color], np.float32) + rng.normal(0.0, 8.0, 3).astype(np.float32)
        image = image * (1 - ink) + color * ink
    pixels: Array = np.clip(image + 0.5, 0, 255).astype(np.uint8)
    return pixels


# -- scenes and questions


def scene(
    split: str, seed: int, index: int, most: int = 4, hard: float = 1.0, draw: bool = True, wobble: float = 0.0
) -> Scene:
    """Scene `index` of a split and a seed.

    `most`, `hard` and `wobble` are for training: the largest number of digits, the share of digits that is moved and
    rotated, and how much digits are distorted.
    """
    rng = np.random.default_rng([list(SPLITS).index(split), seed, index])
    background, digits, bitmaps = _layout(rng, split, most, hard, wobble)
    image = _draw(rng, background, digits, bitmaps) if draw else np.zeros((0, 0, 3), np.uint8)
    return Scene(f"{split}-{seed}-{index:06d}", image, background, digits)


def draw_scenes(split: str, n: int, seed: int = 0) -> list[Scene]:
    """The first `n` scenes of a split; a longer list starts with the same ones."""
    return [scene(split, seed, index) for index in range(n)]


def caption(scene: Scene) -> str:
    """The caption of a scene: every digit with its color and place, then the background."""
    parts = [f"{d.color} {d.value} {CELLS[d.cell]}" for d in scene.digits]
    return ", ".join(parts) + f", on {scene.background}"


def _exists(scene: Scene, seed: int) -> Iterator[SceneQuestion]:
    """One question about a digit that is there and one about a digit that is not, so that yes and no are as likely."""
    rng = np.random.default_rng([seed, zlib.crc32(scene.id.encode())])
    present = [d.value for d in scene.digits]
    absent = [v for v in range(10) if v not in present]
    for values, answer in ((present, "yes"), (absent, "no")):
        yield SceneQuestion("exists", f"is there any {values[int(rng.integers(len(values)))]}?", answer)


def questions_about(scene: Scene, seed: int = 0) -> list[SceneQuestion]:
    """Every question about a scene, kind by kind; only the two existence questions depend on `seed`."""
    digits = scene.digits
    return [
        *(SceneQuestion("position", f"where is the {d.value}?", CELLS[d.cell]) for d in digits),
        *(SceneQuestion("colour", f"what colour is the {d.value}?", d.color) for d in digits),
        *(SceneQuestion("digit", f"which digit is {d.color}?", str(d.value)) for d in digits),
        *_exists(scene, seed),
        SceneQuestion("count", "how many digits are there?", COUNTS[len(digits) - 1]),
        SceneQuestion("caption", "describe the image.", caption(scene)),
        SceneQuestion("scene", "what is the background?", scene.background),
        *(SceneQuestion("ground", f"locate the {d.value}.", d.text) for d in digits),
    ]
