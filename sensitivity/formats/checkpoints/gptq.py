"""gptq: GPTQModel's checkpoint, with bits per module in `dynamic`, and quantize_config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sensitivity.formats.writing.checkpoint import PackedLayout, bytes_beside_tensors, float16_scale, write_checkpoint
from sensitivity.formats.writing.job import Job, Written
from sensitivity.formats.writing.packing import pack
from sensitivity.formats.writing.stream import Spec
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.spec.components import Weight
from sensitivity.spec.plan import Scheme
from sensitivity.spec.stored_bits import groups

# GPTQModel's planar layout splits a code into pieces whose widths divide 32, so that each piece is in one word.
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
LOAD = """\
from gptqmodel import GPTQModel

model = GPTQModel.load(FOLDER)  # for the model types that GPTQModel knows
"""


def write(job: Job, folder: Path) -> Written:
    """Write codes packed along the columns, zero points along the rows, float16 scales, and each column's group."""
    kind = checkpoint_format(job)
    settings = config(job, kind)
    weight, hashes = write_checkpoint(job, folder, packed_layout(kind), {"quantization_config": settings}, renamed=True)
    (folder / "quantize_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    notes = [
        "This layout also stores a zero point for every group of a symmetric grid, and four bytes per column that name "
        "its group.",
        "transformers' own GPTQ loader takes one width for all; mixed widths need GPTQModel, whose definitions cover "
        "the language model of most families and leave vision and connector alone.",
    ]
    return Written(load=LOAD, bytes=weight, hashes=hashes, headers=bytes_beside_tensors(folder, weight), notes=notes)


def checkpoint_format(job: Job) -> str:
    """The oldest layout that can hold the plan.

    `gptq` stores each zero point minus one, so a zero point of 0, which asymmetric grids can have, would overflow;
    `gptq_v2` stores it unchanged. `gptq_p` is planar, for 5, 6 and 7 bits.
    """
    schemes = {scheme for _, scheme, _ in job.groups()}
    if any(scheme.bits in (5, 6, 7) for scheme in schemes):
        return "gptq_p"
    return "gptq" if all(scheme.symmetric for scheme in schemes) else "gptq_v2"


def config(job: Job, kind: str) -> dict[str, object]:
    """The settings: the most common scheme as default, and an entry for each other module; `-:` marks native ones."""
    common = job.most_common_scheme()
    dynamic: dict[str, dict[str, object]] = {f"-:^{re.escape(module)}$": {} for module in job.native()}
    for _, scheme, modules in job.groups():
        if scheme != common:
            dynamic |= {f"+:^{re.escape(module)}$": _arguments(scheme) for module in modules}
    return {
        **_arguments(common),
        "desc_act": False,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": kind,
        "pack_dtype": "int32",
        "dynamic": dynamic,
        "meta": {"quantizer": ["sensitivity:0.1.0"]},
    }


def _arguments(scheme: Scheme) -> dict[str, object]:
    return {"bits": scheme.bits, "group_size": _group(scheme), "sym": scheme.symmetric}


def _group(scheme: Scheme) -> int:
    return -1 if scheme.group == "row" else int(scheme.group)


def packed_layout(kind: str) -> PackedLayout:
    """The tensors of one packed weight in a layout: gptq, gptq_v2 or gptq_p."""

    def specs(key: str, weight: Weight, scheme: Scheme) -> tuple[Spec, ...]:
        count = groups(scheme, 1, weight.cols)
        return (
            Spec(f"{key}qweight", torch.int32, (weight.cols * scheme.bits // 32, weight.rows)),
            Spec(f"{key}qzeros", torch.int32, (count, weight.rows * scheme.bits // 32)),
            Spec(f"{key}scales", torch.float16, (count, weight.rows)),
            Spec(f"{key}g_idx", torch.int32, (weight.cols,)),
        )

    def tensors(stored: QuantizedWeight, weight: Weight, scheme: Scheme) -> Sequence[Tensor]:
        bits, planar = scheme.bits, kind == "gptq_p"
        zero = stored.zero.to(torch.int16).T.expand(groups(scheme, 1, weight.cols), weight.rows)
        if kind == "gptq":
            zero = zero - 1
        scale = float16_scale(stored, weight.name, "gptq")
        return (
            pack_planes(stored.codes, bits, planar).T.contiguous(),
            pack_planes(zero.to(torch.uint8).contiguous(), bits, planar),
            scale.T.expand(groups(scheme, 1, weight.cols), weight.rows).contiguous(),
            torch.arange(weight.cols, dtype=torch.int32) // (weight.cols if _group(scheme) < 0 else _group(scheme)),
        )

    return PackedLayout(specs, tensors)


def pack_planes(codes: Tensor, bits: int, planar: bool) -> Tensor:
    """Pack rows x cols codes into rows x (cols * bits / 32) words.

    In the planar layout, each 32 codes become the words of their low pieces, then the words of their higher pieces.
    """
    if not planar or bits not in PLANES:
        return pack(codes, bits)
    rows = len(codes)
    pieces, offset = [], 0
    for width in PLANES[bits]:
        piece = codes >> offset & (1 << width) - 1
        pieces.append(pack(piece, width).reshape(rows, -1, width))
        offset += width
    return torch.cat(pieces, dim=2).reshape(rows, -1)
