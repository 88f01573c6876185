"""Examples as tensors, in batches: whole prompts, or questions apart from their image, whose tokens they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sensitivity import searching
from sensitivity.answer_tokens import target
from sensitivity.errors import UserError
from sensitivity.models import VLM
from sensitivity.tasks import GALLERIES, SEARCHES, SHORT, Example, Task, open_image

IMAGES_PER_BATCH = 64


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
    groups: dict[str, list[Example]] = {}
    for example in task.examples:
        groups.setdefault(example.cluster, []).append(example)
    clusters = list(groups.values())
    for start in range(0, len(clusters), IMAGES_PER_BATCH):
        chunk = clusters[start : start + IMAGES_PER_BATCH]
        shared = None if plain or not vlm.family.shares_prefix else _with_prefix(vlm, chunk)
        if shared is not None:
            yield shared
        else:
            examples = [example for cluster in chunk for example in cluster]
            for i in range(0, len(examples), IMAGES_PER_BATCH):
                yield _whole(vlm, tuple(examples[i : i + IMAGES_PER_BATCH]))


def _gallery(vlm: VLM, task: Task) -> Batch:
    """All that is looked for at once, read when it is needed; one example alone is a calibration's, as tensors."""
    searching.check(vlm)
    alone = searching.pair(vlm, task.examples[0]) if len(task.examples) == 1 else {}
    return Batch(task.examples, alone, targets=[[0]] * len(task.examples), at_once=searching.CHUNK)


def _whole(vlm: VLM, examples: tuple[Example, ...]) -> Batch:
    vlm.processor.tokenizer.padding_side = "left"
    inputs = vlm.processor(
        images=[[open_image(example.image)] for example in examples],
        text=[prompt_text(vlm, example) for example in examples],
        padding=True,
        return_tensors="pt",
    )
    return Batch(examples, dict(inputs), targets=[target(vlm, example) for example in examples])


def _with_prefix(vlm: VLM, clusters: Sequence[Sequence[Example]]) -> Batch | None:
    """Images with their questions, if every prompt starts with the image; None where that does not hold."""
    image_token = vlm.model.config.image_token_id
    owner, prompts, pictures, prefix = [], [], [], None
    for index, cluster in enumerate(clusters):
        picture = open_image(cluster[0].image)
        texts = [prompt_text(vlm, example) for example in cluster]
        encoded = vlm.processor(images=[[picture]] * len(texts), text=texts)
        pictures.append(torch.as_tensor(encoded["pixel_values"][0]))
        for ids in encoded["input_ids"]:
            end = len(ids) - ids[::-1].index(image_token) if image_token in ids else 0
            head = list(ids[:end])
            prefix = prefix or head
            if head != prefix or not head:
                return None
            owner.append(index)
            prompts.append(list(ids[end:]))
    if prefix is None:
        return None
    inputs = {"pixel_values": torch.stack(pictures), "input_ids": torch.tensor([prefix] * len(clusters))}
    examples = tuple(example for cluster in clusters for example in cluster)
    return Batch(examples, inputs, len(prefix), owner, prompts, [target(vlm, example) for example in examples])


def prompt_text(vlm: VLM, example: Example) -> str:
    """The prompt as the model's own chat template or family wants it, with a place for one image."""
    if getattr(vlm.processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": example.prompt}]
        chat = [{"role": "user", "content": content}]
        return str(vlm.processor.apply_chat_template(chat, add_generation_prompt=True))
    if example.kind == "caption" and vlm.family.caption is not None:
        return vlm.family.caption
    question = example.prompt.removesuffix(SHORT) if vlm.family.brief else example.prompt
    return vlm.family.prompt.format(question)


def placed(vlm: VLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    floats = vlm.model.dtype
    return {k: v.to(vlm.device, floats) if v.is_floating_point() else v.to(vlm.device) for k, v in inputs.items()}
