"""At which bit width the embedded models lose their score: each part alone and all together, on every task.

python -m experiments.methods.cliffs            # writes reports/cliffs.md
python -m experiments.methods.cliffs --smoke    # a few examples, two widths
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from sensitivity import inspect, load, one_at_a_time
from sensitivity.api.sweeping import sweep
from sensitivity.spec.files import overwrite
from sensitivity.study.study import Study
from sensitivity.study.trial import NATIVE

ROOT = Path(__file__).parents[2]
MODELS = ("embedded:scenes-llava", "embedded:scenes-llava-heavy")
TASKS = ("vqa", "caption", "scene", "ground")


def cell(row: pd.Series, task: str) -> str:
    return f"{row[task]:.3f} ± {1.96 * row[task + '.se']:.3f}"


def section(model: str, study: Study) -> list[str]:
    """One table per task: a row for each part, a column for each width."""
    table = study.table()
    names = list(study.parts.names)
    full = table[table["native"]].iloc[0]
    widths = sorted({int(b) for name in names for b in table[name]} - {NATIVE})
    lines = [f"## {model}", ""]
    if note := study.meta.get("note"):
        lines += [f"{note}.", ""]
    for task in study.tasks:
        chance = study.meta["chance"][task]
        n = int(full[f"{task}.n"])
        lines += [f"### {task}: full precision {cell(full, task)}, most common answer {chance:.3f}, n {n:,}", ""]
        heads = ["quantized", *(f"{width} bits" for width in widths)]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for name in [*names, "all"]:
            row = []
            for width in widths:
                wanted = [table[other] == (width if name in (other, "all") else NATIVE) for other in names]
                found = table[pd.concat(wanted, axis=1).all(axis=1)].iloc[0]
                row.append(cell(found, task))
            lines.append(f"| {name} | {' | '.join(row)} |")
        lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "cliffs.md")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "cliffs", help="where the studies are kept")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    widths, n = ((3, 8), 10) if args.smoke else ((2, 3, 4, 5, 6, 8), args.n)
    lines = [
        "# At which bit width the embedded models lose their score",
        "",
        "    python -m experiments.methods.cliffs",
        "",
    ]
    lines += ["Uniform min-max, per tensor; mean ± 1.96 standard errors clustered by scene; other parts native.", ""]
    for model in MODELS:
        vlm = load(model)
        parts = inspect(vlm, by="part")
        plans = one_at_a_time(parts, bits=widths, method="uniform")
        study = sweep(vlm, parts, plans, tasks=TASKS, out=args.runs / model.removeprefix("embedded:"), n=n)
        lines += section(model, study)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    overwrite(args.out, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
