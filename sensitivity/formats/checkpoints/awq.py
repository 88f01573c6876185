"""awq: AutoAWQ's layout, 4 bits, with input scales folded into the layer before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sensitivity.formats.checkpoints.fake import LOAD
from sensitivity.formats.writing.checkpoint import PackedLayout, bytes_beside_tensors, float16_scale, write_checkpoint
from sensitivity.formats.writing.job import Job, Written
from sensitivity.formats.writing.packing import pack
from sensitivity.formats.writing.stream import Spec
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Scheme
from sensitivity.spec.stored_bits import groups

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight rows' codes in a 32-bit word, as AutoAWQ's kernels read them


def write(job: Job, folder: Path) -> Written:
    """Write the `gemm` version: codes packed along the rows, and a zero point for every group."""
    weight, hashes = write_checkpoint(job, folder, PackedLayout(_specs, _tensors), {"quantization_config": config(job)})
    return Written(
        load=LOAD.format(dtype=job.dtype_name) + "# needs: pip install gptqmodel\n",
        bytes=weight,
        hashes=hashes,
        headers=bytes_beside_tensors(folder, weight),
        notes=("This layout stores a zero point for every group, even on symmetric grids.",),
    )


def config(job: Job) -> dict[str, object]:
    """The `quantization_config` of the checkpoint."""
    schemes = {scheme for _, scheme, _ in job.groups()}
    if not schemes:
        raise UserError("the plan quantizes nothing; export it as --format fake")
    # exactly one: RUNTIMES allows this format a single scheme, and that was checked before
    (scheme,) = schemes
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": -1 if scheme.group == "row" else scheme.group,
        "zero_point": True,
        "modules_to_not_convert": job.native(),
    }


def _specs(key: str, weight: Weight, scheme: Scheme) -> tuple[Spec, ...]:
    count = groups(scheme, 1, weight.cols)
    return (
        Spec(f"{key}qweight", torch.int32, (weight.cols, weight.rows // 8)),
        Spec(f"{key}qzeros", torch.int32, (count, weight.rows // 8)),
        Spec(f"{key}scales", torch.float16, (count, weight.rows)),
    )


def _tensors(stored: QuantizedWeight, weight: Weight, scheme: Scheme) -> Sequence[Tensor]:
    count = _specs("", weight, scheme)[1].shape[0]
    zero = stored.zero.to(torch.uint8).T.expand(count, weight.rows)
    scale = float16_scale(stored, weight.name, "awq")
    return _words(stored.codes.T), _words(zero), scale.T.expand(count, weight.rows).contiguous()


def _words(codes: Tensor) -> Tensor:
    ordered = codes.reshape(len(codes), -1, 8)[:, :, list(ORDER)]
    return pack(ordered.reshape(len(codes), -1), 4)
