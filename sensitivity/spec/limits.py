"""Limits on plans: which bit widths a component may have, and which components must share a scheme."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

from sensitivity.spec.components import matches
from sensitivity.spec.errors import Notice, UserError, unknown
from sensitivity.spec.plan import Scheme

NATIVE = 16  # the bit width that stands for native precision
Allowed = Callable[[str, Scheme | None], bool]  # whether a component may have a scheme; None is native precision


def allowed_by(names: Sequence[str], widths: Mapping[str, Sequence[int]] | None) -> Allowed | None:
    """A function that says whether a component may have a scheme, from the bit widths that each pattern allows.

    The longest matching pattern decides; 16 stands for native precision. None means no limits.
    """
    if not widths:
        return None
    widths_of: dict[str, Sequence[int]] = {}
    # shortest first, so that longer patterns, which are more specific, overwrite them
    for pattern in sorted(widths, key=len):
        widths_of |= dict.fromkeys(members(names, pattern), widths[pattern])
    return lambda name, scheme: name not in widths_of or (scheme.bits if scheme else NATIVE) in widths_of[name]


def warn_of_idle_widths(widths: Mapping[str, Sequence[int]], schemes: Iterable[Scheme], there: str) -> None:
    """Warn of widths that a request allows and no scheme has: they add no plan."""
    known = {NATIVE, *(one.bits for one in schemes)}
    for pattern, asked in widths.items():
        if idle := [str(width) for width in asked if width not in known]:
            warnings.warn(
                f"--allow {pattern}={','.join(map(str, asked))}: {' and '.join(idle)} allows nothing, since {there} "
                f"{', '.join(map(str, sorted(known)))}",
                Notice,
                stacklevel=3,
            )


def tied_groups(names: Sequence[str], groups: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Groups of components that must share a scheme, from groups of patterns."""
    tied_sets = []
    for group in groups:
        tied = tuple(dict.fromkeys(name for pattern in group for name in members(names, pattern)))
        if len(tied) < 2:
            raise UserError(
                f"'{','.join(group)}' is a single component; name all that share a scheme, such as vision,language"
            )
        tied_sets.append(tied)
    return list(dict.fromkeys(tied_sets))


def intersection(one: Allowed | None, other: Allowed | None) -> Allowed | None:
    """A function that allows what both functions allow; None allows everything."""
    if one is None or other is None:
        return one or other
    return lambda name, scheme: one(name, scheme) and other(name, scheme)


def merge_groups(groups: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Merge groups that have a member in common."""
    merged: list[tuple[str, ...]] = []
    for group in map(tuple, groups):
        # one group may connect several earlier ones, so all that share a member with it are merged
        touching = [other for other in merged if set(other) & set(group)]
        merged = [other for other in merged if other not in touching]
        merged.append(tuple(dict.fromkeys(name for one in (*touching, group) for name in one)))
    return merged


def members(names: Sequence[str], pattern: str) -> list[str]:
    """The components that a pattern names, such as vision or *.attn."""
    if not (matching := [name for name in names if matches(name, pattern)]):
        # the prefixes that are accepted, such as vision of vision.front.attn, come first
        prefixes = (name.rsplit(".", dots)[0] for name in names for dots in range(name.count("."), 0, -1))
        raise unknown("component", pattern, dict.fromkeys([*prefixes, *names]))
    return matching
