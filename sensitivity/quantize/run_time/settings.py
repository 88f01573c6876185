"""The settings of rounding in each forward pass, of tweaked norms and of pruning, which every method takes."""

from __future__ import annotations

from dataclasses import replace

from sensitivity.quantize.layer.linears import Method
from sensitivity.quantize.run_time.inputs import NORM, SCALES, TENSOR, TOKEN
from sensitivity.quantize.run_time.probabilities import ADAPTIVE, GRIDS, NONE
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import (
    ACTIVATION_SCALE,
    ACTIVATIONS,
    ATTENTION,
    CACHE,
    CACHE_GROUP,
    CACHE_PAST,
    CACHE_SMOOTH,
    MATCH,
    NORM_AND_TOKEN_SETTINGS,
    NOT_ROUNDED,
    PRUNE,
    PRUNE_AFTER,
    ROUNDING_SETTINGS,
    SOFTMAX,
    TWEAK,
    Scheme,
    Setting,
)

# what any scheme may have: the bits of what it rounds in each forward pass, and the settings of that rounding
ROUNDED_BITS, RUN_TIME = (ACTIVATIONS, CACHE), ROUNDING_SETTINGS
# Defaults of the settings that a scheme has if it rounds activations (OF_ACTIVATIONS) or the cache, and of those that
# every scheme has (COMMON). Those in *_OFF change nothing, and a scheme does not record them.
ATTENTION_OFF: dict[str, Setting] = {SOFTMAX: NONE, ATTENTION: NONE, MATCH: False}
OF_ACTIVATIONS: dict[str, Setting] = {ACTIVATION_SCALE: TOKEN, **ATTENTION_OFF}
# how queries, keys and values are rounded: not at all; each with one range; or each with one range, after signs were
# changed so that the two peaks of the keys fall together (PTQ4SAM)
OPERANDS = (NONE, OPERANDS_TENSOR := "tensor", FOLDED := "folded")
COMMON_OFF: dict[str, Setting] = {TWEAK: 0, PRUNE: 0.0}  # no norm is tweaked, no image token pruned
COMMON: dict[str, Setting] = {**COMMON_OFF, PRUNE_AFTER: 2}
COMMON_RANGES = {TWEAK: (0, 10_000), PRUNE: (0, 1), PRUNE_AFTER: (0, 1_000)}
CACHE_OFF: dict[str, Setting] = {CACHE_PAST: False, CACHE_SMOOTH: False}
CHOICES: dict[str, tuple[Setting, ...]] = {ACTIVATION_SCALE: SCALES, SOFTMAX: GRIDS, ATTENTION: OPERANDS}
CHANNELS = 32  # channels of a key or value that share a scale, as in KIVI (Liu et al. 2024)


def with_common(row: Method) -> Method:
    """A method's row with the settings that every scheme may have: tweaking norms, and pruning image tokens."""
    return replace(row, settings={**row.settings, **COMMON}, ranges={**row.ranges, **COMMON_RANGES})


def with_run_time(row: Method, name: str, activations: int, cache: int) -> Method:
    """A method's row with the settings that rounding activations or the cache adds to its own."""
    if activations != NOT_ROUNDED:
        if row.inputs is not None:
            raise UserError(f"{name} rounds activations by itself; leave out --activation-bits, or use another method")
        row = replace(
            row,
            settings={**row.settings, **OF_ACTIVATIONS},
            choices={**row.choices, **CHOICES},
        )
    if cache != NOT_ROUNDED:
        row = replace(
            row,
            settings={**row.settings, CACHE_GROUP: CHANNELS, **CACHE_OFF},
            ranges={**row.ranges, CACHE_GROUP: (1, 65_536)},
        )
    return row


def has_fixed_range(scheme: Scheme) -> bool:
    """Whether a scheme rounds activations between the least and the largest input of the calibration data."""
    return scheme.get(ACTIVATION_SCALE) in (TENSOR, NORM)


def softmax_grid(scheme: Scheme) -> str | None:
    """The grid to which a scheme rounds attention's probabilities, if it does."""
    grid = str(scheme.get(SOFTMAX, NONE))
    return None if grid == NONE else grid


def operand_mode(scheme: Scheme) -> str | None:
    """How a scheme rounds queries, keys and values, if it does."""
    mode = str(scheme.get(ATTENTION, NONE))
    return None if mode == NONE else mode


def matches_attention(scheme: Scheme) -> bool:
    """Whether a scheme scales attention's logits and outputs to match those of the float model."""
    return bool(scheme.get(MATCH))


def needs_run_time_data(scheme: Scheme) -> bool:
    """Whether the rounding in each forward pass, or what goes with it, needs calibration data."""
    calibrated = scheme.get(ACTIVATION_SCALE, TOKEN) != TOKEN or scheme.get(SOFTMAX) == ADAPTIVE
    attention = operand_mode(scheme) is not None or matches_attention(scheme)
    return calibrated or attention or smooths_cache(scheme) or tweaks_norms(scheme)


def tweaks_norms(scheme: Scheme) -> bool:
    """Whether gradient steps tune the norms of quantized blocks."""
    return bool(scheme.get(TWEAK))


def smooths_cache(scheme: Scheme) -> bool:
    """Whether a scheme divides keys and values by the size of their channels, which calibration gives."""
    return bool(scheme.get(CACHE_SMOOTH))


def of_weights(scheme: Scheme, row: Method, facts: tuple[str, ...]) -> Scheme:
    """A scheme without the settings that its stored weights do not depend on; `row` is that of its method.

    `facts` are the names under which a scheme records its calibration data. Where the method needs none, the scheme
    records them only for its activations or norms, and they are left out too.
    """
    unrounded = scheme.without_rounding
    others = NORM_AND_TOKEN_SETTINGS if row.calibrated else (*NORM_AND_TOKEN_SETTINGS, *facts)
    return replace(unrounded, settings=tuple((name, value) for name, value in unrounded.settings if name not in others))
