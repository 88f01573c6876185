"""SECONDS: how long each method took to quantize one large layer, so that slow methods are known beforehand."""

from __future__ import annotations

from sensitivity.quantize.presets import PRESETS

MEASURED_BY = "python -m experiments.benchmarks.methods_cost"
# CPU seconds of one thread for a weight of 4096 x 4096 at 4 bits, or at the nearest width that the method takes,
# including the factorization of H (reports/methods-cost.md); --dry-run measures the machine where a sweep will run
SECONDS: dict[str, float] = {
    "uniform": 0.09,
    "rtn": 0.11,
    "clip": 12.59,
    "gptq": 2.82,
    "vlm-ptq": 26.15,
    "awq": 36.41,
    "smooth": 0.31,
    "nf4": 0.81,
    "fp4": 0.79,
    "llm-int8": 0.29,
    "binary": 2.1,
    "squeezellm": 6.91,
    "leanquant": 7.48,
    "leanquant-affine": 3.42,
    "bpdq": 20.1,
    "billm": 9.87,
    "bivlm": 5.94,
    "spqr": 5.75,
    "gwq": 0.72,
    "adpq": 1.15,
    "qvla": 2.49,
    "qsvd": 20.54,
    "gptaq": 8.65,
    "rsq": 9.88,
    "norm-tweak": 225.66,
    "salq-vlm": 7.72,
    "quantvggt": 183.16,
    "quantvla": 1.46,
}


def seconds_of(name: str) -> float | None:
    """The seconds of a method or preset; a preset without an entry of its own takes as long as its method.

    None for a method that was not measured.
    """
    return SECONDS.get(name, SECONDS.get(str(PRESETS.get(name, {"method": ""})["method"])))
