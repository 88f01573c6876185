"""Scheme: how one component is quantized (weights, activations, cache). Plan: the scheme of each component."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NotRequired, TypedDict

from sensitivity.spec.components import Component, ComponentMap, Weight, matches
from sensitivity.spec.errors import UserError, check_is, unknown

Setting = str | int | float | bool | None

WIDEST_GROUP = 2**24  # columns that share a scale: more than any layer has
NOT_ROUNDED = 16  # the width of activations, or of keys and values, that stay as the model computes them
ROUNDED = range(2, 9)  # the widths to which they can be rounded
ACTIVATIONS, CACHE = "activations", "cache"  # endings of names such as vision.activations
ACTIVATION_SCALE = "activation_scale"  # the setting that says which activations share a scale
# the setting that names the grid to which attention's probabilities are rounded, with as many bits as activations
SOFTMAX = "softmax"
CACHE_GROUP = "cache_group"  # the setting that says how many channels of a key or value share a scale
# the setting that says how queries, keys and values are rounded, with as many bits as activations
ATTENTION = "attention"
MATCH = "match"  # the setting that says whether attention's logits and outputs are scaled to the float model's
CACHE_PAST = "cache_past"  # the setting that says whether a token reads its own key and value unrounded
CACHE_SMOOTH = "cache_smooth"  # the setting that says whether channels are divided by their magnitudes before rounding
TWEAK = "tweak"  # the setting that says how many gradient steps the norms of a quantized block take
# the settings that say which share of an image's tokens is pruned, and after which block of the language model
PRUNE, PRUNE_AFTER = "prune", "prune_after"
# settings of any method that change norms or image tokens, but not how weights are quantized
NORM_AND_TOKEN_SETTINGS = (TWEAK, PRUNE, PRUNE_AFTER)
CACHE_SETTINGS = (CACHE_GROUP, CACHE_PAST, CACHE_SMOOTH)
# settings of what is rounded in each forward pass, which say nothing about how weights are stored
ROUNDING_SETTINGS = (ACTIVATION_SCALE, SOFTMAX, ATTENTION, MATCH, *CACHE_SETTINGS)
KEY_LENGTH = 8  # characters of a plan's key in messages and tables: enough to name the plan
KEEP = "keep"  # the method that leaves weights as they are, for a component whose activations or cache are rounded


class SchemeJson(TypedDict):
    """What a file stores of a scheme; settings are left out where there are none."""

    method: str
    bits: int
    group: NotRequired[int | str]
    symmetric: NotRequired[bool]
    settings: NotRequired[dict[str, Setting]]
    activations: NotRequired[int]
    cache: NotRequired[int]


@dataclass(frozen=True)
class Scheme:
    """How the weights of one component are stored, and to how many bits its inputs, keys and values are rounded.

    Examples:
        >>> from sensitivity import Scheme
        >>> str(Scheme("rtn", 4)), Scheme.from_json(Scheme("rtn", 4).to_json()) == Scheme("rtn", 4)
        ('rtn:4', True)
        >>> str(Scheme("rtn", 4, activations=8, cache=4))
        'rtn:4a8kv4'
    """

    method: str
    bits: int
    group: int | str = "row"  # which weights share a scale: the "tensor", a "row", or this many columns of a row
    symmetric: bool = True
    # the method's own, and those of norms, tokens and rounding; sorted by name so that equal schemes are equal
    settings: tuple[tuple[str, Setting], ...] = ()
    activations: int = NOT_ROUNDED  # bits of each linear layer's input
    cache: int = NOT_ROUNDED  # bits of attention's keys and values, where a language model caches them

    def __post_init__(self) -> None:
        whole = isinstance(self.bits, int) and not isinstance(self.bits, bool)
        if not whole or not 1 <= self.bits <= 16:
            raise UserError(f"bits must be a whole number from 1 to 16, not {self.bits!r}")
        number = isinstance(self.group, int) and not isinstance(self.group, bool)
        if self.group not in ("tensor", "row") and not (number and 1 <= int(self.group) <= WIDEST_GROUP):
            raise UserError(
                f"group must be 'tensor', 'row' or a number of columns from 1 to {WIDEST_GROUP:,}, not {self.group!r}"
            )
        for what, width in (("activations", self.activations), ("keys and values", self.cache)):
            if isinstance(width, bool) or width not in (*ROUNDED, NOT_ROUNDED):
                raise UserError(
                    f"{what} have {ROUNDED[0]} to {ROUNDED[-1]} bits, or 16 to stay as they are, not {width!r}"
                )
        object.__setattr__(self, "settings", tuple(sorted(self.settings)))

    def __getitem__(self, setting: str) -> Setting:
        return dict(self.settings)[setting]

    def get(self, setting: str, default: Setting = None) -> Setting:
        """A setting, or the default if the scheme does not have it."""
        return dict(self.settings).get(setting, default)

    @property
    def widths(self) -> str:
        """The bits of weights, and of activations and of keys and values where these are rounded, such as 4a8kv4."""
        activations = "" if self.activations == NOT_ROUNDED else f"a{self.activations}"
        return f"{self.bits}{activations}{'' if self.cache == NOT_ROUNDED else f'kv{self.cache}'}"

    @property
    def without_cache(self) -> Scheme | None:
        """The same scheme without rounding of keys and values; None (native precision) if nothing else is quantized."""
        if self.method == KEEP and self.activations == NOT_ROUNDED and not self.get(PRUNE):
            return None
        settings = tuple((name, value) for name, value in self.settings if name not in CACHE_SETTINGS)
        return replace(self, settings=settings, cache=NOT_ROUNDED) if self.cache != NOT_ROUNDED else self

    @property
    def without_rounding(self) -> Scheme:
        """The same scheme without rounding of activations and cache: only how its weights are stored."""
        if self.activations == NOT_ROUNDED and self.cache == NOT_ROUNDED:
            return self
        settings = tuple((name, value) for name, value in self.settings if name not in ROUNDING_SETTINGS)
        return replace(self, settings=settings, activations=NOT_ROUNDED, cache=NOT_ROUNDED)

    def __str__(self) -> str:
        return f"{self.method}:{self.widths}"

    def to_json(self) -> SchemeJson:
        """The scheme as JSON values."""
        content: SchemeJson = {
            "method": self.method, "bits": self.bits, "group": self.group, "symmetric": self.symmetric,
        }  # fmt: skip
        if self.settings:
            content["settings"] = dict(self.settings)
        # left out where nothing is rounded, so that plans from before these fields existed keep their keys
        if self.activations != NOT_ROUNDED:
            content["activations"] = self.activations
        if self.cache != NOT_ROUNDED:
            content["cache"] = self.cache
        return content

    @classmethod
    def from_json(cls, data: SchemeJson) -> Scheme:
        """The scheme from what `to_json` returned."""
        known = {"method", "bits", "group", "symmetric", "settings", "activations", "cache"}
        if extra := sorted(set(data) - known):
            raise unknown("scheme field", extra[0], sorted(known))
        group, symmetric = data.get("group", cls.group), data.get("symmetric", cls.symmetric)
        settings = tuple(data.get("settings", {}).items())
        activations, cache = data.get("activations", NOT_ROUNDED), data.get("cache", NOT_ROUNDED)
        return cls(data["method"], data["bits"], group, symmetric, settings, activations, cache)


@dataclass(frozen=True)
class Plan:
    """Each component's Scheme, or None for native precision.

    Examples:
        >>> from sensitivity import Plan
        >>> plan = Plan.of(parts, {"*": scheme("rtn", 4), "vision": scheme("rtn", 8), "connector": None})
        >>> plan.describe()
        'vision 8 · connector native · language 4'
        >>> plan["language"].bits
        4
    """

    schemes: tuple[tuple[str, Scheme | None], ...]

    @classmethod
    def of(cls, parts: ComponentMap, choice: Mapping[str, Scheme | None], default: Scheme | None = None) -> Plan:
        """A plan from patterns over component names; the last pattern that matches wins.

        A scheme's cache bits are left out for components without keys and values that a language model caches.
        """
        check_is("choice", choice, Mapping)
        for scheme in (default, *choice.values()):
            if scheme is not None:
                check_is("the scheme of a component", scheme, Scheme)
        for pattern in choice:
            parts.match(pattern)  # raises an error if it matches nothing, as with a misspelled name
        schemes: dict[str, Scheme | None] = dict.fromkeys(parts.names, default)
        for name in parts.names:
            for pattern, scheme in choice.items():
                if matches(name, pattern):
                    schemes[name] = scheme
        return cls(tuple((name, without_unused_cache(parts[name], scheme)) for name, scheme in schemes.items()))

    @classmethod
    def uniform(cls, parts: ComponentMap, scheme: Scheme | None) -> Plan:
        """The plan with one scheme for all components."""
        return cls.of(parts, {}, scheme)

    def __getitem__(self, name: str) -> Scheme | None:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Scheme | None]:
        return dict(self.schemes)

    def check(self, parts: ComponentMap) -> None:
        """Raise an error unless the plan names every component of a model, and no other."""
        names = parts.names
        missing = [name for name in names if name not in self._by_name]
        extra = [name for name in self._by_name if name not in set(names)]
        if missing or extra:
            problems = ("missing", missing), ("unknown", extra)
            raise UserError(
                f"the plan is for other components: {'; '.join(f'{w} {few_names(n)}' for w, n in problems if n)}"
            )

    @property
    def distinct_schemes(self) -> list[Scheme]:
        """The schemes of its components, each once."""
        return list(dict.fromkeys(scheme for _, scheme in self.schemes if scheme is not None))

    @property
    def is_native(self) -> bool:
        """Whether nothing is quantized."""
        return all(scheme is None for _, scheme in self.schemes)

    @property
    def is_uniform(self) -> bool:
        """Whether all components have the same scheme."""
        return len({scheme for _, scheme in self.schemes}) == 1

    @property
    def prunes(self) -> bool:
        """Whether image tokens are pruned.

        The last token of a prompt decides which, so questions about one image cannot share its hidden states.
        """
        return any(scheme is not None and bool(scheme.get(PRUNE)) for _, scheme in self.schemes)

    def is_uniform_in(self, parts: ComponentMap) -> bool:
        """Whether all components have the same scheme, apart from the cache bits of components without a cache."""
        cached = [scheme for _, scheme in self.schemes if scheme and scheme.cache != NOT_ROUNDED]
        return self.is_uniform or (bool(cached) and self == Plan.uniform(parts, cached[0]))

    @cached_property
    def key(self) -> str:
        """The hash of the canonical JSON: the same in every process and version."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()[:16]

    def bits(self, native: int = 16) -> dict[str, int]:
        """The bit width of each component."""
        return {name: scheme.bits if scheme else native for name, scheme in self.schemes}

    def rounded_bits(self) -> dict[str, int]:
        """The bits of activations, keys and values where they are rounded, by names such as vision.activations."""
        schemes = [(name, scheme) for name, scheme in self.schemes if scheme]
        widths = {f"{name}.{ACTIVATIONS}": scheme.activations for name, scheme in schemes}
        widths |= {f"{name}.{CACHE}": scheme.cache for name, scheme in schemes}
        return {name: width for name, width in widths.items() if width != NOT_ROUNDED}

    def describe(self) -> str:
        """A short text for tables and figures, such as 'vision 4 · connector 8 · language 3'."""
        methods = {scheme.method for scheme in self.distinct_schemes}
        if self.is_uniform:
            return f"all {self.schemes[0][1]}" if methods else "full precision"
        return " · ".join(
            f"{name} {'native' if s is None else s.widths if len(methods) == 1 else s}" for name, s in self.schemes
        )

    def to_json(self) -> dict[str, SchemeJson | None]:
        """The plan as JSON values: component to scheme, or null."""
        return {name: None if scheme is None else scheme.to_json() for name, scheme in self.schemes}

    def dumps(self) -> str:
        """The canonical JSON: sorted, without spaces."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, data: Mapping[str, SchemeJson | None]) -> Plan:
        """The plan from what `to_json` returned."""
        check_is("data", data, Mapping)
        return cls(tuple((name, scheme and Scheme.from_json(scheme)) for name, scheme in data.items()))


def split_ending(name: str) -> tuple[str, str]:
    """Split the name of a column of bits: the component, and what follows it (nothing, .activations or .cache)."""
    ending = next((f".{word}" for word in (ACTIVATIONS, CACHE) if name.endswith(f".{word}")), "")
    return name.removesuffix(ending), ending


def without_unused_cache(component: Component, scheme: Scheme | None) -> Scheme | None:
    """The scheme for a component: without its cache bits if no output of the component is cached."""
    if scheme is None or (component.has_cache and scheme.cache != NOT_ROUNDED):
        return scheme
    return scheme.without_cache


def few_names(names: Sequence[str]) -> str:
    """The first four of many names."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")


# Methods that calibrate on a layer's inputs. An embedding has no inputs, since its rows are looked up and not
# multiplied; under these methods its rows are rounded to nearest on the same kind of grid.
CALIBRATED = (
    *("clip", "gptq", "awq", "squeezellm", "leanquant", "leanquant-affine", "bpdq", "billm", "spqr", "vlm-ptq"),
    *("gwq", "qvla", "smooth", "qsvd"),
)
# The method that factorizes queries, keys and values together, and its settings; it rounds other weights to nearest.
QSVD, QSVD_SETTINGS = "qsvd", ("rank", "beta", "damp", "importance")


def scheme_of(weight: Weight, scheme: Scheme) -> Scheme:
    """The scheme of one weight of a component: rounding to nearest where the component's method does not apply."""
    if weight.is_embedding and scheme.method in CALIBRATED:
        return Scheme("rtn", scheme.bits, scheme.group, scheme.symmetric)
    if scheme.method == QSVD and not weight.is_qkv:
        others = tuple((name, value) for name, value in scheme.settings if name not in QSVD_SETTINGS)
        return replace(scheme, method="rtn", settings=others)
    return scheme
