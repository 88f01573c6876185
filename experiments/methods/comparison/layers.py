"""Output errors of single layers under rows of the comparison and their hosts: where a row that loses its score errs.

python -m experiments.methods.comparison.layers    # prints the tables of reports/methods-layers.md
python -m experiments.methods.comparison.layers --out reports/methods-layers.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.methods.comparison.rows import ADDS_TO, MODELS, scheme_of
from sensitivity.api.sweeping import with_calibration
from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.grids.qvla import allocated
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import input_of
from sensitivity.quantize.methods import UNIFORM, needs_fisher, token_weighting
from sensitivity.quantize.stored.channels import ChannelWidthsWeight
from sensitivity.quantize.stored.integer_grid import as_16_bit, encode, ranges, scale_and_zero
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.stored_bits import CHANNEL_WIDTHS, channel_budget

ROWS = ("qvla", "oac", "tlq-gptq", "mbq", "qig", "squeezellm-fisher")
QVLA = "qvla"
Cost = Callable[[Tensor, Tensor], float]  # of a weight and what it is rounded to


def error(before: Tensor, after: Tensor, gram: Tensor) -> float:
    """The squared error of a layer's outputs over their squares, on inputs with this Gram matrix."""
    own, delta = before.double(), after.double() - before.double()
    return float(((delta @ gram.double()) * delta).sum() / ((own @ gram.double()) * own).sum())


def weighed(before: Tensor, after: Tensor, squares: Tensor) -> float:
    """The squared error of a weight's elements over their squares, each times the squared gradient there."""
    return float((squares * (after - before).square()).sum() / (squares * before.square()).sum())


class Layers:
    """The layers of one model, with the statistics of their inputs, and their weights under each scheme."""

    def __init__(self, vlm: VLM, parts: ComponentMap, statistics: Statistics) -> None:
        self.vlm, self.parts, self.statistics = vlm, parts, statistics
        self.codes = WeightCodes()
        self.weights = [one for one in parts.weights if not one.is_embedding]
        self.own = {name: tensor.detach().clone() for name, tensor in vlm.model.named_parameters()}
        self.grams: dict[str, Mapping[str, Curvature]] = {UNIFORM: statistics.gather(self.weights)}

    def cost(self, weight: Weight, scheme: Scheme | None = None) -> Cost:
        """What a scheme minimizes at a layer; without one, its output error with all tokens alike."""
        if scheme is not None and needs_fisher(scheme):
            assert self.statistics.fisher is not None
            squares = self.statistics.fisher(weight.name, self.own)
            return lambda before, after: weighed(before, after, squares)
        kind = UNIFORM if scheme is None else token_weighting(scheme)
        if kind not in self.grams:
            self.grams[kind] = self.statistics.weighted[kind](self.weights)
        gram = self.grams[kind][input_of(weight)].gram
        return lambda before, after: error(before, after, gram)

    def rounded(self, scheme: Scheme) -> dict[str, Tensor]:
        """Every layer's weight under a scheme."""
        with quantized(self.vlm.model, self.parts, Plan.uniform(self.parts, scheme), self.codes, self.statistics):
            now = dict(self.vlm.model.named_parameters())
            return {one.name: now[one.name].detach().clone() for one in self.weights}

    def errors(self, rounded: Mapping[str, Tensor], as_of: Scheme | None = None) -> dict[str, float]:
        """Each layer's output error on the float model's inputs, or what a scheme sees as its cost."""
        return {one.name: self.cost(one, as_of)(self.own[one.name], rounded[one.name]) for one in self.weights}

    def widths(self, scheme: Scheme) -> dict[str, list[int]]:
        """The widths that QVLA gave to the rows of each layer, once they are solved."""
        stored = {key[0]: value for key, value in self.codes.items() if key[1].method == QVLA}
        return {n: value.widths.tolist() for n, value in stored.items() if isinstance(value, ChannelWidthsWeight)}

    def by_true_errors(self, scheme: Scheme) -> dict[str, Tensor]:
        """QVLA's weights, were the cost of a row its true output error and not the proxy."""
        found = {}
        for one in self.weights:
            own, gram = self.own[one.name].float(), self.grams[UNIFORM][input_of(one)].gram
            rounded = [at_width(own, bits, scheme) for bits in CHANNEL_WIDTHS]
            costs = torch.stack([(((own - q) @ gram) * (own - q)).sum(1) for q in rounded], 1)
            widths = allocated(costs.tolist(), own.shape[1], channel_budget(scheme, *own.shape))
            rows = [rounded[CHANNEL_WIDTHS.index(width)][row] for row, width in enumerate(widths)]
            found[one.name] = torch.stack(rows)
        return found


def at_width(weight: Tensor, bits: int, scheme: Scheme) -> Tensor:
    """A weight whose rows all have one of QVLA's widths."""
    if bits in (0, 16):
        return as_16_bit(weight, weight.dtype) if bits else torch.zeros_like(weight)
    grid = Scheme(scheme.method, bits, scheme.group, scheme.symmetric)
    return encode(weight, grid, *scale_and_zero(weight, grid, *ranges(weight, grid), weight.dtype)).dequantize()


def kind(weight: Weight) -> str:
    """What layers are put together in a table: the part, and the layer's own name."""
    return f"{weight.part} {weight.reader.rpartition('.')[2]}"


def table(found: Mapping[str, Mapping[str, float]], weights: Sequence[Weight]) -> list[str]:
    """The mean relative error of layers of one kind, a column for each row of the comparison."""
    kinds = list(dict.fromkeys(map(kind, weights)))
    lines = [f"| layers | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    for name in kinds:
        means = [
            sum(errors[one.name] for one in weights if kind(one) == name) / sum(kind(one) == name for one in weights)
            for errors in found.values()
        ]
        lines.append(f"| {name} | {' | '.join(f'{mean:.4f}' for mean in means)} |")
    return lines


def shares(widths: Mapping[str, Sequence[int]], weights: Sequence[Weight]) -> list[str]:
    """How many rows of the weights got each width, part by part."""
    lines = [f"| part | {' | '.join(f'{bits} bits' for bits in CHANNEL_WIDTHS)} |", "|---" * 6 + "|"]
    for part in dict.fromkeys(one.part for one in weights):
        every = [width for one in weights if one.part == part for width in widths[one.name]]
        lines.append(f"| {part} | {' | '.join(f'{every.count(b) / len(every):.3f}' for b in CHANNEL_WIDTHS)} |")
    return lines


def section(model: str, asked: Sequence[str], bits: int, task: str, examples: int) -> list[str]:
    """The tables of one model."""
    vlm = load(model)
    parts = inspect(vlm, by="part")
    names = list(dict.fromkeys(name for row in asked for name in (ADDS_TO[row], row)))
    named, statistics = with_calibration(vlm, parts, [scheme_of(row, bits) for row in names], [task], n=examples)
    assert statistics is not None
    layers, schemes = Layers(vlm, parts, statistics), dict(zip(names, named, strict=True))
    rounded = {row: layers.rounded(scheme) for row, scheme in schemes.items()}
    more: list[str] = []
    if QVLA in schemes:
        rounded["qvla by true errors"] = layers.by_true_errors(schemes[QVLA])
        more = [f"Rows of weights at each width of `{QVLA}`:", ""]
        more += [*shares(layers.widths(schemes[QVLA]), layers.weights), ""]
    lines = [f"## {model.removeprefix('embedded:')}, {bits} bits", "", "All tokens alike:", ""]
    lines += [*table({row: layers.errors(one) for row, one in rounded.items()}, layers.weights), "", *more]
    for row in (row for row in asked if row != QVLA):
        lines += [f"As `{row}` sees it, which is what it minimizes:", ""]
        both = {name: layers.errors(rounded[name], schemes[row]) for name in (ADDS_TO[row], row)}
        lines += [*table(both, layers.weights), ""]
    return lines


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", default=",".join(MODELS[:2]))
    p.add_argument("--rows", default=",".join(ROWS))
    p.add_argument("--bits", type=int, default=2)
    p.add_argument("--task", default="vqa")
    p.add_argument("--examples", type=int, default=64, help="examples to calibrate on")
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    lines = [
        "# Output errors of single layers",
        "",
        "    python -m experiments.methods.comparison.layers --out reports/methods-layers.md",
        "",
        "Squared error of a layer's outputs over their squares, on the float model's inputs of the calibration data",
        f"({args.examples} examples of {args.task}): the mean over layers of one kind. With all tokens alike, a row",
        "that weighs tokens is expected to be worse than its host, which minimizes just this; as the row itself weighs",
        "them, it should be better. Squared gradients of elements weigh errors of elements, not of outputs.",
        "",
    ]
    for model in args.models.split(","):
        lines += section(model, args.rows.split(","), args.bits, args.task, args.examples)
    if args.out:
        overwrite(args.out, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
