"""How many calibration tokens each kind of importance leaves: (sum r)^2 / sum r^2 over the tokens of a layer.

python -m experiments.methods.effective_tokens [--model embedded:scenes-llava] [--examples 32]
"""

from __future__ import annotations

import argparse
from statistics import median

import torch
from torch import Tensor

from sensitivity.measure.gradients.token_importance import IMPORTANCE, importance_of
from sensitivity.measure.passes.token_batches import answer_batches
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.quantize.layer.linears import input_of
from sensitivity.tasks.table import task


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded:scenes-llava")
    p.add_argument("--task", default="vqa")
    p.add_argument("--examples", type=int, default=32)
    args = p.parse_args()
    vlm = load(args.model)
    weights = [weight for weight in inspect(vlm, by="part").weights if not weight.is_embedding]
    language = {input_of(weight) for weight in weights if weight.part == "language"}
    data = list(answer_batches(vlm, [task(args.task, "calibration", args.examples, 0)], 4))
    print("| importance | tokens of a language layer | effective, median layer | least | largest example's share |")
    print("|---|---|---|---|---|")
    for kind, weighed in importance_of(vlm, weights, data, list(IMPORTANCE)).items():
        of: dict[str, list[Tensor]] = {}
        for (_, name), values in weighed.items():
            if name in language:
                of.setdefault(name, []).append(values.double())
        whole = [torch.cat(values) for values in of.values()]
        effective = [float(r.sum() ** 2 / r.square().sum()) for r in whole]
        share = [max(float(v.sum()) for v in values) / sum(float(v.sum()) for v in values) for values in of.values()]
        print(f"| {kind} | {len(whole[0])} | {median(effective):.0f} | {min(effective):.0f} | {median(share):.2f} |")


if __name__ == "__main__":
    main()
