"""TASKS: what a model is asked, and what counts as right; a task is a function from (split, n, seed) to examples."""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sensitivity.errors import UserError, reason, unknown
from sensitivity.fields import MISSING, Misfit, not_a_file
from sensitivity.tasks.boxes import Regions

SLIMMEST = 200  # to one: a line of pixels whose short side is enlarged to a model's fills gigabytes
SPLITS: tuple[str, ...] = ("evaluation", "calibration")
SHORT = "\nAnswer the question using a single word or phrase."  # after a question, as in LLaVA-1.5 and GeoChat


class Stored(Protocol):
    """An image that is read when it is needed: a Path, or a cell of a data set."""

    def read_bytes(self) -> bytes: ...

    def resolve(self) -> object:
        """Which image this is, for comparisons."""


@dataclass(frozen=True, eq=False, slots=True)  # there may be hundreds of thousands (reports/memory.md)
class Example:
    """One image, one prompt, and the answers that are right; examples of one cluster share an image.

    The first answer is the one whose likelihood is measured. `regions` are the true boxes, where boxes are asked for.
    """

    id: str
    cluster: str
    kind: str
    image: NDArray[np.uint8] | Stored
    prompt: str
    answers: tuple[str, ...]
    regions: Regions | None = None


Metric = Callable[[Sequence[str], Sequence[Example]], float]


@dataclass(frozen=True)
class Gallery:
    """Nothing is asked, but captions are looked for among those of so many images, and images among them.

    The `top` most similar are compared once more, by a model that can read an image and a text together; 0 for none.
    """

    pool: int
    top: int


@dataclass(frozen=True, eq=False)
class Task:
    """Examples and the rule that scores an answer.

    `exact` says that an answer scores only if it is a right one, apart from case and white space. Then one that begins
    like none of them need not be written out.
    `metrics` are further figures of all answers together; those in `slow` (a program of its own starts) are not taken
    of every plan. `notes` say what was left out.
    """

    name: str
    examples: tuple[Example, ...]
    score: Callable[[str, Example], float]
    exact: bool = False
    max_new_tokens: int = 32
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    gallery: Gallery | None = None
    slow: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any id, prompt, answer, box or image."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr((example.id, example.kind, example.prompt, example.answers)).encode())
            if example.regions:
                digest.update(repr(example.regions).encode())
            image = example.image
            pixels = np.ascontiguousarray(image).tobytes() if isinstance(image, np.ndarray) else image.read_bytes()
            digest.update(pixels)
        return digest.hexdigest()[:16]

    @cached_property
    def chance(self) -> float:
        """The score of always giving each kind's commonest right answer: what blindness gets."""
        if self.gallery:
            return 1 / min(self.gallery.pool, len({example.cluster for example in self.examples}))
        commonest: dict[str, str] = {}
        for kind in {example.kind for example in self.examples}:
            answers = Counter(example.answers[0] for example in self.examples if example.kind == kind)
            commonest[kind] = answers.most_common(1)[0][0]
        return float(np.mean([self.score(commonest[example.kind], example) for example in self.examples]))

    def measure(self, answers: Sequence[str]) -> dict[str, float]:
        """The further metrics of one answer per example, in their order."""
        if len(answers) != len(self.examples):
            raise ValueError(f"{len(answers)} answers for {len(self.examples)} examples")
        return {name: float(metric(answers, self.examples)) for name, metric in self.metrics.items()}

    def quick(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, float]:
        """The further metrics that are not slow, of a trial's rows: in any order, and of as many examples as it has."""
        named = zip(rows["task"], rows["example"], rows["answer"], strict=True)
        said = {example: answer for name, example, answer in named if name == self.name}
        asked = [example for example in self.examples if example.id in said]
        answers = [said[example.id] for example in asked]
        chosen = [name for name in self.metrics if asked and name not in self.slow]
        found = {name: float(self.metrics[name](answers, asked)) for name in chosen}
        return {name: value for name, value in found.items() if math.isfinite(value)}  # all kinds may not be there yet


def open_image(source: NDArray[np.uint8] | Stored) -> Image.Image:
    """An upright RGB picture from an array or a file of any kind that Pillow reads."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    try:
        with opened(source) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits a channel; convert() would clip them to white
                return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")
            return upright.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"no image at {source}") from None
    except Exception as error:  # on a damaged file, each of Pillow's readers has errors of its own
        raise UserError(f"cannot read the image {source}: {reason(error)}") from error


@contextmanager
def opened(source: Stored) -> Iterator[Image.Image]:
    """A picture whose size is known and whose pixels are not read yet; what is no file is not waited for."""
    if isinstance(source, Path) and (trouble := not_a_file(source)):
        raise FileNotFoundError(source) if trouble == MISSING else Misfit(trouble)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # at twice as much, Pillow refuses
        with Image.open(stream(source)) as image:
            if max(image.size) > SLIMMEST * min(image.size):
                raise Misfit(f"it is {image.width} by {image.height} pixels, and {SLIMMEST} to 1 is the most")
            yield image


def same_image(image: Any) -> Any:
    """Equal for equal images, and small."""
    return image.resolve() if hasattr(image, "resolve") else (image.shape, hashlib.blake2b(image.tobytes()).digest())


def stream(source: Stored) -> Path | io.BytesIO:
    """What Pillow can open; of a file, no more is read than is needed."""
    return source if isinstance(source, Path) else io.BytesIO(source.read_bytes())


def exact(answer: str, example: Example) -> float:
    """1 if the answer is one of the right ones, apart from case and white space."""
    given = " ".join(answer.lower().split())
    return float(any(given == " ".join(right.lower().split()) for right in example.answers))


def mean_of(score: Callable[[str, Example], float]) -> Metric:
    """A score per example as a metric of all answers."""
    return lambda answers, examples: float(np.mean([score(a, e) for a, e in zip(answers, examples, strict=True)]))


from sensitivity.tasks import (  # noqa: E402 - they use these
    coco,
    geochat,
    gqa,
    local,
    of_scenes,
    retrieval,
    rsvqa,
    scene_folders,
    vqav2,
)

TASKS: dict[str, Callable[[str, int, int], Task]] = {
    "vqa": of_scenes.vqa,
    "caption": of_scenes.caption,
    "scene": of_scenes.scene,
    "ground": of_scenes.ground,
}

# published data sets, from a folder in their official layout: --task coco-captions:FOLDER
DATASETS: dict[str, Callable[[Path, str, int, int], Task]] = {
    "coco-captions": coco.captions,
    "vqav2": vqav2.vqav2,
    "gqa": gqa.gqa,
    "rsvqa-lrben": rsvqa.lrben,
    "rsvqa-hrben": rsvqa.hrben,
    "aid": scene_folders.aid,
    "ucmerced": scene_folders.ucmerced,
    "geochat-grounding": geochat.grounding,
    "geochat-region-captions": geochat.region_captions,
}

# what is searched and not asked, for models that compare images with texts; here `n` counts images
SEARCHES: dict[str, Callable[[str, int, int], Task]] = {"retrieval": retrieval.of_scenes}
GALLERIES: dict[str, Callable[[Path, str, int, int], Task]] = {"flickr30k": retrieval.of_flickr30k}


def task(name: str, split: str = "evaluation", n: int = 1000, seed: int = 0, whole: bool = False) -> Task:
    """A task by its name, DATASET:FOLDER, or from a user's own data, SCORER:PATH; `n` counts examples.

    Answers are written out `whole`, also where they can no longer be right.

    Examples:
        >>> from sensitivity import task
        >>> questions = task("vqa", n=20)
        >>> first = questions.examples[0]
        >>> questions.score(first.answers[0], first)
        1.0
    """
    found = _named(name, split, n, seed)
    return replace(found, exact=False) if whole else found


def distinct(found: Sequence[Task], sources: Sequence[str]) -> None:
    """Scores are kept by the name of a task, so that no two may have the same."""
    for i, (one, source) in enumerate(zip(found, sources, strict=True)):
        for other, earlier in zip(found[:i], sources, strict=False):
            if one.name == other.name:
                raise UserError(f"{earlier} and {source} are both called {one.name}; rename one of the files")


def _named(name: str, split: str, n: int, seed: int) -> Task:
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if n < 1:
        raise UserError(f"a task needs at least one example, not {n}")
    return find(name)(split, n, seed)


def find(name: str) -> Callable[[str, int, int], Task]:
    """What makes the task of a name, of which nothing is read yet."""
    tasks, sets = {**TASKS, **SEARCHES}, {**DATASETS, **GALLERIES}
    if name in tasks:
        return tasks[name]
    head, colon, folder = name.partition(":")
    if head in sets:
        if not folder:
            raise UserError(f"{head} needs the folder where the data set is; type {head}:FOLDER")
        return partial(sets[head], Path(folder).expanduser())
    if colon and head in local.SCORERS:
        return partial(local.own, Path(folder).expanduser(), scorer=head)
    if name.endswith(".jsonl"):
        return partial(local.own, Path(name).expanduser())
    owns = (*(f"{scorer}:PATH" for scorer in local.SCORERS), "FILE.jsonl")
    raise unknown("task", name, [*tasks, *(f"{known}:FOLDER" for known in sets), *owns])
