"""Whether the time and memory of a plan are predicted by those of its layers: random plans, predicted and then timed.

python -m experiments.benchmarks.time_prediction [--plans 20] [--rounds 5] [--depth 0.1] [--out FILE.csv]

The model is wired as LLaVA, with the shapes of CLIP's ViT-B/16 and SmolLM2-135M and random weights: the embedded models
are all overhead. One thread, CPU time: what the clock would show on an idle machine. Each plan has a process of its
own, and is timed in turn with full precision. Its measured time is its share of full precision's in the same rounds,
times full precision's in the profile, so that a slow minute changes nothing.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import spearmanr

from experiments.true_shapes import save
from sensitivity.formats.halved.tracing import kept as kept_traces
from sensitivity.formats.table import write
from sensitivity.formats.timing.intervals import STAGES, interval
from sensitivity.formats.timing.profile import profile_layers
from sensitivity.formats.timing.timed_process import Asked, Round, TimedModel, timed_model
from sensitivity.formats.writing.job import Job
from sensitivity.models.discovery import inspect
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.layer_times import LayerTimes
from sensitivity.spec.sizes import GB

SHAPE, RUNTIME = "llava-vit-b-smollm2-135m", "openvino"
AT_ONCE = 4  # plans in memory beside full precision
CONCENTRATION = 0.3  # small, so that most plans take one or two widths nearly everywhere
SCHEMES = [Scheme("rtn", bits, 32, bits > 2) for bits in (2, 4, 8)]
COLUMNS = dict(zip(("image", "prompt", "token"), STAGES.values(), strict=True))


def random_plans(parts: ComponentMap, count: int, draw: random.Random) -> Iterator[Plan]:
    """Different plans from the whole range of budgets: how often each takes each width is drawn first.

    Were every width as likely in every plan, all plans of many components would take about the same time.
    """
    widths = [None, *SCHEMES]
    drawn = {Plan.uniform(parts, None)}
    while len(drawn) <= count:
        often = [draw.gammavariate(CONCENTRATION, 1) for _ in widths]  # a draw from a Dirichlet distribution
        plan = Plan.of(parts, {c: draw.choices(widths, often)[0] for c in parts.names})
        if plan not in drawn:
            drawn.add(plan)
            yield plan


def run(model: str, parts: ComponentMap, plans: Sequence[Plan], rounds: int, space: Path) -> pd.DataFrame:
    """A row per plan: each stage's share of full precision's time, and the memory that the model took."""
    rows: list[dict[str, object]] = []
    with kept_traces(space / "traces"), ExitStack() as open_all_the_time:
        native = open_all_the_time.enter_context(running(model, parts, Plan.uniform(parts, None), space / "native"))
        for start in range(0, len(plans), AT_ONCE):
            some = plans[start : start + AT_ONCE]
            with ExitStack() as stack:
                models = [native, *(stack.enter_context(running(model, parts, p, space / p.key)) for p in some)]
                times = [[one.round(0) for one in models] for _ in range(rounds + 1)][1:]  # the first is slower
                rows += [
                    row(plan, one, [(of[number], of[0]) for of in times])
                    for number, (plan, one) in enumerate(zip(some, models[1:], strict=True), 1)
                ]
    return pd.DataFrame(rows)


def running(model: str, parts: ComponentMap, plan: Plan, out: Path) -> AbstractContextManager[TimedModel]:
    """A process that holds a plan in the runtime."""
    write(Job(model, parts, plan, {"model": model}, dtype=torch.float32), out, RUNTIME)
    return timed_model(Asked(str(out), model, RUNTIME, "float32", 1, "vqa", 1, 0))


def row(plan: Plan, one: TimedModel, times: Sequence[tuple[Round, Round]]) -> dict[str, object]:
    """What was measured of a plan."""
    held = one.memory()
    assert held is not None
    found: dict[str, object] = {"plan": plan.describe()}
    found |= {kind: held[kind] / GB for kind in ("anonymous", "mapped")}
    found["resident"] = (held["anonymous"] + held["mapped"]) / GB
    for name, stage in COLUMNS.items():
        found[name] = interval([stage(ours).cpu / stage(full).cpu for ours, full in times])["median"]
    print(found, flush=True)
    return found


def compared(table: pd.DataFrame, parts: ComponentMap, plans: Sequence[Plan], times: LayerTimes) -> pd.DataFrame:
    """The table with milliseconds in place of shares, and what was predicted beside them."""
    native = Plan.uniform(parts, None)
    for name in COLUMNS:
        table[name] *= times.plan_cost(parts, native, f"ms_per_{name}")
        table[f"predicted {name}"] = [times.plan_cost(parts, plan, f"ms_per_{name}") for plan in plans]
    table["predicted resident"] = [times.plan_cost(parts, plan, "gb_resident") for plan in plans]
    return table


def summary(table: pd.DataFrame) -> Mapping[str, str]:
    """For each quantity the error of its prediction, and the rank correlation."""
    found = {}
    for name in (*COLUMNS, "resident"):
        error = table[f"predicted {name}"] / table[name] - 1
        rank = spearmanr(table[f"predicted {name}"], table[name]).statistic
        found[name] = (
            f"{table[name].min():.3g} to {table[name].max():.3g}, error median {error.median():+.1%}, largest "
            f"{error.abs().max():.1%}, within 10 %: {(error.abs() <= 0.1).mean():.0%}, rank correlation {rank:.3f}"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=float, default=0.1, help="the share of the model's blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as space:
        model = str(save(SHAPE, Path(space) / "model", args.depth))
        parts = inspect(model, by="group.kind")
        times = profile_layers(model, SCHEMES, RUNTIME, "vqa", args.rounds, threads=1)
        print({name: round(value, 3) for name, value in times.rest.items()}, times.tokens, times.resident, flush=True)
        plans = list(random_plans(parts, args.plans, random.Random(args.seed)))
        table = compared(run(model, parts, plans, args.rounds, Path(space)), parts, plans, times)
    if args.out:
        table.to_csv(args.out, index=False, float_format="%.4g")
    for name, words in summary(table).items():
        print(f"{name}: {words}, n = {len(table)}")


if __name__ == "__main__":
    main()
