"""The bytes of a graph's constants, parameter by parameter, computed when they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sensitivity.formats.writing.checkpoint import on_integer_grid, unquantized
from sensitivity.formats.writing.job import Job
from sensitivity.formats.writing.source import CheckpointTensor
from sensitivity.formats.writing.stream import Piece, Spec
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.spec.components import Weight
from sensitivity.spec.plan import Scheme

# the bytes of each constant of a quantized weight, with scales in the given dtype
Contents = Callable[[QuantizedWeight, Weight, Scheme, torch.dtype], Sequence[Tensor]]


class Sized(Protocol):
    """A constant of a graph, as a format describes it."""

    @property
    def name(self) -> str:
        """Its name in the graph."""

    @property
    def bytes(self) -> int:
        """The bytes that it takes."""


def pieces_of(
    job: Job,
    tensors: Mapping[str, CheckpointTensor],
    constants: Mapping[str, Sequence[Sized]],
    contents: Contents,
) -> list[Piece]:
    """One piece for each parameter that a graph reads."""
    return [_piece(job, tensors[name], sized, contents) for name, sized in constants.items()]


def _piece(job: Job, tensor: CheckpointTensor, constants: Sequence[Sized], contents: Contents) -> Piece:
    name = tensor.parameter

    def make() -> Sequence[Tensor]:
        if name not in job.weights:
            return (unquantized(job, tensor).contiguous().reshape(-1).view(torch.uint8),)
        scheme = job.schemes[name]
        return contents(on_integer_grid(job, tensor, scheme), job.weights[name], scheme, job.scale_dtype)

    return Piece(tuple(Spec(one.name, torch.uint8, (one.bytes,)) for one in constants), make)
