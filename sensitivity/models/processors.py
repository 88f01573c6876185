"""Loads and checks the processor of a model folder, without its video part if torchvision is missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.import_utils import is_torchvision_available

from sensitivity.models.checkpoint import described
from sensitivity.spec.errors import UserError, reason
from sensitivity.spec.fields import MISSING, not_a_file

FILES = ("processor_config.json", "preprocessor_config.json")
LONGEST_SIDE = 8192  # pixels of a model's input: more is an error here, before it fills memory
LARGEST_AREA = LONGEST_SIDE**2  # where a size counts pixels, as in Qwen2-VL
MOST_TOKENS = 2**16  # per image: each prompt gets as many placeholder tokens
SIDES = ("size", "crop_size", "max_image_size", "pad_size", "min_pixels", "max_pixels")
TOKENS = ("image_seq_length", "image_seq_len", "num_query_tokens", "num_additional_image_tokens")
HOW: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


def processor_of(folder: Path, name: str, config: Any) -> Any:
    """The processor in a folder; None if there is none."""
    there = [folder / file for file in FILES if not_a_file(folder / file) != MISSING]
    if not there:
        return None
    for file in there:
        _check_sizes(described(file, name), file.name, name)
    found = PROCESSOR_MAPPING.get(type(config), None)
    silent = isinstance(found, type) and "video_processor" in _parts(found) and not is_torchvision_available()
    try:
        if silent:
            processor = _without_video(found).from_pretrained(folder, local_files_only=True)
        else:
            processor = transformers.AutoProcessor.from_pretrained(folder, **HOW)  # type: ignore[no-untyped-call]
    except Exception as error:  # each family builds its own processor, with its own types of error
        raise UserError(f"the processor of {name} cannot be loaded ({reason(error)})") from error
    _check_image_token(processor, config, name)
    return processor


def _check_sizes(settings: dict[str, Any], file: str, name: str) -> None:
    """Raise an error for a size or count that would fill memory at the first image."""
    inside = settings.get("image_processor")
    every = {**settings, **(inside if isinstance(inside, dict) else {})}
    limit = LARGEST_AREA if "merge_size" in every or "min_pixels" in every else LONGEST_SIDE
    for key, most in (*((side, limit) for side in SIDES), *((count, MOST_TOKENS) for count in TOKENS)):
        value = every.get(key)
        for number in value.values() if isinstance(value, dict) else (value,):
            if isinstance(number, int | float) and not 0 <= number <= most:
                raise UserError(
                    f"{file} of {name} has {number} in {key}, and 0 to {most:,} is possible; fetch it again"
                )


def _parts(processor: Any) -> list[str]:
    """The names of a processor's components."""
    return list(processor.get_attributes())


def _without_video(processor: Any) -> Any:
    """The same processor class without its video processor, which needs torchvision; images do not."""
    place = _parts(processor).index("video_processor")

    class Silent(processor):  # type: ignore[misc]
        video_processor = SimpleNamespace(num_frames=0, fps=0)  # SmolVLM reads these even without a video

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in _parts(processor) if part != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
            known = {key: value for key, value in processor_dict.items() if key != "video_processor"}
            # the constructor takes components by position, so the video processor's place holds None
            return super().from_args_and_dict([*args[:place], None, *args[place:]], known, **kwargs)

    Silent.__name__ = Silent.__qualname__ = processor.__name__  # save_pretrained writes the name of the class
    return Silent


def _check_image_token(processor: Any, config: Any, name: str) -> None:
    """Raise an error unless the tokenizer knows the placeholder token by which the model finds an image's place."""
    wanted, tokenizer = getattr(config, "image_token_id", None), getattr(processor, "tokenizer", None)
    if wanted is None or tokenizer is None:
        return
    token = getattr(processor, "image_token", None)
    said = str(getattr(token, "content", token))
    if token is not None and said not in (known := tokenizer.get_vocab()):
        why = f"does not know '{said}', which marks images in a prompt"
    elif not 0 <= wanted < len(tokenizer):
        why = f"has no word number {wanted}, by which config.json marks images (image_token_id)"
    elif token is not None and wanted not in (known[said], getattr(tokenizer, "image_token_id", None)):
        why = f"has '{said}', which marks images in a prompt, as word {known[said]}, and config.json has {wanted}"
    else:
        return
    raise UserError(f"the tokenizer of {name} {why}; fetch the tokenizer's files again")
