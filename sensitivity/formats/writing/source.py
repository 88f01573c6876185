"""SourceCheckpoint: a model's tensors, read one at a time from its checkpoint, each with its parameter's name."""

from __future__ import annotations

import mmap
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sensitivity.models.adapters import full_model, resolve
from sensitivity.models.checkpoint import DTYPES, fingerprint, header, read_config, weight_files
from sensitivity.models.conversion import as_converted, config_json
from sensitivity.models.loading import load
from sensitivity.models.original_llava import is_original
from sensitivity.models.tensor_check import renaming
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}  # in safetensors headers
STALE = re.compile(r"(position_ids|inv_freq|masked_bias)$")  # buffers of old checkpoints that are no longer read
SMALL_FILES = re.compile(r".*\.(json|jinja|txt|model)|(licen[cs]e|notice|use_policy).*", re.IGNORECASE)
NOT_COPIED = re.compile(
    r"config\.json|(model\.safetensors|pytorch_model\.bin)\.index\.json|sensitivity\.json|(verified|openvino_weights|onnx_weights|gguf_weights)\.json|trainer_state\.json"
)


class Processor(Protocol):
    """The one method of a transformers processor that an export calls."""

    def save_pretrained(self, save_directory: Path) -> object:
        """Write its files into a folder."""


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor of a checkpoint: its key there, the parameter that it becomes, and how to read it."""

    key: str
    parameter: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """The bytes that it takes in the checkpoint."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SourceCheckpoint:
    """A model before quantization: its tensors, its configuration, and its small files."""

    name: str
    folder: Path
    config: Mapping[str, object]
    tensors: tuple[CheckpointTensor, ...]
    fingerprint: str = ""
    processor: Processor | None = None  # only for a checkpoint in another layout, which lacks the processor's files

    def copy_small_files(self, target: Path) -> None:
        """Copy tokenizer, processor, generation settings and license, but not what an export writes itself."""
        for file in sorted(self.folder.iterdir()):
            # generation settings beside another layout were not read when the model was measured: none are exported
            unread = self.processor is not None and file.name == "generation_config.json"
            if (
                file.is_file()
                and SMALL_FILES.fullmatch(file.name)
                and not NOT_COPIED.fullmatch(file.name)
                and not unread
            ):
                shutil.copyfile(file, target / file.name)
        if self.processor is not None:
            self.processor.save_pretrained(target)

    @property
    def license(self) -> str:
        """The license that the model's own card names, or `unknown`."""
        card = self.folder / "README.md"
        text = card.read_text(encoding="utf-8", errors="ignore") if card.exists() else ""
        front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        line = re.search(r"^license:\s*(\S+)", front[1] if front else "", re.MULTILINE)
        return line[1] if line else "unknown"


def open_checkpoint(model: VLM | str, dtype: torch.dtype | None = None) -> SourceCheckpoint:
    """The checkpoint of a model, to be read tensor by tensor.

    A model whose weights are in no file (a merged adapter, planted outliers) is read from memory instead. If it is not
    loaded yet, it is loaded here, and its adapter is merged in `dtype`, in which the model was measured.
    """
    name = model if isinstance(model, str) else model.name
    folder, adapter = resolve(name)
    if name == "embedded:scenes-llava-heavy" or adapter is not None:  # no file holds these weights
        planted = adapter is None
        if isinstance(model, str):
            model = load(name, dtype=None if planted else dtype)
        return _in_memory(model)
    config = read_config(folder, name)
    if is_original(config):
        return _as_converted(name, folder, config)
    files = weight_files(folder, name)
    # names and shapes of the parameters, without weights
    skeleton = load(name, config_only=True).model
    rename = _renaming(skeleton, name)
    parameters, buffers = dict(skeleton.named_parameters()), dict(skeleton.named_buffers())
    # other names of shared parameters: a checkpoint may store these twice, but an export writes them once
    tied = {path for path, _ in skeleton.named_parameters(remove_duplicate=False)} - set(parameters)
    tensors: list[CheckpointTensor] = []
    for file in files:
        for key, entry in header(file).items():
            known = rename(key)
            if known in tied or (known not in parameters and (STALE.search(key) or known not in buffers)):
                continue
            read = _reader(file, entry.start, entry.bytes, entry.dtype, entry.shape)
            tensors.append(CheckpointTensor(key, known, entry.dtype, entry.shape, read))
    _check_complete(parameters, tensors, name)
    return SourceCheckpoint(name, folder, config, tuple(tensors), fingerprint(config, files))


def _in_memory(vlm: VLM) -> SourceCheckpoint:
    """A model whose merged adapter or planted outliers are in no file; small files are those of the base model."""
    base, folder = full_model(vlm.name)
    config, processor = read_config(folder, base), None
    if is_original(config):
        config, processor = config_json(vlm.model.config, type(vlm.model).__name__), vlm.processor
    return SourceCheckpoint(vlm.name, folder, config, tuple(_tensors_in_memory(vlm.model)), vlm.fingerprint, processor)


def _tensors_in_memory(model: nn.Module) -> Iterator[CheckpointTensor]:
    tied = {path for path, _ in model.named_parameters(remove_duplicate=False)} - set(dict(model.named_parameters()))
    for name, data in model.state_dict().items():
        if name not in tied:
            yield CheckpointTensor(name, name, data.dtype, tuple(data.shape), lambda data=data: data)  # type: ignore[misc]


def _as_converted(name: str, folder: Path, raw: Mapping[str, object]) -> SourceCheckpoint:
    """A checkpoint in another layout; each tensor is converted when it is read."""
    converted = as_converted(folder, name, raw)
    parameters = dict(load(name, config_only=True).model.named_parameters())
    tensors = [
        CheckpointTensor(key, key, dtype, tuple(parameters[key].shape), read)
        for key, (dtype, read) in converted.tensors.items()
        if key in parameters
    ]
    _check_complete(parameters, tensors, name)
    return SourceCheckpoint(
        name, folder, converted.config, tuple(tensors), fingerprint(raw, converted.files), converted.processor
    )


def _reader(file: Path, start: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """A function that maps the bytes of one tensor into memory; the mapping is closed when the tensor is freed.

    It does not use safe_open, which maps the whole file, so that all pages that were read stay resident. Copying the
    bytes instead would allocate new memory, which takes longer than reading them.
    """

    def read() -> Tensor:
        if length == 0:
            return torch.empty(shape, dtype=dtype)
        # a mapping must begin at a page boundary
        page = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        try:
            with file.open("rb") as stream:
                mapping = mmap.mmap(stream.fileno(), start - page + length, access=mmap.ACCESS_COPY, offset=page)
        except ValueError as error:
            raise UserError(f"{file.name} ends early; fetch it again") from error
        if hasattr(mmap, "MADV_WILLNEED"):
            mapping.madvise(mmap.MADV_WILLNEED)  # all of it will be read: start reading ahead
        content = torch.frombuffer(mapping, dtype=torch.uint8, offset=start - page)
        if (start - page) % dtype.itemsize:  # old files have headers that do not align the data
            content = content.clone()
        return content.view(dtype).reshape(shape)

    return read


def _renaming(skeleton: nn.Module, name: str) -> Callable[[str], str]:
    """Checkpoint key to parameter name, with an error if transformers merges or splits the tensor on loading."""
    renamed = renaming(skeleton)

    def rename(key: str) -> str:
        known, changed = renamed(key)
        if changed:
            raise UserError(
                f"{name} stores {key} in another shape than transformers uses it (merged or split on loading), which "
                "cannot be exported tensor by tensor; load it and save it again with save_pretrained"
            )
        return known

    return rename


def _check_complete(parameters: Mapping[str, object], tensors: list[CheckpointTensor], name: str) -> None:
    """Raise an error if a parameter of the model has no tensor in the checkpoint."""
    stored = {tensor.parameter for tensor in tensors}
    if missing := sorted(set(parameters) - stored):
        raise UserError(f"the checkpoint of {name} lacks {', '.join(missing[:4])}; fetch it again")
