"""Source: the tensors of a model, read one at a time from its checkpoint, and which parameter each of them is."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sensitivity.errors import UserError
from sensitivity.models import VLM, load
from sensitivity.models.checkpoint import find, fingerprint, header, read_config, weight_files

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}  # as safetensors names them
STALE = re.compile(r"(position_ids|inv_freq|masked_bias)$")  # buffers of old checkpoints, which nobody reads
BESIDE = re.compile(r".*\.(json|jinja|txt|model)|(licen[cs]e|notice|use_policy).*", re.IGNORECASE)
NOT_BESIDE = {"config.json", "model.safetensors.index.json", "sensitivity.json", "verified.json", "vocab.py"}


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: what it is called there, which parameter it becomes, and how it is stored."""

    key: str
    parameter: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """A model before it is quantised: its tensors, its configuration, and the small files that belong to it."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    tensors: tuple[Stored, ...]
    fingerprint: str = ""

    def beside(self) -> Iterator[Path]:
        """Tokenizer, processor, generation settings, licence: all but weights and what an export writes itself."""
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and BESIDE.fullmatch(file.name) and file.name not in NOT_BESIDE:
                yield file

    @property
    def license(self) -> str:
        """The model's licence as its own card says it, or what is to be done where it does not."""
        card = self.folder / "README.md"
        text = card.read_text(encoding="utf-8", errors="ignore") if card.exists() else ""
        front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        found = re.search(r"^license:\s*(\S+)", front[1] if front else "", re.MULTILINE)
        return found[1] if found else "unknown"


def open_source(model: VLM | str) -> Source:
    """The checkpoint of a model, streamed; a model that was changed after loading is taken from memory instead."""
    name = model if isinstance(model, str) else model.name
    if isinstance(model, str) and name == "embedded:scenes-llava-heavy":
        model = load(name)  # its outliers are planted on loading: no file holds them
    folder = find(name)
    config = read_config(folder, name)
    if isinstance(model, VLM) and (model.name == "embedded:scenes-llava-heavy"):
        return Source(name, folder, config, tuple(_held(model.model)), model.fingerprint)
    files = weight_files(folder, name)
    skeleton = load(name, config_only=True).model
    rename = _renaming(skeleton, name)
    parameters, buffers = dict(skeleton.named_parameters()), dict(skeleton.named_buffers())
    tied = {path for path, _ in skeleton.named_parameters(remove_duplicate=False)} - set(parameters)
    tensors: list[Stored] = []
    for file in files:
        with file.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
        for key, entry in header(file).items():
            known = rename(key)
            if known in tied or (known not in parameters and (STALE.search(key) or known not in buffers)):
                continue
            dtype, shape, where = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            tensors.append(
                Stored(key, known, dtype, shape, _reader(file, start + where[0], where[1] - where[0], dtype, shape))
            )
    _complete(parameters, tensors, name)
    return Source(name, folder, config, tuple(tensors), fingerprint(config, files))


def _held(model: nn.Module) -> Iterator[Stored]:
    for name, parameter in model.named_parameters():
        data = parameter.data
        yield Stored(name, name, data.dtype, tuple(data.shape), lambda data=data: data)  # type: ignore[misc]


def _reader(file: Path, start: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """A map of these bytes alone, given back with the tensor; a copy would be new memory, which costs more than it."""

    def read() -> Tensor:
        if length == 0:
            return torch.empty(shape, dtype=dtype)
        page = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        try:
            with file.open("rb") as stream:
                there = mmap.mmap(stream.fileno(), start - page + length, access=mmap.ACCESS_COPY, offset=page)
        except ValueError as error:
            raise UserError(f"{file.name} ends early; fetch it again") from error
        if hasattr(mmap, "MADV_WILLNEED"):
            there.madvise(mmap.MADV_WILLNEED)  # all of it will be read, so the disk may begin
        content = torch.frombuffer(there, dtype=torch.uint8, offset=start - page)
        if (start - page) % dtype.itemsize:  # a header of any length may stand before the tensors of old files
            content = content.clone()
        return content.view(dtype).reshape(shape)

    return read


def _renaming(skeleton: nn.Module, name: str) -> Callable[[str], str]:
    """Checkpoint key to parameter name, as transformers itself renames on loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping: Any = get_model_conversion_mapping(skeleton)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    there: dict[str, Any] = skeleton.state_dict()

    def rename(key: str) -> str:
        prefix = getattr(skeleton, "base_model_prefix", None)
        known, converted = rename_source_key(key, renamings, converters, prefix, there)
        if converted is not None:
            raise UserError(
                f"{name} stores {key} in another shape than transformers uses it (merged or split on loading), which "
                "cannot be exported tensor by tensor; load it and save it again with save_pretrained"
            )
        return str(known)

    return rename


def _complete(parameters: Mapping[str, Any], tensors: list[Stored], name: str) -> None:
    found = {tensor.parameter for tensor in tensors}
    if missing := sorted(set(parameters) - found):
        raise UserError(f"the checkpoint of {name} lacks {', '.join(missing[:4])}; fetch it again")
