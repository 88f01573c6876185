"""What passes of a task's examples through the parts of a model cost, from the model's shapes and a probe's times."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sensitivity.components import PARTS, ComponentMap, Weight
from sensitivity.evaluate import IMAGES_PER_BATCH, Batch, batches
from sensitivity.models import VLM
from sensitivity.probe import Probe
from sensitivity.shards import MOST
from sensitivity.tasks import Task

FEW = 8  # images that are made into tensors to see what all will be like
PASSES = 30  # over a block's hidden states, beside its products: norms, rotations, residuals, reshaping
COPIES = 6  # of keys and values, where questions are read on top of their images
COLD = 1.4  # a pass takes so many times what its pieces take one by one, again and again (reports/preflight.md)
CALLS = 12  # small operations to every linear layer; their start-up is most of what a small model costs


@dataclass(frozen=True)
class Sample:
    """What a few examples of a task tell about all of them; tokens and bytes are per image or per question."""

    task: Task
    examples: int
    images: int
    sizes: Mapping[int, int]  # how many batches of so many images
    making: float  # seconds to read one image and make it and its questions into tensors
    bytes: float
    patches: int
    places: int  # of an image in the language model
    sequence: int  # tokens of the pass over an image, or over a whole prompt and its answer
    tail: int  # tokens of the pass over a question and its answer, where that is apart
    prefix: bool

    @classmethod
    def of(
        cls, vlm: VLM, task: Task, ends: Sequence[int], plain: bool, clock: Callable[[], float] = time.perf_counter
    ) -> Sample:
        clusters = list(dict.fromkeys(example.cluster for example in task.examples))
        few = replace(task, examples=tuple(e for e in task.examples if e.cluster in set(clusters[:FEW])))
        if task.gallery:  # an image and a caption; how many of them meet is counted elsewhere
            few = replace(task, examples=task.examples[:1])
        next(batches(vlm, few, plain))  # what is slow the first time
        began = clock()
        batch = next(batches(vlm, few, plain))
        looked = len({example.cluster for example in batch.examples})
        making = (clock() - began) / looked
        share = len(clusters) / max(ends[-1], 1)
        shards = [round((end - begin) * share) for begin, end in zip([0, *ends], ends, strict=False)]
        target = max(map(len, batch.targets))
        ids = batch.inputs["input_ids"]
        return cls(
            task=task,
            examples=len(task.examples),
            images=len(clusters),
            sizes=Counter(size for images in shards for size in _chunks(images)),
            making=making,
            bytes=sum(t.numel() * t.element_size() for t in batch.inputs.values()) / looked,
            patches=_patches(vlm, batch, looked),
            places=int((ids == getattr(vlm.model.config, "image_token_id", -1)).sum()) // len(ids) or ids.shape[1],
            sequence=batch.prefix or ids.shape[1] + target,
            tail=max(map(len, batch.prompts)) + target if batch.prefix else 0,
            prefix=bool(batch.prefix),
        )

    @property
    def questions(self) -> float:
        return self.examples / self.images


class Shapes:
    """What passes through the parts of a model cost, from their shapes."""

    def __init__(self, vlm: VLM, parts: ComponentMap, probe: Probe) -> None:
        self.probe, self.parts = probe, parts
        text = vlm.model.config.get_text_config()
        self.heads = int(getattr(text, "num_attention_heads", 8) or 8)
        head = vlm.model.get_output_embeddings()
        self.head = tuple(head.weight.shape) if head is not None else (0, 0)
        self.weights = {part: [w for w in parts.weights if w.part == part] for part in PARTS}
        self.blocks = {part: max((w.blocks for w in weights), default=0) for part, weights in self.weights.items()}
        self.width = {part: _width(weights) for part, weights in self.weights.items()}

    def through(self, part: str, rows: int, tokens: int, before: int = 0) -> float:
        """Seconds for one pass of rows x tokens through a part; `before` are tokens that they attend to as well."""
        if not self.weights[part] or not rows * tokens:
            return 0.0
        count, blocks, width = rows * tokens, self.blocks[part], self.width[part]
        products = sum(self.probe.product(count, w.rows, w.cols) for w in self.weights[part])
        heads = self.heads if width % self.heads == 0 else 1
        attention = self.probe.attention(rows, heads, tokens, before + tokens, width // heads) if blocks else 0.0
        calls = CALLS * len(self.weights[part]) * self.probe.call
        return products + blocks * (attention + PASSES * self.probe.sweep_over(count * width)) + calls

    def passes(self, sample: Sample) -> dict[str, tuple[float, float]]:
        """Per part: seconds of what plans may share, over all images, and of what each plan does for itself."""
        found = dict.fromkeys(PARTS, (0.0, 0.0))
        for images, times in sample.sizes.items():
            questions = max(round(images * sample.questions), 1)
            rows = images if sample.prefix else questions
            looked = images if sample.task.gallery else rows
            met = (
                questions * (1 + sample.task.gallery.top) if sample.task.gallery else rows
            )  # image and text, read together
            tokens = sample.places + (sample.sequence if sample.task.gallery else 0)
            found["vision"] = _plus(found["vision"], times * self.through("vision", looked, sample.patches))
            found["connector"] = _plus(found["connector"], times * self.through("connector", met, tokens))
            if sample.task.gallery:
                continue
            whole = self.through("language", rows, sample.sequence)
            if sample.prefix:
                asked = self._asked(sample, questions)
                again = 0.0 if sample.task.exact else asked
                found["language"] = _plus(found["language"], times * (whole + asked), times * again)
            else:
                whole += self.probe.product(rows * sample.sequence, *self.head)
                again = 0.0 if sample.task.exact else whole
                found["language"] = _plus(found["language"], times * whole, times * again)
        return {part: (COLD * shared, COLD * own) for part, (shared, own) in found.items()}

    def writing(self, sample: Sample) -> float:
        """Seconds for writing all answers token by token, up to the task's limit."""
        if sample.task.exact or sample.task.gallery:
            return 0.0
        steps, total = sample.task.max_new_tokens, 0.0
        for images, times in sample.sizes.items():
            questions = max(round(images * sample.questions), 1)
            step = self._asked(sample, questions) if sample.prefix else self.through("language", questions, 1)
            total += times * steps * step
        return COLD * total

    def _asked(self, sample: Sample, questions: int) -> float:
        head = self.probe.product(questions * sample.tail, *self.head)
        known = questions * sample.sequence * self.width["language"] * self.blocks["language"]
        copied = COPIES * self.probe.sweep_over(known)
        return self.through("language", questions, sample.tail, before=sample.sequence) + head + copied

    def kept(self, sample: Sample) -> float:
        """Bytes of hidden states along one path: where components begin, and keys and values of the images."""
        images, size = min(sample.images, MOST), self.probe.dtype.itemsize
        begins = Counter(component.part for component in self.parts.components)
        found = begins["vision"] * sample.patches * self.width["vision"]
        if sample.prefix:
            found += (begins["language"] + 2 * self.blocks["language"]) * sample.sequence * self.width["language"]
        return float(images * size * found)

    def activations(self, sample: Sample) -> float:
        """Bytes of the largest pass: logits in two types, and what a block is at work on."""
        images = max(sample.sizes)
        questions = max(round(images * sample.questions), 1)
        tokens = questions * sample.tail if sample.prefix else questions * sample.sequence
        logits = tokens * self.head[0] * (self.probe.dtype.itemsize + 8)
        return float(logits + 8 * images * sample.sequence * self.width["language"] * self.probe.dtype.itemsize)


def _plus(one: tuple[float, float], shared: float, own: float = 0.0) -> tuple[float, float]:
    return one[0] + shared, one[1] + own


def _width(weights: Sequence[Weight]) -> int:
    """Of the hidden states: what most linear layers read."""
    return Counter(w.cols for w in weights).most_common(1)[0][0] if weights else 0


def _chunks(images: int) -> list[int]:
    whole, rest = divmod(images, IMAGES_PER_BATCH)
    return [IMAGES_PER_BATCH] * whole + ([rest] if rest else [])


def _patches(vlm: VLM, batch: Batch, images: int) -> int:
    """Of one image, however a family cuts it up: the numbers in its pixels over those in a patch."""
    config = getattr(vlm.model.config, "vision_config", None)
    side = getattr(config, "patch_size", None) or 16
    side = side[0] if isinstance(side, list | tuple) else side
    numbers = 3 * int(side) ** 2 * int(getattr(config, "temporal_patch_size", 1) or 1)
    rows = images if batch.prefix else len(batch.examples)
    return max(batch.inputs["pixel_values"].numel() // (numbers * rows), 1)
