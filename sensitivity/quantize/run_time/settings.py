"""The settings of what is rounded in each forward pass, which every method takes."""

from __future__ import annotations

from dataclasses import replace

from sensitivity.quantize.layer.linears import Method
from sensitivity.quantize.run_time.inputs import SCALES, TENSOR, TOKEN
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import ACTIVATION_SCALE, ACTIVATIONS, CACHE, CACHE_GROUP, NOT_ROUNDED, Scheme

ROUNDED_BITS, RUN_TIME = (ACTIVATIONS, CACHE), (ACTIVATION_SCALE, CACHE_GROUP)  # of any scheme: its bits, its settings
CHANNELS = 32  # of a key or value that share a scale, as in KIVI (Liu et al. 2024)


def with_run_time(row: Method, name: str, activations: int, cache: int) -> Method:
    """A method's row with the settings that rounding activations or the cache adds to its own."""
    if activations != NOT_ROUNDED:
        if row.inputs is not None:
            raise UserError(f"{name} rounds activations by itself; leave out --activation-bits, or use another method")
        row = replace(
            row,
            settings={**row.settings, ACTIVATION_SCALE: TOKEN},
            choices={**row.choices, ACTIVATION_SCALE: SCALES},
        )
    if cache != NOT_ROUNDED:
        row = replace(
            row, settings={**row.settings, CACHE_GROUP: CHANNELS}, ranges={**row.ranges, CACHE_GROUP: (1, 65_536)}
        )
    return row


def has_fixed_range(scheme: Scheme) -> bool:
    """Whether a scheme rounds activations with one scale for all tokens, which calibration gives."""
    return scheme.get(ACTIVATION_SCALE) == TENSOR


def of_weights(scheme: Scheme, row: Method, facts: tuple[str, ...]) -> Scheme:
    """The part of a scheme that its weights depend on: equal for all widths of activations and cache.

    `facts` are the names under which a scheme records its calibration data; an uncalibrated method has them only
    because of the range of its activations.
    """
    unrounded = scheme.without_rounding
    if row.calibrated or unrounded is scheme:
        return unrounded
    return replace(unrounded, settings=tuple((name, value) for name, value in unrounded.settings if name not in facts))
