"""What every method costs on one layer, at two sizes: CPU seconds and peak memory, beside gptq's.

python -m experiments.benchmarks.methods_cost     # writes reports/methods-cost.md; killed, it goes on where it was

A method that tweaks norms does so for whole blocks; here the block is a norm and the layer, and takes the same steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sensitivity.measure.activations.block_chain import BlockCalls, outputs
from sensitivity.measure.install.tweaked_norms import RATE, tweaked
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.layer.two_paths import TwoPaths
from sensitivity.quantize.methods import METHODS, method_of, needs_fisher
from sensitivity.quantize.presets import PRESETS
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solving import solve
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import TWEAK, Scheme

SIDES = (1024, 4096)
SMALL = 64  # of a layer on which each method runs once before it is timed
FEW = (1, 3)  # gradient steps or epochs that are run, from which the time of all is computed
BESIDE = 10  # times gptq: what takes longer needs a line that says why
# presets that only weigh tokens or weights otherwise cost what their method costs
OF_THEIR_OWN = [name for name, row in PRESETS.items() if {"shift", "transform", TWEAK} & set(row)]
ROWS = [*METHODS, *OF_THEIR_OWN]
Measured = dict[tuple[str, int], dict[str, float]]
WHY = {
    "awq": "It searches 20 scales for each input, and each takes the error of the whole layer.",
    "norm-tweak": "Each of 30 steps runs the layer on all calibration tokens, forth and back, and again for the error.",
    "quantvggt": "It trains for 15 epochs, and rounds the whole weight in each of 120 steps, forth and back.",
}


def most(run: Callable[[], object]) -> int:
    """Peak memory of a call beyond what was in use before it; writing to clear_refs resets Linux's peak counter."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status")
    before = int(re.findall(r"VmRSS:\s+(\d+)", status.read_text())[0])
    run()
    return 1024 * (int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) - before)


def layer(side: int, tokens: int) -> tuple[Tensor, Tensor, Curvature]:
    """A random weight, correlated inputs of very different sizes, and their statistics."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(side, side, generator=g) / side**0.5
    inputs = torch.randn(tokens, side, generator=g) @ mix * torch.logspace(-1, 1, side)
    weight = torch.randn(side, side, generator=g) / side**0.5
    seen = Curvature(side)
    seen.add(inputs)
    seen.paths = TwoPaths(side)
    seen.paths.add(inputs, inputs, None, torch.arange(tokens) < tokens // 2)
    return weight, inputs, seen


def near_4_bits(name: str) -> Scheme:
    """A method at 4 bits, or the nearest width that it has."""
    widths = METHODS[str(PRESETS.get(name, {"method": name})["method"])].widths
    return scheme(name, min(widths, key=lambda bits: abs(bits - 4)))


def measure(record: Path, sides: tuple[int, ...], seconds: float) -> Measured:
    """Every method once on a layer of each size; what `record` holds is not run again, and time may run out."""
    began = time.perf_counter()
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    found: Measured = {(one["name"], one["side"]): one for one in lines}
    for side in sides:
        if all((name, side) in found for name in ROWS):
            continue
        large, small = layer(side, side), layer(SMALL, SMALL)
        for name in (name for name in ROWS if (name, side) not in found):
            cost(near_4_bits(name), *small)  # the first call of an optimizer imports modules for seconds
            held = in_few_steps(near_4_bits(name), *large)
            found[name, side] = {"name": name, "side": side, **held}  # type: ignore[dict-item]
            with record.open("a") as file:
                file.write(json.dumps(found[name, side]) + "\n")
            print(name, side, f"{found[name, side]['seconds']:.2f} s", flush=True)
            if time.perf_counter() - began > seconds:
                return found
    return found


def in_few_steps(chosen: Scheme, weight: Tensor, inputs: Tensor, seen: Curvature) -> dict[str, float]:
    """The cost of a scheme; gradient steps or epochs are alike, so that of many only the first few are run."""
    steps = next((name for name in (TWEAK, "learned") if chosen.get(name)), None)
    if steps is None:
        return cost(chosen, weight, inputs, seen)
    fewer = [replace(chosen, settings=tuple({**dict(chosen.settings), steps: few}.items())) for few in FEW]
    short, long = (cost(one, weight, inputs, seen) for one in fewer)
    each = (long["seconds"] - short["seconds"]) / (FEW[1] - FEW[0])
    return {"seconds": short["seconds"] + (int(chosen[steps] or 0) - FEW[0]) * each, "gb": max(short["gb"], long["gb"])}


def cost(chosen: Scheme, weight: Tensor, inputs: Tensor, seen: Curvature) -> dict[str, float]:
    """CPU seconds and gigabytes of quantizing one weight, and of what follows on the inputs that its layer reads."""
    fisher = (weight.square(),) if needs_fisher(chosen) else None
    linears = Linears(("layer",), (weight,), seen if method_of(chosen).calibrated else None, fisher=fisher)
    seen.free_factor()
    clock: list[float] = []

    def once() -> None:
        clock.append(time.process_time())
        ((stored,),) = solve(linears, [chosen])
        if steps := int(chosen.get(TWEAK) or 0):
            assert stored is not None
            tweak(weight, stored.dequantize(), inputs, steps)
        clock.append(time.process_time())

    held = most(once)
    return {"seconds": clock[1] - clock[0], "gb": held / 1e9}


def tweak(weight: Tensor, rounded: Tensor, inputs: Tensor, steps: int) -> None:
    """Gradient steps on the norm before a layer, towards what the layer put out before it was rounded."""
    norm, layer = nn.RMSNorm(weight.shape[1]), nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    block = nn.Sequential(norm, layer).requires_grad_(False)
    layer.weight.data = weight
    calls = BlockCalls(block, [((inputs,), {})])
    target = outputs([calls])
    layer.weight.data = rounded
    tweaked(calls, {"0.weight": norm.weight.data}, target, steps, RATE)


def page(found: Measured, small: int, large: int) -> list[str]:
    """The report: a row per method, and why the slow ones are slow."""
    gptq = found["gptq", large]["seconds"]
    slow = [name for name in ROWS if found[name, large]["seconds"] > BESIDE * gptq]
    assert set(slow) <= set(WHY), f"over {BESIDE} times as long as gptq, and WHY does not say why: {slow}"
    lines = [
        "# What every method costs",
        "",
        "    python -m experiments.benchmarks.methods_cost",
        "",
        f"torch {torch.__version__}, one thread of {platform.machine()}, at low priority beside other work.",
        "CPU seconds of one run on one square layer, factorization included, at 4 bits or the nearest width that a",
        "method has; peak memory beyond the layer and its statistics. Presets that only weigh tokens or weights in",
        "another way cost what their method costs; the passes that find those weights come once for all layers.",
        "Calibration tokens are as many as the layer is wide; `norm-tweak` alone takes time for each of them here.",
        f"Of its steps, and of the epochs of `quantvggt`, {FEW[0]} and {FEW[1]} are run; the time of all follows.",
        "",
        f"| method | bits | {small}: seconds | GB | {large}: seconds | GB | times gptq |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ROWS:
        cells = [f"{found[name, side]['seconds']:.2f} | {found[name, side]['gb']:.2f}" for side in (small, large)]
        times = found[name, large]["seconds"] / gptq
        lines.append(f"| {name} | {near_4_bits(name).bits} | {' | '.join(cells)} | {times:.1f} |")
    if not slow:
        return [*lines, "", f"None takes {BESIDE} times as long as gptq."]
    return [*lines, "", f"Over {BESIDE} times as long as gptq:", "", *(f"* `{name}`: {WHY[name]}" for name in slow)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/methods-cost"))
    parser.add_argument("--out", type=Path, default=Path("reports/methods-cost.md"))
    parser.add_argument("--sides", type=lambda text: tuple(map(int, text.split(","))), default=SIDES)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after the method that reaches it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    small, large = args.sides
    found = measure(args.work / "measured.jsonl", args.sides, args.seconds)
    if left := [f"{name} {side}" for side in args.sides for name in ROWS if (name, side) not in found]:
        print(f"{len(left)} are left; the same command goes on with {left[0]}")
        return
    lines = page(found, small, large)
    overwrite(args.out, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
