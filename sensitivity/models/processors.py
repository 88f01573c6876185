"""Loads and checks the processor of a model folder, without its video part if torchvision is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import transformers
from transformers import PreTrainedConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.import_utils import is_torchvision_available

from sensitivity.models.checkpoint import json_object
from sensitivity.spec.errors import UserError, reason
from sensitivity.spec.fields import MISSING, not_a_file

FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "spiece*",
    "*.model",
    "*.tiktoken",
)  # files of tokenizers, of which one is enough
NO_PROCESSOR = (
    f"has neither {FILES[0]} nor {FILES[1]}, which say how prompts and images are read; copy one from where the model "
    "came from"
)
LONGEST_SIDE = 8192  # pixels of a model's input: more is an error here, before it fills memory
LARGEST_AREA = LONGEST_SIDE**2  # where a size counts pixels, as in Qwen2-VL
MOST_TOKENS = 2**16  # per image; each prompt gets as many placeholder tokens
SIZE_FIELDS = ("size", "crop_size", "max_image_size", "pad_size", "min_pixels", "max_pixels")
TOKEN_COUNT_FIELDS = ("image_seq_length", "image_seq_len", "num_query_tokens", "num_additional_image_tokens")
OPTIONS: dict[str, bool] = {"trust_remote_code": False, "local_files_only": True}


def load_processor(folder: Path, name: str, config: PreTrainedConfig) -> ProcessorMixin | None:
    """The processor in a folder; None if there is none."""
    there = [folder / file for file in FILES if not_a_file(folder / file) != MISSING]
    if not there:
        return None
    for file in there:
        _check_sizes(json_object(file, name), file.name, name)
    listed = PROCESSOR_MAPPING.get(type(config), None)
    processor: ProcessorMixin
    try:
        if isinstance(listed, type) and "video_processor" in _attributes(listed) and not is_torchvision_available():
            processor = _without_video(listed).from_pretrained(folder, local_files_only=True)
        else:
            processor = transformers.AutoProcessor.from_pretrained(folder, **OPTIONS)  # type: ignore[no-untyped-call]
    except Exception as error:  # each family builds its own processor, with its own types of error
        if not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
            why = "has no tokenizer.json, and no other file of a tokenizer; copy it from where the model came from"
            raise UserError(f"{name} {why}") from error
        raise UserError(f"the processor of {name} cannot be loaded ({reason(error)})") from error
    _check_image_token(processor, config, name)
    return processor


def square_seen(processor: object) -> tuple[str, float] | None:
    """Which centered square of an image a model sees: a share of its short side, or its long side with padding.

    None: the whole image, stretched if it is not square.
    """
    images = getattr(processor, "image_processor", processor)
    if getattr(images, "do_pad", None):
        return "long", 1.0
    sizes = (getattr(images, "size", None), "shortest_edge"), (getattr(images, "crop_size", None), "height")
    short, cropped = (getattr(size, side, None) or (dict(size or {}).get(side)) for size, side in sizes)
    if getattr(images, "do_center_crop", None) and short and cropped:
        return "short", min(1.0, cropped / short)
    return None


def _check_sizes(settings: Mapping[str, object], file: str, name: str) -> None:
    """Raise an error for a size or count that would fill memory at the first image."""
    inside = settings.get("image_processor")
    every = {**settings, **(inside if isinstance(inside, dict) else {})}
    limit = LARGEST_AREA if "merge_size" in every or "min_pixels" in every else LONGEST_SIDE
    for key, most in (
        *((side, limit) for side in SIZE_FIELDS),
        *((count, MOST_TOKENS) for count in TOKEN_COUNT_FIELDS),
    ):
        value = every.get(key)
        for number in value.values() if isinstance(value, dict) else (value,):
            if isinstance(number, int | float) and not 0 <= number <= most:
                raise UserError(
                    f"{file} of {name} has {number} in {key}, and 0 to {most:,} is possible; fetch it again"
                )


def _attributes(processor: type[ProcessorMixin]) -> list[str]:
    """The names of a processor's components."""
    names: Callable[[], list[str]] = processor.get_attributes
    return names()


def _without_video(processor: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The same processor class without its video processor, which needs torchvision; images do not."""
    position = _attributes(processor).index("video_processor")

    class WithoutVideo(processor):  # type: ignore[misc,valid-type]
        video_processor = SimpleNamespace(num_frames=0, fps=0)  # SmolVLM reads these even without a video

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in _attributes(processor) if name != "video_processor"]

        @classmethod
        def from_args_and_dict(
            cls, args: list[object], processor_dict: dict[str, object], **kwargs: object
        ) -> ProcessorMixin:
            known = {key: value for key, value in processor_dict.items() if key != "video_processor"}
            # the constructor takes components by position, so None stands in for the video processor
            made: ProcessorMixin = super().from_args_and_dict(
                [*args[:position], None, *args[position:]], known, **kwargs
            )
            return made

    # save_pretrained writes the name of the class
    WithoutVideo.__name__ = WithoutVideo.__qualname__ = processor.__name__
    return WithoutVideo


def _check_image_token(processor: ProcessorMixin, config: PreTrainedConfig, name: str) -> None:
    """Raise an error unless the tokenizer knows the placeholder token that marks an image in a prompt."""
    image_token_id, tokenizer = getattr(config, "image_token_id", None), getattr(processor, "tokenizer", None)
    if image_token_id is None or tokenizer is None:
        return
    token = getattr(processor, "image_token", None)
    token_text = str(getattr(token, "content", token))
    if token is not None and token_text not in (known := tokenizer.get_vocab()):
        why = f"does not know '{token_text}', which marks images in a prompt"
    elif not 0 <= image_token_id < len(tokenizer):
        why = f"has no token with id {image_token_id}, by which config.json marks images (image_token_id)"
    elif token is not None and image_token_id not in (known[token_text], getattr(tokenizer, "image_token_id", None)):
        why = f"has '{token_text}', which marks images in a prompt, as token {known[token_text]}, and config.json has "
        why += str(image_token_id)
    else:
        return
    raise UserError(f"the tokenizer of {name} {why}; fetch the tokenizer's files again")
