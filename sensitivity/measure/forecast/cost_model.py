"""Predicts the cost of forward passes from a model's shapes and times measured on this machine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sensitivity.measure.forecast.hardware import Hardware
from sensitivity.measure.generate.batches import Batch, batches, images_at_once
from sensitivity.measure.generate.retrieval import CHUNK
from sensitivity.measure.shards import MOST
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import PARTS, WORDS, ComponentMap, Weight
from sensitivity.tasks.examples.types import Gallery, Task

FEW = 8  # images that are made into tensors, to estimate all of them
PASSES = (
    30  # times a block's hidden states are read and written beside products: norms, rotations, residuals, reshaping
)
COPIES = 6  # times keys and values are read and written to copy them, where questions share an image
COLD = (
    1.4  # a pass costs so many times the sum of its operations, timed in loops with warm caches (reports/preflight.md)
)
EVERYTHING: Mapping[str | None, float] = {}  # every kind of layer reads all tokens
CALLS = 12  # small operations per linear layer; their start-up is most of the cost of a small model


@dataclass(frozen=True)
class TaskSample:
    """What a few examples tell about a whole task; tokens and bytes are per image or per question."""

    task: Task
    examples: int
    images: int
    sizes: Mapping[int, int]  # images in a batch -> how many such batches
    making: float  # seconds to read one image and make it and its questions into tensors
    bytes: float
    patches: int  # of an image in the vision tower
    places: int  # tokens of an image in the language model
    sequence: int  # tokens of the pass over an image, or over a whole prompt and its answer
    tail: int  # tokens of the pass over a question and its answer, where the image is shared
    said: int  # tokens, of `tail` or else of `sequence`, that get logits
    prefix: bool  # whether questions share the tokens of their image

    @classmethod
    def of(
        cls, vlm: VLM, task: Task, ends: Sequence[int], plain: bool, clock: Callable[[], float] = time.perf_counter
    ) -> TaskSample:
        """Estimate a whole task from its first few images."""
        clusters = list(dict.fromkeys(example.cluster for example in task.examples))
        few = replace(task, examples=tuple(e for e in task.examples if e.cluster in set(clusters[:FEW])))
        if task.gallery:  # one image and one caption; `_searched` counts the pairs
            few = replace(task, examples=task.examples[:1])
        next(batches(vlm, few, plain))  # warm-up: the first call is slower
        began = clock()
        batch = next(batches(vlm, few, plain))
        looked = len({example.cluster for example in batch.examples})
        making = (clock() - began) / looked
        most = images_at_once(batch.inputs["pixel_values"].numel() // (looked if batch.prefix else len(batch.examples)))
        # shards are counted in images of the largest task; this one has its share of each
        share = len(clusters) / max(ends[-1], 1)
        shards = [round((end - begin) * share) for begin, end in zip([0, *ends], ends, strict=False)]
        target = max(map(len, batch.targets))
        ids = batch.inputs["input_ids"]
        tail = max((len(p) + len(t) for p, t in zip(batch.prompts, batch.targets, strict=False)), default=0)
        return cls(
            task=task,
            examples=len(task.examples),
            images=len(clusters),
            sizes=Counter(size for images in shards for size in _chunks(images, most)),
            making=making,
            bytes=sum(t.numel() * t.element_size() for t in batch.inputs.values()) / looked,
            patches=_patches(vlm, batch, looked),
            places=int((ids == getattr(vlm.model.config, "image_token_id", -1)).sum()) // len(ids) or ids.shape[1],
            sequence=batch.prefix or ids.shape[1] + target,
            tail=tail,
            said=tail - min(map(len, batch.prompts)) + 1 if batch.prefix else ids.shape[1] + target,
            prefix=bool(batch.prefix),
        )

    def shares(self, part: str) -> bool:
        """Whether plans with a common prefix compute a part once; a gallery shares the vision tower only."""
        return part == "vision" or not self.task.gallery

    @property
    def questions(self) -> float:
        """Questions per image."""
        return self.examples / self.images


class CostModel:
    """Predicts the seconds and bytes of a task's passes through each part, from the shapes of its weights."""

    def __init__(self, vlm: VLM, parts: ComponentMap, probe: Hardware) -> None:
        self.probe, self.parts = probe, parts
        text = vlm.model.config.get_text_config()
        self.heads = int(getattr(text, "num_attention_heads", 8) or 8)
        groups = int(getattr(text, "num_key_value_heads", None) or self.heads)
        head = vlm.model.get_output_embeddings()
        self.head = tuple(head.weight.shape) if head is not None else (0, 0)
        # embedding and head are counted where tokens are read and predicted
        layers = [w for w in parts.weights if w.kind not in WORDS]
        self.weights = {part: [w for w in layers if w.part == part] for part in PARTS}
        self.blocks = {part: max((w.blocks for w in weights), default=0) for part, weights in self.weights.items()}
        self.width = {part: _width(weights) for part, weights in self.weights.items()}
        # numbers in the keys of one token: query heads may share them
        self.caches = self.width["language"] * groups // self.heads

    def through(
        self, part: str, rows: int, tokens: int, before: int = 0, seen: Mapping[str | None, float] = EVERYTHING
    ) -> float:
        """Seconds for one pass of rows x tokens through a part, which also attend to `before` earlier tokens.

        `seen` gives, by kind of layer, the share of the tokens that it reads, where that is not all.
        """
        if not self.weights[part] or not rows * tokens:
            return 0.0
        count, blocks, width = rows * tokens, self.blocks[part], self.width[part]
        shares = [(w, round(seen.get(w.kind, 1.0) * count)) for w in self.weights[part]]
        products = sum(self.probe.product(some, w.rows, w.cols) for w, some in shares if some)
        heads = self.heads if width % self.heads == 0 else 1
        attention = self.probe.attention(rows, heads, tokens, before + tokens, width // heads) if blocks else 0.0
        calls = CALLS * len(self.weights[part]) * self.probe.call
        return products + blocks * (attention + PASSES * self.probe.sweep_over(count * width)) + calls

    def passes(self, sample: TaskSample) -> dict[str, tuple[float, float]]:
        """Per part, over all images: seconds of what plans can share, and of what each plan computes for itself."""
        if sample.task.gallery:
            return self._searched(sample, sample.task.gallery)
        found = dict.fromkeys(PARTS, (0.0, 0.0))
        for images, times in sample.sizes.items():
            questions = max(round(images * sample.questions), 1)
            rows = images if sample.prefix else questions
            found["vision"] = _plus(found["vision"], times * self.through("vision", rows, sample.patches))
            found["connector"] = _plus(found["connector"], times * self.through("connector", rows, sample.places))
            whole = self.through("language", rows, sample.sequence)
            # each plan computes its own logits, then reads a neighbor's answers as drafts; where only exact answers
            # count, the pass over the right ones decides
            if sample.prefix:
                asked, words = self._asked(sample, questions)
                again = words + (0.0 if sample.task.exact else asked + words)
                found["language"] = _plus(found["language"], times * (whole + asked), times * again)
            else:
                words = self.probe.product(rows * sample.said, *self.head)
                again = words + (0.0 if sample.task.exact else whole + words)
                found["language"] = _plus(found["language"], times * whole, times * again)
        return {part: (COLD * shared, COLD * own) for part, (shared, own) in found.items()}

    def _searched(self, sample: TaskSample, gallery: Gallery) -> dict[str, tuple[float, float]]:
        """Images and captions by themselves, then together those pairs that either of the two ranks among its `top`.

        Queries and text have feed-forwards of their own, and only queries attend to the image.
        """
        captions = sample.examples - sample.images
        pool = min(gallery.pool, sample.images)
        texts = max(captions * pool / sample.images, 1.0)
        alone = min(gallery.top / texts, 1.0), min(gallery.top / pool, 1.0)
        # images and captions choose mostly the same pairs: three quarters of this is as if they chose all the same, one
        # quarter as if they chose independently
        chosen = 0.75 * max(alone) + 0.25 * (1 - (1 - alone[0]) * (1 - alone[1]))
        pairs = round(chosen * texts * sample.images)
        queries, words = sample.places, max(sample.sequence - sample.places, 1)

        def portions(part: str, rows: int, size: int, tokens: int, looking: float = 1.0) -> float:
            count = -(-rows // size)
            seen: Mapping[str | None, float] = {"ff": 0.5, "cross": looking} if part == "connector" else EVERYTHING
            return count * self.through(part, -(-rows // count), tokens, seen=seen) if count else 0.0

        read = portions("connector", sample.images, CHUNK, queries)
        read += portions("connector", captions, CHUNK, words, looking=0.0)
        read += portions("connector", pairs, 4 * CHUNK, queries + words, looking=queries / (queries + words))
        vision = portions("vision", sample.images, CHUNK, sample.patches)
        return {"vision": (COLD * vision, 0.0), "connector": (COLD * read, 0.0), "language": (0.0, 0.0)}

    def writing(self, sample: TaskSample) -> float:
        """Seconds to generate all answers token by token, up to the task's limit."""
        if sample.task.exact or sample.task.gallery:
            return 0.0
        steps, total = sample.task.max_new_tokens, 0.0
        for images, times in sample.sizes.items():
            questions = max(round(images * sample.questions), 1)
            step = self.probe.product(questions, *self.head)
            if sample.prefix:
                read = sample.sequence + sample.tail
                step += self.through("language", questions, 1, before=read) + self._copied(questions, read)
                total += times * steps * step
            else:  # generate() starts from the images again
                total += times * self.through("vision", questions, sample.patches)
                total += times * self.through("connector", questions, sample.places)
                total += times * self.through("language", questions, sample.sequence)
                total += times * steps * (step + self.through("language", questions, 1, before=sample.sequence))
        return COLD * total

    def _asked(self, sample: TaskSample, questions: int) -> tuple[float, float]:
        """Seconds for the blocks to read questions after their image, and for each plan's own logits and copies."""
        words = self.probe.product(questions * sample.said + round(questions / sample.questions), *self.head)
        copied = self._copied(questions, sample.sequence)
        return self.through("language", questions, sample.tail, before=sample.sequence), words + copied

    def _copied(self, questions: int, tokens: int) -> float:
        """Seconds to give each question its own copy of its image's keys and values."""
        return COPIES * self.probe.sweep_over(questions * tokens * self.width["language"] * self.blocks["language"])

    def kept(self, sample: TaskSample) -> float:
        """Bytes that the prefix cache holds for one plan.

        These are hidden states where components begin and before and after the last block of a part, and the keys and
        values of the images.
        """
        begins = Counter(component.part for component in self.parts.components)
        states = {part: begins[part] + 1 for part in PARTS if self.blocks[part]}
        states["language"] = begins["language"] - 1
        if sample.task.gallery:
            states = {"vision": states["vision"]}
        tokens = {"vision": sample.patches, "connector": sample.places, "language": sample.sequence}
        numbers = sum(count * tokens[part] * self.width[part] for part, count in states.items())
        images = min(sample.images, MOST)
        rows = images if sample.prefix or sample.task.gallery else images * sample.questions
        if sample.prefix:
            numbers += 2 * self.blocks["language"] * sample.sequence * self.caches
            numbers += round(sample.questions * states["language"] * sample.tail * self.width["language"])
        return float(rows * self.probe.dtype.itemsize * numbers)

    def activations(self, sample: TaskSample) -> float:
        """Bytes of the largest pass: logits in two dtypes, the activations of one block, and keys and values.

        Each question has keys and values of its own where it is read after a shared image.
        """
        images, wide = max(sample.sizes), self.probe.dtype.itemsize
        questions = max(round(images * sample.questions), 1)
        logits = questions * sample.said * self.head[0] * (wide + 8)
        own = 2 * self.blocks["language"] * questions * (sample.sequence + sample.tail) * self.caches * sample.prefix
        return float(logits + wide * (own + 8 * images * sample.sequence * self.width["language"]))


def _plus(one: tuple[float, float], shared: float, own: float = 0.0) -> tuple[float, float]:
    """A part's shared and own seconds, with these added."""
    return one[0] + shared, one[1] + own


def _width(weights: Sequence[Weight]) -> int:
    """The width of the hidden states: what most linear layers read."""
    return Counter(w.cols for w in weights).most_common(1)[0][0] if weights else 0


def _chunks(images: int, most: int) -> list[int]:
    """The batch sizes of so many images."""
    whole, rest = divmod(images, most)
    return [most] * whole + ([rest] if rest else [])


def _patches(vlm: VLM, batch: Batch, images: int) -> int:
    """The patches of one image, for any family: the values in its pixels over those in one patch."""
    config = getattr(vlm.model.config, "vision_config", None)
    side = getattr(config, "patch_size", None) or 16
    side = side[0] if isinstance(side, list | tuple) else side
    numbers = 3 * int(side) ** 2 * int(getattr(config, "temporal_patch_size", 1) or 1)
    rows = images if batch.prefix else len(batch.examples)
    return max(batch.inputs["pixel_values"].numel() // (numbers * rows), 1)
