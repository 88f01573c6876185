"""Makes schemes from methods, presets and chosen settings, and checks every setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

from sensitivity.quantize.layer.linears import Method
from sensitivity.quantize.methods import CALIBRATION, NO_EFFECT, OWN, ROWS, method_of, needs_both_paths, needs_data
from sensitivity.quantize.presets import PRESETS
from sensitivity.quantize.run_time.inputs import TOKEN
from sensitivity.quantize.run_time.settings import ROUNDED_BITS, RUN_TIME, with_common, with_run_time
from sensitivity.quantize.solvers import gptqmodel_solver
from sensitivity.spec.errors import UserError, check_is, unknown
from sensitivity.spec.plan import (
    ACTIVATION_SCALE,
    CACHE_PAST,
    CACHE_SETTINGS,
    CACHE_SMOOTH,
    NORM_AND_TOKEN_SETTINGS,
    NOT_ROUNDED,
    PRUNE,
    PRUNE_AFTER,
    Scheme,
    Setting,
)


def scheme(method: str, bits: int, *, calibration: Mapping[str, Setting] | None = None, **chosen: Any) -> Scheme:
    """A scheme of a method or preset: the defaults, the chosen settings, and the facts about its calibration data.

    `calibration` is what `Statistics.facts` returns; only calibrated schemes record it. Among the chosen settings,
    `activations` and `cache` are the bits of each layer's input, and of keys and values; 16 leaves them unrounded.

    Examples:
        >>> from sensitivity import scheme
        >>> scheme("gptq", 4, group=128)["damp"]
        0.01
        >>> scheme("paper-awq", 3).group
        128
        >>> str(scheme("rtn", 4, activations=8, cache=4, cache_group=64))
        'rtn:4a8kv4'
    """
    name, given = _given(method, {key: value for key, value in chosen.items() if value is not None})
    activations, cache = given.pop("activations", NOT_ROUNDED), given.pop("cache", NOT_ROUNDED)
    row = with_common(with_run_time(ROWS[name], name, activations, cache))
    bits = int(bits) if isinstance(bits, Integral) else bits  # one of NumPy's, such as from np.arange
    if bits not in row.widths:
        widths = f"{row.widths[0]} to {row.widths[-1]}" if len(row.widths) > 1 else f"only {row.widths[0]}"
        raise UserError(f"{name} takes {widths} bits, not {bits!r}")
    if "backend" in given and "backend" not in row.settings:
        raise UserError(f"{name} has no backend but our own; leave out --backend, or choose --method gptq")
    if given.get("backend", OWN) != OWN:
        given.setdefault("clip", False)  # the clip search is ours; other solvers lack it
    group, symmetric = given.pop("group", row.group), given.pop("symmetric", row.symmetric)
    check_is("symmetric", symmetric, bool)
    if not row.takes(group, symmetric):
        raise UserError(f"{name} is always {row.fixed}; use rtn for other groups and symmetric grids")
    if (row.calibrated or row.any_group) and group == "tensor":
        raise UserError(f"{name} needs a scale per row or group; choose --group row or a number of columns")
    settings = {**row.settings, **{key: _checked(name, row, key, value) for key, value in given.items()}}
    # a setting that changes nothing is not recorded, so that schemes from before it existed stay equal to new ones
    settings = {key: value for key, value in settings.items() if key not in NO_EFFECT or NO_EFFECT[key] != value}
    if not settings.get(PRUNE):
        if PRUNE_AFTER in given:
            raise UserError(f"{PRUNE_AFTER} says after which block image tokens are pruned; set {PRUNE} beside it")
        settings.pop(PRUNE_AFTER)
    _check_together(method, row, settings)
    made = Scheme(name, bits, group, symmetric, tuple(settings.items()), activations, cache)
    if calibration and needs_data(made):
        made = replace(made, settings=tuple({**settings, **calibration}.items()))
    if made.get("backend"):
        if needs_both_paths(made) or made.get("transform"):
            raise UserError(
                f"{method} shifts or rotates weights, which {made['backend']} does not; leave out --backend"
            )
        gptqmodel_solver.check(made)
    return made


def _given(method: str, chosen: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The method behind the name of a method or preset, and the preset's settings, overridden by the chosen ones."""
    preset = dict(PRESETS.get(method, {"method": method}))
    name = str(preset.pop("method"))
    if name not in ROWS:
        raise unknown("method", method, [*ROWS, *PRESETS])
    # a preset without its rounding of activations or cache loses the settings of that rounding too
    for rounded, its_settings in (("activations", set(RUN_TIME) - set(CACHE_SETTINGS)), ("cache", set(CACHE_SETTINGS))):
        if chosen.get(rounded) == NOT_ROUNDED:
            preset = {key: value for key, value in preset.items() if key not in its_settings}
    return name, {**preset, **chosen}


def _check_together(method: str, row: Method, settings: Mapping[str, Setting]) -> None:
    """Raise an error for settings that are allowed one by one but not together."""
    if settings.get("transform") and settings.get(ACTIVATION_SCALE, TOKEN) != TOKEN:
        raise UserError(f"{method} rotates inputs, whose ranges are then not known; leave activation_scale at {TOKEN}")
    if settings.get(CACHE_SMOOTH) and not settings.get(CACHE_PAST):
        raise UserError(f"{method} divides the channels that attention reads; set cache_past=true beside cache_smooth")
    if settings.get(CACHE_PAST) and row.latent:
        raise UserError(
            f"{method} caches the latent vector that keys and values are computed from, not them; leave out cache_past"
        )
    if settings.get("transform") == "blocks" and settings.get("learned"):
        raise UserError(f"{method} learns factors only with transform=hadamard or none, not blocks; set one of them")


def schemes_of(methods: Sequence[str], bits: Sequence[int], **chosen: Any) -> list[Scheme]:
    """The schemes of one or several methods; if there are several, each gets only the widths and settings it takes.

    Examples:
        >>> from sensitivity.quantize.scheme_settings import schemes_of
        >>> [str(one) for one in schemes_of(["gptq", "nf4"], [3, 4], damp=0.1)]
        ['gptq:3', 'gptq:4', 'nf4:4']
    """
    if len(methods) == 1:
        return [scheme(methods[0], width, **chosen) for width in bits]
    chosen = {key: value for key, value in chosen.items() if value is not None}
    rows = {name: method_named(name) for name in methods}
    known = sorted({setting for row in rows.values() for setting in row.settings})
    rounded = {key: chosen.pop(key) for key in (*ROUNDED_BITS, *RUN_TIME, *NORM_AND_TOKEN_SETTINGS) if key in chosen}
    for setting in chosen:
        if setting not in ("group", "symmetric", *known):
            raise unknown(f"setting of {' and '.join(methods)}", setting, known or ["none"])
    schemes = []
    for name, row in rows.items():
        settings = {key: value for key, value in chosen.items() if key in row.settings}
        grid = {key: chosen.get(key) for key in ("group", "symmetric") if not row.fixed}
        schemes += [scheme(name, width, **settings, **grid, **rounded) for width in bits if width in row.widths]
        if not any(width in row.widths for width in bits):
            raise UserError(f"{name} takes none of the widths {', '.join(map(str, bits))}; leave it out of --method")
    return schemes


def method_named(name: str) -> Method:
    """The row of METHODS of a method or preset."""
    method = str(PRESETS.get(name, {"method": name})["method"])
    if method not in ROWS:
        raise unknown("method", name, [*ROWS, *PRESETS])
    return ROWS[method]


def check_scheme(chosen: Scheme) -> None:
    """Raise an error where a scheme, such as one from a file, has bits or settings that its method does not take."""
    if chosen.method == "codes":  # from an imported table, which says nothing but bit widths
        if chosen.settings:
            raise unknown("setting of codes", chosen.settings[0][0], ["none"])
        return
    row = with_common(with_run_time(method_of(chosen), chosen.method, chosen.activations, chosen.cache))
    facts = CALIBRATION if needs_data(chosen) else {}
    if chosen.bits not in row.widths:
        raise UserError(f"{chosen.method} does not take {chosen.bits} bits")
    if not row.takes(chosen.group, chosen.symmetric):
        raise UserError(f"{chosen.method} is always {row.fixed}, not {chosen.group}, symmetric: {chosen.symmetric}")
    for setting, value in chosen.settings:
        if setting in facts:
            if isinstance(value, bool) or not isinstance(value, facts[setting]):
                raise UserError(f"{setting} of {chosen.method} cannot be {value!r}")
        else:
            _checked(chosen.method, row, setting, value)


def _checked(name: str, row: Method, setting: str, value: Setting) -> Setting:
    """Check a setting's name, type and limits and return its value, as a float where the default is a float."""
    if setting not in row.settings:
        raise unknown(f"setting of {name}", setting, row.settings or ["none"])
    if setting in row.choices and value not in row.choices[setting]:
        raise unknown(f"{setting} of {name}", value, row.choices[setting])
    default = row.settings[setting]
    if isinstance(default, bool | str):
        if type(value) is not type(default):
            raise UserError(f"{setting} of {name} takes a value like {default!r}, not {value!r}")
        return value
    low, high = row.ranges[setting]
    # the default decides the type; bool is excluded below, since Python counts it as an int
    kinds = (int,) if isinstance(default, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        what = "a whole number" if kinds == (int,) else "a number"
        raise UserError(f"{setting} of {name} is {what} from {low:g} to {high:,g}, not {value!r}")
    return float(value) if isinstance(default, float) else value  # 1 and 1.0 are one setting
