"""The search space for a runtime: which schemes it can load, and which rules exclude the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.limits import Allowed
from sensitivity.spec.plan import Scheme
from sensitivity.spec.runtimes.rules import comma_list, refusals, tied
from sensitivity.spec.runtimes.table import Choice, runtime


def allowed(parts: ComponentMap, name: str, only: Choice = None) -> Allowed:
    """A function that says whether a component may have a scheme in a runtime.

    With `only`, it allows no scheme but that one and native precision.
    """
    runtime(name)

    def can_load(component: str, scheme: Choice) -> bool:
        if only is not None and scheme not in (None, only):
            return False
        return not any(refusals(parts[component], scheme, name, parts.shaped))

    return can_load


def searches(parts: ComponentMap, name: str, schemes: Sequence[Choice]) -> list[Allowed]:
    """An `allowed` function for each search that is needed to find the best legal plan.

    A runtime that takes one scheme for everything needs one search per scheme; any other needs one search.
    """
    if not runtime(name).one_scheme:
        return [allowed(parts, name)]
    return [allowed(parts, name, only) for only in dict.fromkeys(schemes) if only is not None]


def restrict(
    parts: ComponentMap, schemes: Sequence[Scheme], name: str, wanted: Allowed | None = None
) -> tuple[list[Scheme], list[str]]:
    """The schemes that a runtime can load for at least one component, and one sentence per rule that excludes some.

    Raises an error if it can load none, or none of those that `wanted` allows a component.
    """
    refused: dict[str, dict[str, list[str]]] = {}
    legal: dict[Scheme, None] = {}
    for component in parts.components:
        asked = [scheme for scheme in schemes if wanted is None or wanted(component.name, scheme)]
        why = {scheme: list(refusals(component, scheme, name, parts.shaped)) for scheme in asked}
        legal |= {scheme: None for scheme, rules in why.items() if not rules}
        for scheme, rules in why.items():
            for rule in rules:
                refused.setdefault(rule, {}).setdefault(str(scheme), []).append(component.name)
        # a component that must be quantized, while the runtime can load none of its schemes, leaves no plan at all
        if wanted is not None and not wanted(component.name, None) and asked and all(why.values()):
            raise UserError(f"{name} can load none of the schemes allowed for {component.name}: {why[asked[0]][0]}")
    notes = [_left_out(parts, places, rule) for rule, places in refused.items()]
    if not legal:
        raise UserError(f"{name} can load none of these schemes: {'; '.join(notes)}")
    title = runtime(name).title
    notes += [f"{', '.join(group)} share their scheme: {title} makes one layer of them" for group in tied(parts, name)]
    return [scheme for scheme in schemes if scheme in legal], notes


def _left_out(parts: ComponentMap, places: Mapping[str, Sequence[str]], rule: str) -> str:
    """A sentence such as 'rtn:2, rtn:3 of vision: the rule'."""
    by_place: dict[str, list[str]] = {}
    for scheme, names in places.items():
        where = "all parts" if len(names) == len(parts.names) else ", ".join(names)
        by_place.setdefault(where, []).append(scheme)
    return f"{'; '.join(f'{comma_list(schemes)} of {where}' for where, schemes in by_place.items())}: {rule}"
