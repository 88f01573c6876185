"""compressed-tensors: packed weights of 1 to 8 bits, with a config group for each component."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sensitivity.formats.checkpoints.fake import LOAD
from sensitivity.formats.writing.checkpoint import PackedLayout, bytes_beside_tensors, write_checkpoint
from sensitivity.formats.writing.job import Job, Written
from sensitivity.formats.writing.packing import pack
from sensitivity.formats.writing.stream import Spec
from sensitivity.models.loading import load as load_model
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.spec.components import Weight
from sensitivity.spec.plan import NOT_ROUNDED, Scheme
from sensitivity.spec.stored_bits import groups

# its names for codes packed into words, for one byte per code (if activations are rounded), and for a mix of both
PACKED, BYTES, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
UNPACK = "model.hf_quantizer.compressor.decompress_model(model)\n"
# transformers 5.23 initializes what a file leaves out; in some families (SigLIP, T5) it looks for packed weights then
LEAVE_PACKED = """\
import contextlib
from transformers import PreTrainedModel

plainly = PreTrainedModel._initialize_weights

def initialize(self, layer, *more):
    with contextlib.suppress(AttributeError):  # some layers of this model look for weights that are still packed
        plainly(self, layer, *more)

PreTrainedModel._initialize_weights = initialize

"""
LAST_LINE = (
    "Without the last line the weights are unpacked by the first forward pass of the whole model, and `generate` reads "
    "images before it; transformers itself unpacks on loading only where all weights have the same width and group. "
    "Where sensitivity is installed, one line does it all: `from sensitivity import load; vlm = load(FOLDER, "
    "quantized=True)`."
)
ROUNDED = (
    "transformers unpacks the weights on loading, in 16 bits, so that a model in float32 differs from the measured one "
    "in the last bits. `from sensitivity import load; vlm = load(FOLDER, quantized=True)` unpacks them as measured."
)
STRATEGIES = {"tensor": "tensor", "row": "channel"}


def write(job: Job, folder: Path) -> Written:
    """Write a checkpoint that plain `from_pretrained` loads where compressed-tensors is installed."""
    weight, hashes = write_checkpoint(job, folder, packed_layout(job.scale_dtype), {"quantization_config": config(job)})
    load = LOAD.format(dtype=job.dtype_name)
    if not has_one_group(job):
        load = ("" if _starts_packed(job) else LEAVE_PACKED) + load + UNPACK
    return Written(
        load=load,
        bytes=weight,
        hashes=hashes,
        headers=bytes_beside_tensors(folder, weight),
        notes=(
            "Needs compressed-tensors (pip install compressed-tensors).",
            ROUNDED if has_one_group(job) else LAST_LINE,
        ),
        runs=all(_loads(scheme) for _, scheme, _ in job.groups()),
    )


def has_one_group(job: Job) -> bool:
    """Whether all quantized weights have the same settings, since transformers can then unpack them on loading."""
    # weights whose inputs are rounded are stored in bytes, others packed into words
    stored = {(s.bits, s.group, s.symmetric, s.activations == NOT_ROUNDED) for _, s, _ in job.groups()}
    return len(stored) == 1


def _starts_packed(job: Job) -> bool:
    """Whether transformers can initialize the model without the weights that are packed; tried without any numbers."""
    model = load_model(job.name, config_only=True).model
    assert isinstance(model, PreTrainedModel)
    for _, _, modules in job.groups():
        for module in modules:
            del model.get_submodule(module).weight
    try:
        model.initialize_weights()  # type: ignore[no-untyped-call]
    except AttributeError:
        return False
    return True


def _loads(scheme: Scheme) -> bool:
    """Whether transformers can load a scheme; packed zero points are for other runtimes (see RUNTIMES)."""
    return scheme.symmetric or scheme.group == "tensor"


def config(job: Job) -> dict[str, object]:
    """The `quantization_config` of the checkpoint."""
    groups = {name: _group(scheme, modules) for name, scheme, modules in job.groups()}
    formats = {str(group["format"]) for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED if formats else PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": job.native(),
        # transformers 5.23 applies the first config group to all modules, so it cannot unpack mixed widths on loading
        **({"dequantize": True} if has_one_group(job) else {}),
        "kv_cache_scheme": None,
    }


def _group(scheme: Scheme, modules: list[str]) -> dict[str, object]:
    """A component's config group: its modules, and the arguments of their weights and of rounded inputs."""
    if scheme.activations == NOT_ROUNDED:
        return {"targets": modules, "format": PACKED, "weights": quantization_args(scheme)}
    inputs = {
        "num_bits": scheme.activations, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
    }  # fmt: skip
    return {"targets": modules, "format": BYTES, "weights": quantization_args(scheme), "input_activations": inputs}


def quantization_args(scheme: Scheme) -> dict[str, object]:
    """A scheme as compressed-tensors' QuantizationArgs."""
    grouped = isinstance(scheme.group, int)
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if grouped else STRATEGIES[str(scheme.group)],
        **({"group_size": scheme.group} if grouped else {}),
        "dynamic": False,
    }


def packed_layout(scale_dtype: torch.dtype) -> PackedLayout:
    """The layout of one weight: weight_packed, weight_scale, weight_shape, and weight_zero_point on asymmetric grids.

    Zero points are packed along the rows. If activations are rounded, the tensors are weight (signed bytes) and
    weight_scale.
    """

    def specs(key: str, weight: Weight, scheme: Scheme) -> tuple[Spec, ...]:
        shape = _scales(weight, scheme)
        if scheme.activations != NOT_ROUNDED:
            return (
                Spec(f"{key}weight", torch.int8, (weight.rows, weight.cols)),
                Spec(f"{key}weight_scale", scale_dtype, shape),
            )
        placed = [
            Spec(f"{key}weight_packed", torch.int32, (weight.rows, math.ceil(weight.cols * scheme.bits / 32))),
            Spec(f"{key}weight_scale", scale_dtype, shape),
            Spec(f"{key}weight_shape", torch.int64, (2,)),
        ]
        if not scheme.symmetric:
            whole = scheme.group == "tensor"
            packed = shape if whole else (math.ceil(weight.rows * scheme.bits / 32), shape[1])
            placed.append(Spec(f"{key}weight_zero_point", torch.int8 if whole else torch.int32, packed))
        return tuple(placed)

    def tensors(stored: QuantizedWeight, weight: Weight, scheme: Scheme) -> Sequence[Tensor]:
        if scheme.activations != NOT_ROUNDED:
            signed = (stored.codes.to(torch.int16) - 2 ** (scheme.bits - 1)).to(torch.int8)
            return [signed, stored.scale.to(scale_dtype).reshape(_scales(weight, scheme))]
        shape = torch.tensor([weight.rows, weight.cols])
        made = [pack(stored.codes, scheme.bits), stored.scale.to(scale_dtype).reshape(_scales(weight, scheme)), shape]
        if not scheme.symmetric:
            zero = stored.zero.to(torch.int16)
            if scheme.group == "tensor":  # not packed, and relative to the middle of the signed codes
                made.append((zero - 2 ** (scheme.bits - 1)).to(torch.int8).reshape(1))
            else:
                made.append(pack(zero.to(torch.uint8).T, scheme.bits).T.contiguous())
        return made

    return PackedLayout(specs, tensors)


def _scales(weight: Weight, scheme: Scheme) -> tuple[int, ...]:
    if scheme.group == "tensor":
        return (1,)
    return (weight.rows, groups(scheme, 1, weight.cols))
