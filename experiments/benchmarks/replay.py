"""Search methods on tables of plans that were measured before: regret of the frontier against the number of plans.

    python -m experiments.benchmarks.replay [--seeds 20] [--searches tpe,frontier] [--only gptq,planted]

A table replaces the model: the score of a plan that a search asks for is read from it. After some plans a plan
is chosen for each budget from 3.5 to 8 bpw, in three ways (see regrets), and its true score is compared with the best
true score within the budget. Truth is known for planted tables; for a noisy published one it is the table smoothed by
a Gaussian process, for one without noise the table itself. "The whole table" has measured everything: what remains
there is the table's own noise. The published tables are read from SENSITIVITY_SHARED or ../shared and left out where
they are not.

What reports/replay.csv already holds is not run again: more seeds only add to it, and a change of the code asks for a
new file. The time of GP grows with the cube of the evaluations: it stops at 64.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from optuna.distributions import IntDistribution
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from sensitivity.analysis.search.frontier_sampler import FrontierSampler, PlanSizes
from sensitivity.analysis.search.samplers import MAXIMIZE, MINIMIZE, SAMPLERS, sampled_plans
from sensitivity.analysis.search.search_space import SearchSpace
from sensitivity.analysis.surrogate.surrogate import Space, Surrogate, fit_surrogate
from sensitivity.spec.components import ComponentMap, Kept, Weight
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.sizes import size

ROOT = Path(__file__).parent.parent.parent
SHARED = Path(os.environ.get("SENSITIVITY_SHARED", ROOT.parent / "shared")) / "data" / "published"
BUDGETS = np.arange(3.5, 8.01, 0.25)
SHARES = (0.05, 0.1, 0.2)
GP_MOST = 64  # evaluations of the GP sampler
WHOLE = "the whole table"
SIZES = {"vision": 984_023_040, "connector": 104_988_672, "language": 2_516_582_400}
TOTAL = 3_744_761_856


@dataclass(frozen=True)
class Table:
    """Distinct plans, one measured score of each, their true scores and sizes."""

    name: str
    parts: ComponentMap
    plans: list[Plan]
    reading: np.ndarray
    truth: np.ndarray
    noise: float | None
    factors: np.ndarray | None = None  # where not every combination exists: the table's own columns, as levels

    @property
    def space(self) -> Space:
        return Space.of(self.plans)

    @property
    def bpw(self) -> np.ndarray:
        return np.array([size(self.parts, plan).bpw for plan in self.plans])


def part_map(sizes: dict[str, int], total: int) -> ComponentMap:
    weights = tuple(Weight(f"{n}.weight", 1, s, n.split(".")[0], None, 0, None) for n, s in sizes.items())
    return ComponentMap("table", "linear", weights, (Kept("rest", total - sum(sizes.values()), "rest"),))


def plan_of(names: list[str], bits: np.ndarray) -> Plan:
    schemes = (None if b == 16 else Scheme("codes", int(b)) for b in bits)
    return Plan(tuple(zip(names, schemes, strict=True)))


def gptq(score: str) -> Table:
    table = pd.read_csv(SHARED / "blip2_gptq_coco.csv")
    bits = table[["vit_bits", "qformer_bits", "llm_bits"]].to_numpy(dtype=float)
    kernel = ConstantKernel(1) * RBF([1, 1, 1], (0.3, 20)) + WhiteKernel(0.01)
    reading = table[score].to_numpy(dtype=float)
    process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=0)
    truth = process.fit(np.log2(bits), reading).predict(np.log2(bits))
    parts = part_map(SIZES, TOTAL)
    return Table(f"GPTQ {score}", parts, [plan_of(list(SIZES), row) for row in bits], reading, truth, None)


def uniform() -> Table:
    table = pd.read_csv(SHARED / "blip2_uniform_coco.csv")
    parts = {"VIT": "vision", "QFORMER": "connector", "LLM": "language"}
    thirds = ("FIRST", "MIDDLE", "LAST")
    on = {f"{p}.{t}.{k}": table[f"{c}_{t}"].to_numpy() * np.isin(table["type"], [w, "BOTH"])
          for c, p in parts.items() for t in thirds for k, w in (("attn", "ATTENTION"), ("ff", "MLP"))}  # fmt: skip
    bits = np.column_stack([np.where(column == 1, table["bit_size"], 16) for column in on.values()])
    switches = table[[f"{c}_{t}" for c in parts for t in thirds]].to_numpy()
    patterns = switches.reshape(-1, 3, 3) @ [4, 2, 1]
    kind = table["type"].map({"MLP": 0, "ATTENTION": 1, "BOTH": 2}).to_numpy()
    width = np.searchsorted([3, 4, 5, 6, 8, 16], table["bit_size"])
    _, first = np.unique(bits, axis=0, return_index=True)  # plans that change the same weights are one plan
    names = list(on)
    components = part_map({n: SIZES[n.split(".")[0]] // 6 for n in names}, TOTAL)
    score = table["CIDEr"].to_numpy(dtype=float)[first]
    plans = [plan_of(names, row) for row in bits[first]]
    return Table(
        "uniform CIDEr", components, plans, score, score, None, np.column_stack([width, kind, patterns])[first]
    )


def planted(name: str, cross: float, noise: float, seed: int) -> Table:
    """Synthetic: four components at five bit widths; `cross` adds damage where vision and language are both low."""
    draw = np.random.default_rng(seed)
    names = ["vision.front", "vision.end", "connector", "language"]
    bits = np.array([*itertools.product((2, 3, 4, 6, 16), repeat=4)], dtype=float)
    harm = np.exp(-(bits - draw.uniform(0, 3, 4)))
    harm[bits == 16] = 0
    truth = np.exp(-harm.sum(axis=1) - cross * harm[:, 0] * harm[:, 3])
    parts = part_map(dict(zip(names, (300, 320, 60, 2500), strict=True)), 3300)
    reading = truth + noise * draw.standard_normal(len(truth))
    return Table(name, parts, [plan_of(names, row) for row in bits], reading, truth, noise)


def tables(only: str | None) -> Iterator[Table]:
    made: dict[str, Callable[[], Table]] = {}
    if SHARED.exists():
        made |= {"gptq": lambda: gptq("cider"), "meteor": lambda: gptq("meteor"), "uniform": uniform}
    made |= {
        "planted": lambda: planted("planted", 0.0, 0.03, 0),
        "planted-pairs": lambda: planted("planted, pairs", 4.0, 0.03, 1),
        "planted-quiet": lambda: planted("planted, quiet", 0.0, 0.002, 2),
    }
    for name, make in made.items():
        if only is None or name in only.split(","):
            yield make()


def walk(table: Table, search: str, count: int, seed: int) -> list[int]:
    """The plans that a search asks for, in order, as row numbers."""
    if search in ("random", "one-at-a-time"):
        lot = np.random.default_rng(seed).permutation(len(table.plans))
        if search == "one-at-a-time":  # full precision, uniform plans and each part alone; then at random
            lot = np.array(sorted(lot, key=lambda i: not _simple(table.plans[i])))
        return [int(i) for i in lot[:count]]
    if table.factors is not None:
        return walk_rows(table, search, count, seed)
    place = {plan.key: i for i, plan in enumerate(table.plans)}
    bpw, rows, trials = table.bpw, list[int](), list[SimpleNamespace]()
    study = SimpleNamespace(tasks=("score",), parts=table.parts, trials=lambda: trials)
    schemes = sorted({s for plan in table.plans for _, s in plan.schemes if s}, key=lambda s: s.bits)
    choices = dict(zip(table.space.names, table.space.choices, strict=True))
    search_space = SearchSpace.of(table.parts, schemes, lambda name, scheme: scheme in choices[name])
    for plan in sampled_plans(study, search_space, search, 10**9, seed * 10_000):  # type: ignore[arg-type]
        i = place[plan.key]
        trials.append(SimpleNamespace(key=plan.key, plan=plan, values=[float(table.reading[i]), float(bpw[i])]))
        rows.append(i)
        if len(rows) == count:
            return rows
    return rows


def _simple(plan: Plan) -> bool:
    return plan.is_uniform or sum(scheme is not None for _, scheme in plan.schemes) <= 1


def walk_rows(table: Table, search: str, count: int, seed: int) -> list[int]:
    """The same for a table without all combinations: a plan that is missing is replaced by the nearest one."""
    assert table.factors is not None
    bpw, rows = table.bpw, list[int]()
    if search == "frontier":
        space = table.space
        index = space.encode(table.plans)
        place = {tuple(row): i for i, row in enumerate(index)}
        native = size(table.parts, Plan.uniform(table.parts, None)).bits
        bits = tuple(
            np.array([(o.bits if o else 16) * c.numel for o in options], dtype=float)
            for c, options in zip(table.parts.components, space.choices, strict=True)
        )
        weights = PlanSizes(bits, native - sum(b[0] for b in bits), table.parts.numel)
        sampler = FrontierSampler(space, weights, candidates=index, seed=seed)
        while len(rows) < count:
            rows.append(place[tuple(sampler.next(index[rows], table.reading[rows][:, None]))])
        return rows
    levels = [int(column.max()) + 1 for column in table.factors.T]
    search_space = SimpleNamespace(joint=None, sizes=None, low=None)
    study = optuna.create_study(directions=[MAXIMIZE, MINIMIZE], sampler=SAMPLERS[search](search_space, seed))  # type: ignore[arg-type]
    space_ = {f"f{i}": IntDistribution(0, n - 1) for i, n in enumerate(levels)}
    for _ in range(20 * count):
        trial = study.ask(dict(space_))
        wish = np.array([trial.params[name] for name in space_])
        bits_apart = np.array([[bin(int(a) ^ int(b)).count("1") for a, b in zip(r[2:], wish[2:], strict=True)]
                               for r in table.factors]).sum(axis=1)  # fmt: skip
        apart = 2 * np.abs(table.factors[:, 0] - wish[0]) + 2 * (table.factors[:, 1] != wish[1]) + bits_apart
        i = int(np.argmin(apart))
        study.tell(trial, [float(table.reading[i]), float(bpw[i])])
        if i not in rows:
            rows.append(i)
        if len(rows) == count:
            break
    return rows


def denoised(model: Surrogate, index: np.ndarray, scores: np.ndarray, noise: float | None) -> np.ndarray:
    """Scores of measured plans with noise removed: the prediction, plus the share of its residual that is not noise.

    Where the noise is unknown, all of the residual counts as noise.
    """
    spread = model.sigma**2
    own = 0.0 if noise is None or spread == 0 else max(0.0, 1 - noise**2 / spread)
    expected = model.predict(index)
    return np.asarray(expected + own * (scores - expected))


def regrets(table: Table, rows: list[int]) -> dict[str, float]:
    """Mean over budgets of the score that is lost, in percent of full precision, for three ways to choose a plan.

    reading: the measured plan with the highest measured score; believed: the measured plan with the best score
    according to the surrogate; recommended: any plan, as `sensitivity recommend` would (before running it).
    """
    chosen, bpw, space = np.array(rows), table.bpw, table.space
    index = space.encode(table.plans)
    model = fit_surrogate(space, index[chosen], table.reading[chosen], noise=table.noise)
    belief = denoised(model, index[chosen], table.reading[chosen], table.noise)
    ways = {
        "reading": (chosen, table.reading[chosen]),
        "believed": (chosen, belief),
        "recommended": (np.arange(len(bpw)), model.predict(index)),
    }
    full = table.truth[np.argmax(bpw)]
    found = {}
    for name, (plans, value) in ways.items():
        missed = []
        for budget in BUDGETS[bpw.min() <= BUDGETS]:
            fits = bpw[plans] <= budget
            held = table.truth[plans[fits][np.argmax(value[fits])]] if fits.any() else 0.0
            missed.append((table.truth[bpw <= budget].max() - held) / full)
        found[name] = 100 * float(np.mean(missed))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--searches", default="random,one-at-a-time,tpe,nsga2,gp,frontier")
    parser.add_argument("--only")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "replay.csv")
    args = parser.parse_args()
    found: list[dict[str, object]] = []
    if args.out.exists():
        found = pd.read_csv(args.out).to_dict("records")  # type: ignore[assignment]
    done = {(one["table"], one["search"], one["seed"]) for one in found}
    made = list(tables(args.only))
    for seed, table in itertools.product(range(args.seeds), made):  # all tables with a few seeds before many seeds
        marks = [round(share * len(table.plans)) for share in SHARES]
        steps = sorted({*marks, *np.geomspace(8, marks[-1], 6).round().astype(int).tolist()})
        if (table.name, WHOLE, 0) not in done:
            done.add((table.name, WHOLE, 0))
            for n in marks:
                found += records(table, WHOLE, 0, n, list(range(len(table.plans))), 0.0)
        for search in args.searches.split(","):
            if (table.name, search, seed) in done:
                continue
            began = time.perf_counter()
            asked = walk(table, search, min(marks[-1], GP_MOST) if search == "gp" else marks[-1], seed)
            seconds = time.perf_counter() - began
            for n in steps:
                found += records(table, search, seed, n, asked[:n], seconds) if n <= len(asked) else []
            print(table.name, search, seed, f"{seconds:.1f} s for {len(asked)} plans", flush=True)
            pd.DataFrame(found).to_csv(args.out, index=False, float_format="%.4f")
    save(pd.DataFrame(found), args.out)


def records(
    table: Table, search: str, seed: int, plans: int, rows: list[int], seconds: float
) -> list[dict[str, object]]:
    share = plans / len(table.plans)
    return [
        {"table": table.name, "search": search, "seed": seed, "plans": plans, "share": share, "pick": pick,
         "regret": regret, "seconds": seconds}
        for pick, regret in regrets(table, rows).items()
    ]  # fmt: skip


def save(found: pd.DataFrame, out: Path) -> None:
    """Write the report's table and its figure."""
    marks = found[found["share"].round(2).isin(SHARES)].assign(share=lambda t: (100 * t["share"]).round())
    wide = marks.pivot_table(index=["table", "pick", "search"], columns="share", values="regret").round(2)
    seeds = found[found["search"] != WHOLE].groupby(["table", "search"])["seed"].nunique()
    wide.insert(0, "seeds", [seeds.get((table, search), 1) for table, _, search in wide.index])
    overwrite(
        out.with_suffix(".md"),
        "# Regret of the frontier, % of full precision, after measuring a share of all plans (%)\n\n"
        "`python -m experiments.benchmarks.replay`, with --only and --searches for the tables and searches below; mean "
        f"over the seeds named. gp stops at {GP_MOST} plans.\n\n```\n{wide.to_string()}\n```\n\n{won(marks)}\n",
    )
    curves = found[found["search"] != WHOLE]
    names = list(curves["table"].unique())
    across, down = min(3, len(names)), -(-len(names) // 3)
    figure = Figure(figsize=(4.5 * across, 4 * down), layout="constrained")
    for axes, name in zip(figure.subplots(down, across, squeeze=False).flat, names, strict=False):
        rows = curves[(curves["table"] == name) & (curves["pick"] == "believed")]
        sns.lineplot(
            rows, x="plans", y="regret", hue="search", style="search", palette="colorblind", ax=axes, n_boot=200
        )
        axes.set(title=name, xlabel="plans measured", ylabel="regret, % of full precision", ylim=(0, 25))
    figure.savefig(out.with_suffix(".png"), dpi=110)


def won(marks: pd.DataFrame) -> str:
    """A sentence on where the frontier sampler has the least regret when measured plans are picked by `believed`."""
    rows = marks[(marks["pick"] == "believed") & (marks["search"] != WHOLE)]
    mean = rows.pivot_table(index=["table", "share"], columns="search", values="regret")
    if "frontier" not in mean or mean.shape[1] < 2:
        return ""
    best = mean.drop(columns="frontier").min(axis=1)
    lost = [f"{table} at {share:g} %" for table, share in mean.index[mean["frontier"] >= best]]
    cases = f"{len(mean) - len(lost)} of {len(mean)} cases"
    told = f"`frontier` has the least regret of a measured plan (believed) in {cases}"
    return f"{told}; not on {', '.join(lost)}." if lost else f"{told}."


if __name__ == "__main__":
    main()
