"""Examples as tensors, in batches: whole prompts, or questions apart from their image, whose tokens they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sensitivity.measure.generate import retrieval
from sensitivity.measure.generate.answer_tokens import plainly_greedy, target, without_image
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError, reason
from sensitivity.tasks.examples.images import open_image, same_image
from sensitivity.tasks.examples.types import SHORT, Example, Task
from sensitivity.tasks.table import GALLERIES, SEARCHES

IMAGES_PER_BATCH = 64
# Numbers in a batch's pixels, at most, such as eight images of 512 x 512. More at once is no quicker, since what lies
# between a block's products no longer stays in a cache, and memory grows with it.
PIXELS = 8 * 3 * 512 * 512


@dataclass
class Batch:
    """Examples as tensors. Where `prefix` is set, questions of one image share its tokens and are stored once."""

    examples: tuple[Example, ...]
    inputs: dict[str, Tensor]  # of the processor: for the images where there is a prefix, else for the whole prompts
    prefix: int = 0
    owner: list[int] = field(default_factory=list)  # which image each example is about
    prompts: list[list[int]] = field(default_factory=list)  # tokens after the prefix
    targets: list[list[int]] = field(default_factory=list)  # tokens of the first right answer, and the end
    at_once: int = 0  # of a gallery: how many images, or captions, go onto the device together
    halves: list[Batch] = field(default_factory=list)  # instead of all this, where it did not fit on the device


def batches(vlm: VLM, task: Task, plain: bool = False) -> Iterator[Batch]:
    """The task's examples as tensors, image by image; independent of any plan, so they can be kept."""
    if vlm.processor is None:
        raise UserError(f"{vlm.name} has no processor or tokenizer files; they are needed to run a task")
    if task.gallery:
        yield _gallery(vlm, task)
        return
    if not vlm.model.can_generate():
        searches = " and ".join([*SEARCHES, *(f"{name}:FOLDER" for name in GALLERIES)])
        raise UserError(f"{vlm.name} answers nothing: its tasks are {searches}")
    groups: dict[Any, list[Example]] = {}
    for example in task.examples:
        groups.setdefault((example.cluster, same_image(example.image)), []).append(example)
    clusters = list(groups.values())
    sharing = vlm.family.shares_prefix and not plain and not vlm.encoder_decoder and plainly_greedy(vlm)
    most = images_at_once(_pixels(vlm, task.examples[0])) if len(clusters) > 1 else IMAGES_PER_BATCH
    for start in range(0, len(clusters), most):
        chunk = clusters[start : start + most]
        shared = _with_prefix(vlm, chunk) if sharing else []
        yield from shared
        if not shared:
            examples = [example for cluster in chunk for example in cluster]
            for i in range(0, len(examples), most):
                yield _whole(vlm, tuple(examples[i : i + most]))


def images_at_once(pixels: int) -> int:
    """How many images of so many numbers make a batch."""
    return max(min(IMAGES_PER_BATCH, PIXELS // max(pixels, 1)), 1)


def _pixels(vlm: VLM, example: Example) -> int:
    """The numbers that a processor makes of an image; images of one data set are taken to be alike."""
    seen = vlm.processor(images=[[open_image(example.image)]], text=[prompt_text(vlm, example)], return_tensors="pt")
    return int(seen["pixel_values"].numel())


def check(vlm: VLM, tasks: Sequence[Task]) -> None:
    """Whether a model can be asked these tasks at all, found out on one example of each before a study is begun."""
    for task in tasks:
        for _ in batches(vlm, replace(task, examples=task.examples[:1])):
            pass


def _gallery(vlm: VLM, task: Task) -> Batch:
    """All that is looked for at once, read when it is needed; one example alone is a calibration's, as tensors."""
    retrieval.check(vlm)
    alone = retrieval.pair(vlm, task.examples[0]) if len(task.examples) == 1 else {}
    return Batch(task.examples, alone, targets=[[0]] * len(task.examples), at_once=retrieval.CHUNK)


def _whole(vlm: VLM, examples: tuple[Example, ...]) -> Batch:
    vlm.processor.tokenizer.padding_side = "left"
    images = [[open_image(example.image)] for example in examples]
    texts = [prompt_text(vlm, example) for example in examples]
    inputs = _processed(vlm, images, texts, padding=True, return_tensors="pt")
    return Batch(examples, _read(inputs), targets=[target(vlm, example) for example in examples])


def _processed(vlm: VLM, images: list[list[Any]], texts: list[str], **how: Any) -> Any:
    try:
        return vlm.processor(images=images, text=texts, **how)
    except Exception as error:  # each family's processor has errors of its own
        raise UserError(
            f"the processor of {vlm.name} cannot make the model's input from a picture and a prompt ({reason(error)}); "
            "fetch its preprocessor_config.json and processor_config.json again"
        ) from error


def _read(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what only training reads, which some processors give."""
    return {name: value for name, value in inputs.items() if name != "labels"}


def _with_prefix(vlm: VLM, clusters: Sequence[Sequence[Example]]) -> list[Batch]:
    """Images with their questions, those together whose prompts begin alike; nothing where that saves nothing."""
    together: dict[Any, list[_Image]] = {}
    for cluster in clusters:
        if (image := _image(vlm, tuple(cluster))) is None:
            return []
        together.setdefault(image.kind, []).append(image)
    if len(together) > 1 and all(len(cluster) == 1 for cluster in clusters):
        return []  # images of many sizes with a question each
    return [_stacked(vlm, images) for images in together.values()]


@dataclass
class _Image:
    """An image's tensors, with the tokens up to its end, and what each question about it says after that."""

    examples: tuple[Example, ...]
    inputs: dict[str, Tensor]
    prompts: list[list[int]]

    @property
    def kind(self) -> Any:
        shapes = [(name, value.shape[1:]) for name, value in self.inputs.items()]
        return tuple(self.inputs["input_ids"][0].tolist()), tuple(shapes)


def _image(vlm: VLM, examples: tuple[Example, ...]) -> _Image | None:
    """None if a prompt does not go on after its image, or not all prompts begin alike."""
    picture, texts = open_image(examples[0].image), [prompt_text(vlm, example) for example in examples]
    inputs = _read(_processed(vlm, [[picture]], texts[:1], return_tensors="pt"))
    prompts = [inputs["input_ids"][0].tolist()]
    if texts[1:]:
        prompts += map(list, _processed(vlm, [[picture]] * len(texts[1:]), texts[1:])["input_ids"])
    first, image, shape = prompts[0], vlm.model.config.image_token_id, inputs["input_ids"].shape
    end = len(first) - first[::-1].index(image) if image in first else 0
    if not end or any(ids[:end] != first[:end] or not ids[end:] or image in ids[end:] for ids in prompts):
        return None
    inputs.pop("attention_mask", None)  # nothing is padded
    inputs = {name: value[:, :end] if value.shape == shape else value for name, value in inputs.items()}
    return _Image(examples, inputs, [ids[end:] for ids in prompts])


def _stacked(vlm: VLM, images: Sequence[_Image]) -> Batch:
    examples = tuple(example for image in images for example in image.examples)
    return Batch(
        examples,
        {name: torch.cat([image.inputs[name] for image in images]) for name in images[0].inputs},
        prefix=images[0].inputs["input_ids"].shape[1],
        owner=[index for index, image in enumerate(images) for _ in image.examples],
        prompts=[prompt for image in images for prompt in image.prompts],
        targets=[target(vlm, example) for example in examples],
    )


def prompt_text(vlm: VLM, example: Example) -> str:
    """The prompt as the model's own chat template or family wants it, with a place for one image."""
    without_image(vlm, example.prompt, f"the prompt of example {example.id}")
    if getattr(vlm.processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": example.prompt}]
        chat = [{"role": "user", "content": content}]
        try:
            return str(vlm.processor.apply_chat_template(chat, add_generation_prompt=True))
        except Exception as error:  # of Jinja, or raised by the template itself
            raise UserError(
                f"the chat template of {vlm.name} cannot be filled ({reason(error)}); fetch chat_template.jinja, or "
                "whichever of its files has the template, again"
            ) from error
    if example.kind == "caption" and vlm.family.caption is not None:
        return vlm.family.caption
    question = example.prompt.removesuffix(SHORT) if vlm.family.brief else example.prompt
    return vlm.family.prompt.format(question)


def placed(vlm: VLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    floats = vlm.model.dtype
    return {k: v.to(vlm.device, floats) if v.is_floating_point() else v.to(vlm.device) for k, v in inputs.items()}
