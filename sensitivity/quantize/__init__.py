"""METHODS, and `with quantized(vlm, parts, plan)`: a plan put into a model and taken out again, bit for bit."""

from sensitivity.quantize.calibration import calibrate
from sensitivity.quantize.curvature import Curvature
from sensitivity.quantize.install import prepare, quantized, targets
from sensitivity.quantize.linears import Linears, Method
from sensitivity.quantize.methods import METHODS, method_of, quantise, scheme, solve
from sensitivity.quantize.presets import PRESETS
from sensitivity.quantize.statistics import Statistics

__all__ = [
    "METHODS",
    "PRESETS",
    "Curvature",
    "Linears",
    "Method",
    "Statistics",
    "calibrate",
    "method_of",
    "prepare",
    "quantise",
    "quantized",
    "scheme",
    "solve",
    "targets",
]
