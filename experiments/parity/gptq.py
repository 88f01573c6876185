"""GPTQ: ours against GPTQModel and the published algorithm, on layers of a trained model with the inputs they meet.

python -m experiments.parity.gptq --peer PYTHON-OF-A-VENV-WITH-GPTQMODEL
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
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiments.parity.layers import Layer, layers
from sensitivity.plan import Scheme
from sensitivity.quantize import Curvature, Linears, quantise, scheme, solve
from sensitivity.quantize.grid import affine, ranges

BITS = (2, 3, 4, 8)
PLAIN = {"order": "given", "clip": False}
SETTINGS = {  # label: grid, ours, GPTQModel's
    "row symmetric": ({"group": "row", "symmetric": True}, PLAIN, {}),
    "group 64 asymmetric": ({"group": 64, "symmetric": False}, PLAIN, {}),
    "group 64 symmetric, activation order": (
        {"group": 64, "symmetric": True}, {"order": "activation", "clip": False}, {"order": "activation"},
    ),
    "row symmetric, each by its defaults": ({"group": "row", "symmetric": True}, {}, {}),
    "group 64 symmetric, each by its defaults": ({"group": 64, "symmetric": True}, {}, {"aware": True}),
}  # fmt: skip


def published(weight: Tensor, gram: Tensor, chosen: Scheme) -> Tensor:
    """Frantar et al. 2023 in plain PyTorch, single precision, blocks of 128 columns, as released; groups adaptive."""
    w, h = weight.clone(), gram.clone()
    h.diagonal().add_(float(chosen["damp"]) * h.diagonal().mean())  # type: ignore[arg-type]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    cols = w.shape[1]
    width = cols if chosen.group == "row" else int(chosen.group)
    row, out = Scheme("rtn", chosen.bits, "row", chosen.symmetric), torch.zeros_like(w)
    for a in range(0, cols, 128):
        b = min(a + 128, cols)
        block, errors = w[:, a:b].clone(), torch.zeros_like(w[:, a:b])
        for j in range(a, b):
            if j % width == 0:
                chunk = torch.cat([block[:, j - a :], w[:, b:]], 1)[:, :width]
                scale, zero = (t[:, 0] for t in affine(chunk, row, *ranges(chunk, row), torch.float32))
            code = torch.round(block[:, j - a] / scale + zero).clamp(0, 2**chosen.bits - 1)
            out[:, j] = (code - zero) * scale
            errors[:, j - a] = (block[:, j - a] - out[:, j]) / upper[j, j]
            block[:, j - a :] -= errors[:, j - a, None] * upper[j, j:b]
        w[:, b:] -= errors @ upper[a:b, b:]
    return out


def theirs(peer: str, found: list[Layer], wishes: list[tuple[str, str, dict]]) -> tuple[dict[str, Tensor], dict]:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "layers.safetensors", Path(folder) / "theirs.safetensors"
        tensors = {f"{layer.name}|{key}": t for layer in found for key, t in (("weight", layer.weight),
                                                                               ("inputs", layer.inputs))}  # fmt: skip
        save_file({name: t.contiguous().clone() for name, t in tensors.items()}, source,
                  metadata={"wishes": json.dumps(wishes)})  # fmt: skip
        script = Path(__file__).with_name("with_gptqmodel.py")
        done = subprocess.run([peer, str(script), str(source), str(target)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        with safe_open(target, "pt") as stored:
            names = list(stored.keys())
            return {name: stored.get_tensor(name) for name in names}, json.loads(stored.metadata()["facts"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="the python of a virtual environment with gptqmodel==7.6.0")
    parser.add_argument("--model", default="embedded:scenes-llava")
    parser.add_argument("--every", type=int, default=5, help="of the model's linear layers")
    parser.add_argument("--out", default="reports/parity-gptq.md")
    args = parser.parse_args()
    found = layers(args.model, every=args.every)
    wishes = [
        (f"{layer.name}|{label}|{bits}", layer.name, {**grid, **how, "bits": bits})
        for layer in found for label, (grid, _, how) in SETTINGS.items() for bits in BITS
    ]  # fmt: skip
    peer, facts = theirs(args.peer, found, wishes) if args.peer else ({}, {})
    ratios: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    for layer in found:
        seen = Curvature(layer.weight.shape[1])
        seen.add(layer.inputs)
        for label, (grid, how, _) in SETTINGS.items():
            began = time.perf_counter()
            schemes = [scheme("gptq", bits, **grid, **how) for bits in BITS]
            results = solve(Linears((layer.name,), (layer.weight,), seen), schemes)
            seconds["ours"] += time.perf_counter() - began
            seen.forget()
            for chosen, (result,) in zip(schemes, results, strict=True):
                ours = result.dequantise()  # type: ignore[union-attr]
                others = {"nearest": quantise(layer.weight, scheme("rtn", chosen.bits, group=chosen.group,
                                                                   symmetric=chosen.symmetric))}  # fmt: skip
                if how is PLAIN:
                    began = time.perf_counter()
                    others["published"] = published(layer.weight, seen.gram, chosen)
                    seconds["published"] += time.perf_counter() - began
                if peer:
                    others["GPTQModel"] = peer[f"{layer.name}|{label}|{chosen.bits}"]
                for name, other in others.items():
                    ratios[label, chosen.bits, name].append(layer.error(ours) / layer.error(other))
                    fresh = layer.error(ours, fresh=True) / layer.error(other, fresh=True)
                    ratios[label, chosen.bits, f"{name}, fresh"].append(fresh)
    seconds["GPTQModel"] = sum(facts.get("seconds", {}).values())
    write(Path(args.out), args, found, ratios, seconds, facts)


def write(out: Path, args: argparse.Namespace, found: list[Layer], ratios: dict, seconds: dict, facts: dict) -> None:
    versions = f"torch {torch.__version__}, gptqmodel {facts.get('gptqmodel', 'not run')}"
    command = f"python -m experiments.parity.gptq --peer PYTHON --model {args.model} --every {args.every}"
    lines = [
        "# GPTQ: ours against the published algorithm and GPTQModel",
        "",
        f"`{command}` ({versions}, {torch.get_num_threads()} threads, {os.cpu_count()} cores)",
        "",
        f"{len(found)} linear layers of {args.model}, {len(found[0].inputs)} or so calibration tokens each.",
        "Numbers are ratios of relative output error, ours / theirs: below 1 ours is better. Geometric means over",
        "layers, in brackets the worst layer; `fresh` is judged on inputs from the evaluation split.",
        "",
        "| setting | bits | nearest | published | published, fresh | GPTQModel | GPTQModel, fresh |",
        "|---|---|---|---|---|---|---|",
    ]
    for label in SETTINGS:
        for bits in BITS:
            cells = []
            for name in ("nearest", "published", "published, fresh", "GPTQModel", "GPTQModel, fresh"):
                values = ratios.get((label, bits, name))
                cells.append(f"{np.exp(np.mean(np.log(values))):.3f} ({max(values):.3f})" if values else "–")
            lines.append(f"| {label} | {bits} | {' | '.join(cells)} |")
    times = ", ".join(f"{name} {t:.1f} s" for name, t in seconds.items() if t)
    lines += ["", f"Seconds for all of it, statistics left out: {times} (ours does the four widths of a layer at once; "
              "published without the activation order)."]  # fmt: skip
    out.parent.mkdir(exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
