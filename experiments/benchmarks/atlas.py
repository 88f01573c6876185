"""Each model left out of an atlas: do the intervals hold, what do its plans lose, and how many measurements it saves.

    python -m experiments.benchmarks.atlas [--n 500] [--seeds 5] [--kinds embedded,published]

Studies of the embedded models (a grid by part, rounded to nearest), or the two published tables of BLIP-2 (GPTQ by
part; min-max rounding of 18 components), read from SENSITIVITY_SHARED or ../shared; or both. Each is left out once,
and predicted from the others.

* Intervals: what is true of a plan is its score in the study that was left out, or where that did not measure the plan,
  its surrogate's prediction.
* Loss: score of the best measured plan within the budget minus that of the atlas's plan, of which nothing was measured;
  beside it the loss of the best uniform plan within the budget. Only where all plans were measured.
* Measurements: `frontier` searches the left-out table without a prior; with the damages of the others of its kind as
  prior, for a published table those of the other one; with those of the wrong parts; and with those of all others. A
  search of an embedded model reads the first 200 examples of each plan, what is true is the mean over all others
  (measured_grids.py); of a table it reads the table (score_tables.py). Counted are the plans until the best of those
  that `recommend` would verify lose at most 1 %; beside it, until those measured plans do that it believes to be best.

Searches that reports/atlas.csv holds are not run again; it was measured with the --n of the page.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.benchmarks.measured_grids import read
from experiments.benchmarks.replay import regrets, verified_regret, walk
from experiments.benchmarks.score_tables import Table, gptq, of_grid, uniform
from sensitivity import Study, add_to_atlas, grid, inspect, load, predict_frontier, sweep
from sensitivity.analysis.allocate.by_scores import combined
from sensitivity.analysis.atlas.priors import schemes_of
from sensitivity.analysis.observations import observations_of
from sensitivity.analysis.surrogate.fitting import fit_surrogate
from sensitivity.analysis.surrogate.space import Expected, Space
from sensitivity.analysis.surrogate.transfer import measured_damages, transfer_damages
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.sizes import size
from sensitivity.study.storage import expected

ROOT = Path(__file__).parent.parent.parent
MODELS = ("scenes-llava", "scenes-llava-heavy", "scenes-blip2")
WALKS = ROOT / "reports" / "atlas.csv"
BITS = (2, 3, 4, 8)
AVERAGES = (3.0, 4.0, 5.0, 6.0)  # budgets: mean bits of the quantized weights
AFTER = (3, 5, 10, 20)  # numbers of plans after which the loss is shown
MAX_PLANS = {"embedded": 20, "published": 30}  # plans that a search measures
ENOUGH = 1.0  # loss in % of full precision at which a search has found its plans
NONE, ALIKE, WRONG, ALL = "none", "others of its kind", "of the wrong parts", "all others"


@dataclass(frozen=True)
class Known:
    """A study, and its scores as a table that a search can read."""

    study: Study
    table: Table
    kind: str

    @property
    def name(self) -> str:
        return self.study.path.name


def embedded(name: str, n: int, folder: Path) -> Known:
    vlm = load(f"embedded:{name}")
    parts = inspect(vlm, by="part")
    study = sweep(vlm, parts, grid(parts, bits=BITS, method="rtn"), tasks=["vqa"], out=folder / name, n=n)
    return Known(study, of_grid(read(study)), "embedded")


def published(table: Table, folder: Path) -> Known:
    parts = replace(table.parts, model=table.name)
    path = folder / table.name.replace(" ", "-")
    fresh = not path.exists()
    study = Study.create(path, parts, ["score"], {"model": table.name}) if fresh else Study(path)
    if fresh:
        study.append(table.plans, [{"score": float(one)} for one in table.reading])
    return Known(study, table, "published")


def shares(study: Study, plans: Sequence[Plan], schemes: Sequence[Scheme]) -> list[float]:
    """The share of full precision that each plan keeps in the study of its own model."""
    seen = observations_of(study)
    space = Space.of([*seen.plans, *plans], {name: dict.fromkeys(schemes, 1.0) for name in study.parts.names})
    model = fit_surrogate(space, space.encode(seen.plans), seen.score, seen.full, seen.noises)
    known = {key: float(seen.score[[key == one for one in seen.keys]].mean()) for key in set(seen.keys)}
    predicted = model.predict(space.encode(plans))
    return [known.get(plan.key, float(p)) / seen.full for plan, p in zip(plans, predicted, strict=True)]


def best(study: Study, bpw: float, uniform: bool) -> float:
    """The largest share that a measured plan within a budget keeps, of all or of the uniform ones."""
    seen = observations_of(study)
    fits = [size(study.parts, plan).bpw <= bpw and (plan.is_uniform or not uniform) for plan in seen.plans]
    return float(seen.score[fits].max() / seen.full) if any(fits) else 0.0


def frontier(own: Study, atlas: Path, complete: bool) -> Iterator[dict[str, object]]:
    """What an atlas without a model says of it, beside what was measured."""
    schemes = schemes_of(own)
    inside = sum(component.numel for component in own.parts.components)
    kept = (own.parts.numel - inside) * own.parts.native_bits
    budgets = [(average * inside + kept) / own.parts.numel + 0.05 for average in AVERAGES]
    found = predict_frontier(own.parts, schemes, atlas, budgets)
    measured = shares(own, [point.plan for point in found.points], schemes)
    for average, point, share in zip(AVERAGES, found.points, measured, strict=True):
        yield {
            "model": own.path.name, "bits": average, "predicted": point.share, "low": point.low, "high": point.high,
            "measured": share, "held": round(point.low, 3) <= round(min(share, 1.0), 3) <= round(point.high, 3),
            "lost": best(own, point.bpw, False) - share if complete else np.nan,
            "uniform lost": best(own, point.bpw, False) - best(own, point.bpw, True) if complete else np.nan,
            "halved by": found.halved_by,
        }  # fmt: skip


def priors(own: Known, studies: Sequence[Known]) -> dict[str, Expected | None]:
    """The damages that a search of a table may expect."""
    others = [one for one in studies if one is not own]
    alike, every = (
        combined(
            [
                transfer_damages(measured_damages(one.study), own.study.parts, schemes_of(own.study), one.name)
                for one in some
            ]
        )
        for some in ([one for one in others if one.kind == own.kind], others)
    )
    names = list(alike)
    wrong = {name: alike[other] for name, other in zip(names, names[1:] + names[:1], strict=True)}
    return {NONE: None, ALIKE: alike, WRONG: wrong, **({ALL: every} if every != alike else {})}


def searches(own: Known, studies: Sequence[Known], folder: Path, seeds: int) -> None:
    """Add to the record the loss after every plan of a search, with each prior and seed."""
    for (prior, damages), seed in itertools.product(priors(own, studies).items(), range(seeds)):
        done = pd.read_csv(WALKS) if WALKS.exists() else pd.DataFrame({"model": [], "prior": [], "seed": []})
        if ((done["model"] == own.name) & (done["prior"] == prior) & (done["seed"] == seed)).any():
            continue
        place = folder / "priors" / f"{own.name}-{prior.replace(' ', '-')}"
        place.mkdir(parents=True, exist_ok=True)
        if damages is not None:
            expected.save(place, damages, prior)
        began = time.process_time()
        rows = walk(own.table, "frontier", MAX_PLANS[own.kind], seed, place)
        found = [
            {"model": own.name, "prior": prior, "seed": seed, "plans": plans,
             "lost": verified_regret(own.table, rows[:plans], damages),
             "believed": regrets(own.table, rows[:plans], damages)["believed"]}
            for plans in range(2, MAX_PLANS[own.kind] + 1)
        ]  # fmt: skip
        seconds = round(time.process_time() - began, 1)
        rows_ = pd.concat([done, pd.DataFrame(found).assign(cpu_s=seconds)], ignore_index=True)
        overwrite(WALKS, rows_.to_csv(index=False, float_format="%.4g"))
        print(own.name, prior, seed, f"{seconds} CPU s", flush=True)


def left_out(studies: Sequence[Known], folder: Path) -> pd.DataFrame:
    """Each study predicted from the others."""
    points: list[dict[str, object]] = []
    for own in studies:
        atlas = folder / "atlases" / f"without-{own.name}.parquet"
        for other in studies:
            if other is not own:
                add_to_atlas(other.study, atlas)
        points += frontier(own.study, atlas, own.table.factors is None)
        print(pd.DataFrame(points).tail(len(AVERAGES)).to_string(), flush=True)
    return pd.DataFrame(points)


def reached(walks: pd.DataFrame) -> pd.DataFrame:
    """The plans until a search has found its plans, and what is lost after some numbers of plans; means over seeds.

    A search that does not find them counts as one plan more than it measured.
    """
    rows = []
    for (model, prior), own in walks.groupby(["model", "prior"], sort=False):
        most = int(own["plans"].max())
        first, believed = (
            [
                int(one.loc[one[loss] <= ENOUGH, "plans"].min()) if (one[loss] <= ENOUGH).any() else most + 1
                for _, one in own.groupby("seed")
            ]
            for loss in ("lost", "believed")
        )
        after = {f"after {n}": own.loc[own["plans"] == n, "lost"].mean() for n in AFTER}
        all_ = ", ".join(f"over {most}" if one > most else f"{one}" for one in first)
        own_plans = {"plans": np.mean(first), "all": all_, "believed": np.mean(believed)}
        rows.append({"model": model, "prior": prior, **own_plans, **after})
    return pd.DataFrame(rows)


def page(points: pd.DataFrame, walks: pd.DataFrame, args: argparse.Namespace, studies: Sequence[Known]) -> str:
    heads = ("left out", "bits", "predicted", "95 % interval", "measured", "held", "lost", "uniform lost", "halved by")
    rows = [
        f"| {row['model']} | {row['bits']:g} | {row['predicted']:.3f} | {row['low']:.3f} to {row['high']:.3f} | "
        f"{row['measured']:.3f} | {'yes' if row['held'] else 'no'} | {shown(row['lost'])} | "
        f"{shown(row['uniform lost'])} | {shown(row['halved by'], 0)} |"
        for _, row in points.iterrows()
    ]
    found = reached(walks)
    table = [
        f"| {row['model']} | {row['prior']} | {row['plans']:.1f} | "
        f"{row['all']} | {row['believed']:.1f} | " + " | ".join(f"{row[f'after {n}']:.2f}" for n in AFTER) + " |"
        for _, row in found.iterrows()
    ]
    full = points.dropna(subset=["lost"])
    return (
        "# Models left out of an atlas\n\n"
        f"`python -m experiments.benchmarks.atlas --n {args.n} --seeds {args.seeds} --kinds {args.kinds}`, whose\n"
        f"first lines say how: {len(studies)} studies, each predicted from the others. Shares are of full precision's\n"
        "score, bits are a mean over the quantized weights.\n\n"
        "## Predictions without a measurement\n\n"
        f"Intervals hold {points['held'].sum()} of {len(points)} plans; their median width is "
        f"{np.median(points['high'] - points['low']):.2f}.\n"
        f"The atlas's plans lose {100 * full['lost'].mean():.1f} % on average, the best uniform plans within\n"
        f"the same budgets {100 * full['uniform lost'].mean():.1f} %. `halved by`: plans that would halve the\n"
        "intervals, as the atlas says itself; that was not checked.\n\n"
        f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n" + "\n".join(rows) + "\n\n"
        "## Measurements with and without\n\n"
        "Plans that `frontier` measures until the best of those that `recommend` would verify lose at most\n"
        f"{ENOUGH:g} % (mean over budgets), as a mean over {args.seeds} seeds; `believed`: until those measured plans\n"
        "do that it believes to be best. Then what is lost (%) after some numbers of plans, as verified. The searches\n"
        f"took {walks.groupby(['model', 'prior', 'seed'])['cpu_s'].first().sum():.0f} CPU s.\n\n"
        f"| left out | prior | plans | each seed | believed | {' | '.join(f'after {n}' for n in AFTER)} |\n"
        f"|{'---|' * 9}\n"
        + "\n".join(table) + "\n"
    )  # fmt: skip


def shown(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kinds", default="embedded")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "atlas", help="where studies are kept")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    studies = [embedded(name, args.n, args.runs) for name in MODELS if "embedded" in kinds]
    if "published" in kinds:
        studies += [published(table, args.runs) for table in (gptq("cider"), uniform())]
    points = left_out(studies, args.runs)
    for own in reversed(studies):
        searches(own, studies, args.runs, args.seeds)
    walks = pd.read_csv(WALKS)
    walks = walks[walks["model"].isin([one.name for one in studies])]
    name = "atlas" if "embedded" in kinds else "atlas-published"
    overwrite(ROOT / "reports" / f"{name}.md", page(points, walks, args, studies))


if __name__ == "__main__":
    main()
