"""The preflight against what sweeps really take: time, disk and peak memory, on models and tasks of several sizes.

python experiments/benchmarks/preflight.py            # writes reports/preflight.md
python experiments/benchmarks/preflight.py --smoke    # one small case
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "experiments"))


@dataclass(frozen=True)
class Case:
    model: str
    task: str
    method: str
    bits: tuple[int, ...]
    n: int


CASES = (
    Case("embedded:scenes-llava", "vqa", "rtn", (3, 8), 400),
    Case("embedded:scenes-llava", "vqa", "gptq", (3, 8), 400),
    Case("embedded:scenes-llava", "caption", "rtn", (4, 8), 60),
    Case("embedded:scenes-llava", "ground", "awq", (4, 8), 60),
    Case("llava-wide", "gqa", "rtn", (3, 8), 24),
    Case("llava", "gqa", "rtn", (3, 8), 24),
    Case("blip2", "coco-captions", "gptq", (3, 8), 24),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "preflight.md")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the fields of a case: measured in this process
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(Case(**json.loads(args.one)))))
        return
    cases = [Case("llava", "gqa", "rtn", (8,), 6)] if args.smoke else CASES
    lines = ["# The preflight, and what was then measured", "", "    python experiments/benchmarks/preflight.py", ""]
    lines += [
        f"{platform.machine()}, one thread, CPU seconds: the machine is shared with other work. Each sweep runs in a"
    ]
    lines += [
        "process of its own: all combinations of the widths over three parts. `llava` and `blip2` are random models of"
    ]
    lines += [
        "16 and 24 channels, `llava-wide` one of 320 and 480; their answers end anywhere, and are written anew by every"
    ]
    lines += [
        "plan: the forecast for them is a span. `at most` is what writing all answers to the task's limit would take.",
        "",
    ]
    heads = [
        "model, task, method, n",
        "CPU seconds",
        "at most",
        "measured",
        "disk kB",
        "measured",
        "memory MB",
        "measured",
    ]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    good, total = 0, 0
    for case in cases:
        command = [sys.executable, __file__, "--one", json.dumps(asdict(case))]
        here = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=here)
        found = json.loads(run.stdout.splitlines()[-1])
        said, was = found["said"], found["was"]
        cells = [
            f"{case.model}, {case.task}, {case.method}, {case.n}",
            f"{said['seconds']:.1f}",
            f"{found['slowest']:.1f}",
        ]
        cells += [f"{was['seconds']:.1f}", f"{said['disk'] / 1e3:.0f}", f"{was['disk'] / 1e3:.0f}"]
        cells += [f"{said['host'] / 1e6:.0f}", f"{was['host'] / 1e6:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
        near = [abs(said[name] / was[name] - 1) <= 0.3 for name in said]
        near[0] = near[0] or said["seconds"] * 0.7 <= was["seconds"] <= found["slowest"] * 1.3
        print(lines[-1], file=sys.stderr)
        good, total = good + sum(near), total + len(near)
    lines += [
        "",
        f"{good} of {total} forecasts lie within 30 % (of time: within 30 % of the span from seconds to at most).",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def measured(case: Case) -> dict[str, object]:
    """What the preflight said, and what the sweep then took, in this process."""
    import resource
    import time

    import torch
    from small import datasets, models

    from sensitivity import preflight, verbs
    from sensitivity.models.blank import blank
    from sensitivity.quantize import scheme
    from sensitivity.tasks import task

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        name, about = case.model, case.task
        if name in models.BUILDERS:
            name = str(models.save(name, Path(folder) / "model"))
            datasets.WRITE[about](Path(folder) / "data")
            about = f"{about}:{folder}/data"
        vlm = blank(name)
        parts = verbs.inspect(vlm, by="part")
        plans = verbs.grid(parts, bits=case.bits, method=case.method)
        asked = [task(about, n=case.n)]
        said = preflight.foresee(
            vlm, parts, plans, asked, calibration=32, dtype="float32", cache_gb=0, clock=time.process_time
        )
        began = time.process_time()
        vlm = verbs.load(name, dtype="float32")
        schemes = [scheme(case.method, bits) for bits in case.bits]
        schemes, statistics = verbs.calibrated(vlm, parts, schemes, [about], n=32, against=asked, cache_gb=0)
        plans = verbs.grid(parts, schemes=schemes)
        study = verbs.sweep(vlm, parts, plans, [about], Path(folder) / "run", n=case.n, statistics=statistics)
        seconds = time.process_time() - began
        disk = sum(file.stat().st_size for file in study.path.rglob("*") if file.is_file())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    total = said.to_json()["total"]
    return {
        "said": {name: total[name] for name in ("seconds", "disk", "host")},
        "slowest": said.slowest,
        "was": {"seconds": seconds, "disk": disk, "host": peak},
    }


if __name__ == "__main__":
    main()
