"""Search methods on tables of plans that were measured before: regret of the frontier against the number of plans.

    python -m experiments.benchmarks.replay [--seeds 20] [--searches tpe,frontier] [--only gptq,planted]

A table replaces the model: the score of a plan that a search asks for is read from it. After some plans a plan
is chosen for each budget from 3.5 to 8 bpw, in three ways (see regrets), and its true score is compared with the best
true score within the budget (see score_tables.py). "The whole table" has measured everything: what remains there is
the table's own noise.

What reports/replay.csv already holds is not run again: more seeds only add to it, and a change of the code asks for a
new file. The time of GP grows with the cube of the evaluations: it stops at 64.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from optuna.distributions import IntDistribution

from experiments.benchmarks.score_tables import Table, tables
from sensitivity.analysis.recommending.request import TOP
from sensitivity.analysis.search.frontier_sampler import FrontierSampler, PlanSizes
from sensitivity.analysis.search.samplers import MAXIMIZE, MINIMIZE, SAMPLERS, sampled_plans
from sensitivity.analysis.search.search_space import SearchSpace
from sensitivity.analysis.surrogate.fitting import fit_surrogate
from sensitivity.analysis.surrogate.space import Expected
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import Plan
from sensitivity.spec.sizes import size
from sensitivity.study.storage.expected import read as read_expected

ROOT = Path(__file__).parent.parent.parent
BUDGETS = np.arange(3.5, 8.01, 0.25)
SHARES = (0.05, 0.1, 0.2)
GP_MOST = 64  # evaluations of the GP sampler
WHOLE = "the whole table"


def walk(table: Table, search: str, count: int, seed: int, folder: Path = Path("nowhere")) -> list[int]:
    """The plans that a search asks for, in order, as row numbers; a folder may hold damages that it expects."""
    if search in ("random", "one-at-a-time"):
        lot = np.random.default_rng(seed).permutation(len(table.plans))
        if search == "one-at-a-time":  # full precision, uniform plans and each part alone; then at random
            lot = np.array(sorted(lot, key=lambda i: not _simple(table.plans[i])))
        return [int(i) for i in lot[:count]]
    if table.factors is not None:
        return walk_rows(table, search, count, seed, read_expected(folder))
    place = {plan.key: i for i, plan in enumerate(table.plans)}
    bpw, rows, trials = table.bpw, list[int](), list[SimpleNamespace]()
    study = SimpleNamespace(tasks=("score",), parts=table.parts, trials=lambda: trials, path=folder)
    schemes = sorted({s for plan in table.plans for _, s in plan.schemes if s}, key=lambda s: s.bits)
    choices = dict(zip(table.space.names, table.space.choices, strict=True))
    search_space = SearchSpace.of(
        table.parts, schemes, lambda name, scheme: scheme in choices[name] and (table.native or scheme is not None)
    )
    for plan in sampled_plans(study, search_space, search, 10**9, seed * 10_000):  # type: ignore[arg-type]
        i = place[plan.key]
        trials.append(SimpleNamespace(key=plan.key, plan=plan, values=[float(table.reading[i]), float(bpw[i])]))
        rows.append(i)
        if len(rows) == count:
            return rows
    return rows


def _simple(plan: Plan) -> bool:
    return plan.is_uniform or sum(scheme is not None for _, scheme in plan.schemes) <= 1


def walk_rows(table: Table, search: str, count: int, seed: int, expected: Expected | None = None) -> list[int]:
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
        sampler = FrontierSampler(space, weights, candidates=index, seed=seed, expected=expected)
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


def regrets(table: Table, rows: list[int], expected: Expected | None = None) -> dict[str, float]:
    """Mean over budgets of the score that is lost, in percent of full precision, for three ways to choose a plan.

    reading: the measured plan with the highest measured score; believed: the measured plan with the best score
    according to the surrogate; recommended: any plan, as `sensitivity recommend` would (before running it).
    """
    chosen, bpw, space = np.array(rows), table.bpw, table.space
    index = space.encode(table.plans)
    noise = table.noise if table.noises is None else table.noises[chosen]
    model = fit_surrogate(space, index[chosen], table.reading[chosen], noise=noise, expected=expected)
    ways = {
        "reading": (chosen, table.reading[chosen]),
        "believed": (chosen, model.predict(index[chosen])),
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


def verified_regret(table: Table, rows: list[int], expected: Expected | None = None) -> float:
    """The mean regret, in percent, where each budget's candidates of `sensitivity recommend` run on every example.

    With expected damages, these are in turn the best plans with them and those by measured plans alone.
    """
    chosen, bpw, index = np.array(rows), table.bpw, table.space.encode(table.plans)
    noise = table.noise if table.noises is None else table.noises[chosen]
    ranks = []
    for damages in [expected, None] if expected is not None else [None]:
        model = fit_surrogate(table.space, index[chosen], table.reading[chosen], noise=noise, expected=damages)
        ranks.append(np.argsort(-model.predict(index), kind="stable"))
    in_turn = np.column_stack(ranks).ravel()
    missed = []
    for budget in BUDGETS[bpw.min() <= BUDGETS]:
        candidates = list(dict.fromkeys(in_turn[bpw[in_turn] <= budget].tolist()))[:TOP]
        missed.append(table.truth[bpw <= budget].max() - table.truth[candidates].max())
    return 100 * float(np.mean(missed) / table.truth[np.argmax(bpw)])


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
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
            overwrite(args.out, pd.DataFrame(found).to_csv(index=False, float_format="%.4f"))
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
