"""Two images of one place: change in LEVIR-CD and LEVIR-CC, and buildings damaged by a disaster in xBD."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sensitivity.spec.fields import ANY_TEXT, FILE_INSIDE, OBJECT, TEXT, InvalidValue, check, list_of
from sensitivity.tasks.datasets.source import DatasetFolder, Flaw, checked_records
from sensitivity.tasks.examples.images import open_image, why_unusable
from sensitivity.tasks.examples.types import SHORT_ANSWER, Example, Task
from sensitivity.tasks.scoring import captions as caption_scores
from sensitivity.tasks.scoring import yes_no
from sensitivity.tasks.scoring.answer_text import equals_squeezed
from sensitivity.tasks.scoring.by_kind import accuracies_by_kind

GET_CD = (
    "download the archives of LEVIR-CD (justchenhao.github.io/LEVIR) and unpack test there (train too, to calibrate on "
    "it), to have test/A/test_1.png, test/B/test_1.png and test/label/test_1.png"
)
GET_CC = (
    "download Levir-CC-dataset.zip (github.com/Chen-Yang-Liu/RSICC) and unpack it there, to have LevirCCcaptions.json "
    "and images/test/A/test_000001.png and its like"
)
GET_XBD = (
    "download the test set of xView2 (xview2.org; train too, to calibrate on it) and unpack it there, to have "
    "test/images/NAME_pre_disaster.png, test/images/NAME_post_disaster.png and test/labels/NAME_post_disaster.json"
)
PARTS = ("test", "train")
CHANGED = "The two images show the same place, the first one earlier. Has a building appeared or disappeared?"
DESCRIBE = "The two images show the same place, the first one earlier. Describe in one sentence what has changed."
AFTER = "The two images show the same place before and after a disaster."
DAMAGE = {  # from the least to the worst: the name in xBD's labels -> the words of an answer
    "no-damage": "no damage",
    "minor-damage": "minor damage",
    "major-damage": "major damage",
    "destroyed": "destroyed",
}
DAMAGED = f"{AFTER} Is any building damaged?"
WORST = f"{AFTER} How badly is the most damaged building hit: {', '.join(DAMAGE.values())}?"
LISTED = {"filename": FILE_INSIDE, "split": TEXT, "sentences": list_of(OBJECT, 0)}


def levir_change(folder: Path, split: str, n: int, seed: int) -> Task:
    """LEVIR-CD: whether buildings changed, yes or no, by its masks; with F1."""
    source = DatasetFolder("levir-cd", folder, GET_CD)
    part = source.part(split, PARTS, ("{}/A", "{}/B", "{}/label"))
    for name in ("A", "B", "label"):
        source.file(f"{part.name}/{name}")
    examples, notes = source.drawn_examples(_masked(folder / part.name), part, n, seed)
    return yes_no.task(source.name, examples, notes)


def levir_captions(folder: Path, split: str, n: int, seed: int) -> Task:
    """LEVIR-CC: sentences that say what changed, scored by CIDEr; the kinds are changed and unchanged pairs."""
    source = DatasetFolder("levir-cc", folder, GET_CC)
    part = source.part(split, PARTS, ("images/{}/A", "images/{}/B"))
    listed = source.json("LevirCCcaptions.json", "images")["images"]
    source.file(f"images/{part.name}")
    examples, notes = source.drawn_examples(_described(folder, part.name, listed), part, n, seed)
    return caption_scores.task(source.name, examples, notes)


def building_damage(folder: Path, split: str, n: int, seed: int) -> Task:
    """xBD: whether any building is damaged, and how badly the worst is; the score is the share of right answers."""
    source = DatasetFolder("xbd", folder, GET_XBD)
    part = source.part(split, PARTS, ("{}/images", "{}/labels"))
    labels = source.file(f"{part.name}/labels")
    rows = _damaged(source, labels, source.file(f"{part.name}/images"))
    examples, notes = source.drawn_examples(rows, part, n, seed)
    return Task(
        source.name, examples, equals_squeezed, max_new_tokens=10, metrics=accuracies_by_kind(examples), notes=notes
    )


def _masked(folder: Path) -> Iterator[Example | Flaw]:
    """One question for each mask."""
    for mask in sorted((folder / "label").iterdir()):
        if mask.name.startswith(".") or not TEXT.fits(mask.name):
            continue
        if trouble := why_unusable(mask):
            yield Flaw(mask.stem, f"{trouble} as its mask")
            continue
        answer = "yes" if np.asarray(open_image(mask)).any() else "no"
        first, second = folder / "A" / mask.name, folder / "B" / mask.name
        yield Example(mask.stem, mask.stem, "change", first, CHANGED + SHORT_ANSWER, (answer,), more=(second,))


def _described(folder: Path, part: str, listed: object) -> Iterator[Example | Flaw]:
    """One description for each pair of a part, with all its sentences as right answers."""
    for image in checked_records(listed, "an image", LISTED):
        if image["split"] != part:
            continue
        name = image["filename"]
        raw = [check(one, {"raw": ANY_TEXT}, {}, "a sentence")["raw"].strip() for one in image["sentences"]]
        if not (right := tuple(filter(None, raw))):
            yield Flaw(name, "no sentence")
            continue
        first, second = (folder / "images" / part / when / name for when in "AB")
        kind = "changed" if image.get("changeflag") else "unchanged"
        yield Example(Path(name).stem, Path(name).stem, kind, first, DESCRIBE, right, more=(second,))


def _subtype(building: object) -> object:
    """How badly a building is damaged, as the labels name it; None where they do not say."""
    properties = check(building, {"properties": OBJECT}, {}, "a building")["properties"]
    return check(properties, {}, {"subtype": ANY_TEXT}, "a building's properties").get("subtype")


def _damaged(source: DatasetFolder, labels: Path, images: Path) -> Iterator[Example | Flaw]:
    """Two questions for each pair with buildings whose damage is known."""
    for file in sorted(labels.glob("*_post_disaster.json")):
        if not TEXT.fits(file.name):
            continue
        name = file.name.removesuffix("_post_disaster.json")
        features = source.json(str(file.relative_to(source.folder)), "features")["features"]
        buildings = check(features, {"xy": list_of(OBJECT, 0)}, {}, f"the buildings of {name}")["xy"]
        subtypes = {_subtype(one) for one in buildings}
        if strange := subtypes - {*DAMAGE, "un-classified", None}:
            raise InvalidValue(f"{name} has the damage {' and '.join(sorted(map(str, strange)))}")
        if damages := [kind for kind in DAMAGE if kind in subtypes]:
            first, second = (images / f"{name}_{when}_disaster.png" for when in ("pre", "post"))
            any_damage = "no" if damages == ["no-damage"] else "yes"
            for kind, prompt, right in (("any", DAMAGED, any_damage), ("worst", WORST, DAMAGE[damages[-1]])):
                yield Example(f"{name}-{kind}", name, kind, first, prompt + SHORT_ANSWER, (right,), more=(second,))
