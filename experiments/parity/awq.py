"""AWQ: ours against llm-compressor's, on the layers of a trained model that a norm feeds, with the inputs they meet.

python -m experiments.parity.awq --peer PYTHON-OF-A-VENV-WITH-LLMCOMPRESSOR
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiments.parity.layers import TASKS, layers
from sensitivity.models import VLM, inspect, load
from sensitivity.models.checkpoint import find
from sensitivity.quantize import Curvature, Linears, quantise, scheme, solve
from sensitivity.quantize.linears import reads
from sensitivity.quantize.tokens import batches
from sensitivity.tasks import task

BITS = (2, 3, 4, 8)
GROUP, N = 64, 128


def rows(vlm: VLM, file: Path) -> None:
    """The calibration examples as the peer's inputs, one by one."""
    found = []
    for name in TASKS:
        data = task(name, "calibration", N // len(TASKS), 0)
        for example in data.examples:
            (batch,) = batches(vlm, [replace(data, examples=(example,))])
            found.append({key: value[0] for key, value in batch.inputs.items()})
    names = sorted(found[0])
    tensors = {f"{i}|{name}": row[name].contiguous().clone() for i, row in enumerate(found) for name in names}
    save_file(tensors, file, metadata={"count": str(len(found)), "names": json.dumps(names)})


def theirs(peer: str, folder: Path, vlm: VLM, bits: int) -> tuple[dict[str, Tensor], dict]:
    with tempfile.TemporaryDirectory() as work:
        source, target = Path(work) / "rows.safetensors", Path(work) / "theirs.safetensors"
        rows(vlm, source)
        script = Path(__file__).with_name("with_llm_compressor.py")
        command = [peer, "-W", "ignore", str(script), str(folder), str(source), str(target), str(bits), str(GROUP)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=work)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        with safe_open(target, "pt") as stored:
            names = list(stored.keys())
            return {name: stored.get_tensor(name) for name in names}, json.loads(stored.metadata()["facts"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="the python of a virtual environment with llmcompressor==0.14.0")
    parser.add_argument("--model", default="embedded:scenes-llava")
    parser.add_argument("--out", default="reports/parity-awq.md")
    args = parser.parse_args()
    vlm, folder = load(args.model), find(args.model)
    found = {layer.name: layer for layer in layers(args.model, N)}
    inputs: dict[str, list[str]] = defaultdict(list)
    for weight in inspect(vlm).weights:
        inputs[reads(weight)].append(weight.name)
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
            for label, chosen in schemes.items():
                (results,) = solve(Linears(tuple(names), weights, seen), [chosen])
                for name, result in zip(names, results, strict=True):
                    ours, layer = result.dequantise(), found[name]  # type: ignore[union-attr]
                    other = layer.error(peer[name], fresh=True)
                    ratios[bits, label].append(layer.error(ours) / layer.error(peer[name]))
                    ratios[bits, f"{label}, fresh"].append(layer.error(ours, fresh=True) / other)
                    if label == "search":
                        nearest = scheme("rtn", bits, group=GROUP, symmetric=False)
                        plain = layer.error(quantise(layer.weight, nearest), fresh=True)
                        ratios[bits, "theirs / nearest"].append(other / plain)
        seconds["ours, both searches and the comparison"] += time.perf_counter() - began
    columns = ("theirs / nearest", "search", "search, fresh", "search and clip", "search and clip, fresh")
    lines = [
        "# AWQ: ours against llm-compressor",
        "",
        f"`python -m experiments.parity.awq --peer PYTHON --model {args.model}` (torch {torch.__version__}, "
        f"llm-compressor {facts['llmcompressor']} with transformers {facts['transformers']}, "
        f"{torch.get_num_threads()} threads, {os.cpu_count()} cores)",
        "",
        f"The {len(ratios[BITS[0], 'search'])} linear layers of {args.model} that a norm feeds, groups of {GROUP},",
        f"asymmetric, {N} calibration examples, activations alone in the scales (`duo_scaling=False`). Ratios of",
        "relative output error, ours / theirs: below 1 ours is better.",
        "Geometric mean (worst layer); `fresh` is judged on inputs from the evaluation split.",
        "",
        f"| bits | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for bits in BITS:
        cells = [f"{np.exp(np.mean(np.log(ratios[bits, c]))):.3f} ({max(ratios[bits, c]):.3f})" for c in columns]
        lines.append(f"| {bits} | {' | '.join(cells)} |")
    lines += ["", "Seconds: " + ", ".join(f"{name} {t:.0f} s" for name, t in seconds.items()) + "."]
    Path(args.out).parent.mkdir(exist_ok=True)
    Path(args.out).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
