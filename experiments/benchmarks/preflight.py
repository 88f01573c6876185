"""What `--dry-run` predicts against what sweeps take: time, disk and peak memory, on models of several sizes.

python -m experiments.benchmarks.preflight            # writes reports/preflight.md
python -m experiments.benchmarks.preflight --smoke    # one small case
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sensitivity.spec.files import overwrite

ROOT = Path(__file__).parent.parent.parent
NEAR = 0.3
SPREADS = [
    1.0 + 0.05 * i for i in range(41)
]  # candidates for COLD, the time of a forward pass divided by the sum of its timed layers


@dataclass(frozen=True)
class Case:
    model: str
    task: str
    method: str
    bits: tuple[int, ...]
    n: int
    by: str = "part"
    activations: int = 16
    cache: int = 16
    fold: str = "b"  # constants fitted on half "a" are judged on half "b", and the other way round


CASES = (
    Case("embedded:scenes-llava", "vqa", "rtn", (3, 8), 400, fold="a"),
    Case("embedded:scenes-llava", "vqa", "gptq", (3, 8), 400),
    Case("embedded:scenes-llava", "caption", "rtn", (4, 8), 60, fold="a"),
    Case("embedded:scenes-llava", "ground", "awq", (4, 8), 60),
    Case("embedded:scenes-llava", "vqa", "rtn", (8,), 400, by="group"),
    Case("embedded:scenes-blip2", "vqa", "rtn", (4, 8), 200, fold="a"),
    Case("embedded:scenes-blip2", "caption", "gptq", (4, 8), 60),
    Case("embedded:scenes-blip2", "vqa", "rtn", (8,), 200, by="group"),
    Case("embedded:scenes-blip2-itm", "retrieval", "rtn", (4, 8), 100, fold="a"),
    Case("llava-wide", "gqa", "rtn", (3, 8), 24, fold="a"),
    Case("llava-wide", "vqav2", "gptq", (4,), 24),
    Case("llava", "gqa", "rtn", (3, 8), 24, fold="a"),
    Case("geochat", "rsvqa-lrben", "rtn", (4, 8), 48),
    Case("blip2", "coco-captions", "gptq", (3, 8), 24, fold="a"),
    Case("blip2", "vqav2", "awq", (4, 8), 48),
    Case("blip2-retrieval", "flickr30k", "rtn", (4, 8), 20),
    Case("embedded:scenes-llava", "vqa", "rtn", (3, 8), 400, activations=8),
    Case("embedded:scenes-llava", "caption", "rtn", (4, 8), 60, cache=4, fold="a"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "preflight.md")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--cases", help="some of them, by number, such as 0,3")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the fields of a case: measured in this process
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(Case(**json.loads(args.one)))))
        return
    cases: Sequence[Case] = [Case("llava", "gqa", "rtn", (8,), 6)] if args.smoke else CASES
    if args.cases:
        cases = [CASES[int(number)] for number in args.cases.split(",")]
    found = []
    for case in cases:
        found.append(in_a_process(case))
        print(row(case, found[-1]), file=sys.stderr)
    lines = page(cases, found)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    overwrite(args.out, "\n".join(lines) + "\n")
    print("\n".join(lines))


def in_a_process(case: Case) -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.benchmarks.preflight", "--one", json.dumps(asdict(case))]
    here = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=here, cwd=ROOT)
    return dict(json.loads(run.stdout.splitlines()[-1]))


def page(cases: Sequence[Case], found: Sequence[dict[str, Any]]) -> list[str]:
    heads = ("model, task, method, n", "CPU seconds", "at most", "measured", "disk kB", "measured", "memory MB")
    lines = [
        "# What --dry-run predicts, and what was then measured",
        "",
        "    python -m experiments.benchmarks.preflight",
        "",
        f"{platform.machine()}, one thread, CPU seconds, since the machine may do other work. Each sweep runs in",
        "a process of its own: all combinations of the bit widths over three parts, or over groups of blocks. Models",
        "that are not embedded are small and random; their answers end at random, and no plan can reuse another's, so",
        "their prediction is a range: `at most` is the time with every answer as long as the task allows.",
        "",
        f"| {' | '.join((*heads, 'measured'))} |",
        "|---" * (len(heads) + 1) + "|",
        *(row(case, one) for case, one in zip(cases, found, strict=True)),
        "",
        *shares("As shipped", cases, found, [shipped(one) for one in found]),
        "",
        "Three constants were fitted to sweeps like these: the time of a pass over the sum of its layers (COLD), the",
        "time to store a shard (STORING), and memory that libraries allocate later (LATER). Here they are fitted on",
        "one half of the cases and judged on the other, and the other way round. (The number of pairs that retrieval",
        "ranks again was taken from the first retrieval case.)",
        "",
        *shares("Held out", cases, found, held_out(cases, found)),
    ]
    return lines


def row(case: Case, found: dict[str, Any]) -> str:
    said, was = shipped(found), found["was"]
    by = "" if case.by == "part" else f" by {case.by}"
    by += "".join(f" {name}{bits}" for name, bits in (("a", case.activations), ("kv", case.cache)) if bits < 16)
    cells = [f"{case.model}, {case.task}, {case.method}{by}, {case.n}", f"{said['seconds']:.1f}"]
    cells += [f"{said['slowest']:.1f}", f"{was['seconds']:.1f}", f"{said['disk'] / 1e3:.0f}"]
    cells += [f"{was['disk'] / 1e3:.0f}", f"{said['host'] / 1e6:.0f}", f"{was['host'] / 1e6:.0f}"]
    return f"| {' | '.join(cells)} |"


def shipped(found: dict[str, Any]) -> dict[str, float]:
    return forecast(found, found["constants"])


def forecast(found: dict[str, Any], constants: dict[str, float]) -> dict[str, float]:
    """The prediction with other constants; it is linear in each of them."""
    passes, still = found["passes"], found["still"]
    stored = found["shards"] * constants["STORING"]
    return {
        "seconds": still["seconds"] + passes["seconds"] * constants["COLD"] + stored,
        "slowest": still["slowest"] + passes["slowest"] * constants["COLD"] + stored,
        "disk": found["disk"],
        "host": found["host"] + constants["LATER"],
    }


def shares(title: str, cases: Sequence[Case], found: Sequence[dict[str, Any]], said: Sequence[Any]) -> list[str]:
    """How many predictions are within NEAR of the measurement."""
    count = dict.fromkeys(("time", "span", "disk", "host"), 0)
    for one, of in zip(found, said, strict=True):
        was = one["was"]
        count["time"] += near(of["seconds"], was["seconds"])
        count["span"] += of["seconds"] * (1 - NEAR) <= was["seconds"] <= of["slowest"] * (1 + NEAR)
        count["disk"] += near(of["disk"], was["disk"])
        count["host"] += near(of["host"], was["host"])
    return [
        f"{title}, of {len(cases)} cases within {NEAR:.0%}: time {count['time']}, of the span from seconds to at most "
        f"{count['span']}; disk {count['disk']}; memory {count['host']}."
    ]


def near(said: float, was: float) -> bool:
    return abs(said / was - 1) <= NEAR


def held_out(cases: Sequence[Case], found: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Each case predicted with constants that were fitted on the other half."""
    of_half = {
        half: fitted([one for case, one in zip(cases, found, strict=True) if case.fold != half]) for half in ("a", "b")
    }
    return [forecast(one, of_half[case.fold]) for case, one in zip(cases, found, strict=True)]


def fitted(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The constants that fit these cases: the mean for memory; for time the least log error outside the span."""
    if not found:
        return {"COLD": 1.0, "STORING": 0.0, "LATER": 0.0}

    def off(cold: float, storing: float) -> float:
        total = 0.0
        for one in found:
            said = forecast(one, {"COLD": cold, "STORING": storing, "LATER": 0.0})
            was = one["was"]["seconds"]
            total += abs(math.log(was / min(max(was, said["seconds"]), said["slowest"])))
        return total

    choices = [(cold, storing) for cold in SPREADS for storing in (0.005, 0.01, 0.015, 0.02, 0.03)]
    cold, storing = min(choices, key=lambda pair: off(*pair))
    later = sum(one["was"]["host"] - one["host"] for one in found) / len(found)
    return {"COLD": cold, "STORING": storing, "LATER": later}


def measured(case: Case) -> dict[str, Any]:
    """The prediction, split by its constants, and what the sweep then took, both in this process."""
    import resource
    import time

    import torch

    from experiments.small import datasets, models
    from sensitivity.api.sweeping import grid, sweep, with_calibration
    from sensitivity.measure.forecast import cost_model as passes
    from sensitivity.measure.forecast import forecast as preflight
    from sensitivity.measure.shards import shard_ends
    from sensitivity.models.config_only import without_weights
    from sensitivity.models.discovery import inspect
    from sensitivity.models.loading import load
    from sensitivity.quantize.scheme_settings import scheme
    from sensitivity.tasks.table import task

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        name, about = case.model, case.task
        if not name.startswith("embedded:"):
            name = str(models.save(name, Path(folder) / "model"))
            datasets.WRITE[about](Path(folder) / "data")
            about = f"{about}:{folder}/data"
        vlm = without_weights(name)
        parts = inspect(vlm, by=case.by)
        rounded = {"activations": case.activations, "cache": case.cache}
        schemes = [scheme(case.method, bits, **rounded) for bits in case.bits]
        plans = grid(parts, schemes=schemes)
        asked = [task(about, n=case.n)]
        how: dict[str, Any] = {"calibration": 32, "dtype": "float32", "cache_gb": 0, "clock": time.process_time}
        cold, passes.COLD_CACHE_FACTOR = passes.COLD_CACHE_FACTOR, 0.0
        still = preflight.forecast_sweep(vlm, parts, plans, asked, **how)
        passes.COLD_CACHE_FACTOR = cold
        said = preflight.forecast_sweep(vlm, parts, plans, asked, **how)
        began = time.process_time()
        vlm = load(name, dtype="float32")
        schemes, statistics = with_calibration(vlm, parts, schemes, [about], n=32, against=asked, cache_gb=0)
        plans = grid(parts, schemes=schemes)
        study = sweep(vlm, parts, plans, [about], Path(folder) / "run", n=case.n, statistics=statistics)
        seconds = time.process_time() - began
        disk = sum(file.stat().st_size for file in study.path.rglob("*") if file.is_file())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    total, without = said.to_json()["total"], still.to_json()["total"]
    shards = len(plans) * len(shard_ends(asked))
    stored = preflight.STORING * shards
    ends = {"seconds": (total["seconds"], without["seconds"]), "slowest": (said.slowest, still.slowest)}
    return {
        "constants": {"COLD": cold, "STORING": preflight.STORING, "LATER": preflight.LATER},
        "still": {end: least - stored for end, (_, least) in ends.items()},
        "passes": {end: (most - least) / cold for end, (most, least) in ends.items()},
        "shards": shards,
        "disk": total["disk"],
        "host": total["host"] - preflight.LATER,
        "was": {"seconds": seconds, "disk": disk, "host": peak},
        "made": dict(said.seconds),
    }


if __name__ == "__main__":
    main()
