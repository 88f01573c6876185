"""The rules of a runtime that a plan breaks, each as a sentence; and a plan's size in the runtime's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sensitivity.spec.components import VOCABULARY, Component, ComponentMap, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.limits import merge_groups
from sensitivity.spec.plan import (
    ACTIVATION_SCALE,
    ATTENTION,
    MATCH,
    NOT_ROUNDED,
    PRUNE,
    SOFTMAX,
    TWEAK,
    Plan,
    Scheme,
    few_names,
)
from sensitivity.spec.runtimes.table import Choice, Runtime, files_of, runtime
from sensitivity.spec.sizes import Size, size


def refusals(component: Component, scheme: Choice, name: str, shaped: bool = True) -> Iterator[str]:
    """Why a runtime cannot load one component at one scheme: each rule that this breaks, as the end of a sentence.

    shaped: whether the shapes of its weights are known; if not, rules about rows and columns are left to the export.
    """
    # no rule names the component, so that `violations` and `restrict` can list all components under one sentence
    able = runtime(name)
    if scheme is None:
        return
    yield from _of_component(component, able)
    yield from _of_method(scheme, able)
    if able.methods is None or scheme.method in able.methods:  # else the method must change, and with it the grid
        yield from _of_grid(scheme, able)
    yield from _of_rounding(scheme, able)
    if scheme.get("biases") and not able.biases:
        yield f"{able.title} keeps biases in full precision; leave out --biases"
    if scheme.get(TWEAK) and able.title and not able.files:
        yield (
            f"{able.title} makes its files from the model's own norms; sweep with --set tweak=0, or use --format fake, "
            "which writes the norms that the plan has"
        )
    if shaped:
        yield from _of_shape(component.weights, scheme, able)


def _of_component(component: Component, able: Runtime) -> Iterator[str]:
    """Rules about parts, embeddings and output heads that the runtime keeps in full precision."""
    if component.part not in able.parts:
        yield f"{able.title} keeps {component.part} in full precision"
    if lost := [word for word in map(_vocabulary_weight, component.weights) if word and word not in able.vocabulary]:
        yield (
            f"{able.title} keeps the {VOCABULARY_NAMES[lost[0]]} in full precision; sweep without --include "
            f"{'embedding,head' if lost[0] == 'tied' else lost[0]}, or use --format fake"
        )


def _of_method(scheme: Scheme, able: Runtime) -> Iterator[str]:
    """Rules about methods, and about factors and rotations of inputs."""
    if able.methods is not None and scheme.method not in able.methods:
        yield (
            f"{able.title} cannot hold what {scheme.method} stores; use --method {able.instead}, or --format fake, "
            "which writes the values themselves"
        )
    if able.packed and scheme.method == "awq" and scheme.get("scales") != "folded":
        yield (
            f"{able.title} has no place for the factor per input channel that awq stores; sweep with --set "
            "scales=folded, which moves it into the layer before where that is exact (never across a GELU), or use "
            "--format fake"
        )
    if able.packed and scheme.get("transform"):
        yield (
            f"{able.title} does not rotate inputs; sweep with --set transform=none, or use --format fake, which writes "
            "the values themselves"
        )


def _of_grid(scheme: Scheme, able: Runtime) -> Iterator[str]:
    """Rules about widths, groups and zero points."""
    widths = able.symmetric if scheme.symmetric else able.asymmetric
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    if not widths:
        yield f"{able.title} loads no {kind} codes; use --{'no-' if scheme.symmetric else ''}symmetric"
    elif scheme.bits not in widths:
        yield f"{able.title} loads {kind} codes of {comma_list(widths)} bits, not {scheme.bits}"
        return
    groups = able.groups_of.get(scheme.bits, able.groups)
    if groups is not None and scheme.group not in groups:
        yield f"{able.title} takes groups of {comma_list(groups)} at {scheme.bits} bits, not {scheme.group}"
    elif scheme.group == "tensor" and not able.tensors:
        yield f"{able.title} takes a scale per row or group, not one per tensor; use --group row"
    elif not scheme.symmetric and able.zeros is not None and scheme.group not in able.zeros:
        zeros = comma_list(able.zeros)
        yield f"{able.title} loads zero points at --group {zeros}, not at --group {scheme.group}; use --symmetric"


def _of_rounding(scheme: Scheme, able: Runtime) -> Iterator[str]:
    """Rules about what is rounded in each forward pass, and about pruned image tokens."""
    title = able.title or "a checkpoint of plain weights"
    if scheme.cache != NOT_ROUNDED and not able.cache:
        yield f"{title} has no place for a rounded cache; sweep without --cache-bits, or use --format plan"
    if scheme.get(PRUNE) and not able.cache:
        yield f"{title} reads all tokens of an image; sweep with --set prune=0, or use --format plan"
    if scheme.activations == NOT_ROUNDED:
        return
    beside = able.activations.get(scheme.bits, ())
    if not able.activations:
        yield f"{title} cannot say that activations are rounded; sweep without --activation-bits, or use --format plan"
    elif scheme.activations not in beside:
        pairs = [f"{a} beside {bits}-bit weights" for bits, widths in able.activations.items() for a in widths]
        asked = f"{scheme.activations} beside {scheme.bits}-bit weights"
        yield f"{title} takes activations of these bits: {', '.join(pairs)}; not {asked}"
    elif able.packed and (not scheme.symmetric or scheme.group != "row"):
        rows = "beside symmetric weights with a scale per row; use --symmetric --group row"
        yield f"{title} takes rounded activations {rows}"
    elif able.packed and (more := [name for name in (SOFTMAX, ATTENTION, MATCH) if scheme.get(name)]):
        yield f"{title} does not round or scale attention; leave out {' and '.join(more)}, or use --format plan"
    elif able.packed and scheme.get(ACTIVATION_SCALE, "token") != "token":
        yield f"{title} is written with a scale for each token; use --set activation_scale=token"


VOCABULARY_NAMES = {"embedding": "embedding", "head": "output head", "tied": "embedding that is the output head too"}


def _vocabulary_weight(weight: Weight) -> str | None:
    return "tied" if weight.tied else weight.kind if weight.kind in VOCABULARY else None


def _of_shape(weights: Sequence[Weight], scheme: Scheme, able: Runtime) -> Iterator[str]:
    """Rules about rows and columns that the group size or the packing does not divide."""
    rows, cols = sorted({w.rows for w in weights}), sorted({w.cols for w in weights})
    if isinstance(scheme.group, int) and not able.ragged and (odd := [n for n in cols if n % scheme.group]):
        yield f"groups of {scheme.group} do not divide rows of {comma_list(odd)} weights; use --group row"
    if odd := [n for n in rows if n % able.rows]:
        yield f"{able.title} needs rows in multiples of {able.rows}, not {comma_list(odd)}"
    step = able.cols_of.get(scheme.bits, able.cols)
    if odd := [n for n in cols if n % step]:
        yield f"{able.title} needs columns in multiples of {step} at {scheme.bits} bits, not {comma_list(odd)}"


def violations(parts: ComponentMap, plan: Plan, name: str) -> list[str]:
    """The rules that a plan breaks, one sentence per rule with its components; empty if the runtime can load it."""
    able = runtime(name)
    refused: dict[str, list[str]] = {}
    for component in parts.components:
        for refusal in refusals(component, plan[component.name], name, parts.shaped):
            refused.setdefault(refusal, []).append(f"{component.name} ({_scheme(plan[component.name])})")
    broken = [f"{few_names(components)}: {refusal}" for refusal, components in refused.items()]
    for group in tied(parts, name):
        schemes = {plan[member] for member in group}
        if len(schemes) > 1:
            widths = ", ".join(f"{member} at {_scheme(plan[member])}" for member in group)
            broken.append(f"{widths}: {able.title} makes one layer of them, so they must have one scheme")
    used = plan.distinct_schemes
    if able.one_scheme and len(used) > 1:
        broken.append(
            f"the plan has {len(used)} schemes ({', '.join(sorted(map(_scheme, used)))}), and {able.title} takes one "
            "for all that is quantized"
        )
    return broken


def tied(parts: ComponentMap, name: str) -> list[tuple[str, ...]]:
    """Components that must share their scheme, because the runtime fuses their weights into one layer."""
    if not runtime(name).fused:
        return []
    home = {weight.name: component.name for component in parts.components for weight in component.weights}
    sharing: dict[str, set[str]] = {}
    for weight in parts.weights:
        if weight.shares_input is not None:
            sharing.setdefault(weight.shares_input, set()).add(home[weight.name])
    order = {component: place for place, component in enumerate(parts.names)}
    # each input ties the components of its readers, and ties are transitive
    merged = merge_groups([tuple(names) for names in sharing.values()])
    return sorted(tuple(sorted(group, key=order.__getitem__)) for group in merged if len(group) > 1)


def check(parts: ComponentMap, plan: Plan, name: str) -> None:
    """Raise an error that names the rules that a plan breaks."""
    if broken := violations(parts, plan, name):
        shown = "; ".join(broken[:4]) + (f"; and {len(broken) - 4} more" if len(broken) > 4 else "")
        raise UserError(f"{name} cannot hold this plan: {shown}. `sensitivity legalize` finds the best plan that fits")


def size_for(parts: ComponentMap, plan: Plan, name: str | None) -> Size:
    """The size of a plan in the files that a runtime loads, or as the plan itself counts it where there are none."""
    format = files_of(name)
    can_load = name is not None and format is not None and not violations(parts, plan, name)
    return size(parts, plan, format if can_load else None)


def _scheme(scheme: Choice) -> str:
    return "native" if scheme is None else str(scheme)


def comma_list(values: Sequence[object]) -> str:
    """Values with commas between them."""
    return ", ".join(map(str, values))
