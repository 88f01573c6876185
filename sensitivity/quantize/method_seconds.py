"""SECONDS: how long each method took to quantize one large layer, so that slow methods are known beforehand."""

from __future__ import annotations

from sensitivity.quantize.presets import PRESETS

MEASURED_BY = "python -m experiments.benchmarks.methods_cost"
# CPU seconds of one thread for a weight of 4096 x 4096 at 4 bits, or at the nearest width that the method takes,
# including the factorization of H (reports/methods-cost.md); --dry-run measures the machine where a sweep will run
SECONDS: dict[str, float] = {
    "uniform": 0.12,
    "rtn": 0.11,
    "clip": 12.39,
    "gptq": 2.84,
    "vlm-ptq": 25.26,
    "awq": 39.18,
    "smooth": 0.30,
    "nf4": 0.81,
    "fp4": 0.68,
    "llm-int8": 0.27,
    "binary": 1.96,
    "squeezellm": 6.43,
    "leanquant": 7.41,
    "leanquant-affine": 2.80,
    "bpdq": 19.00,
    "billm": 10.81,
    "bivlm": 6.62,
    "spqr": 6.58,
    "gwq": 0.66,
    "adpq": 0.99,
    "qvla": 2.47,
    "qsvd": 22.78,
    "gptaq": 8.20,
    "rsq": 11.77,
    "norm-tweak": 222.59,
    "salq-vlm": 8.08,
    "quantvggt": 176.70,
    "quantvla": 1.13,
}


def seconds_of(name: str) -> float | None:
    """The seconds of a method or preset; a preset without an entry of its own takes as long as its method.

    None for a method that was not measured.
    """
    return SECONDS.get(name, SECONDS.get(str(PRESETS.get(name, {"method": ""})["method"])))
