"""Predicts the cost of forward passes from a model's shapes and times measured on this machine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sensitivity.measure.forecast.hardware import Hardware
from sensitivity.measure.generate.batches import Batch, batches_by_image, images_at_once
from sensitivity.measure.generate.retrieval import CHUNK
from sensitivity.measure.shards import MAX_IMAGES
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import PARTS, VOCABULARY, ComponentMap, Weight
from sensitivity.tasks.examples.types import Gallery, Task

SAMPLE_IMAGES = 8  # images that are made into tensors, to estimate all of them
# how often a block reads and writes its hidden states besides products: norms, rotations, residuals, reshaping
READS_AND_WRITES = 30
COPIES = 6  # how often keys and values are read and written to copy them, where questions share an image
# a pass costs so many times the sum of its operations, which are timed in loops with warm caches (reports/preflight.md)
COLD_CACHE_FACTOR = 1.4
ALL_TOKENS: Mapping[str | None, float] = {}  # every kind of layer reads all tokens
CALLS = 12  # small operations per linear layer; the overhead of calling them is most of the cost of a small model


@dataclass(frozen=True)
class TaskSample:
    """What a few examples tell about a whole task; tokens and bytes are per image or per question."""

    task: Task
    examples: int
    images: int
    sizes: Mapping[int, int]  # images in a batch -> how many such batches
    preprocessing: float  # seconds to read one image and make it and its questions into tensors
    bytes: float
    patches: int  # of an image in the vision tower
    image_tokens: int  # tokens of an image in the language model
    prompt_tokens: int  # tokens of the pass over an image, or over a whole prompt and its answer
    question_tokens: int  # tokens of the pass over a question and its answer, where the image is shared
    logit_tokens: int  # tokens, of `question_tokens` or else of `prompt_tokens`, that get logits
    shared_image: bool  # whether questions share the tokens of their image

    @classmethod
    def of(
        cls, vlm: VLM, task: Task, ends: Sequence[int], plain: bool, clock: Callable[[], float] = time.perf_counter
    ) -> TaskSample:
        """Estimate a whole task from its first few images."""
        clusters = list(dict.fromkeys(example.cluster for example in task.examples))
        sample = replace(task, examples=tuple(e for e in task.examples if e.cluster in set(clusters[:SAMPLE_IMAGES])))
        if task.gallery:  # one image and one caption; `_retrieval_passes` counts the pairs
            sample = replace(task, examples=task.examples[:1])
        next(batches_by_image(vlm, sample, plain))  # warm-up: the first call is slower
        began = clock()
        batch = next(batches_by_image(vlm, sample, plain))
        sample_images = len({example.cluster for example in batch.examples})
        preprocessing = (clock() - began) / sample_images
        max_images = images_at_once(
            batch.inputs["pixel_values"].numel() // (sample_images if batch.prefix else len(batch.examples))
        )
        # shards are counted in images of the largest task; this one has its share of each
        share = len(clusters) / max(ends[-1], 1)
        shards = [round((end - begin) * share) for begin, end in zip([0, *ends], ends, strict=False)]
        target = max(map(len, batch.targets))
        ids = batch.inputs["input_ids"]
        question_tokens = max((len(p) + len(t) for p, t in zip(batch.prompts, batch.targets, strict=False)), default=0)
        return cls(
            task=task,
            examples=len(task.examples),
            images=len(clusters),
            sizes=Counter(size for images in shards for size in _chunks(images, max_images)),
            preprocessing=preprocessing,
            bytes=sum(t.numel() * t.element_size() for t in batch.inputs.values()) / sample_images,
            patches=_patches(vlm, batch, sample_images),
            image_tokens=int((ids == getattr(vlm.model.config, "image_token_id", -1)).sum()) // len(ids)
            or ids.shape[1],
            prompt_tokens=batch.prefix or ids.shape[1] + target,
            question_tokens=question_tokens,
            logit_tokens=question_tokens - min(map(len, batch.prompts)) + 1 if batch.prefix else ids.shape[1] + target,
            shared_image=bool(batch.prefix),
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

    def __init__(self, vlm: VLM, parts: ComponentMap, hardware: Hardware) -> None:
        self.hardware, self.parts = hardware, parts
        text = vlm.model.config.get_text_config()
        self.heads = int(getattr(text, "num_attention_heads", 8) or 8)
        groups = int(getattr(text, "num_key_value_heads", None) or self.heads)
        head = vlm.model.get_output_embeddings()
        self.head = tuple(head.weight.shape) if head is not None else (0, 0)
        # embedding and head are counted where tokens are read and predicted
        layers = [w for w in parts.weights if w.kind not in VOCABULARY]
        self.weights = {part: [w for w in layers if w.part == part] for part in PARTS}
        self.blocks = {part: max((w.blocks for w in weights), default=0) for part, weights in self.weights.items()}
        self.width = {part: _width(weights) for part, weights in self.weights.items()}
        # channels of one token's keys: query heads may share them
        self.key_width = self.width["language"] * groups // self.heads

    def part_seconds(
        self, part: str, rows: int, tokens: int, before: int = 0, seen: Mapping[str | None, float] = ALL_TOKENS
    ) -> float:
        """Seconds for one pass of rows x tokens through a part, which also attend to `before` earlier tokens.

        `seen` gives, by kind of layer, the share of the tokens that it reads, where that is not all.
        """
        if not self.weights[part] or not rows * tokens:
            return 0.0
        count, blocks, width = rows * tokens, self.blocks[part], self.width[part]
        shares = [(w, round(seen.get(w.kind, 1.0) * count)) for w in self.weights[part]]
        products = sum(self.hardware.matmul(some, w.rows, w.cols) for w, some in shares if some)
        heads = self.heads if width % self.heads == 0 else 1
        attention = self.hardware.attention(rows, heads, tokens, before + tokens, width // heads) if blocks else 0.0
        calls = CALLS * len(self.weights[part]) * self.hardware.call
        return products + blocks * (attention + READS_AND_WRITES * self.hardware.elementwise(count * width)) + calls

    def passes(self, sample: TaskSample) -> dict[str, tuple[float, float]]:
        """By part, over all images: seconds of what plans can share, and of what each plan computes for itself."""
        if sample.task.gallery:
            return self._retrieval_passes(sample, sample.task.gallery)
        seconds = dict.fromkeys(PARTS, (0.0, 0.0))
        for images, times in sample.sizes.items():
            questions = max(round(images * sample.questions), 1)
            rows = images if sample.shared_image else questions
            seconds["vision"] = _added(seconds["vision"], times * self.part_seconds("vision", rows, sample.patches))
            seconds["connector"] = _added(
                seconds["connector"], times * self.part_seconds("connector", rows, sample.image_tokens)
            )
            whole = self.part_seconds("language", rows, sample.prompt_tokens)
            # each plan computes its own logits, then reads a neighboring plan's answers as drafts; where only exact
            # answers count, the pass over the right answers is enough
            if sample.shared_image:
                question_seconds, logit_seconds = self._question_seconds(sample, questions)
                own_seconds = logit_seconds + (0.0 if sample.task.exact else question_seconds + logit_seconds)
                seconds["language"] = _added(
                    seconds["language"], times * (whole + question_seconds), times * own_seconds
                )
            else:
                logit_seconds = self.hardware.matmul(rows * sample.logit_tokens, *self.head)
                own_seconds = logit_seconds + (0.0 if sample.task.exact else whole + logit_seconds)
                seconds["language"] = _added(seconds["language"], times * whole, times * own_seconds)
        return {
            part: (COLD_CACHE_FACTOR * shared, COLD_CACHE_FACTOR * alone) for part, (shared, alone) in seconds.items()
        }

    def _retrieval_passes(self, sample: TaskSample, gallery: Gallery) -> dict[str, tuple[float, float]]:
        """Passes over images and captions, then over the pairs that an image or a caption ranks among its `top`.

        Queries and text have feed-forwards of their own, and only queries attend to the image.
        """
        captions = sample.examples - sample.images
        pool = min(gallery.pool, sample.images)
        texts = max(captions * pool / sample.images, 1.0)
        by_images, by_captions = min(gallery.top / texts, 1.0), min(gallery.top / pool, 1.0)  # shares of all pairs
        # both choose mostly the same pairs: a weighted mean of the share if they choose the same, and if independently
        share = 0.75 * max(by_images, by_captions) + 0.25 * (1 - (1 - by_images) * (1 - by_captions))
        pairs = round(share * texts * sample.images)
        queries, text_tokens = sample.image_tokens, max(sample.prompt_tokens - sample.image_tokens, 1)

        def in_chunks(part: str, rows: int, size: int, tokens: int, cross: float = 1.0) -> float:
            count = -(-rows // size)
            seen: Mapping[str | None, float] = {"ff": 0.5, "cross": cross} if part == "connector" else ALL_TOKENS
            return count * self.part_seconds(part, -(-rows // count), tokens, seen=seen) if count else 0.0

        both = queries + text_tokens
        connector = in_chunks("connector", sample.images, CHUNK, queries)
        connector += in_chunks("connector", captions, CHUNK, text_tokens, cross=0.0)
        connector += in_chunks("connector", pairs, 4 * CHUNK, both, cross=queries / both)
        vision = in_chunks("vision", sample.images, CHUNK, sample.patches)
        return {
            "vision": (COLD_CACHE_FACTOR * vision, 0.0),
            "connector": (COLD_CACHE_FACTOR * connector, 0.0),
            "language": (0.0, 0.0),
        }

    def generation_seconds(self, sample: TaskSample) -> float:
        """Seconds to generate all answers token by token, up to the task's limit."""
        if sample.task.exact or sample.task.gallery:
            return 0.0
        steps, total = sample.task.max_new_tokens, 0.0
        for images, times in sample.sizes.items():
            questions = max(round(images * sample.questions), 1)
            step = self.hardware.matmul(questions, *self.head)
            if sample.shared_image:
                read = sample.prompt_tokens + sample.question_tokens
                step += self.part_seconds("language", questions, 1, before=read) + self._copy_seconds(questions, read)
                total += times * steps * step
            else:  # generate() starts from the images again
                total += times * self.part_seconds("vision", questions, sample.patches)
                total += times * self.part_seconds("connector", questions, sample.image_tokens)
                total += times * self.part_seconds("language", questions, sample.prompt_tokens)
                total += (
                    times * steps * (step + self.part_seconds("language", questions, 1, before=sample.prompt_tokens))
                )
        return COLD_CACHE_FACTOR * total

    def _question_seconds(self, sample: TaskSample, questions: int) -> tuple[float, float]:
        """Seconds for the blocks to read questions after their image, and for each plan's own logits and copies."""
        logit_seconds = self.hardware.matmul(
            questions * sample.logit_tokens + round(questions / sample.questions), *self.head
        )
        copied = self._copy_seconds(questions, sample.prompt_tokens)
        return self.part_seconds(
            "language", questions, sample.question_tokens, before=sample.prompt_tokens
        ), logit_seconds + copied

    def _copy_seconds(self, questions: int, tokens: int) -> float:
        """Seconds to give each question its own copy of its image's keys and values."""
        return COPIES * self.hardware.elementwise(questions * tokens * self.width["language"] * self.blocks["language"])

    def prefix_cache_bytes(self, sample: TaskSample) -> float:
        """Bytes that the prefix cache holds for one plan.

        These are hidden states where components begin and before and after the last block of a part, and the keys and
        values of the images.
        """
        begins = Counter(component.part for component in self.parts.components)
        states = {part: begins[part] + 1 for part in PARTS if self.blocks[part]}
        states["language"] = begins["language"] - 1
        if sample.task.gallery:
            states = {"vision": states["vision"]}
        tokens = {"vision": sample.patches, "connector": sample.image_tokens, "language": sample.prompt_tokens}
        numbers = sum(count * tokens[part] * self.width[part] for part, count in states.items())
        images = min(sample.images, MAX_IMAGES)
        rows = images if sample.shared_image or sample.task.gallery else images * sample.questions
        if sample.shared_image:
            numbers += 2 * self.blocks["language"] * sample.prompt_tokens * self.key_width
            numbers += round(sample.questions * states["language"] * sample.question_tokens * self.width["language"])
        return float(rows * self.hardware.dtype.itemsize * numbers)

    def activation_bytes(self, sample: TaskSample) -> float:
        """Bytes of the largest pass: logits in two dtypes, the activations of one block, and keys and values.

        Each question has keys and values of its own where it is read after a shared image.
        """
        images, wide = max(sample.sizes), self.hardware.dtype.itemsize
        questions = max(round(images * sample.questions), 1)
        logits = questions * sample.logit_tokens * self.head[0] * (wide + 8)
        per_question = (
            2
            * self.blocks["language"]
            * questions
            * (sample.prompt_tokens + sample.question_tokens)
            * self.key_width
            * sample.shared_image
        )
        return float(logits + wide * (per_question + 8 * images * sample.prompt_tokens * self.width["language"]))


def _added(one: tuple[float, float], shared: float, alone: float = 0.0) -> tuple[float, float]:
    """A part's shared and own seconds, with more of both."""
    return one[0] + shared, one[1] + alone


def _width(weights: Sequence[Weight]) -> int:
    """The width of the hidden states: what most linear layers read."""
    return Counter(w.cols for w in weights).most_common(1)[0][0] if weights else 0


def _chunks(images: int, max_images: int) -> list[int]:
    """The batch sizes of so many images."""
    whole, rest = divmod(images, max_images)
    return [max_images] * whole + ([rest] if rest else [])


def _patches(vlm: VLM, batch: Batch, images: int) -> int:
    """The patches of one image, for any family: its pixel values, divided by those of one patch."""
    config = getattr(vlm.model.config, "vision_config", None)
    side = getattr(config, "patch_size", None) or 16
    side = side[0] if isinstance(side, list | tuple) else side
    numbers = 3 * int(side) ** 2 * int(getattr(config, "temporal_patch_size", 1) or 1)
    rows = images if batch.prefix else len(batch.examples)
    return max(batch.inputs["pixel_values"].numel() // (numbers * rows), 1)
