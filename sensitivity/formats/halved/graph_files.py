"""Writes the graphs of a model's halves with the constants that they read, and the lines by which they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from sensitivity.formats.halved.pieces import Sized
from sensitivity.formats.writing.checkpoint import save
from sensitivity.formats.writing.job import Job, Written
from sensitivity.formats.writing.source import CheckpointTensor
from sensitivity.spec.components import Weight
from sensitivity.spec.plan import Scheme

ConstantT = TypeVar("ConstantT")

LOAD = """\
from transformers import AutoProcessor
from {module} import {model}

model, processor = {model}(FOLDER), AutoProcessor.from_pretrained(FOLDER)
inputs = processor(images=[image], text=[prompt], return_tensors="pt")
features = model.image_features(**model.image_inputs(inputs))
ends = {{processor.tokenizer.eos_token_id}}
tokens = model.generate(inputs["input_ids"][0].tolist(), features, ends, max_new_tokens=20)
"""
NOTES = ("Run it with one image per prompt. Sums are in float32, so that its answers are those that were measured.",)


@dataclass(frozen=True)
class WrittenHalf:
    """What was written of one half: its constants by parameter, the file that holds them, and hashes."""

    constants: Mapping[str, Sequence[Sized]]
    data: Path
    hash: str  # of that file
    constant_hashes: dict[str, str]


def write_halves(
    job: Job,
    folder: Path,
    files: Mapping[str, str],
    hashes_file: str,
    load: str,
    write_half: Callable[[str, Path, Sequence[str], Mapping[str, CheckpointTensor]], WrittenHalf],
) -> Written:
    """Write each half's graph, layer by layer, so that memory never holds all weights.

    `files` names the file of each half's graph. `write_half` takes the half, its file, the names of all parameters and
    the tensor of each.
    """
    tensors = {tensor.parameter: tensor for tensor in job.source.tensors}
    names = [*job.weights, *(name for name in tensors if name not in job.weights)]  # codes in data-flow order
    bytes: dict[str, int] = {}  # of each parameter
    file_bytes = 0
    hashes: dict[str, str] = {}
    constant_hashes: dict[str, dict[str, str]] = {}
    for half, file in files.items():
        written = write_half(half, folder / file, names, tensors)
        assert not bytes.keys() & written.constants.keys(), "a parameter is read by one half alone"
        hashes[written.data.name], constant_hashes[file] = written.hash, written.constant_hashes
        bytes |= {name: sum(one.bytes for one in constants) for name, constants in written.constants.items()}
        file_bytes += (folder / file).stat().st_size + written.data.stat().st_size
    save(folder, hashes_file, constant_hashes)
    save(folder, "config.json", dict(job.source.config))
    job.source.copy_small_files(folder)
    by_component = job.by_component(bytes)
    headers = file_bytes - sum(by_component.values())
    unread = tuple(name for name in names if name not in bytes)
    return Written(load, by_component, hashes, NOTES, True, headers, unread=unread)


def constants_by_name(
    job: Job,
    tensors: Mapping[str, CheckpointTensor],
    names: Sequence[str],
    quantized: Callable[[Weight, Scheme, torch.dtype], tuple[ConstantT, ...]],
    kept: Callable[[str, torch.dtype, Sequence[int]], ConstantT],
) -> dict[str, tuple[ConstantT, ...]]:
    """The constants that each parameter becomes in a graph: those of a quantized weight, or one that is kept."""
    return {
        name: quantized(job.weights[name], job.schemes[name], job.scale_dtype)
        if name in job.weights
        else (kept(name, tensors[name].dtype, tensors[name].shape),)
        for name in names
    }
