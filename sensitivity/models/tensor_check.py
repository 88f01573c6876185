"""Checks that a checkpoint's tensors fit its config, by name, shape and dtype, before any is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sensitivity.spec.components import natural_order
from sensitivity.spec.errors import UserError

Shape = tuple[int, ...]
# The most elements of all buffers together. No file holds buffers, so a wrong config can make them huge; those of real
# models have thousands.
BUFFER_NUMBERS = 2**30
# problem -> what the message says of the checkpoint
PROBLEMS = {
    "lacks": "lacks tensors for {model}",
    "unknown": "has unknown tensors for {model}",
    "shape": "has tensors for {model} of another shape than its config says",
}


def check_tensors(skeleton: nn.Module, stored: Mapping[str, tuple[torch.dtype, Shape]], name: str) -> None:
    """Raise an error for missing, misshapen or already rounded tensors, before they fill memory.

    `skeleton` is the model on the meta device. Tensors that it does not have are reported when the weights are loaded.
    """
    rename = renaming(skeleton)
    every = dict(skeleton.named_parameters(remove_duplicate=False))  # a tied parameter under each of its names
    stored_ids: set[int] = set()
    rounded, misshapen = [], []
    for key, (dtype, shape) in stored.items():
        known, converted = rename(key)
        if (parameter := every.get(known)) is None:
            continue
        # by identity: a tied parameter is found under any of its names
        stored_ids.add(id(parameter))
        if not dtype.is_floating_point or dtype.itemsize < 2:
            rounded.append((key, str(dtype).removeprefix("torch.")))
        # a tensor that transformers converts while loading may have another shape in the file
        elif not converted and tuple(parameter.shape) != shape:
            misshapen.append(known)
    if rounded:
        key, dtype_name = rounded[0]
        raise UserError(
            f"{name} stores {key} and {len(rounded) - 1} more weights as {dtype_name}, and its config.json has no "
            "quantization_config that says what they mean; give the model at full precision, in 16 or 32 bits"
        )
    check_none(skeleton, name, "shape", misshapen)
    may_be_missing = [re.compile(one) for one in getattr(skeleton, "_keys_to_ignore_on_load_missing", None) or ()]
    lacking = [path for path, parameter in skeleton.named_parameters() if id(parameter) not in stored_ids]
    check_none(
        skeleton, name, "lacks", [path for path in lacking if not any(one.search(path) for one in may_be_missing)]
    )
    if (numbers := sum(buffer.numel() for buffer in skeleton.buffers())) > BUFFER_NUMBERS:
        raise UserError(
            f"config.json of {name} asks for buffers of {numbers:,} numbers beside the weights, and at most "
            f"{BUFFER_NUMBERS:,} are allowed; mend its sizes (image_size, max_position_embeddings, rope_parameters)"
        )


def other_widths(skeleton: nn.Module, stored: Mapping[str, tuple[torch.dtype, Shape]], usual: int) -> dict[str, int]:
    """Parameter -> the bits in which a checkpoint stores it, where they are others than usual."""
    if {8 * dtype.itemsize for dtype, _ in stored.values()} <= {usual}:
        return {}
    rename, every = renaming(skeleton), dict(skeleton.named_parameters(remove_duplicate=False))
    names = {id(parameter): path for path, parameter in skeleton.named_parameters()}
    known = ((rename(key)[0], dtype) for key, (dtype, _) in stored.items())
    widths = {names[id(every[path])]: 8 * dtype.itemsize for path, dtype in known if path in every}
    return {path: width for path, width in widths.items() if width != usual}


def check_none(model: nn.Module, name: str, problem: str, keys: Iterable[str]) -> None:
    """Raise an error that names the missing, unknown or misshapen tensors, if there are any."""
    if ordered := sorted(keys, key=natural_order):
        some = first_names(ordered)
        what = PROBLEMS[problem].format(model=type(model).__name__)
        raise UserError(f"the checkpoint of {name} {what}: {some}; fetch it again, or mend its config.json")


def first_names(ordered: list[str]) -> str:
    """The first eight names, and how many more there are."""
    return ", ".join(ordered[:8]) + (f" and {len(ordered) - 8} more" if len(ordered) > 8 else "")


def renaming(skeleton: nn.Module) -> Callable[[str], tuple[str, bool]]:
    """A function from checkpoint key to parameter name in transformers, and whether the tensor is converted."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    assert isinstance(skeleton, PreTrainedModel)
    mapping = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state: dict[str, Tensor] = skeleton.state_dict()

    def rename(key: str) -> tuple[str, bool]:
        prefix = getattr(skeleton, "base_model_prefix", None)
        known, converted = rename_source_key(key, renamings, converters, prefix, state)
        return str(known), converted is not None

    return rename
