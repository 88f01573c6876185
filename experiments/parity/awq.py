"""Our AWQ against llm-compressor's, on all linear layers of a trained model that follow a norm.

python -m experiments.parity.awq --peer PYTHON-OF-A-VENV-WITH-LLMCOMPRESSOR
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.methods.measured import write
from experiments.parity.layers import TASKS, layers
from experiments.parity.peers import ask, cell
from sensitivity.measure.passes.token_batches import answer_batches
from sensitivity.models.checkpoint import model_folder
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import Linears, input_of
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solving import fake_quantize, solve
from sensitivity.tasks.table import task

BITS = (2, 3, 4, 8)
GROUP, N = 64, 128


def theirs(peer: str, folder: Path, vlm: VLM, bits: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights that llm-compressor ends with, calibrated on the same examples, one at a time."""
    found = []
    for name in TASKS:
        data = task(name, "calibration", N // len(TASKS), 0)
        for example in data.examples:
            (batch,) = answer_batches(vlm, [replace(data, examples=(example,))])
            found.append({key: value[0] for key, value in batch.inputs.items()})
    names = sorted(found[0])
    tensors = {f"{i}|{name}": row[name] for i, row in enumerate(found) for name in names}
    about = {"count": len(found), "names": names}
    return ask(peer, "with_llm_compressor.py", tensors, about, str(folder.resolve()), str(bits), str(GROUP))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="the python of a virtual environment with llmcompressor==0.14.0")
    parser.add_argument("--model", default="embedded:scenes-llava")
    parser.add_argument("--out", default="reports/parity-awq.md")
    args = parser.parse_args()
    vlm, folder = load(args.model), model_folder(args.model)
    found = {layer.name: layer for layer in layers(args.model, N)}
    inputs: dict[str, list[str]] = defaultdict(list)
    for weight in inspect(vlm).weights:
        inputs[input_of(weight)].append(weight.name)
    ratios: dict[tuple[int, str], list[float]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    facts: dict = {}
    for bits in BITS:
        peer, facts = theirs(args.peer, folder, vlm, bits)
        seconds["llm-compressor, the forward passes included"] += facts["seconds"]
        began = time.perf_counter()
        for names in inputs.values():
            if names[0] not in peer:
                continue
            weights = tuple(found[name].weight for name in names)
            seen = Curvature(weights[0].shape[1])
            seen.add(found[names[0]].inputs)
            schemes = {
                "search": scheme("awq", bits, group=GROUP, clip=False),
                "search and clip": scheme("awq", bits, group=GROUP),
            }
            whole = replace(found[names[0]], weight=torch.cat(weights))
            other = torch.cat([peer[name] for name in names])
            for label, chosen in schemes.items():
                (results,) = solve(Linears(tuple(names), weights, seen), [chosen])
                ours = [result.dequantize() for result in results]  # type: ignore[union-attr]
                ratios[bits, label].append(whole.error(torch.cat(ours)) / whole.error(other))
                fresh = whole.error(torch.cat(ours), fresh=True) / whole.error(other, fresh=True)
                ratios[bits, f"{label}, fresh"].append(fresh)
                for name, one in zip(names, ours, strict=True):
                    ratios[bits, f"{label}, alone"].append(found[name].error(one) / found[name].error(peer[name]))
            nearest = scheme("rtn", bits, group=GROUP, symmetric=False)
            plain = whole.error(fake_quantize(whole.weight, nearest), fresh=True)
            ratios[bits, "theirs / nearest"].append(whole.error(other, fresh=True) / plain)
        seconds["ours, both searches and the comparison"] += time.perf_counter() - began
    judged = ("search", "search, fresh", "search, alone", "search and clip", "search and clip, fresh")
    columns = ("theirs / nearest", *judged)
    lines = [
        "# AWQ: ours against llm-compressor",
        "",
        f"`python -m experiments.parity.awq --peer PYTHON --model {args.model}` (torch {torch.__version__}, "
        f"llm-compressor {facts['llmcompressor']} with transformers {facts['transformers']}, "
        f"{torch.get_num_threads()} threads, {os.cpu_count()} cores)",
        "",
        f"The {len(ratios[BITS[0], 'search, alone'])} linear layers of {args.model} that follow a norm,",
        f"groups of {GROUP}, asymmetric, {N} calibration examples, activations alone in the scales",
        "(`duo_scaling=False`). Ratios of relative output error, ours / theirs: below 1 ours is better. Geometric mean",
        f"and, in brackets, the worst of the {len(ratios[BITS[0], 'search'])} inputs: layers that share one share",
        "their scales, and are chosen for and judged together;",
        "`alone` is each layer by itself; `fresh` is judged on inputs from the evaluation split.",
        "",
        f"| bits | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for bits in BITS:
        cells = [cell(ratios[bits, name]) for name in columns]
        lines.append(f"| {bits} | {' | '.join(cells)} |")
    lines += ["", "Seconds: " + ", ".join(f"{name} {t:.0f} s" for name, t in seconds.items()) + "."]
    write(args.out, lines)


if __name__ == "__main__":
    main()
