"""What users of other tools would pick, side by side: the best plan by each score, `plan`, a sweep, and uniform plans.

    python -m experiments.peers [--settings heavy,plain] [--n 200] [--test 600] [--again]

All choose plans for the same budgets (those of experiments.benchmarks.quick_plans) at 2, 3, 4, 6 and 8 bits by
group.kind, from the same calibration examples. `plan`, the sweep of 60 plans with `recommend`, and each component run
alone also see n examples of the task. What they choose then runs on examples that no chooser saw, and is compared
example by example with what the sweep chose.

The scores are ours, by the formulas of ModelOpt (fisher, kl), AutoRound (autoround.py), HIGGS (higgs), and coverage by
Aumann and Shapley (coverage, from integrals of fewer examples and passes than `explain` takes); with_modelopt.py
compares the first with the package itself. Some settings should mislead scores: rounded inputs, another task's
calibration data, few examples.

Settings in reports/peers.csv are not run again; with --again, `plan` is, beside what the others chose: it then has no
seconds, since a machine's speed differs from day to day. One that was cut off goes on from runs/peers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.benchmarks.quick_plans import TESTED, budgets
from experiments.peers.choosers import BASE, PLANS, SETTINGS, Setting, choices
from experiments.peers.page import page
from sensitivity.api.sweeping import sweep
from sensitivity.spec.files import overwrite
from sensitivity.study.scores import paired_difference
from sensitivity.study.study import Study

ROOT = Path(__file__).parent.parent.parent
TABLE, RUNS = ROOT / "reports" / "peers.csv", ROOT / "runs" / "peers"
MEAN = "mean"  # of the differences at all budgets, on the same examples


def compared(name: str, setting: Setting, n: int, test: int, before: pd.DataFrame) -> Iterator[dict[str, object]]:
    """For each chooser a row for each budget, and one for their mean."""
    folder = RUNS / f"{name.replace(' ', '-')}-{n}"
    vlm, parts, found = choices(setting, n, folder, before)
    every = list(dict.fromkeys(plan for chosen in found.plans.values() for plan in chosen))
    print(name, len(every), "plans to test", flush=True)
    tested = sweep(vlm, parts, every, [setting.task], folder / f"test-{test}", n=test, seed=TESTED)
    for chooser, plans in found.plans.items():
        seconds = None if len(before) and chooser in PLANS else round(found.seconds[chooser], 1)
        head = {"setting": name, "chooser": chooser, "cpu_s": seconds, "n": n, "test": test}
        bases = found.plans[BASE]
        frames = [frame(tested, plan, base) for plan, base in zip(plans, bases, strict=True)]
        for bpw, own, plan, base in zip(budgets(parts), frames, plans, bases, strict=True):
            yield {**head, "bpw": f"{bpw:g}", **difference(own, plan == base), "plan": plan.describe()}
        together = frames[0][["cluster"]].assign(
            score=np.mean([one["score"] for one in frames], axis=0),
            score_base=np.mean([one["score_base"] for one in frames], axis=0),
        )
        yield {**head, "bpw": MEAN, **difference(together, plans == bases)}


def frame(tested: Study, plan: object, base: object) -> pd.DataFrame:
    """The scores of a plan and of the sweep's on the same examples, in the order of the examples."""
    own, theirs = tested.examples(plan), tested.examples(base)  # type: ignore[arg-type]
    assert own is not None
    assert theirs is not None
    return own.merge(theirs, on="example", suffixes=("", "_base")).sort_values("example", ignore_index=True)


def difference(both: pd.DataFrame, same: bool) -> dict[str, object]:
    """The mean score and its difference to the base's; of the same plan there is nothing to estimate."""
    gain = paired_difference(both["score"], both["score_base"], both["cluster"])
    low, high = (0.0, 0.0) if same else (round(gain.low, 5), round(gain.high, 5))
    return {"score": round(float(both["score"].mean()), 4), "to_sweep": round(gain.mean, 5), "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--test", type=int, default=600)
    parser.add_argument("--again", action="store_true", help="run plan again, not the others")
    args = parser.parse_args()
    table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame({"setting": []})
    for name in filter(None, args.settings.split(",")):
        before = table[table["setting"] == name]
        if args.again or before.empty:
            rows = pd.DataFrame(compared(name, SETTINGS[name], args.n, args.test, before))
            table = pd.read_csv(TABLE) if TABLE.exists() else table  # another process may have added to it
            table = pd.concat([table[table["setting"] != name], rows], ignore_index=True)
            overwrite(TABLE, table.to_csv(index=False))
            print(rows.drop(columns="plan").to_string(), flush=True)
    overwrite(TABLE.with_suffix(".md"), page(table))


if __name__ == "__main__":
    main()
