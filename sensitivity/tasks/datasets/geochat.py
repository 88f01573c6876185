"""GeoChat-Bench: boxes for a description (referring.jsonl), and captions of a box (region_captioning)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sensitivity.spec.fields import ANY_TEXT, FILE_INSIDE, NAME, TEXT, Kind
from sensitivity.tasks.datasets.source import DatasetFolder, Flaw, Record, checked_records
from sensitivity.tasks.examples.types import Example, Metric, Regions, Task, mean_of
from sensitivity.tasks.scoring import captions
from sensitivity.tasks.scoring import grounding as boxes_found
from sensitivity.tasks.scoring.answer_text import phrase

GET = (
    "download referring.jsonl and region_captioning.jsonl from huggingface.co/datasets/MBZUAI/GeoChat-Bench and "
    "images.zip of GeoChat_Instruct, with all its .png files in one folder named images there"
)
REQUIRED, MORE = {"image_id": FILE_INSIDE, "question": TEXT}, {"type": TEXT, "question_id": NAME}
TRUE_BOXES = Kind("a list of boxes", lambda value: value == [] or boxes_found.BOXES.fits(value))
PROMPTS = {"ref": "[refer] Give me the location of <p> {} </p>", "grounding": "[grounding]{}"}
IDENTIFY = "[identify] What is the object present at {}"
REFERRING, REGIONS = "referring.jsonl", "region_captioning.jsonl"


def geochat_boxes(folder: Path, split: str, n: int, seed: int, decoding: str = "turned") -> Task:
    """Boxes scored by acc@0.5; the kinds of question are ref (a described object) and grounding (all of a class)."""
    source = DatasetFolder("geochat-grounding", folder, GET)
    lines = source.lines(REFERRING)
    source.file("images")
    examples, notes = source.drawn_examples(_referring_rows(source, lines), source.part(split), n, seed)
    return boxes_found.task(source.name, tuple(map(boxes_found.with_image_size, examples)), notes, decoding)


def region_captions(folder: Path, split: str, n: int, seed: int) -> Task:
    """Captions of a box, scored by ROUGE-L as rouge_score computes it.

    The paper's METEOR is NLTK's and ours is METEOR 1.5, so the two are not comparable.
    """
    source = DatasetFolder("geochat-region-captions", folder, GET)
    lines = source.lines(REGIONS)
    source.file("images")
    examples, notes = source.drawn_examples(_caption_rows(source, lines), source.part(split), n, seed)
    first, longest = captions.rouge("rouge1"), captions.rouge("rougeL")

    def rouge_l(answer: str, example: Example) -> float:
        return max(longest(phrase(answer), right.lower()) for right in example.answers)

    def rouge_1(answer: str, example: Example) -> float:
        return max(first(phrase(answer), right.lower()) for right in example.answers)

    further, missing = captions.caption_metrics()
    kept: dict[str, Metric] = {"ROUGE-1": mean_of(rouge_1)}
    kept |= {name: metric for name, metric in further.items() if name == "METEOR"}
    all_notes = (*notes, *missing)
    return Task(source.name, examples, rouge_l, max_new_tokens=64, metrics=kept, notes=all_notes, slow=captions.SLOW)


def _referring_rows(source: DatasetFolder, lines: Iterator[Record]) -> Iterator[Example | Flaw]:
    """One example per line of referring.jsonl, with polygons as true boxes."""
    for number, line in enumerate(
        checked_records(lines, "a line", REQUIRED, {**MORE, "ground_truth": TRUE_BOXES}), start=1
    ):
        name, image, kind = _name(line, number), line["image_id"], line.get("type") or "ref"
        right = boxes_found.polygons(line.get("ground_truth") or [])
        if kind not in PROMPTS:
            yield Flaw(name, f"of a type that is not {' or '.join(PROMPTS)}")
        elif right is None:
            yield Flaw(name, "no true box with an area")
        else:
            prompt = PROMPTS[kind].format(line["question"].strip())
            yield Example(name, image, kind, _image(source, image), prompt, (), Regions(0, 0, right))


def _caption_rows(source: DatasetFolder, lines: Iterator[Record]) -> Iterator[Example | Flaw]:
    """One example per line of region_captioning.jsonl, with its caption as the right answer."""
    for number, line in enumerate(
        checked_records(lines, "a line", REQUIRED, {**MORE, "ground_truth": ANY_TEXT}), start=1
    ):
        name, image, right = _name(line, number), line["image_id"], line.get("ground_truth") or ""
        if not right.strip():
            yield Flaw(name, "no caption")
        else:
            prompt = IDENTIFY.format(line["question"].strip())
            yield Example(name, image, "region", _image(source, image), prompt, (right.strip(),))


def _name(line: Record, number: int) -> str:
    """A unique name: question ids repeat across types of question, line numbers do not."""
    question = line.get("question_id")
    return f"{'line' if question is None else question}-{number:05d}"


def _image(source: DatasetFolder, name: str) -> Path:
    return source.folder / "images" / f"{name}.png"
