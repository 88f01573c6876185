"""Examples from the documents of an lmms-eval task: its messages, images and right answers."""

from __future__ import annotations

import hashlib
import io
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from sensitivity.spec.errors import UserError, reason
from sensitivity.spec.fields import InvalidValue, quoted
from sensitivity.tasks.datasets.source import DatasetFolder, Flaw, Part, Record
from sensitivity.tasks.examples.types import Example
from sensitivity.tasks.harness.loading import Docs, LibraryTask, quiet

# columns that name a question's kind
KINDS = ("category", "question_type", "type", "subfield", "subject", "topic", "task")
MAX_KINDS = 40  # a column with more values does not name kinds
RECENT = 4  # documents whose decoded images are kept


@dataclass
class Documents:
    """The documents of a split with their images; `name` is the name of the split."""

    task: LibraryTask
    name: str
    docs: Docs
    recent: OrderedDict[int, tuple[Image.Image, ...]] = field(default_factory=OrderedDict)

    def content(self, doc: Record) -> list[Mapping[str, object]]:
        """The texts and images of a document's user message, in order."""
        with quiet():
            messages = self.task.doc_to_messages(doc)
        if not isinstance(messages, list) or len(messages) != 1 or messages[0].get("role") != "user":
            raise _Unsupported("its prompt is not a single user message")
        content: list[Mapping[str, object]] = messages[0]["content"]
        if strange := {str(one.get("type")) for one in content} - {"text", "image"}:
            raise _Unsupported(f"it shows {' and '.join(sorted(strange))}, and only images can be shown")
        return content

    def images(self, number: int) -> tuple[Image.Image, ...]:
        """The images of a document, as the task shows them."""
        if number not in self.recent:
            self.keep(number, _images_of(self.content(self.docs[number])))
        return self.recent[number]

    def keep(self, number: int, images: tuple[Image.Image, ...]) -> None:
        """Keep a document's decoded images, which are read one after the other, and drop those of older documents."""
        self.recent[number] = images
        while len(self.recent) > RECENT:
            self.recent.popitem(last=False)


@dataclass(frozen=True)
class DocumentImage:
    """One image of a document; it is decoded when it is needed."""

    documents: Documents
    number: int
    place: int
    name: str  # of all images of the document

    def read_bytes(self) -> bytes:
        """The image as the task shows it, uncompressed."""
        written = io.BytesIO()
        self.documents.images(self.number)[self.place].convert("RGB").save(written, format="PPM")
        return written.getvalue()

    def resolve(self) -> tuple[str, int]:
        """A value that is equal for equal images."""
        return self.name, self.place

    def __str__(self) -> str:
        return self.name


class _Unsupported(UserError):
    """A document that is not a question about images."""


def drawn(
    source: DatasetFolder, documents: Documents, part: Part, n: int, seed: int
) -> tuple[tuple[Example, ...], tuple[str, ...]]:
    """n examples of a part drawn with the seed, in the order of the documents, and notes on those left out."""
    kind_of, undecoded = _kind_column(documents.docs), _undecoded(documents.docs)
    chosen: list[tuple[int, Example]] = []
    flaws: list[Flaw] = []
    # images are read until there are enough, since a whole data set can have gigabytes of them
    for number in np.random.default_rng(seed).permutation(len(documents.docs)).tolist():
        if len(chosen) == n:
            break
        cluster = _cluster(documents.name, undecoded, number)
        if not part.contains(cluster):
            continue
        try:
            chosen.append((number, _example(documents, number, cluster, kind_of)))
        except _Unsupported as error:
            raise UserError(f"{source.name} cannot be swept: in document {number}, {error}") from None
        except Exception as error:  # of Pillow, or of the task's own code on a document without an image
            flaws.append(Flaw(_id(documents.name, number), f"no usable image ({reason(error)})"))
    notes = source.flaw_notes(flaws, len(flaws) + len(chosen))
    if not chosen:
        raise UserError(f"{source.name} has no {part.split} examples in {source.folder}")
    return tuple(example for _, example in sorted(chosen, key=lambda one: one[0])), (*part.note, *notes)


def _id(split: str, number: int) -> str:
    return f"{split}-{number:06d}"


def _example(documents: Documents, number: int, cluster: str, kind_of: str | None) -> Example:
    doc = documents.docs[number]
    content = documents.content(doc)
    images = _images_of(content)
    if not images:
        raise InvalidValue("it shows none")
    documents.keep(number, images)
    for image in images:
        image.load()
    prompt, pieces = prompt_of([str(one["text"]) if one["type"] == "text" else None for one in content])
    lazy = [DocumentImage(documents, number, place, cluster) for place in range(len(images))]
    return Example(
        id=_id(documents.name, number),
        cluster=cluster,
        kind=str(doc[kind_of]) if kind_of else "all",
        image=lazy[0],
        prompt=prompt,
        answers=_answers(documents.task, doc),
        more=tuple(lazy[1:]),
        pieces=pieces,
    )


def prompt_of(texts: Sequence[str | None]) -> tuple[str, tuple[str | None, ...]]:
    """The prompt of a message (images are None in `texts`), and its pieces: () if all images come before one text."""
    images = texts.count(None)
    images_first = list(texts[:images]) == [None] * images and len(texts) == images + 1
    return "\n".join(text for text in texts if text), () if images_first else tuple(texts)


def _images_of(content: Sequence[Mapping[str, object]]) -> tuple[Image.Image, ...]:
    """The images among the pieces of a message."""
    images = []
    for one in content:
        if one["type"] == "image":
            if not isinstance(image := one["url"], Image.Image):
                raise InvalidValue(f"{quoted(image)} is no image")
            images.append(image)
    return tuple(images)


def _answers(task: LibraryTask, doc: Record) -> tuple[str, ...]:
    """The right answers, of which the likelihood of the first is measured; a box or a number is one answer."""
    target = task.doc_to_target(doc)
    if target == task.config.doc_to_target and "answers" in doc:
        target = doc["answers"]  # the task names a column that the data do not have (textvqa_val)
    if isinstance(target, list) and target and all(isinstance(one, str) for one in target):
        return tuple(answer for answer, _ in Counter(target).most_common() if answer.strip()) or ("",)
    return (str(target),)


def _kind_column(docs: Docs) -> str | None:
    """The column that names kinds of questions: one with few different texts."""
    for name in KINDS:
        if name in docs.column_names:
            values = set(docs.select_columns([name])[:][name])
            if all(isinstance(value, str) for value in values) and 1 < len(values) <= MAX_KINDS:
                return name
    return None


def _undecoded(docs: Docs) -> Docs | None:
    """The image columns with encoded images, as they are stored; None if there are no such columns."""
    import datasets

    columns = {
        name: datasets.List(datasets.Image(decode=False)) if hasattr(kind, "feature") else datasets.Image(decode=False)
        for name, kind in docs.features.items()
        if isinstance(getattr(kind, "feature", kind), datasets.Image)
    }
    if not columns:
        return None
    stored = docs.select_columns(list(columns))
    for name, kind in columns.items():
        stored = stored.cast_column(name, kind)
    return stored


def _cluster(split: str, undecoded: Docs | None, number: int) -> str:
    """A name for the images of a document, which is equal for equal images."""
    if undecoded is None:
        return _id(split, number)
    digest = hashlib.sha256()
    for stored in undecoded[number].values():
        for one in stored if isinstance(stored, list) else [stored]:
            if one:
                digest.update(one["bytes"] if one["bytes"] is not None else str(one["path"]).encode())
    return digest.hexdigest()[:16]
