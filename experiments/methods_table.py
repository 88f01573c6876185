"""Method x bits x part x task on an embedded model, with intervals: which method keeps the score at how few bits.

python -m experiments.methods_table [--model embedded:scenes-llava] [--n 500]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from sensitivity import verbs
from sensitivity.models import inspect, load
from sensitivity.plan import Plan, size
from sensitivity.quantize import METHODS, calibrate, scheme
from sensitivity.tasks import task

TASKS = ("vqa", "caption", "scene", "ground")
METHODS_BITS = {
    "uniform": (2, 3, 4, 5, 6, 8),
    "rtn": (2, 3, 4, 6, 8),
    "paper-gptq": (2, 3, 4, 6, 8),
    "gptq": (2, 3, 4, 6, 8),
    "awq": (2, 3, 4, 6, 8),
    "nf4": (4,),
    "llm-int8": (8,),
}
WHERE = ("vision", "connector", "language", "all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded:scenes-llava")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--work", default="runs/methods-table")
    parser.add_argument("--out", default="reports/methods-table.md")
    args = parser.parse_args()
    vlm = load(args.model)
    parts = inspect(vlm, by="part")
    evaluation = [task(name, n=args.n) for name in TASKS]
    statistics = calibrate(vlm, parts, TASKS, against=evaluation)
    plans, rows = [], []
    for method, widths in METHODS_BITS.items():
        for bits in widths:
            chosen = scheme(method, bits, calibration=statistics.facts)
            for where in WHERE:
                plan = Plan.uniform(parts, chosen) if where == "all" else Plan.of(parts, {where: chosen})
                plans.append(plan)
                rows.append({"method": method, "bits": bits, "part": where, "key": plan.key,
                             "bpw": size(parts, plan).bpw})  # fmt: skip
    study = verbs.sweep(vlm, parts, plans, TASKS, args.work, n=args.n, statistics=statistics)
    native = study.native
    by_key = {plan.key: plan for plan in plans}
    for row in rows:
        for name in TASKS:
            against = study.compare(by_key[str(row["key"])], native, name)
            assert against is not None
            row[name] = against
    write(Path(args.out), args, study, pd.DataFrame(rows), dict(statistics.facts))


def write(out: Path, args: argparse.Namespace, study: verbs.Study, table: pd.DataFrame, facts: dict) -> None:
    native = study.table().set_index("key").loc[study.native.key]
    lines = [
        "# Method x bits x part x task",
        "",
        f"`python -m experiments.methods_table --model {args.model} --n {args.n}`",
        "",
        f"{args.model}, {args.n} examples of each task; calibration: {facts['examples']} examples, float path. Full",
        "precision scores "
        + ", ".join(f"{name} {native[name]:.3f}" for name in TASKS)
        + ". Numbers are paired differences to",
        "that on the same examples, with 95 % intervals; bpw counts everything stored, kept weights at 16 bits.",
    ]
    for where in WHERE:
        lines += [
            "",
            f"## {where}",
            "",
            f"| method | bits | bpw | {' | '.join(TASKS)} |",
            "|---" * (3 + len(TASKS)) + "|",
        ]
        for _, row in table[table["part"] == where].iterrows():
            cells = [f"{row[name].mean:+.3f} ± {1.96 * row[name].se:.3f}" for name in TASKS]
            lines.append(f"| {row['method']} | {row['bits']} | {row['bpw']:.2f} | {' | '.join(cells)} |")
    lines += ["", "## Fewest bits per weight that keep the score, everything quantised", "",
              "Loss of at most 0.01 on average over the tasks.", "", "| method | bpw |", "|---|---|"]  # fmt: skip
    whole = table[table["part"] == "all"].copy()
    whole["loss"] = [sum(row[name].mean for name in TASKS) / len(TASKS) for _, row in whole.iterrows()]
    for method, group in whole[whole["loss"] >= -0.01].groupby("method", sort=False):
        lines.append(f"| {method} | {group['bpw'].min():.2f} |")
    assert set(table["method"]) <= {*METHODS, "paper-gptq"}
    out.parent.mkdir(exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
