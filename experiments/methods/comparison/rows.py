"""The rows of the comparison, what each adds its idea to, and the order in which they are measured."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from sensitivity.quantize.methods import METHODS, needs_both_paths
from sensitivity.quantize.presets import PRESETS
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.plan import NOT_ROUNDED, PRUNE, QSVD, Plan, Scheme, Setting
from sensitivity.spec.sizes import component_bits

MODELS = ("embedded:scenes-llava-heavy", "embedded:scenes-llava", "embedded:scenes-blip2")
TASKS = ("vqa", "caption")
WIDTHS = (1, 2, 3, 4)
WHERE = ("vision", "connector", "language", "all")
# stored bits per weight of the quantized part: what 1, 2, 3 and 4 bits and their scales take
BUDGETS = (1.5, 2.5, 3.5, 4.5)
EXPOSED = "exposed"  # in the name of a host that is calibrated behind quantized layers, as the row that adds to it
WEIGHTS, BOTH, ROUNDED, PRUNED = "weights", "both paths", "rounded inputs or cache", "pruned tokens"
PRUNES = "bivlm on half of the image tokens"

# what a published method adds its idea to, where that is no method or preset: everything of its row but the idea
HOSTS: dict[str, dict[str, Setting]] = {
    "rtn, groups of 128, asymmetric": {"method": "rtn", "group": 128, "symmetric": False},
    "awq, no clip": {"method": "awq", "group": 128, "clip": False},
    "gptq, order given": {"method": "gptq", "order": "given"},
    "gptq, exposed": {"method": "gptq"},
    "awq, exposed": {"method": "awq"},
    "gptq, asymmetric, exposed": {"method": "gptq", "symmetric": False},
    "rtn, inputs of 4 bits": {"method": "rtn", "activations": 4},
    "rtn, inputs and attention of 4 bits": {
        **{"method": "rtn", "symmetric": False, "activations": 4, "activation_scale": "tensor"},
        **{"attention": "tensor", "softmax": "uniform"},
    },
    "gptq, inputs and attention of 4 bits": {
        **{"method": "gptq", "symmetric": False, "activations": 4, "activation_scale": "tensor"},
        **{"attention": "tensor", "softmax": "uniform"},
    },
    "quantvla, no scalars": {**PRESETS["quantvla"], "match": False},
    "nf4, inputs of 4 bits": {"method": "nf4", "activations": 4},
    "nf4, double, inputs of 4 bits": {"method": "nf4", "double": True, "activations": 4},
    "clip, cache of 4 bits": {
        **{"method": "clip", "group": 128, "symmetric": False},
        **{"cache": 4, "cache_group": 128},
    },
}
# rows that are neither a method nor a preset
EXTRA: dict[str, dict[str, Setting]] = {PRUNES: {"method": "bivlm", "prune": 0.5, "prune_after": 2}}
# row -> what it adds its idea to, with the same grid, group and calibration path
ADDS_TO = {
    "clip": "rtn", "gptq": "rtn", "awq": "rtn, groups of 128, asymmetric", "mbq": "awq, no clip", "qig": "awq, no clip",
    "tlq": "awq, exposed", "tlq-gptq": "gptq, exposed", "oac": "gptq", "rsq": "gptq, order given",
    "gptaq": "gptq, exposed", "salq-vlm": "gptaq", "vlm-ptq": "gptq, asymmetric, exposed",
    "squeezellm-fisher": "squeezellm",
    "norm-tweak": "gptq", "qvla": "rtn", "quantvggt": "rtn, inputs of 4 bits",
    "repq-vit": "rtn, inputs and attention of 4 bits", "ptq4sam": "gptq, inputs and attention of 4 bits",
    "quantvla": "quantvla, no scalars", "qvlm": "nf4, inputs of 4 bits",
    "qvlm-released": "nf4, double, inputs of 4 bits", "wkv": "clip, cache of 4 bits", PRUNES: "bivlm",
}  # fmt: skip
BEHIND = ("tlq", "tlq-gptq")  # rows that are published with what a layer reads behind quantized layers
# rows that equal their host where there is no cache, and no attention that reads image tokens
IN_LANGUAGE = ("wkv", "clip, cache of 4 bits", QSVD, PRUNES)
# BLIP-2's prompts mark no image tokens, so none can be pruned
CANNOT = {(PRUNES, "embedded:scenes-blip2")}
ROWS = [*METHODS, *PRESETS, *EXTRA]
# What is measured first tells most: at 2 bits methods differ, rounded inputs are published at 4, and at 4 bits of
# weights alone nearly every row keeps the score.
TURNS = (
    (WEIGHTS, 2), (ROUNDED, 4), (WEIGHTS, 3), (WEIGHTS, 1), (BOTH, 2), (PRUNED, 1), (BOTH, 3), (ROUNDED, 3),
    (WEIGHTS, 4), (BOTH, 4), (ROUNDED, 2), (BOTH, 1), (ROUNDED, 1),
)  # fmt: skip


@dataclass(frozen=True, order=True)
class Cell:
    """One row at one width on one part of a model."""

    model: str
    row: str
    bits: int
    where: str


def settings_of(row: str) -> Mapping[str, Setting]:
    """The settings of a row or host, its method among them."""
    return HOSTS.get(row) or EXTRA.get(row) or PRESETS.get(row) or {"method": row}


def scheme_of(row: str, bits: int) -> Scheme:
    """The scheme of a row or host at one width."""
    if row in METHODS or row in PRESETS:
        return scheme(row, bits)
    given: dict[str, Any] = dict(settings_of(row))
    return scheme(str(given.pop("method")), bits, **given)


def widths_of(row: str) -> range:
    """The widths that a row or host takes."""
    return METHODS[str(settings_of(row)["method"])].widths


def with_hosts(rows: Sequence[str]) -> list[str]:
    """The rows, and everything that one of them adds its idea to, directly or not."""
    found = list(rows)
    for row in found:  # grows while it is walked
        if (host := ADDS_TO.get(row)) is not None and host not in found:
            found.append(host)
    return found


def kind(row: str, bits: int) -> str:
    """What sets a row apart from others: how it is calibrated, or what it changes beside the weights."""
    one = scheme_of(row, bits)
    if needs_both_paths(one) or EXPOSED in row or row in BEHIND:
        return BOTH
    if one.get(PRUNE):
        return PRUNED
    return ROUNDED if (one.activations, one.cache) != (NOT_ROUNDED, NOT_ROUNDED) else WEIGHTS


def cells(
    models: Sequence[str], rows: Sequence[str], widths: Collection[int], where: Sequence[str]
) -> Iterator[tuple[str, list[Cell]]]:
    """All cells in portions of one model that are calibrated alike, the most informative first."""
    every = [(row, bits) for row in with_hosts(rows) for bits in widths_of(row) if bits in widths]
    # a turn of the next model and the next turn of this one come together, so that none of them waits for all others
    order = sorted(product(range(len(TURNS)), range(len(models))), key=lambda place: (sum(place), place[1]))
    for turn, number in order:
        (what, width), model = TURNS[turn], models[number]
        alike = [row for row, bits in every if bits == width and kind(row, bits) == what]
        alike = [row for row in alike if (row, model) not in CANNOT]
        parts = [(row, one) for row in alike for one in where if row not in IN_LANGUAGE or one in WHERE[2:]]
        if parts:
            yield what, [Cell(model, row, width, one) for row, one in parts]


def plan_of(parts: ComponentMap, where: str, one: Scheme) -> Plan:
    """A scheme on one part, the others native, or on all of them."""
    return Plan.uniform(parts, one) if where == "all" else Plan.of(parts, {where: one})


def stored_bits(parts: ComponentMap, where: str, one: Scheme) -> float:
    """Bits per weight of a part, everything counted."""
    names = parts.names if where == "all" else (where,)
    return sum(component_bits(parts, n, one) for n in names) / sum(parts[n].numel for n in names)
