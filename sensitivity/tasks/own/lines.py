"""A user's own data as a task: JSON Lines or a saved data set, with one of SCORERS."""

from __future__ import annotations

import codecs
import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sensitivity.spec.errors import UserError
from sensitivity.spec.fields import (
    ANY_TEXT,
    FILE,
    NAME,
    TEXT,
    InvalidValue,
    Kind,
    check,
    content,
    either,
    list_of,
    one_of,
    parsed,
    quoted,
    shortened,
)
from sensitivity.tasks.datasets.source import DatasetFolder, Record, draw
from sensitivity.tasks.examples import videos
from sensitivity.tasks.examples.types import SPLITS, Example, ImageSource, Regions, Task, exact
from sensitivity.tasks.own import saved
from sensitivity.tasks.own.calibration_images import choose_calibration_images, kept, too_few
from sensitivity.tasks.scoring import anls, captions, choices, grounding, numbers, vqa_accuracy, yes_no

NEEDS = 'each line is like {"image": "a.jpg", "prompt": "What is this?", "answers": ["a cat"]}'
VIDEO = 'a line about a video is like {"video": "a.mp4", "frames": 8, "prompt": "What happens?", "answers": ["a fall"]}'
BOXES = 'each line is like {"image": "a.jpg", "prompt": "Where is it?", "boxes": [[10, 20, 50, 60]]}, in pixels'
ANSWERS = either(ANY_TEXT, list_of(ANY_TEXT))  # empty answers pass here, since they get a message of their own below
REQUIRED = {"prompt": ANY_TEXT}
TURN = Kind(
    "[prompt, answer]", lambda value: isinstance(value, list) and len(value) == 2 and all(map(TEXT.fits, value))
)
OPTIONAL = {"id": NAME, "kind": TEXT, "split": one_of(*SPLITS), "turns": list_of(TURN, 0)}
SHOWN = {"image": either(FILE, list_of(FILE)), "video": FILE}  # what a question is about: each line has one of these
FRAMES = Kind(
    f"a whole number from 1 to {videos.MAX_FRAMES}",
    lambda value: type(value) is int and 1 <= value <= videos.MAX_FRAMES,
)
# the fields of a line that are read; the last is added when a line is
READ = (*SHOWN, "frames", *REQUIRED, "answers", "boxes", *OPTIONAL, "number")
MOST_NAMED = 5  # of other fields
MIN_ANSWERS = 4  # of a question, for VQA's accuracy: without one person, three others must be able to agree

Scorer = Callable[[str, tuple[Example, ...], tuple[str, ...]], Task]


def _exact(name: str, examples: tuple[Example, ...], notes: tuple[str, ...]) -> Task:
    return Task(name, examples, exact, exact=True, notes=notes)


def _vqa(name: str, examples: tuple[Example, ...], notes: tuple[str, ...]) -> Task:
    for example in examples:
        if len(example.answers) < MIN_ANSWERS:
            raise UserError(
                f"example {example.id} of {name} has fewer than {MIN_ANSWERS} answers, so the accuracy of VQA cannot "
                "reach 1; give every person's answer, or type exact: in front of the file instead of vqa:"
            )
    return Task(name, examples, vqa_accuracy.accuracy, notes=notes)


# how answers are scored: --task SCORER:FILE.jsonl or SCORER:FOLDER
SCORERS: dict[str, Scorer] = {
    "exact": _exact,
    "vqa": _vqa,
    "iou": grounding.task,
    "recall": grounding.recall_task,
    "caption": captions.task,
    "choice": choices.task,
    "number": numbers.task,
    "anls": anls.task,
    "yesno": yes_no.task,
}
BOXED = ("iou", "recall")  # scorers of answers that are boxes
ROUNDED = 1.0  # pixels by which a box may reach beyond its image without a note
URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)


def own_task(
    path: Path,
    split: str,
    n: int,
    seed: int,
    scorer: str = "exact",
    score: Callable[[str, Example], float] | None = None,
) -> Task:
    """n examples of a file or folder, drawn with the seed; a line without a "split" is for evaluation.

    If no line has a split, a tenth of the images is for calibration.

    `score` may be any function from an answer and its example to a number; it replaces the scorer's rule.
    """
    if path.is_dir():
        rows, notes = saved.lines_of(path, split, scorer in BOXED)
        return task_from_lines(path, rows, split, n, seed, scorer, score, notes)
    boxes = scorer in BOXED
    every = list(lines_of(path, boxes))
    of_split, notes = _of_split(path, every, split, BOXES if boxes else NEEDS)
    return task_from_lines(path, of_split, split, n, seed, scorer, score, (*notes, *_unread(path, every)))


def _unread(path: Path, lines: Iterable[Record]) -> Iterator[str]:
    """A note on fields of lines that mean nothing here, such as misspelled ones."""
    counted = Counter(name for line in lines for name in line if name not in READ)
    each = []
    for name, number in counted.items():
        near = difflib.get_close_matches(name, READ, n=1)
        each.append(f"{shortened(name)} in {number:,} of them{f' (did you mean {near[0]}?)' if near else ''}")
    if each:
        more = f" and {len(each) - MOST_NAMED} others" if len(each) > MOST_NAMED else ""
        yield f"fields of lines of {path} that are not read: {', '.join(each[:MOST_NAMED])}{more}"


def _of_split(path: Path, every: list[Record], split: str, needs: str) -> tuple[list[Record], tuple[str, ...]]:
    """The lines of a split, and a note if the images for calibration had to be drawn."""
    if every and not any(line["split"] for line in every):
        groups = [_names(line) for line in every]
        held_out, names = choose_calibration_images(path.parent, groups), {name for group in groups for name in group}
        if split == "calibration" and not held_out:
            raise too_few(path)
        drawn = [line for line in every if (_names(line)[0] in held_out) == (split == "calibration")]
        note = f"no line has a split: {kept(split, len(held_out), len(names))}"
        return drawn, (note,) if held_out else ()
    of_split = [line for line in every if (line["split"] or "evaluation") == split]
    if not of_split:
        raise UserError(f'{path} has no {split} lines; {needs}, and may have "split": "{split}"')
    return of_split, ()


def _names(line: Record) -> list[str]:
    """The files of a line: an image, several in a list, or a video."""
    named = line["video"] if "video" in line else line["image"]
    return list(named) if isinstance(named, list) else [named]


def task_from_lines(
    path: Path,
    lines: Iterable[Record],
    split: str,
    n: int,
    seed: int,
    scorer: str,
    score: Callable[[str, Example], float] | None = None,
    notes: tuple[str, ...] = (),
) -> Task:
    """The task of lines that were read from `path`."""
    source = DatasetFolder(path.stem, path.parent, "correct or remove those lines")
    numbers: dict[str, int] = {}  # of lines, by their examples' ids

    def made() -> Iterator[Example]:
        for line in lines:
            example = _example(path, line, scorer in BOXED)
            numbers[example.id] = line["number"]
            yield example

    drawn = draw(made(), n, seed, str(path), split)
    examples, left_out = source.with_usable_images(drawn)
    notes = (*notes, *videos.note([example.image for example in examples]), *left_out)
    if scorer in BOXED:
        examples = tuple(map(grounding.with_image_size, examples))
        notes = (*notes, *_boxes_beyond(path, examples, numbers), *_fractions(path, examples))
    if score is not None:
        return Task(path.stem, examples, score, notes=notes)
    return SCORERS[scorer](path.stem, examples, notes)


def _boxes_beyond(path: Path, examples: Sequence[Example], numbers: Mapping[str, int]) -> Iterator[str]:
    """A note on boxes that reach beyond their image by more than is rounded; an error for one that is not in it."""
    beyond = {example: far for example in examples if (far := grounding.beyond_image(example)) > ROUNDED}
    for example, far in beyond.items():
        if far == math.inf and example.regions:
            size = f"{example.regions.width} by {example.regions.height} pixels"
            number = numbers[example.id]
            raise UserError(f"{path}, line {number} has a box outside of its image, which is {size}; {BOXES}")
    if beyond:
        few = ", ".join(str(numbers[example.id]) for example in list(beyond)[:3]) + ", ..." * (len(beyond) > 3)
        yield (
            f"{len(beyond)} of {len(examples)} examples have boxes that reach beyond their image, by at most "
            f"{max(beyond.values()):g} pixels (line {few}); they are used as they are"
        )


def _fractions(path: Path, examples: Sequence[Example]) -> Iterator[str]:
    """A note where all boxes lie in the first pixel of their images, as boxes do whose corners are fractions."""
    corners = [corner for one in examples if one.regions for box in one.regions.polygons for corner in box]
    if all(0 <= number <= 1 for corner in corners for number in corner):
        yield (
            f"all boxes of {path} lie between 0 and 1: boxes are in pixels, so fractions must be multiplied by the "
            "width and the height of their image"
        )


def lines_of(path: Path, boxes: bool = False) -> Iterator[Record]:
    """The lines of a file as objects, each with its number and its split, which is None if the line has none."""
    needs, right = (BOXES, "boxes") if boxes else (NEEDS, "answers")
    try:
        every = content(path).split(b"\n")  # not splitlines(): JSON may contain U+2028 and U+0085
    except InvalidValue as error:
        raise UserError(f"cannot read {path}: {error}; {needs}") from error
    for number, line in enumerate(every, start=1):
        try:
            if not line.removeprefix(codecs.BOM_UTF8).strip():
                continue
            fields = parsed(line)
        except InvalidValue as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}); {needs}") from error
        if not isinstance(fields, dict):
            raise UserError(f"{path}, line {number} is {quoted(fields)} instead of an object; {needs}")
        given = fields
        shown = "video" if "video" in given else "image"
        right_line = VIDEO if shown == "video" and not boxes else needs
        if missing := [name for name in (shown, "prompt", right) if given.get(name) in (None, "", [])]:
            other = "; for boxes, type iou:FILE or recall:FILE" if "boxes" in given and not boxes else ""
            raise UserError(f"{path}, line {number} lacks {' and '.join(missing)}{other}; {right_line}")
        if shown == "video" and ("image" in given or boxes):
            other = "an image, too" if "image" in given else "boxes, which are those of one image"
            raise UserError(f"{path}, line {number} has a video and {other}; {VIDEO}")
        if shown == "image" and "frames" in given:
            raise UserError(f"{path}, line {number} has frames and no video; {VIDEO}")
        try:
            check(given, {shown: SHOWN[shown], **REQUIRED}, {**OPTIONAL, "frames": FRAMES})
        except InvalidValue as error:
            raise UserError(f"{path}, line {number}: {error}; {right_line}") from error
        yield {**given, "split": given.get("split"), "number": number}


def _example(path: Path, fields: Record, boxes: bool) -> Example:
    """The example of one line."""
    line, needs = f"{path}, line {fields['number']}", BOXES if boxes else NEEDS
    try:
        check(
            fields,
            {**REQUIRED, **({"boxes": grounding.BOXES} if boxes else {"answers": ANSWERS})},
            {**OPTIONAL, "answers": ANSWERS},
        )
    except InvalidValue as error:
        raise UserError(f"{line}: {error}; {needs}") from error
    given = fields.get("answers") or ()
    answers = (given,) if isinstance(given, str) else tuple(given)
    if not all(answer.strip() for answer in answers) or not (answers or boxes):
        raise UserError(f"{line} has an empty answer; {needs}")
    regions = None
    if boxes:
        for box in fields["boxes"]:
            if grounding.is_inverted(box):
                raise UserError(
                    f"{line} has the box {quoted(box)}, which ends before it begins: boxes are [x1, y1, x2, y2], and "
                    "not a corner, a width and a height"
                )
        whole = grounding.polygons(fields["boxes"])
        if whole is None:
            raise UserError(f"{line} has a box without an area; {needs}")
        regions = Regions(0, 0, whole)
    if urls := [one for one in _names(fields) if isinstance(one, str) and URL.match(one)]:
        raise UserError(
            f"{line} names {shortened(urls[0])}, and images and videos must be files on this machine; download it, and "
            "give the path of the file"
        )
    first, *more = _images(path.parent, fields)
    name = fields.get("id")
    return Example(
        id=f"line-{fields['number']:06d}" if name is None else str(name),
        cluster=str(_names(fields)[0]),
        kind=fields.get("kind") or "all",
        image=first,
        prompt=fields["prompt"],
        answers=answers,
        regions=regions,
        more=tuple(more),
        turns=tuple((prompt, answer) for prompt, answer in fields.get("turns") or ()),
    )


def _images(folder: Path, fields: Record) -> Sequence[ImageSource]:
    """What a question is about: its images, or the frames of its video."""
    if "video" in fields:
        return videos.frames_of(folder / fields["video"], fields.get("frames", videos.FRAMES))
    # a line of a file names images; a row of a saved data set has the image itself
    return [folder / one if isinstance(one, str) else one for one in _names(fields)]
