"""A sweep of a model of true shape, stage by stage: seconds, share of the bound, memory, the forecast.

python -m experiments.true_shapes smolvlm-256m /tmp/256m
python -m experiments.benchmarks.true_shapes /tmp/256m [--images 48] [--whole-answers] >> reports/true-shapes.md

Weights are random, so that no answer is right: with --whole-answers all run to the limit of 32 tokens, which is more
decoding than a trained model does; without it, most end at their first token, which is less.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sensitivity.api.sweeping import begin_sweep, one_at_a_time, with_calibration
from sensitivity.measure.forecast.forecast import forecast_sweep
from sensitivity.models.config_only import without_weights as blank_
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.tasks.table import task as find_task

QUESTIONS = ("What is in this picture?", "How many things are there?")
SIDE = 2048  # of the square matrices that say how fast this machine multiplies


@dataclass
class Stages:
    """What each stage took, and the most memory of this process in it."""

    found: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        self.found[name] = {**spent, "peak": memory("VmHWM"), "after": memory("VmRSS")}
        print(name, {key: round(value, 1) for key, value in self.found[name].items()}, file=sys.stderr, flush=True)


def memory(which: str) -> float:
    """Bytes of this process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line for line in lines if line.startswith(which)).split()[1])


def rate() -> float:
    """Float32 operations a CPU second in large products: the best of a few, as a bound should be."""
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    times = []
    for _ in range(7):
        began = time.process_time()
        a @ b
        times.append(time.process_time() - began)
    return 2 * SIDE**3 / min(times)


def pictures(folder: Path, images: int, calibration: int, side: int = 512) -> Path:
    """Noise in large spots as square images, with two questions each, for evaluation and for calibration."""
    draw = np.random.default_rng(0)
    lines: list[str] = []
    for number in range(images + calibration):
        spots = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(spots).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        split = "evaluation" if number < images else "calibration"
        asked = QUESTIONS if number < images else QUESTIONS[:1]
        for question in asked:
            answer = str(draw.choice(["yes", "no", "a tree", "three"]))
            line = {"image": f"{number}.png", "prompt": question, "answers": [answer], "split": split}
            lines.append(json.dumps(line))
    (folder / "pictures.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pictures.jsonl"


def measured(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every stage of a sweep in this process; plans one at a time, nothing read from a cache of earlier runs."""
    found: dict[str, Any] = {"rate": rate(), "threads": torch.get_num_threads()}
    source, stages = str(pictures(work, args.images, args.calibration)), Stages()
    schemes = [scheme("gptq", int(width)) for width in args.bits.split(",")]
    evaluation = find_task(source, whole=args.whole_answers)
    with stages("forecast"):
        without_weights = blank_(args.model)
        parts = inspect(without_weights, by=args.by)
        plans = one_at_a_time(parts, schemes=schemes)
        clock = time.process_time if found["threads"] == 1 else time.perf_counter
        how: dict[str, Any] = {"calibration": args.calibration, "dtype": "float32", "clock": clock}
        said = forecast_sweep(without_weights, parts, plans, [evaluation], **how).to_json()
    with stages("load"):
        vlm = load(args.model, dtype="float32")
    with stages("calibrate and quantize"):
        how = {"n": args.calibration, "against": [evaluation], "cache_gb": 0}
        named, statistics = with_calibration(vlm, parts, schemes, [source], **how)
        plans = one_at_a_time(parts, schemes=named)
        shown: dict[str, Any] = {"statistics": statistics, "whole": args.whole_answers}
        steps = begin_sweep(vlm, parts, plans, [source], work / "study", **shown)[1]
    with stages("plans"), counted() as operations:
        seconds = [step.seconds for step in steps]
    found |= {"stages": stages.found, "flops": sum(operations), "steps": seconds, "plans": len(plans)}
    return found | {"model": 4.0 * parts.numel, "said": said}


@contextmanager
def counted() -> Iterator[list[float]]:
    """The operations of each product inside the block: of linear layers, convolutions and attention.

    torch's own counter looks at every operation, which made decoding three times slower.
    """
    found: list[float] = []
    linear, attention = nn.functional.linear, nn.functional.scaled_dot_product_attention

    def counting_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found.append(2.0 * x.numel() * len(weight))
        return linear(x, weight, bias)

    def counting_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Tensor:
        found.append(4.0 * query.numel() * key.shape[-2])
        return attention(query, key, value, *rest, **more)

    def counting_convolution(module: nn.Module, _: object, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            found.append(2.0 * output.numel() * module.weight[0].numel())

    hook = nn.modules.module.register_module_forward_hook(counting_convolution)
    nn.functional.linear, nn.functional.scaled_dot_product_attention = counting_linear, counting_attention
    try:
        yield found
    finally:
        nn.functional.linear, nn.functional.scaled_dot_product_attention = linear, attention
        hook.remove()


def page(args: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    stages, cpu = found["stages"], "CPU s" if found["threads"] == 1 else "s"
    which = "cpu" if found["threads"] == 1 else "wall"
    total = sum(stage[which] for name, stage in stages.items() if name != "forecast")
    peak = max(stage["peak"] for stage in stages.values())
    share = found["flops"] / found["rate"] / stages["plans"]["cpu"]
    lines = [
        f"## {Path(args.model).name}, {args.images} images, {args.calibration} calibration examples"
        f"{', whole answers' if args.whole_answers else ''}",
        "",
        f"    python -m experiments.benchmarks.true_shapes {args.model} --images {args.images} --calibration "
        f"{args.calibration} --bits {args.bits} --by {args.by}{' --whole-answers' if args.whole_answers else ''}",
        "",
        f"torch {torch.__version__}, {found['threads']} threads, {found['rate'] / 1e9:.0f} GFLOP a CPU second in "
        f"float32 products of {SIDE}.",
        "",
        "| stage | s | CPU s | most memory, GB | GB beyond the model |",
        "|---|---|---|---|---|",
    ]
    for name, stage in stages.items():
        peaks = f"{stage['peak'] / 1e9:.2f} | {(stage['peak'] - found['model']) / 1e9:.2f}"
        lines.append(f"| {name} | {stage['wall']:.0f} | {stage['cpu']:.0f} | {peaks} |")
    each, counted = stages["plans"][which] / found["plans"], found["flops"] / 1e12
    return [
        *lines,
        "",
        f"{found['plans']} plans: {each:.1f} {cpu} a plan, {counted:.1f} TFLOP in products, which is {share:.0%} of "
        f"what this machine's products allow in that time. In all {total:.0f} "
        f"{cpu}; the forecast was {sum(found['said']['seconds'].values()):.0f}, and "
        f"{sum(found['said']['host'].values()) / 1e9:.1f} GB where {peak / 1e9:.1f} were taken.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that experiments.true_shapes made")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--bits", default="3,4,8")
    parser.add_argument("--by", default="part")
    parser.add_argument("--whole-answers", action="store_true", help="generate 32 tokens whatever they are")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = measured(args, Path(work))
    print(json.dumps(found), file=sys.stderr)
    print("\n".join(page(args, found)))


if __name__ == "__main__":
    main()
