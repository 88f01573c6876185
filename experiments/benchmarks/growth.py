"""How the cost of a sweep grows: with plans, examples, calibration examples, the model's width, and the queue.

    python -m experiments.benchmarks.growth      # writes reports/growth.md and reports/growth.png

Each point is a process of its own, with one thread: CPU seconds and peak memory. The slope is that of a straight line
through the points' logarithms: 1 is in proportion. The projection at the end is arithmetic on measured figures and on
the two assumptions that it names.
"""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from sensitivity.spec.files import overwrite

ROOT = Path(__file__).parent.parent.parent
VALUES = {
    "plans": (9, 27, 81, 243),
    "examples": (50, 200, 800, 3200),
    "calibration examples": (32, 128, 512),
    "width": (64, 128, 256, 512),
    "queued plans, journal": (100, 1000, 10_000),
    "queued plans, database": (100, 1000, 10_000),
}
STEPS = 20  # timed together; the report divides by their number
PLANS, IMAGES, GPUS = 10_000, 1000, 64  # assumed by the projection
RATE, TOKENS = 400e12, 616  # assumed: floating point operations a second in bf16; tokens of an image and a question
WEIGHTS = {"vision": 0.30e9, "language": 6.74e9}  # of LLaVA-1.5-7B
PATCHES = 577


def point(kind: str, value: int) -> float:
    """CPU seconds of one measurement, without loading the model."""
    from sensitivity.api.sweeping import grid, sweep, with_calibration
    from sensitivity.models.discovery import inspect
    from sensitivity.models.loading import load
    from sensitivity.quantize.scheme_settings import scheme
    from sensitivity.tasks.table import task

    if kind.startswith("queued"):
        return step(value, database=kind.endswith("database"))
    vlm = load("embedded:scenes-llava") if kind != "width" else wide(value)
    by = "group" if kind in ("plans", "examples") else "part"
    parts = inspect(vlm, by=by)
    if kind == "calibration examples":
        examples = task("vqa", n=50)
        schemes = [scheme("gptq", 4)]
        return spent(lambda: with_calibration(vlm, parts, schemes, ["vqa"], value, against=[examples], cache_gb=0))
    given = {"plans": 27, "examples": 200} | {kind: value}
    plans = grid(parts, schemes=[scheme("rtn", w) for w in (2, 3, 4, 6)])[: given["plans"]]
    with tempfile.TemporaryDirectory() as out:
        return spent(lambda: sweep(vlm, parts, plans, ["vqa"], out, n=given["examples"]))


def spent(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def wide(width: int):  # type: ignore[no-untyped-def]
    from experiments.benchmarks import sweep
    from sensitivity.models.loading import load

    sweep.WIDE |= {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 8}
    return load(str(sweep.saved("llava", Path(tempfile.mkdtemp()))), dtype="float32")


def step(plans: int, database: bool) -> float:
    """CPU seconds to ask for a plan, tell its result and count progress once, with this many plans queued."""
    from sensitivity.api.sweeping import grid
    from sensitivity.models.discovery import inspect
    from sensitivity.models.loading import load
    from sensitivity.quantize.scheme_settings import scheme
    from sensitivity.study.study import Study

    parts = inspect(load("embedded:scenes-llava"), by="group")
    some = grid(parts, schemes=[scheme("rtn", width) for width in (2, 3, 4, 6)])[:plans]
    column = [str(i) for i in range(64)]
    rows = {"task": ["vqa"] * 64, "example": column, "cluster": column, "kind": column, "score": [1.0] * 64,
            "nll": [0.1] * 64, "answer": column}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        study = Study.create(folder, parts, ["vqa"], {}, f"sqlite:///{folder}/team.db" if database else None)
        study.enqueue(some)

        def walk() -> None:
            last = None
            for _ in range(STEPS):
                last = study.ask(last)
                assert last is not None
                study.tell(last, rows, {"seconds": 1.0}, done=64)
                study.progress(1000)

        study.ask()  # the first call reads all plans; later ones read again only when that is a twentieth of the time
        return spent(walk) / STEPS


def measured() -> pd.DataFrame:
    found = []
    for kind, values in VALUES.items():
        for value in values:
            said = subprocess.run(
                [sys.executable, "-m", "experiments.benchmarks.growth", kind, str(value)],
                cwd=ROOT,
                check=True,
                capture_output=True,
                text=True,
            )
            seconds, peak = map(float, said.stdout.split())
            found.append({"of": kind, "how many": value, "CPU s": seconds, "peak MB": peak})
            print(found[-1], flush=True)
    return pd.DataFrame(found)


def drawn(found: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axes, (kind, rows) in zip(figure.subplots(2, 3).flat, found.groupby("of", sort=False), strict=True):
        sns.lineplot(rows, x="how many", y="CPU s", marker="o", ax=axes, color="C0")
        axes.set(
            xscale="log", yscale="log", xlabel=kind, ylabel="CPU seconds a step" if "queue" in kind else "CPU seconds"
        )
        axes.set_title(f"slope {slope(rows):.2f}")
        axes.set_xticks(rows["how many"], [f"{value:,}" for value in rows["how many"]])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3, which="both")
    return figure


def slope(rows: pd.DataFrame) -> float:
    return float(np.polyfit(np.log(rows["how many"]), np.log(rows["CPU s"]), 1)[0])


def projection(found: pd.DataFrame) -> str:
    """The time of a large sweep, and what would limit it first."""
    from sensitivity.measure.memory.weight_codes import BYTES_PER_CODE
    from sensitivity.measure.shards import shard_ends_of_total

    def queue(name: str, plans: int = PLANS) -> float:
        rows = found[found["of"] == f"queued plans, {name}"]
        return float(rows.loc[rows["how many"] == plans, "CPU s"].iloc[0])

    steps = PLANS * len(shard_ends_of_total(IMAGES))
    whole = 2 * (WEIGHTS["language"] * TOKENS + WEIGHTS["vision"] * PATCHES)
    last = 2 * WEIGHTS["language"] / 3 * TOKENS
    hours = {name: PLANS * IMAGES * work / RATE / GPUS / 3600 for name, work in (("all", whole), ("last", last))}
    each, in_turn = steps // GPUS, queue("journal", 100) * steps / 3600
    host = WEIGHTS["language"] * 6 * BYTES_PER_CODE / 1e9
    return f"""{PLANS:,} plans of {IMAGES:,} images with one question each, LLaVA-1.5-7B, {GPUS} GPUs at an assumed
{RATE / 1e12:.0f} TFLOP/s: {hours["all"]:.1f} hours where every plan is a whole forward pass, {hours["last"]:.1f} where
it is the last third of the language model. That is {steps:,} steps, {each:,} for each GPU. With so many plans queued a
step costs {1000 * queue("journal"):.0f} ms of CPU with a journal and {1000 * queue("database"):.0f} ms with a database:
{each * queue("database"):.0f} s for each GPU in all.

What would break first:

1. The journal. One process at a time writes to it and syncs it to disk, about {1000 * queue("journal", 100):.0f} ms a
   step, {in_turn:.1f} hours for all steps one after the other. Use a database for so many GPUs (`--storage`).
2. Host memory. Six widths of 7 billion weights are {host:.0f} GB of codes for each process, at {BYTES_PER_CODE} bytes
   a weight with its scales. The default `--memory-gb 8` gives half of that to codes, so that layers would be
   quantized again for plan after plan: set `--memory-gb {10 * math.ceil(2 * host / 10)}`, or fewer widths.
3. Reading the queue. Each process reads all plans when it starts, and after that only as often as takes a twentieth of
   its time: with many thousands of plans it learns late what others did, and asks for plans that others have taken.

Not included: statistics and six widths of every layer, once for each process before its first plan; not measured on a
GPU here (`experiments/benchmarks/seven_billion.py` measures them)."""


def main() -> None:
    if len(sys.argv) == 3:
        seconds = point(sys.argv[1], int(sys.argv[2]))
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    found = measured()
    texts = {"CPU s": found["CPU s"].map("{:.3g}".format), "peak MB": found["peak MB"].round().astype(int)}
    slopes = "\n".join(f"* {kind}: {slope(rows):.2f}" for kind, rows in found.groupby("of", sort=False))
    drawn(found).savefig(ROOT / "reports" / "growth.png", dpi=110)
    overwrite(
        ROOT / "reports" / "growth.md",
        f"""# How the cost of a sweep grows

`python -m experiments.benchmarks.growth`, one thread: CPU seconds and peak memory of whole processes. 27 plans by group
and 200 questions where nothing else is said; calibration is GPTQ's; width is that of a random LLaVA with twelve layers
in each tower; the queue is one step with so many plans waiting.

![CPU seconds against what grows, on logarithmic axes](growth.png)

Slopes on these axes, where 1 is in proportion:

{slopes}

```
{found.assign(**texts).to_string(index=False)}
```

## Projection

{projection(found)}
""",
    )


if __name__ == "__main__":
    main()
