"""METHODS: every quantization method, its settings, and what a scheme of it needs."""

from __future__ import annotations

from collections import ChainMap
from typing import Any

from sensitivity.quantize.grids.adpq import quantize_adpq
from sensitivity.quantize.grids.billm import quantize_billm
from sensitivity.quantize.grids.binary import quantize_binary
from sensitivity.quantize.grids.bivlm import quantize_bivlm
from sensitivity.quantize.grids.bpdq import quantize_bpdq
from sensitivity.quantize.grids.gwq import quantize_gwq
from sensitivity.quantize.grids.leanquant import quantize_leanquant, quantize_leanquant_affine
from sensitivity.quantize.grids.qvla import quantize_qvla
from sensitivity.quantize.grids.spqr import quantize_spqr
from sensitivity.quantize.grids.squeezellm import quantize_squeezellm
from sensitivity.quantize.layer.linears import Method, per_weight
from sensitivity.quantize.run_time.settings import (
    ATTENTION_OFF,
    CACHE_OFF,
    COMMON_OFF,
    needs_run_time_data,
    of_weights,
)
from sensitivity.quantize.solvers.clip import quantize_clip
from sensitivity.quantize.solvers.gptq import quantize_gptq
from sensitivity.quantize.solvers.llm_int8 import int8_rows, split_inputs
from sensitivity.quantize.solvers.nearest import quantize_rtn, quantize_uniform
from sensitivity.quantize.solvers.qsvd import quantize_qsvd
from sensitivity.quantize.solvers.scale_search import quantize_awq
from sensitivity.quantize.solvers.smooth import quantize_smooth
from sensitivity.quantize.solvers.vlm_ptq import quantize_vlm_ptq
from sensitivity.quantize.stored.codebook import to_codebook
from sensitivity.spec.errors import unknown
from sensitivity.spec.plan import KEEP, QSVD, Scheme, Setting

OWN, UNIFORM = "own", "uniform"
# what decides the weight r of each calibration token in the Gram matrix
IMPORTANCE = (UNIFORM, "modality", "gradient", "output", "block", "attention", "perturbation", "filtered")
GRADIENTS = ("modality", "gradient", "output", "block")  # those that need a backward pass
# Which output a layer is fitted to when its inputs come from quantized layers. none: its own output for these inputs.
# all: the float model's output; each input channel's difference from the float model shifts the weights of all columns.
# later: as all, but each difference shifts only the weights of columns that are rounded later.
SHIFTS = ("none", "later", "all")
SHIFT: dict[str, Setting] = {"shift": "none", "strength": 1.0}
TRANSFORMS = ("none", "hadamard")
TRANSFORM: dict[str, Setting] = {"transform": "none"}
SMOOTHING: dict[str, Setting] = {"spread": "largest", "scales": "stored", "learned": 0, **TRANSFORM}
# the value at which each of these settings changes nothing; a scheme does not record a setting with that value
NO_EFFECT: dict[str, Setting] = {
    "biases": False,
    "backend": OWN,
    "importance": UNIFORM,
    "gradient": False,
    "learned": 0,
}
NO_EFFECT |= {**SHIFT, **TRANSFORM, **ATTENTION_OFF, **CACHE_OFF, **COMMON_OFF}
# what a calibrated scheme records about its calibration data (see Statistics.facts), and the type of each value
CALIBRATION = {"calibration": str, "examples": int, "seed": int, "data": str, "path": str}
# ends of the message "METHOD is always ...", for methods whose group or grid cannot be chosen
BLOCKS = "in blocks of 64 of the flattened weight, around zero"
CODEBOOK, PLANES = "with one codebook per row", "of bit planes, and asymmetric"
LEANQUANT: Any = {
    "settings": {"damp": 0.01, "order": "activation", "exponent": 4.0, "importance": UNIFORM},
    "ranges": {"damp": (0, 10), "exponent": (0, 16)},
    "choices": {"order": ("given", "activation"), "importance": IMPORTANCE},
}
METHODS: dict[str, Method] = {
    "uniform": Method(
        per_weight(quantize_uniform),
        group="tensor",
        symmetric=False,
        settings={"biases": False},
        fixed="per tensor and asymmetric",
    ),
    "rtn": Method(per_weight(quantize_rtn), settings={"biases": False}),
    "clip": Method(
        quantize_clip,
        range(2, 9),
        calibrated=True,
        settings={"importance": UNIFORM},
        choices={"importance": IMPORTANCE},
    ),
    "gptq": Method(
        quantize_gptq,
        calibrated=True,
        # order and clip add no stored bits; on the embedded model's layers they cut the output error by 20 to 40 %
        settings={
            "damp": 0.01,
            "order": "activation",
            "clip": True,
            "backend": OWN,
            "importance": UNIFORM,
            **SHIFT,
            **TRANSFORM,
        },
        ranges={"damp": (0, 10), "strength": (0, 1)},
        choices={
            "order": ("given", "activation"),
            "backend": (OWN, "gptqmodel"),
            "importance": IMPORTANCE,
            "shift": SHIFTS,
            "transform": TRANSFORMS,
        },
    ),
    "vlm-ptq": Method(
        quantize_vlm_ptq,
        range(2, 9),
        symmetric=False,
        calibrated=True,
        settings={"damp": 0.01, "order": "activation", "shift": "all", "strength": 1.0, "importance": UNIFORM},
        ranges={"damp": (0, 10), "strength": (0, 1)},
        choices={"order": ("given", "activation"), "importance": IMPORTANCE, "shift": SHIFTS},
        both_paths=True,
    ),
    "awq": Method(
        quantize_awq,
        range(2, 9),
        group=128,
        symmetric=False,
        calibrated=True,
        settings={"exponents": 20, "clip": True, "clip_qk": False, "scales": "stored", "importance": UNIFORM},
        ranges={"exponents": (1, 1000)},
        # folded: scales only where the layer before can absorb them, so that they add no stored bits
        choices={"scales": ("stored", "folded"), "importance": IMPORTANCE},
    ),
    "smooth": Method(
        quantize_smooth,
        range(2, 9),
        calibrated=True,
        settings={"exponent": 0.5, **SMOOTHING, "importance": UNIFORM},
        ranges={"exponent": (0, 1), "learned": (0, 1000)},
        choices={
            "spread": ("largest", "range"),
            "scales": ("stored", "folded", "norms"),
            "transform": (*TRANSFORMS, "blocks"),
            "importance": IMPORTANCE,
        },
    ),
    "nf4": Method(per_weight(to_codebook), range(4, 5), group=64, settings={"double": False}, fixed=BLOCKS),
    "fp4": Method(per_weight(to_codebook), range(4, 5), group=64, settings={"double": False}, fixed=BLOCKS),
    "llm-int8": Method(
        per_weight(int8_rows),
        range(8, 9),
        settings={"threshold": 6.0, "outliers": "token"},
        ranges={"threshold": (0, 1e6)},
        choices={"outliers": ("token", "call")},
        fixed="per row and symmetric",
        inputs=split_inputs,
    ),
    "binary": Method(per_weight(quantize_binary), symmetric=False, fixed=PLANES, any_group=True),
    "squeezellm": Method(
        quantize_squeezellm,
        symmetric=False,
        calibrated=True,
        settings={"outliers": 0.0045, "sensitive": 0.0005, "gradient": False, "importance": UNIFORM},
        ranges={"outliers": (0, 0.5), "sensitive": (0, 0.5)},
        choices={"importance": IMPORTANCE},
        fixed=CODEBOOK,
    ),
    "leanquant": Method(quantize_leanquant, symmetric=False, calibrated=True, fixed=CODEBOOK, **LEANQUANT),
    "leanquant-affine": Method(quantize_leanquant_affine, range(2, 9), symmetric=False, calibrated=True, **LEANQUANT),
    "bpdq": Method(
        quantize_bpdq,
        range(1, 5),
        group=128,
        symmetric=False,
        calibrated=True,
        settings={"damp": 0.01, "turns": 5, "importance": UNIFORM},
        ranges={"damp": (0, 10), "turns": (1, 100)},
        choices={"importance": IMPORTANCE},
        fixed=PLANES,
        any_group=True,
    ),
    "billm": Method(
        quantize_billm,
        range(1, 2),
        group=128,
        calibrated=True,
        settings={"damp": 0.01, "salient": 49, "split": True, "importance": UNIFORM},
        ranges={"damp": (0, 10), "salient": (0, 1000)},
        choices={"importance": IMPORTANCE},
        fixed="of signs and magnitudes, and symmetric",
        any_group=True,
    ),
    "bivlm": Method(
        per_weight(quantize_bivlm),
        range(1, 2),
        group="tensor",
        settings={"bins": 5, "salient": 0.01},
        ranges={"bins": (1, 126), "salient": (0, 0.2)},
        fixed="per tensor and symmetric",
    ),
    "spqr": Method(
        quantize_spqr,
        range(2, 9),
        group=16,
        symmetric=False,
        calibrated=True,
        settings={"damp": 1.0, "order": "activation", "outliers": 0.01, "scale_bits": 3, "importance": UNIFORM},
        ranges={"damp": (0, 10), "outliers": (0, 0.5), "scale_bits": (1, 16)},
        choices={"order": ("given", "activation"), "importance": IMPORTANCE},
        fixed="asymmetric",
        any_group=True,
    ),
    "gwq": Method(
        quantize_gwq,
        range(2, 9),
        group=128,
        symmetric=False,
        calibrated=True,
        fisher=True,
        settings={"outliers": 0.01},
        ranges={"outliers": (0, 0.5)},
    ),
    "adpq": Method(
        per_weight(quantize_adpq), range(2, 9), group=128, settings={"outliers": 0.06}, ranges={"outliers": (0, 0.5)}
    ),
    "qvla": Method(
        quantize_qvla,
        calibrated=True,
        settings={"damp": 0.01, "importance": UNIFORM},
        ranges={"damp": (0, 10)},
        choices={"importance": IMPORTANCE},
        fixed="per row and symmetric",
    ),
    QSVD: Method(
        quantize_qsvd,
        range(2, 9),
        calibrated=True,
        settings={"rank": 0.5, "beta": 0.2, "damp": 0.01, "importance": UNIFORM},
        ranges={"rank": (0.001, 1), "beta": (0, 1), "damp": (1e-6, 10)},
        choices={"importance": IMPORTANCE},
        fixed="per row and symmetric",
        latent=True,
    ),
}
# The methods that a scheme may name: METHODS, and KEEP, which leaves the weight unchanged in a scheme that only rounds
# activations or the cache. A ChainMap, so that a method that is added to METHODS later is found here too.
ROWS = ChainMap(
    {KEEP: Method(per_weight(lambda weight, scheme: None), range(16, 17), fixed="as stored before")}, METHODS
)


def method_of(scheme: Scheme) -> Method:
    """The row of METHODS for a scheme, or an error that names the methods."""
    if scheme.method not in ROWS:
        raise unknown("method", scheme.method, ROWS)
    return ROWS[scheme.method]


def needs_data(scheme: Scheme) -> bool:
    """Whether a scheme needs calibration data: for its weights, or for what it rounds in each forward pass."""
    return method_of(scheme).calibrated or needs_run_time_data(scheme)


def weights_of(scheme: Scheme) -> Scheme:
    """A scheme without the settings that its stored weights do not depend on: run-time rounding, norms and pruning."""
    return of_weights(scheme, method_of(scheme), tuple(CALIBRATION))


def token_weighting(scheme: Scheme) -> str:
    """What a scheme weighs calibration tokens by: UNIFORM, or another of IMPORTANCE."""
    return str(scheme.get("importance") or UNIFORM)


def needs_both_paths(scheme: Scheme) -> bool:
    """Whether a scheme compares a layer's inputs in the float model with those after quantized layers."""
    return method_of(scheme).both_paths or scheme.get("shift", "none") != "none"


def needs_gradients(scheme: Scheme) -> bool:
    """Whether a scheme needs a backward pass: of the answer loss, or of a block's own error."""
    return token_weighting(scheme) in GRADIENTS or needs_fisher(scheme)


def needs_fisher(scheme: Scheme) -> bool:
    """Whether a scheme weighs each element of a weight by the gradient of the answer loss."""
    return method_of(scheme).fisher or bool(scheme.get("gradient"))
