"""Examples as tensors in batches: whole prompts, or questions apart from the image that they share."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from sensitivity.measure.generate import retrieval
from sensitivity.measure.generate.answer_tokens import check_no_image_token, greedy_takes_argmax, target_tokens
from sensitivity.models.processors import NO_PROCESSOR
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError, reason
from sensitivity.tasks.examples.images import image_key, open_image
from sensitivity.tasks.examples.types import SHORT_ANSWER, Example, Task
from sensitivity.tasks.examples.videos import Frame
from sensitivity.tasks.table import RETRIEVAL_DATASETS, RETRIEVAL_TASKS

IMAGES_PER_BATCH = 64
# Values in a batch's pixels, at most, such as eight images of 512 x 512. Larger batches are no faster, since what a
# block computes no longer stays in the processor's cache, and memory grows with them.
PIXELS_PER_BATCH = 8 * 3 * 512 * 512


@dataclass
class Batch:
    """Examples as tensors. Where `prefix` is set, questions of one image share its tokens, which are stored once."""

    examples: tuple[Example, ...]
    inputs: dict[str, Tensor]  # the processor's output: for images if there is a prefix, else for whole prompts
    prefix: int = 0  # tokens up to the end of the image
    image_index: list[int] = field(default_factory=list)  # index of each example's image
    prompts: list[list[int]] = field(default_factory=list)  # each example's tokens after the prefix
    targets: list[list[int]] = field(default_factory=list)  # tokens of the first right answer, and the end token
    chunk_size: int = 0  # for a gallery: images or captions in one forward pass
    # two smaller batches instead of this one, which ran out of memory
    halves: list[Batch] = field(default_factory=list)


def batches_by_image(vlm: VLM, task: Task, plain: bool = False) -> Iterator[Batch]:
    """The task's examples as tensors, image by image; no plan changes them, so all plans can share them."""
    if vlm.processor is None:
        raise UserError(f"{vlm.name} {NO_PROCESSOR}")
    if task.gallery:
        yield _gallery(vlm, task)
        return
    if not vlm.model.can_generate():
        searches = " and ".join([*RETRIEVAL_TASKS, *(f"{name}:FOLDER" for name in RETRIEVAL_DATASETS)])
        raise UserError(f"{vlm.name} generates no text: its tasks are {searches}")
    groups: dict[Hashable, list[Example]] = {}
    for example in task.examples:
        groups.setdefault((example.cluster, *map(image_key, example.images)), []).append(example)
    clusters = list(groups.values())
    sharing = vlm.family.shares_prefix and not (plain or task.search or vlm.encoder_decoder)
    sharing = sharing and greedy_takes_argmax(vlm)
    max_images = images_at_once(_pixel_count(vlm, task.examples[0])) if len(clusters) > 1 else IMAGES_PER_BATCH
    for start in range(0, len(clusters), max_images):
        chunk = clusters[start : start + max_images]
        shared = _image_batches(vlm, chunk) if sharing else []
        yield from shared
        if not shared:
            examples = [example for cluster in chunk for example in cluster]
            for i in range(0, len(examples), max_images):
                yield _whole_prompts(vlm, tuple(examples[i : i + max_images]))


def images_at_once(pixels: int) -> int:
    """How many images make a batch, if each has so many pixel values."""
    return max(min(IMAGES_PER_BATCH, PIXELS_PER_BATCH // max(pixels, 1)), 1)


def _pixel_count(vlm: VLM, example: Example) -> int:
    """How many pixel values the processor makes of an example; those of one data set are assumed to be alike."""
    pictures = [list(map(open_image, example.images))]
    seen = vlm.processor(images=pictures, text=[prompt_text(vlm, example)], return_tensors="pt")
    return int(seen["pixel_values"].numel())


def check_tasks_fit(vlm: VLM, tasks: Sequence[Task]) -> None:
    """Raise an error if one example of each task cannot be made into tensors, before a study begins."""
    for task in tasks:
        for _ in batches_by_image(vlm, replace(task, examples=task.examples[:1])):
            pass


def _gallery(vlm: VLM, task: Task) -> Batch:
    """All images and captions as one batch, read when it is run; a single example, as in calibration, as tensors."""
    retrieval.check_retrieval_model(vlm)
    tensors = retrieval.pair(vlm, task.examples[0]) if len(task.examples) == 1 else {}
    return Batch(task.examples, tensors, targets=[[0]] * len(task.examples), chunk_size=retrieval.CHUNK)


def _whole_prompts(vlm: VLM, examples: tuple[Example, ...]) -> Batch:
    """A batch of whole prompts, padded on the left."""
    images = [list(map(open_image, example.images)) for example in examples]
    texts = [prompt_text(vlm, example) for example in examples]
    inputs = _processor_output(_left_padding(vlm), images, texts, padding=True, return_tensors="pt")
    return Batch(examples, _without_labels(inputs), targets=[target_tokens(vlm, example) for example in examples])


def _left_padding(vlm: VLM) -> VLM:
    """The model with a processor that pads on the left, so that every prompt ends where its answer begins.

    It is a copy, since the tokenizer belongs to the caller. An argument of the call would not do: some processors ask
    the tokenizer itself for its side (Kosmos-2).
    """
    processor = copy(vlm.processor)
    processor.tokenizer = copy(processor.tokenizer)
    processor.tokenizer.padding_side = "left"
    return replace(vlm, processor=processor)


def _processor_output(
    vlm: VLM, images: list[list[Image.Image]], texts: list[str], **options: bool | str
) -> BatchFeature:
    """The processor's output, or an error that names the files to fetch."""
    try:
        made: BatchFeature = vlm.processor(images=images, text=texts, **options)
    except Exception as error:  # each family's processor has its own types of error
        raise UserError(
            f"the processor of {vlm.name} cannot make the model's input from a picture and a prompt ({reason(error)}); "
            "fetch its preprocessor_config.json and processor_config.json again"
        ) from error
    return made


def _without_labels(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The processor's output without the labels that some add for training."""
    return {name: value for name, value in inputs.items() if name != "labels"}


def _image_batches(vlm: VLM, clusters: Sequence[Sequence[Example]]) -> list[Batch]:
    """Images with their questions, in batches whose prompts begin alike; empty if sharing fails or saves nothing."""
    alike: dict[Hashable, list[_ImageWithQuestions]] = {}
    for cluster in clusters:
        if (image := _image_with_questions(vlm, tuple(cluster))) is None:
            return []
        alike.setdefault(image.shapes_and_prefix, []).append(image)
    if len(alike) > 1 and all(len(cluster) == 1 for cluster in clusters):
        return []  # one question per image, and images of many sizes: whole prompts make larger batches
    return [_concatenated(vlm, images) for images in alike.values()]


@dataclass
class _ImageWithQuestions:
    """An image's tensors, the prompt's tokens up to the end of the image, and each question's tokens after it."""

    examples: tuple[Example, ...]
    inputs: dict[str, Tensor]
    prompts: list[list[int]]

    @property
    def shapes_and_prefix(self) -> Hashable:
        """What images must have in common to be batched: the beginning of the prompt, and all shapes."""
        shapes = [(name, value.shape[1:]) for name, value in self.inputs.items()]
        return tuple(self.inputs["input_ids"][0].tolist()), tuple(shapes)


def _image_with_questions(vlm: VLM, examples: tuple[Example, ...]) -> _ImageWithQuestions | None:
    """One image with its questions; None if a prompt ends with its image, or the prompts begin differently.

    Examples of several images share no prefix, since each family lays out their tensors in its own way.
    """
    if any(example.more for example in examples):
        return None
    picture, texts = open_image(examples[0].image), [prompt_text(vlm, example) for example in examples]
    inputs = _without_labels(_processor_output(vlm, [[picture]], texts[:1], return_tensors="pt"))
    prompts = [inputs["input_ids"][0].tolist()]
    if texts[1:]:
        prompts += map(list, _processor_output(vlm, [[picture]] * len(texts[1:]), texts[1:])["input_ids"])
    first, image, shape = prompts[0], vlm.model.config.image_token_id, inputs["input_ids"].shape
    end = len(first) - first[::-1].index(image) if image in first else 0
    if not end or any(ids[:end] != first[:end] or not ids[end:] or image in ids[end:] for ids in prompts):
        return None
    inputs.pop("attention_mask", None)  # one prompt needs no padding
    inputs = {name: value[:, :end] if value.shape == shape else value for name, value in inputs.items()}
    return _ImageWithQuestions(examples, inputs, [ids[end:] for ids in prompts])


def _concatenated(vlm: VLM, images: Sequence[_ImageWithQuestions]) -> Batch:
    """One batch of images whose prompts begin alike."""
    examples = tuple(example for image in images for example in image.examples)
    return Batch(
        examples,
        {name: torch.cat([image.inputs[name] for image in images]) for name in images[0].inputs},
        prefix=images[0].inputs["input_ids"].shape[1],
        image_index=[index for index, image in enumerate(images) for _ in image.examples],
        prompts=[prompt for image in images for prompt in image.prompts],
        targets=[target_tokens(vlm, example) for example in examples],
    )


def prompt_text(vlm: VLM, example: Example) -> str:
    """The prompt in the model's chat template, or in its family's format, with a place for each image."""
    for text in (example.prompt, *(text for turn in example.turns for text in turn)):
        check_no_image_token(vlm, text, f"the prompt of example {example.id}")
    if getattr(vlm.processor, "chat_template", None):
        try:
            return str(vlm.processor.apply_chat_template(_chat(example), add_generation_prompt=True))
        except Exception as error:  # from Jinja, or raised by the template itself
            raise UserError(
                f"the chat template of {vlm.name} cannot be filled ({reason(error)}); fetch chat_template.jinja, or "
                "whichever of its files has the template, again"
            ) from error
    if example.more or example.turns:
        video = ", such as the frames of a video," if isinstance(example.image, Frame) else ""
        raise UserError(
            f"{vlm.name} has no chat template, so that it cannot be asked about several images{video} or in several "
            f"turns, as example {example.id} does"
        )
    if example.kind == "caption" and vlm.family.caption is not None:
        return vlm.family.caption
    question = example.prompt.removesuffix(SHORT_ANSWER) if vlm.family.brief else example.prompt
    return vlm.family.prompt.format(question)


def _chat(example: Example) -> list[dict[str, object]]:
    """The conversation: the turns, and the prompt that is to be answered.

    All images stand before the first prompt, or among the pieces of the only one.
    """
    if example.pieces:
        pieces = [{"type": "image"} if text is None else {"type": "text", "text": text} for text in example.pieces]
        return [{"role": "user", "content": pieces}]
    prompts = [*(prompt for prompt, _ in example.turns), example.prompt]
    chat: list[dict[str, object]] = []
    for number, prompt in enumerate(prompts):
        images = [] if number else [{"type": "image"}] * len(example.images)
        chat.append({"role": "user", "content": [*images, {"type": "text", "text": prompt}]})
        if number < len(example.turns):
            chat.append({"role": "assistant", "content": [{"type": "text", "text": example.turns[number][1]}]})
    return chat


def on_device(vlm: VLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs on the model's device, floats in the model's dtype."""
    floats = vlm.model.dtype
    return {k: v.to(vlm.device, floats) if v.is_floating_point() else v.to(vlm.device) for k, v in inputs.items()}


def known_options(vlm: VLM, **options: object) -> dict[str, object]:
    """Those options that the forward of this model takes; families differ."""
    parameters = inspect.signature(vlm.model.forward).parameters
    return {name: value for name, value in options.items() if name in parameters}
