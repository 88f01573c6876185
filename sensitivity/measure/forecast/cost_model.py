"""What passes of a task's examples through the parts of a model cost, from the model's shapes and a probe's times."""

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

FEW = 8  # images that are made into tensors to see what all will be like
PASSES = 30  # over a block's hidden states, beside its products: norms, rotations, residuals, reshaping
COPIES = 6  # of keys and values, where questions are read on top of their images
COLD = 1.4  # a pass takes so many times what its pieces take one by one, again and again (reports/preflight.md)
EVERYTHING: Mapping[str | None, float] = {}
CALLS = 12  # small operations to every linear layer; their start-up is most of what a small model costs


@dataclass(frozen=True)
class TaskSample:
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
    said: int  # of these, or of a whole prompt, those whose logits are asked for
    prefix: bool

    @classmethod
    def of(
        cls, vlm: VLM, task: Task, ends: Sequence[int], plain: bool, clock: Callable[[], float] = time.perf_counter
    ) -> TaskSample:
        clusters = list(dict.fromkeys(example.cluster for example in task.examples))
        few = replace(task, examples=tuple(e for e in task.examples if e.cluster in set(clusters[:FEW])))
        if task.gallery:  # an image and a caption; how many of them meet, `_searched` knows
            few = replace(task, examples=task.examples[:1])
        next(batches(vlm, few, plain))  # what is slow the first time
        began = clock()
        batch = next(batches(vlm, few, plain))
        looked = len({example.cluster for example in batch.examples})
        making = (clock() - began) / looked
        most = images_at_once(batch.inputs["pixel_values"].numel() // (looked if batch.prefix else len(batch.examples)))
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
        """Whether plans that begin alike compute a part once; what searches a gallery reads its texts anew."""
        return part == "vision" or not self.task.gallery

    @property
    def questions(self) -> float:
        return self.examples / self.images


class CostModel:
    """What passes through the parts of a model cost, from their shapes."""

    def __init__(self, vlm: VLM, parts: ComponentMap, probe: Hardware) -> None:
        self.probe, self.parts = probe, parts
        text = vlm.model.config.get_text_config()
        self.heads = int(getattr(text, "num_attention_heads", 8) or 8)
        groups = int(getattr(text, "num_key_value_heads", None) or self.heads)
        head = vlm.model.get_output_embeddings()
        self.head = tuple(head.weight.shape) if head is not None else (0, 0)
        layers = [w for w in parts.weights if w.kind not in WORDS]  # words are counted where they are read and said
        self.weights = {part: [w for w in layers if w.part == part] for part in PARTS}
        self.blocks = {part: max((w.blocks for w in weights), default=0) for part, weights in self.weights.items()}
        self.width = {part: _width(weights) for part, weights in self.weights.items()}
        self.caches = self.width["language"] * groups // self.heads  # numbers in the keys of a token

    def through(
        self, part: str, rows: int, tokens: int, before: int = 0, seen: Mapping[str | None, float] = EVERYTHING
    ) -> float:
        """Seconds for one pass of rows x tokens through a part; `before` are tokens that they attend to as well.

        `seen` is the share of the tokens that layers of a kind see, where that is not all.
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
        """Per part: seconds of what plans may share, over all images, and of what each plan does for itself."""
        if sample.task.gallery:
            return self._searched(sample, sample.task.gallery)
        found = dict.fromkeys(PARTS, (0.0, 0.0))
        for images, times in sample.sizes.items():
            questions = max(round(images * sample.questions), 1)
            rows = images if sample.prefix else questions
            found["vision"] = _plus(found["vision"], times * self.through("vision", rows, sample.patches))
            found["connector"] = _plus(found["connector"], times * self.through("connector", rows, sample.places))
            whole = self.through("language", rows, sample.sequence)
            # every plan turns its own hidden states into words; then it reads what its neighbor answered
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
        """Images and captions on their own, and together those pairs that one of the two has among its first few.

        Queries and words pass feed-forwards of their own, and queries alone look at the image.
        """
        captions = sample.examples - sample.images
        pool = min(gallery.pool, sample.images)
        texts = max(captions * pool / sample.images, 1.0)
        alone = min(gallery.top / texts, 1.0), min(gallery.top / pool, 1.0)
        # most pairs that an image chooses are its caption's choice too: a quarter of the way to choosing by chance
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
        """Seconds for writing all answers token by token, up to the task's limit."""
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
            else:  # generated from the images on
                total += times * self.through("vision", questions, sample.patches)
                total += times * self.through("connector", questions, sample.places)
                total += times * self.through("language", questions, sample.sequence)
                total += times * steps * (step + self.through("language", questions, 1, before=sample.sequence))
        return COLD * total

    def _asked(self, sample: TaskSample, questions: int) -> tuple[float, float]:
        """Seconds for questions on top of their images, through the blocks; and what each plan does for itself."""
        words = self.probe.product(questions * sample.said + round(questions / sample.questions), *self.head)
        copied = self._copied(questions, sample.sequence)
        return self.through("language", questions, sample.tail, before=sample.sequence), words + copied

    def _copied(self, questions: int, tokens: int) -> float:
        """Seconds for giving each question keys and values of its own."""
        return COPIES * self.probe.sweep_over(questions * tokens * self.width["language"] * self.blocks["language"])

    def kept(self, sample: TaskSample) -> float:
        """Bytes of hidden states along one path: where components begin, before and after the last block of a part,
        and keys and values of the images."""
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
        """Bytes of the largest pass: logits in two types, what a block is at work on, and each question's own keys and
        values where it is read on top of its image."""
        images, wide = max(sample.sizes), self.probe.dtype.itemsize
        questions = max(round(images * sample.questions), 1)
        logits = questions * sample.said * self.head[0] * (wide + 8)
        own = 2 * self.blocks["language"] * questions * (sample.sequence + sample.tail) * self.caches * sample.prefix
        return float(logits + wide * (own + 8 * images * sample.sequence * self.width["language"]))


def _plus(one: tuple[float, float], shared: float, own: float = 0.0) -> tuple[float, float]:
    return one[0] + shared, one[1] + own


def _width(weights: Sequence[Weight]) -> int:
    """Of the hidden states: what most linear layers read."""
    return Counter(w.cols for w in weights).most_common(1)[0][0] if weights else 0


def _chunks(images: int, most: int) -> list[int]:
    whole, rest = divmod(images, most)
    return [most] * whole + ([rest] if rest else [])


def _patches(vlm: VLM, batch: Batch, images: int) -> int:
    """Of one image, however a family cuts it up: the numbers in its pixels over those in a patch."""
    config = getattr(vlm.model.config, "vision_config", None)
    side = getattr(config, "patch_size", None) or 16
    side = side[0] if isinstance(side, list | tuple) else side
    numbers = 3 * int(side) ** 2 * int(getattr(config, "temporal_patch_size", 1) or 1)
    rows = images if batch.prefix else len(batch.examples)
    return max(batch.inputs["pixel_values"].numel() // (numbers * rows), 1)
