"""TASKS: what a model is asked, and what counts as right; a task is a function from (split, n, seed) to examples."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from sensitivity.errors import UserError, reason, unknown

SPLITS = ("evaluation", "calibration")


@dataclass(frozen=True, eq=False)
class Example:
    """One image, one prompt, and the answers that are right; examples of one cluster share an image."""

    id: str
    cluster: str
    kind: str
    image: NDArray[np.uint8] | Path
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Task:
    """Examples and the rule that scores an answer.

    `exact` says that only the first answer, letter for letter, is right. Then an answer can be judged without
    being generated: greedy generation gives it exactly if each of its tokens is the likeliest after those before.
    """

    name: str
    examples: tuple[Example, ...]
    score: Callable[[str, Example], float]
    exact: bool = False
    max_new_tokens: int = 32

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any id, prompt, answer or image."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr((example.id, example.kind, example.prompt, example.answers)).encode())
            image = example.image
            digest.update(image.read_bytes() if isinstance(image, Path) else np.ascontiguousarray(image).tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def chance(self) -> float:
        """The score of always giving each kind's commonest right answer: what blindness gets."""
        commonest: dict[str, str] = {}
        for kind in {example.kind for example in self.examples}:
            answers = Counter(example.answers[0] for example in self.examples if example.kind == kind)
            commonest[kind] = answers.most_common(1)[0][0]
        return float(np.mean([self.score(commonest[example.kind], example) for example in self.examples]))


def open_image(source: NDArray[np.uint8] | Path) -> Image.Image:
    """An upright RGB picture from an array or a file of any kind that Pillow reads."""
    if not isinstance(source, Path):
        return Image.fromarray(source)
    try:
        with Image.open(source) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits a channel; convert() would clip them to white
                return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")
            return upright.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"no image at {source}") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"cannot read the image {source}: {reason(error)}") from error


def exact(answer: str, example: Example) -> float:
    """1 if the answer is one of the right ones, apart from case and white space."""
    given = " ".join(answer.lower().split())
    return float(any(given == " ".join(right.lower().split()) for right in example.answers))


from sensitivity.tasks import local, of_scenes  # noqa: E402 - they use what stands above

TASKS: dict[str, Callable[[str, int, int], Task]] = {
    "vqa": of_scenes.vqa,
    "caption": of_scenes.caption,
    "scene": of_scenes.scene,
    "ground": of_scenes.ground,
}


def task(name: str, split: str = "evaluation", n: int = 1000, seed: int = 0) -> Task:
    """A task by its name, or from a .jsonl file of the user's own; `n` counts examples."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if n < 1:
        raise UserError(f"a task needs at least one example, not {n}")
    if name.endswith(".jsonl"):
        return local.jsonl(Path(name), split, n, seed)
    if name not in TASKS:
        raise unknown("task", name, [*TASKS, "FILE.jsonl"])
    return TASKS[name](split, n, seed)
