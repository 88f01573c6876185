"""Our GPTQ against GPTQModel and the published algorithm, on linear layers of a trained model.

python -m experiments.parity.gptq --peer PYTHON-OF-A-VENV-WITH-GPTQMODEL
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.methods.measured import write
from experiments.parity.layers import Layer, layers
from experiments.parity.peers import ask, cell
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solving import fake_quantize, solve
from sensitivity.quantize.stored.integer_grid import ranges, scale_and_zero
from sensitivity.spec.plan import Scheme

ROOT = Path(__file__).parents[2]  # so that the other interpreter can import this package
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


def published(weight: Tensor, gram: Tensor, chosen: Scheme, fresh: bool = False) -> Tensor:
    """Frantar et al. 2023 in plain PyTorch: single precision, blocks of 128 columns, as in the released code.

    The released code computes a group's grid from the weights as they were when its block began; `fresh` computes it
    from the weights as they have been updated since.
    """
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
                chunk = torch.cat([block[:, j - a :], w[:, b:]], 1)[:, :width] if fresh else w[:, j : j + width]
                scale, zero = (t[:, 0] for t in scale_and_zero(chunk, row, *ranges(chunk, row), torch.float32))
            code = torch.round(block[:, j - a] / scale + zero).clamp(0, 2**chosen.bits - 1)
            out[:, j] = (code - zero) * scale
            errors[:, j - a] = (block[:, j - a] - out[:, j]) / upper[j, j]
            block[:, j - a :] -= errors[:, j - a, None] * upper[j, j:b]
        w[:, b:] -= errors @ upper[a:b, b:]
    return out


def theirs(
    peer: str, found: list[Layer], wishes: list[tuple[str, str, dict]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """GPTQModel's weights for every (key, layer, settings): called directly, and through `--backend gptqmodel`."""
    tensors = {f"{layer.name}|weight": layer.weight for layer in found}
    tensors |= {f"{layer.name}|inputs": layer.inputs for layer in found}
    return ask(peer, "with_gptqmodel.py", tensors, {"wishes": wishes}, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="the python of a virtual environment with gptqmodel==7.6.0")
    parser.add_argument("--model", default="embedded:scenes-llava")
    parser.add_argument("--every", type=int, default=5, help="use every N-th linear layer of the model")
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
            began = time.process_time()
            schemes = [scheme("gptq", bits, **grid, **how) for bits in BITS]
            results = solve(Linears((layer.name,), (layer.weight,), seen), schemes)
            seconds["ours"] += time.process_time() - began
            seen.free_factor()
            for chosen, (result,) in zip(schemes, results, strict=True):
                ours = result.dequantize()  # type: ignore[union-attr]
                others = {"nearest": fake_quantize(layer.weight, scheme("rtn", chosen.bits, group=chosen.group,
                                                                   symmetric=chosen.symmetric))}  # fmt: skip
                if how is PLAIN:
                    began = time.process_time()
                    others["published"] = published(layer.weight, seen.gram, chosen)
                    seconds["published"] += time.process_time() - began
                    if chosen.group != "row":
                        others["fresher grids"] = published(layer.weight, seen.gram, chosen, fresh=True)
                if peer:
                    key = f"{layer.name}|{label}|{chosen.bits}"
                    others["GPTQModel"] = peer[key]
                    if (through := peer.get(f"{key}|backend")) is not None:
                        ratios[label, 0, "backend"].append(layer.error(through) / layer.error(peer[key]))
                for name, other in others.items():
                    ratios[label, chosen.bits, name].append(layer.error(ours) / layer.error(other))
                    fresh = layer.error(ours, fresh=True) / layer.error(other, fresh=True)
                    ratios[label, chosen.bits, f"{name}, fresh"].append(fresh)
    seconds["GPTQModel"] = sum(facts.get("seconds", {}).values())
    write(args.out, table(args, found, ratios, seconds, facts))


def table(args: argparse.Namespace, found: list[Layer], ratios: dict, seconds: dict, facts: dict) -> list[str]:
    versions = f"torch {torch.__version__}, gptqmodel {facts.get('gptqmodel', 'not run')}"
    command = f"python -m experiments.parity.gptq --peer PYTHON --model {args.model} --every {args.every}"
    columns = ("nearest", "published", "published, fresh", "fresher grids", "GPTQModel", "GPTQModel, fresh")
    lines = [
        "# GPTQ: ours against the published algorithm and GPTQModel",
        "",
        f"`{command}` ({versions}, {torch.get_num_threads()} threads, {os.cpu_count()} cores)",
        "",
        f"{len(found)} linear layers of {args.model}, {len(found[0].inputs)} or so calibration tokens each.",
        "Numbers are ratios of relative output error, ours / theirs: below 1 ours is better. Geometric means over",
        "layers, in brackets the worst layer; `fresh` is judged on inputs from the evaluation split.",
        "",
        f"| setting | bits | {' | '.join(columns)} |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for label in SETTINGS:
        for bits in BITS:
            cells = [cell(ratios.get((label, bits, name))) for name in columns]
            lines.append(f"| {label} | {bits} | {' | '.join(cells)} |")
    times = ", ".join(f"{name} {t:.1f} s" for name, t in seconds.items() if t)
    through = [ratio for (_, _, name), values in ratios.items() if name == "backend" for ratio in values]
    return [
        *lines,
        "",
        "A group's grid is computed from the weights as they are when its block of 128 columns begins, as in the",
        "released code. `fresher grids` is the published algorithm with each grid computed when its group begins: by",
        "then error feedback has changed the weights and widened their ranges.",
        "",
        "`--backend gptqmodel`, which gives the library our Gram matrices and stores its scales in 16 bits, against",
        f"the library by itself, over all widths of the settings that it has: {cell(through)}.",
        "",
        f"Processor seconds for all of it, statistics left out: {times} (ours does the four widths of a layer at once; "
        "published without activation order).",
    ]


if __name__ == "__main__":
    main()
