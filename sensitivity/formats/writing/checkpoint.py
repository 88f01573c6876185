"""Writes a model's tensors in a packed layout into a checkpoint, as a stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sensitivity.formats.writing import stream
from sensitivity.formats.writing.job import Job
from sensitivity.formats.writing.source import CheckpointTensor
from sensitivity.formats.writing.stream import Piece, Spec
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Scheme


@dataclass(frozen=True)
class PackedLayout:
    """How a format stores one quantized weight: which tensors it writes, and how codes become them."""

    specs: Callable[[str, Weight, Scheme], tuple[Spec, ...]]  # takes the key without its final `weight`
    tensors: Callable[[QuantizedWeight, Weight, Scheme], Sequence[Tensor]]


def write_checkpoint(
    job: Job, folder: Path, layout: PackedLayout | None, config: Mapping[str, object], renamed: bool = False
) -> tuple[dict[str, int], dict[str, str]]:
    """Write all tensors as a stream, and copy the model's small files.

    Without a layout, quantized weights are written as dequantized values. With `renamed`, tensors get transformers'
    parameter names instead of the source checkpoint's keys, for runtimes that do not rename on loading. Returns the
    bytes of each component, and the hash of each file.
    """
    tensors = [replace(t, key=t.parameter) if renamed else t for t in job.source.tensors]
    stored = {tensor.parameter: tensor for tensor in tensors}
    pieces: dict[str, Piece] = {}
    for name, weight in job.weights.items():
        pieces[name] = _values(job, stored[name]) if layout is None else _packed(job, stored[name], weight, layout)
    for name in job.schemes:
        if name not in pieces:
            pieces[name] = _values(job, stored[name])  # a bias
    for tensor in tensors:  # last, since folding and tweaking may change these while codes are computed
        if tensor.parameter not in job.schemes:
            pieces[tensor.parameter] = _copied(job, tensor)
    hashes = stream.write(folder, pieces.values(), ahead=job.at_once)
    (folder / "config.json").write_text(json.dumps({**job.source.config, **config}, indent=2) + "\n", encoding="utf-8")
    job.source.copy_small_files(folder)
    return job.by_component({name: piece.bytes for name, piece in pieces.items()}), hashes


def float16_scale(stored: QuantizedWeight, name: str, format: str) -> Tensor:
    """The scales of a weight in float16, or an error if float16 does not hold them.

    Scales that were found in bfloat16 may overflow or lose bits, and answers would differ from the measured ones.
    """
    scale = stored.scale.to(torch.float16)
    if not torch.equal(scale.float(), stored.scale):
        raise UserError(f"a scale of {name} does not fit float16, as {format} stores it; use --format fake")
    return scale


def save(folder: Path, name: str, content: object) -> None:
    """Write a JSON file of an export."""
    (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def bytes_beside_tensors(folder: Path, weight: Mapping[str, int]) -> int:
    """The bytes of the safetensors files that are not tensors."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) - sum(weight.values())


def _read(job: Job, tensor: CheckpointTensor) -> Tensor:
    """A parameter in the dtype in which the plan was measured: in another one, rounding could give other codes."""
    weight = tensor.read().to(job.dtype)
    if weight.numel() and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(weight)):
        raise UserError(f"{tensor.parameter} holds NaN or infinite values and cannot be quantized")
    return weight


def unquantized(job: Job, tensor: CheckpointTensor) -> Tensor:
    """A parameter that the plan does not quantize, as folding or tweaking changed it, in its checkpoint's dtype."""
    changed = job.changed.get(tensor.parameter)
    return tensor.read() if changed is None else changed.to(tensor.dtype)


def on_integer_grid(job: Job, tensor: CheckpointTensor, scheme: Scheme) -> QuantizedWeight:
    """The codes of a weight, or an error if a packed layout cannot hold what its method stores."""
    stored = job.codes(tensor.parameter, _read(job, tensor), scheme)
    if getattr(stored, "inputs", None) is not None:
        raise UserError(
            f"{tensor.parameter} was quantized with a factor for each input, which this layout cannot hold; sweep "
            "with --set scales=folded, or use --format fake, or a method without scales, such as gptq"
        )
    if not isinstance(stored, QuantizedWeight) or not bool((stored.zero == stored.zero.round()).all()):
        raise UserError(f"{tensor.parameter} has no codes on an integer grid; use --method rtn, or --format fake")
    return stored


def _copied(job: Job, tensor: CheckpointTensor) -> Piece:
    """A parameter that the plan leaves unquantized."""
    return Piece((Spec(tensor.key, tensor.dtype, tensor.shape),), lambda: (unquantized(job, tensor),))


def _packed(job: Job, tensor: CheckpointTensor, weight: Weight, layout: PackedLayout) -> Piece:
    """A quantized weight in a packed layout."""
    scheme = job.schemes[tensor.parameter]

    def make() -> Sequence[Tensor]:
        return layout.tensors(on_integer_grid(job, tensor, scheme), weight, scheme)

    return Piece(layout.specs(tensor.key.removesuffix("weight"), weight, scheme), make)


def _values(job: Job, tensor: CheckpointTensor) -> Piece:
    """A parameter as dequantized values."""

    def make() -> Sequence[Tensor]:
        weight = _read(job, tensor)
        flat = weight.reshape(1, -1) if weight.dim() == 1 else weight
        stored = job.codes(tensor.parameter, flat, job.schemes[tensor.parameter])
        return (weight if stored is None else stored.dequantize().to(job.dtype).reshape(weight.shape),)

    return Piece((Spec(tensor.key, job.dtype, tensor.shape),), make)
