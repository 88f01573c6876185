"""Time and memory of quantization: shared statistics, GPTQ of a large layer, AWQ's search; each against plain code.

python -m experiments.benchmarks.quantize [--peer PYTHON-OF-A-VENV-WITH-GPTQMODEL] [--side 4096] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from experiments.benchmarks.methods_cost import layer, most
from experiments.parity.gptq import published, theirs
from experiments.parity.layers import Layer
from sensitivity.measure.calibrate.calibration import calibration_statistics
from sensitivity.measure.install.plan_in_model import prepare
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solvers.scale_search import output_errors, scales
from sensitivity.quantize.solving import fake_quantize, solve
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import Plan

WIDTHS = (2, 3, 4, 5, 6, 8)


def timed(run: Callable[[], object], repeat: int = 3) -> float:
    """Seconds, the fastest of a few runs; CPU seconds with one thread, which other work hardly changes."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(repeat):
        began = clock()
        run()
        times.append(clock() - began)
    return min(times)


def shared(model: str) -> list[str]:
    """Calibrate, and quantize every layer at one bit width and at six."""
    vlm = load(model)
    parts = inspect(vlm, by="part")
    lines = ["| method | statistics | and one width | and six widths | six / one |", "|---|---|---|---|---|"]
    tasks = ["vqa", "caption", "scene", "ground"]
    calibration_statistics(vlm, parts, tasks)  # not timed: the first call loads libraries
    study = timed(lambda: calibration_statistics(vlm, parts, tasks))
    statistics = calibration_statistics(vlm, parts, tasks)
    prepare(vlm.model, parts, [Plan.uniform(parts, scheme("rtn", 4))], WeightCodes())
    for method in ("gptq", "paper-gptq", "clip", "awq"):

        def at(widths: tuple[int, ...], method: str = method) -> float:
            plans = [Plan.uniform(parts, scheme(method, b, calibration=statistics.facts)) for b in widths]
            times = 1 if method == "awq" else 3
            return timed(lambda: prepare(vlm.model, parts, plans, WeightCodes(), statistics), times)

        one, six = at((4,)), at(WIDTHS)
        lines.append(
            f"| {method} | {study:.2f} s | {study + one:.2f} s | {study + six:.2f} s | "
            f"{(study + six) / (study + one):.2f} |"
        )
    return lines


def large(side: int, peer: str | None) -> list[str]:
    """GPTQ on one large layer, four ways, with the factorization of its Gram matrix."""
    weight, inputs, seen = layer(side, 2 * side)
    chosen = scheme("paper-gptq", 4)

    def ours(*widths: int) -> None:
        seen.free_factor()
        solve(Linears(("layer",), (weight,), seen), [scheme("paper-gptq", bits) for bits in widths])

    grouped = scheme("gptq", 4, group=128)
    rows = [
        ("ours, one width", timed(lambda: ours(4))),
        ("ours, six widths", timed(lambda: ours(*WIDTHS), 1)),
        ("ours, one width, with activation order and clip search, groups of 128",
         timed(lambda: (seen.free_factor(), solve(Linears(("layer",), (weight,), seen), [grouped])), 1)),
        ("the published algorithm in plain PyTorch", timed(lambda: published(weight, seen.gram, chosen))),
    ]  # fmt: skip
    if peer:
        one = [Layer("layer", weight, inputs, inputs[:1])]
        wish = {"group": "row", "symmetric": True, "bits": 4, "alone": True}
        times = [theirs(peer, one, [("key", "layer", wish)])[1]["seconds"]["key"] for _ in range(2)]
        rows.append(("GPTQModel 7.6.0", min(times)))
    plain = rows[0][1]
    found, other = (fake_quantize(weight, chosen, seen), published(weight, seen.gram, chosen))
    same = float((found - other).abs().gt(1e-6).float().mean())
    lines = [f"| {side} x {side}, 4 bits, per row | seconds | times ours |", "|---|---|---|"]
    lines += [f"| {name} | {seconds:.2f} | {seconds / plain:.2f} |" for name, seconds in rows]
    rate = timed(lambda: weight @ weight)
    lines += [
        "",
        f"Numbers that differ from the published algorithm's: {100 * same:.3f} %. A product of two such matrices "
        f"takes {rate:.2f} s here ({2 * side**3 / rate / 1e9:.0f} GFLOP/s).",
    ]
    return lines


def search(side: int, tokens: int) -> list[str]:
    """AWQ's search over 20 exponents: all at once from the Gram matrix, or one module output after the other."""
    weight, inputs, seen = layer(side, tokens)
    chosen = scheme("awq", 4)
    grid = scales(seen, 20, torch.float32)
    nearest = scheme("rtn", 4, group=128, symmetric=False)

    def loop() -> Tensor:
        right = inputs @ weight.T
        return torch.stack([(inputs @ (fake_quantize(weight * s, nearest) / s).T - right).square().sum() for s in grid])

    at_once, slow = output_errors(weight, grid, seen.gram, [chosen], torch.float32)[0], loop()
    assert int(at_once.argmin()) == int(slow.argmin())
    batched, looped = timed(lambda: output_errors(weight, grid, seen.gram, [chosen], torch.float32), 2), timed(loop, 1)
    return [f"| {side} x {side}, {tokens} tokens | {batched:.2f} s | {looped:.2f} s | {looped / batched:.1f} |"]


def memory(side: int) -> list[str]:
    """Peak memory of quantizing a layer, beyond its weight and Gram matrix, in multiples of the layer."""
    weight, _, seen = layer(side, side)
    lines = []
    for method, widths in (("gptq", (4,)), ("gptq", WIDTHS), ("clip", (4,)), ("awq", (4,))):
        schemes = [scheme(method, bits) for bits in widths]
        seen.free_factor()
        held = most(lambda schemes=schemes: solve(Linears(("layer",), (weight,), seen), schemes))  # type: ignore[misc]
        lines.append(f"| {method}, {len(widths)} widths | {held / 1e9:.2f} GB | {held / (4 * side**2):.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer")
    parser.add_argument("--model", default="embedded:scenes-llava")
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", default="reports/benchmark-quantize.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the peer
    lines = [
        "# What quantizing costs",
        "",
        f"`python -m experiments.benchmarks.quantize --peer PYTHON --side {args.side} --threads {args.threads}`: "
        f"torch {torch.__version__}, {os.cpu_count()} cores.",
        f"{'Processor seconds' if args.threads == 1 else 'Seconds on the wall'}, the fastest of three where short.",
        "",
        f"## Every layer of {args.model}, 128 calibration examples",
        "",
        *shared(args.model),
        "",
        "## One large layer",
        "",
        *large(args.side, args.peer),
        "",
        "## AWQ's search over 20 exponents",
        "",
        "| layer | at once | loop over outputs | loop / at once |",
        "|---|---|---|---|",
    ]
    for side, tokens in ((args.side // 4, 8 * args.side), (args.side // 2, 4 * args.side)):
        lines += search(side, tokens)
    lines += [
        "",
        f"## Memory beyond a layer of {args.side} x {args.side} and its Gram matrix",
        "",
        f"A layer of this size has {4 * args.side**2 / 1e9:.3f} GB in 32 bits. Results (codes and grids) are included.",
        "",
        "| method | at most | in layers |",
        "|---|---|---|",
        *memory(args.side),
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    lines += ["", f"Peak memory of all of it: {peak:.2f} GB."]
    Path(args.out).parent.mkdir(exist_ok=True)
    overwrite(Path(args.out), "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
