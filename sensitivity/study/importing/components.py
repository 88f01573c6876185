"""The components that the columns of an imported table stand for: their names, their weights and the map of all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sensitivity.spec.components import GRANULARITIES, GROUPS, KINDS, PARTS, ComponentMap, Kept, Weight, matches
from sensitivity.spec.errors import UserError, unknown

# names of components at every granularity but 'linear', where they are names of layers
COMPONENT = re.compile(
    rf"({'|'.join(PARTS)})(\.({'|'.join(GROUPS)}|other|projection))?(\.({'|'.join(KINDS)}))?"
    rf"|({'|'.join(PARTS)})\.\d{{1,4}}"
)
EQUAL_SIZE = 1_000_000  # weights of each component if no sizes are given; bpw is then the mean width
MOST_WEIGHTS = 10**15


def check_names(components: Sequence[str]) -> None:
    """Check that names are those of components, each once, and none inside another."""
    for component in components:
        if not COMPONENT.fullmatch(component):
            raise UserError(
                f"a component is named after its part of the model, {', '.join(PARTS)} (finer: vision.front.attn, with "
                f"{', '.join(GROUPS)} and {', '.join(KINDS)}; or a block, vision.03), not '{component}'"
            )
        if inside := [other for other in components if component.startswith(f"{other}.")]:
            raise UserError(
                f"'{component}' is a part of '{inside[0]}', which has bits of its own; name one or the other"
            )
    if twice := sorted({name for name in components if list(components).count(name) > 1}):
        raise UserError(f"two columns stand for '{twice[0]}'")


def component_map(names: Sequence[str], numel: Mapping[str, int], total: int | None, model: str) -> ComponentMap:
    """The components of the table, at the first granularity that has these names; all other weights count as kept."""
    if wrong := [n for n in (*numel.values(), *([] if total is None else [total])) if not 0 < n <= MOST_WEIGHTS]:
        raise UserError(f"a number of weights is from 1 to {MOST_WEIGHTS:,}, not {wrong[0]:,}")
    sizes = _sizes(names, numel)
    weights = tuple(_weight(name, sizes[name]) for name in names)
    rest = 0 if total is None else total - sum(sizes.values())
    if rest < 0:
        raise UserError(f"the components have {sum(sizes.values()):,} weights, more than the whole model's {total:,}")
    kept = (Kept("rest", rest, "not in the table"),) if rest else ()
    fitting = [by for by in GRANULARITIES if all(weight.component_name(by) == weight.module for weight in weights)]
    return ComponentMap(model, fitting[0], weights, kept, sized=bool(numel), shaped=False)


def _sizes(names: Sequence[str], numel: Mapping[str, int]) -> dict[str, int]:
    """Weights per component: as given, or an even share of what was given for the part in which it lies."""
    sizes: dict[str, int] = {}
    # the finest name first: a part then divides among its other components what remains
    for pattern, weights in sorted(numel.items(), key=lambda item: -len(item[0])):
        members = [name for name in names if matches(name, pattern)]
        if not members:
            raise unknown("component in --numel", pattern, names)
        unsized = [name for name in members if name not in sizes]
        rest = weights - sum(sizes[name] for name in members if name in sizes)
        if rest < len(unsized) or weights < 1:
            raise UserError(f"{pattern} cannot have {weights:,} weights")
        sizes |= {name: rest // len(unsized) + (i < rest % len(unsized)) for i, name in enumerate(unsized)}
    if sizes and (without := [name for name in names if name not in sizes]):
        raise UserError(f"no size given for {', '.join(without)}; give all or none (--numel {without[0]}=...)")
    return sizes or dict.fromkeys(names, EQUAL_SIZE)


def _weight(name: str, numel: int) -> Weight:
    """A weight that stands for a whole component; group and kind are read from its name, for coarser granularities."""
    part, *words = name.split(".")
    group = words.pop(0) if words and words[0] in GROUPS else None
    kind = words.pop(0) if words and words[0] in KINDS else None
    block = None if group is None or words else GROUPS.index(group)
    if block is None:
        kind = None
    return Weight(f"{name}.weight", 1, numel, part, block, 0 if block is None else len(GROUPS), kind)
