"""Output errors of layers on calibration and on evaluation data: whether a row that loses its score fits too few data.

python -m experiments.methods.comparison.unseen --where vision --rows norm-tweak --bits 2

Prints a row beside its host. Errors are squared errors over the squares of the float model's outputs, the mean over
layers of one kind, each on the calibration data and on evaluation data, which no method sees. "Alone" is on the float
model's inputs, "behind" on those behind quantized layers, "text" without the tokens of the image. Losses are of the
right answers with teacher forcing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isnan

import torch
from torch import Tensor, nn

from experiments.methods.comparison.layers import kind
from experiments.methods.comparison.rows import ADDS_TO, BOTH, MODELS, plan_of, scheme_of
from experiments.methods.comparison.rows import kind as calibrated
from sensitivity.api.sweeping import with_calibration
from sensitivity.measure.calibrate.calibration import calibration_examples
from sensitivity.measure.gradients.backward import answer_loss
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.measure.passes.block_modules import layer_input
from sensitivity.measure.passes.token_batches import VISION, TokenBatch, answer_batches
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import Weight
from sensitivity.tasks.examples.types import Task
from sensitivity.tasks.table import task

PLACES = ("alone", "behind", "alone, text", "behind, text")
Seen = Mapping[str, tuple[Tensor, Tensor]]  # by weight: what its layer reads and returns


class Data:
    """Some examples, and what each layer reads and returns for them in the float model."""

    def __init__(self, vlm: VLM, tasks: Sequence[Task], weights: Sequence[Weight]) -> None:
        self.vlm, self.weights = vlm, weights
        self.batches = list(answer_batches(vlm, tasks))
        self.passes = [self.run(batch) for batch in self.batches]

    def run(self, batch: TokenBatch) -> tuple[float, Seen]:
        """The loss of the answers, and the layers' inputs and outputs, in the model as it is."""
        with watched(self.vlm.model, self.weights) as seen, torch.inference_mode():
            return float(answer_loss(self.vlm, batch)), seen

    def errors(self) -> tuple[float, dict[str, Tensor]]:
        """The mean loss of the answers in a quantized model, and the relative squared error of each layer's outputs.

        By weight, for each of PLACES: all tokens and those of the text alone, of the layer alone, on the float model's
        inputs, and on those that it reads behind quantized layers. Without text the latter are not numbers.
        """
        loss, sums = 0.0, {weight.name: torch.zeros(6) for weight in self.weights}
        for batch, (_, before) in zip(self.batches, self.passes, strict=True):
            here, after = self.run(batch)
            loss += here
            for weight in self.weights:
                inputs, wanted = before[weight.name]
                with torch.inference_mode():
                    alone = self.vlm.model.get_submodule(weight.reader)(inputs)
                kinds, _ = batch.modality(weight.part, inputs.shape[:-1])
                text = torch.zeros(wanted[..., 0].numel()) if kinds is None else (kinds > VISION).float()
                squares = torch.stack([alone - wanted, after[weight.name][1] - wanted, wanted]).square().sum(-1)
                sums[weight.name] += torch.cat([one.sum(1) for one in (squares.flatten(1), squares.flatten(1) * text)])
        count = sum(len(batch.examples) for batch in self.batches)
        return loss / count, {
            name: torch.cat([total[:2] / total[2], total[3:5] / total[5]]) for name, total in sums.items()
        }


@contextmanager
def watched(model: nn.Module, weights: Sequence[Weight]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inside the `with` block, what layers read and return is put into the dictionary, by weight."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for weight in weights:

        def note(
            module: nn.Module,
            args: tuple[Tensor, ...],
            kwargs: dict[str, Tensor],
            output: Tensor,
            name: str = weight.name,
        ) -> None:
            seen[name] = layer_input(args, kwargs), output

        hooks.append(model.get_submodule(weight.reader).register_forward_hook(note, with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def look(
    model: str, row: str, bits: int, where: str, asked: str, examples: int, n: int, path: str | None = None
) -> list[str]:
    """The table of a row and its host: layers of one kind together."""
    vlm = load(model)
    parts = inspect(vlm, by="part")
    names = [ADDS_TO[row], row]
    evaluated = task(asked, n=n)
    path = path or ("both" if calibrated(row, bits) == BOTH else "float")
    schemes, statistics = with_calibration(
        vlm, parts, [scheme_of(name, bits) for name in names], [asked], n=examples, path=path, against=[evaluated]
    )
    weights = [one for one in parts.weights if not one.is_embedding and where in ("all", one.part)]
    data = [Data(vlm, calibration_examples([asked], examples, 0), weights), Data(vlm, [evaluated], weights)]
    found = []
    for scheme in schemes:
        with quantized(vlm.model, parts, plan_of(parts, where, scheme), WeightCodes(), statistics):
            found.append([one.errors() for one in data])
    lines = [f"## {model}, {asked}, {where}, {bits} bits, {examples} calibration examples", ""]
    for name, (fitted, unseen) in zip(names, found, strict=True):
        lines.append(f"loss {name}: calibration {fitted[0]:.4f}, evaluation {unseen[0]:.4f}")
    places = [i for i, of in enumerate(PLACES) if "text" not in of or where in ("all", "language")]
    heads = [f"{name} {PLACES[i]}" for i in places for name in names]
    lines += ["", f"| layers | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for of in dict.fromkeys(map(kind, weights)):
        alike = [one.name for one in weights if kind(one) == of]
        cells = []
        for i in places:
            for both in found:
                pair = [sum(float(errors[name][i]) for name in alike) / len(alike) for _, errors in both]
                cells.append(", ".join("–" if isnan(one) else f"{one:.4f}" for one in pair))
        lines.append(f"| {of} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", default=",".join(MODELS[1:2]))
    p.add_argument("--rows", required=True)
    p.add_argument("--bits", type=int, default=2)
    p.add_argument("--where", default="all")
    p.add_argument("--task", default="vqa")
    p.add_argument("--examples", type=int, default=64, help="examples to calibrate on")
    p.add_argument("--n", type=int, default=100, help="examples to evaluate on")
    p.add_argument("--path", help="calibration path, if not the one of the comparison")
    args = p.parse_args()
    given = args.task, args.examples, args.n, args.path
    for model in args.models.split(","):
        for row in args.rows.split(","):
            for where in args.where.split(","):
                print("\n".join(look(model, row, args.bits, where, *given)), flush=True)


if __name__ == "__main__":
    main()
