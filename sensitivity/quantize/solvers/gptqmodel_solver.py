"""GPTQModel's solver in place of ours (extra `peers`), on the same layers and Gram matrices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.stored.integer_grid import QuantizedWeight, encode, group_size, scale_as_16_bit
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Scheme


def check(scheme: Scheme) -> None:
    """Raise an error, before anything is computed, where the library is missing or lacks what a scheme asks for."""
    if find_spec("gptqmodel") is None:
        raise UserError(
            "gptqmodel is not installed; type: pip install 'vlm-sensitivity[peers]', or leave out --backend for our own"
        )
    if scheme.bits < 2:
        raise UserError(f"gptqmodel takes 2 to 8 bits, not {scheme.bits}; leave out --backend for our own")
    if scheme["clip"]:
        raise UserError("gptqmodel has no clip search judged by a layer's inputs; add --set clip=false")


def gptqmodel(linears: Linears, schemes: Sequence[Scheme]) -> list[list[QuantizedWeight | None]]:
    """Quantize each weight at each bit width on its own, as the library does.

    It sets to zero the weights of channels whose inputs were always zero.
    """
    with redirect_stdout(StringIO()):  # its banner would break the JSON of --json
        return [
            [_one_weight(linears, weight.detach().float(), scheme) for weight in linears.weights] for scheme in schemes
        ]


def _one_weight(linears: Linears, weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Quantize one weight at one bit width, as a linear layer that GPTQModel's solver takes."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default is more threads than some machines have cores
    from gptqmodel.looper.named_module import NamedModule
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    seen, activation = linears.input_statistics, scheme["order"] == "activation"
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    layer.weight.data = weight.clone()
    config = QuantizeConfig(
        bits=scheme.bits,
        group_size=-1 if scheme.group == "row" else group_size(scheme, weight),
        sym=scheme.symmetric,
        desc_act=activation,
        static_groups=activation and scheme.group != "row",  # as in our solver: grids of the original weights
        act_group_aware=False,
        damp_percent=float(scheme["damp"] or 0) or 1e-6,
        offload_to_disk=False,
    )
    # its calibration hooks are bypassed: the Gram matrix is set directly, times 2 / n as GPTQ's code accumulates it
    solver: Any = GPTQ(NamedModule(layer, "linear", "linear", 0), config)
    solver.quantizer.configure(perchannel=True)
    solver.H, solver.nsamples = seen.gram * (2 / max(seen.tokens, 1)), seen.tokens
    with torch.inference_mode():
        rounded, scale, zero = solver.quantize()[:3]
    # the library rounds to scales in 32 bits, then stores them in 16: scales are rounded here so that we measure what
    # a file would hold
    codes = encode(rounded.float(), scheme, scale.float(), zero.float())
    return QuantizedWeight(codes.codes, scale_as_16_bit(codes.scale, linears.dtype), codes.zero, codes.group)
