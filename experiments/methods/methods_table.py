"""Every method at every bit width on every part and task of an embedded model: which keeps the score at how few bits?

python -m experiments.methods.methods_table [--model embedded:scenes-llava] [--n 500]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import pandas as pd

from experiments.methods.measured import measured, parser, write
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.plan import Plan
from sensitivity.spec.sizes import size
from sensitivity.study.study import Study

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
LOSS = 0.01  # a score counts as kept if it loses no more than this


def labeled_plans(parts: ComponentMap, facts: Mapping[str, object]) -> list[tuple[str, int, str, Plan]]:
    found = []
    for method, widths in METHODS_BITS.items():
        for bits in widths:
            chosen = scheme(method, bits, calibration=facts)  # type: ignore[arg-type]
            for where in WHERE:
                plan = Plan.uniform(parts, chosen) if where == "all" else Plan.of(parts, {where: chosen})
                found.append((method, bits, where, plan))
    return found


def main() -> None:
    args = parser(__doc__, "methods-table", 500).parse_args()
    vlm = load(args.model)
    parts = inspect(vlm, by="part")
    known: list[tuple[str, int, str, Plan]] = []

    def plans(facts: Mapping[str, object]) -> list[Plan]:
        known.extend(labeled_plans(parts, facts))
        return [plan for *_, plan in known]

    study, _ = measured(vlm, parts, TASKS, plans, args)
    rows = []
    for method, bits, where, plan in known:
        against = {name: study.compare(plan, study.native, name) for name in TASKS}
        what = {"method": method, "bits": bits, "part": where, "plan": plan}
        rows.append({**what, "bpw": size(parts, plan).bpw, **against})
    write(args.out, report(args, study, pd.DataFrame(rows), vlm.note))


def report(args: argparse.Namespace, study: Study, table: pd.DataFrame, note: str | None) -> list[str]:
    native = study.table().set_index("key").loc[study.native.key]
    lines = [
        "# Method x bits x part x task",
        "",
        f"`python -m experiments.methods.methods_table --model {args.model} --n {args.n} --out {args.out}`",
        "",
        f"{args.model}, {args.n} examples of each task; calibration: {args.examples} examples, float path. Full",
        "precision scores "
        + ", ".join(f"{name} {native[name]:.3f}" for name in TASKS)
        + ". Numbers are paired differences to",
        "that on the same examples, with 95 % intervals; bpw counts everything stored, kept weights at 16 bits.",
        *([f"{note[0].upper()}{note[1:]}."] if note else []),
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
    return [*lines, *fewest(table), *beside(study, table)]


def fewest(table: pd.DataFrame) -> list[str]:
    """For every part and task the fewest bits at which, and above which, the score is kept."""
    methods = [name for name, widths in METHODS_BITS.items() if len(widths) > 1]
    lines = [
        "",
        "## Fewest bits that keep the score",
        "",
        f"Of the measured widths, the fewest bits at which, and at all more bits, no more than {LOSS} is lost; in",
        "brackets the bits per weight of the whole model.",
        "",
        f"| part | task | {' | '.join(methods)} |",
        "|---" * (2 + len(methods)) + "|",
    ]
    for where in WHERE:
        for name in (*TASKS, "all"):
            cells = []
            for method in methods:
                rows = table[(table["part"] == where) & (table["method"] == method)]
                rows = rows.sort_values("bits", ascending=False)
                tasks = TASKS if name == "all" else (name,)
                kept = [sum(row[task].mean for task in tasks) / len(tasks) >= -LOSS for _, row in rows.iterrows()]
                best = rows.iloc[[*kept, False].index(False) - 1] if kept[0] else None
                cells.append("–" if best is None else f"{best['bits']} ({best['bpw']:.2f})")
            lines.append(f"| {where} | {name} | {' | '.join(cells)} |")
    needs = ", ".join(f"{method} {cell}" for method, cell in zip(methods, cells, strict=True))
    return [*lines, "", f"All parts quantized, mean of the tasks: {needs}."]


def beside(study: Study, table: pd.DataFrame) -> list[str]:
    """Calibrated methods against `uniform` with the same bits on the same examples."""
    lines = [
        "",
        "## Against uniform at the same bits",
        "",
        "Paired differences to `uniform`, with 95 % intervals: above zero the method is better.",
        "",
        f"| part | method | bits | {' | '.join(TASKS)} |",
        "|---" * (3 + len(TASKS)) + "|",
    ]
    plans = {(row["part"], row["method"], row["bits"]): row["plan"] for _, row in table.iterrows()}
    for where in WHERE:
        for method in ("paper-gptq", "gptq", "awq"):
            for bits in (3, 4):
                pair = plans[where, method, bits], plans[where, "uniform", bits]
                found = [study.compare(*pair, name) for name in TASKS]
                cells = [f"{one.mean:+.3f} ± {1.96 * one.se:.3f}" for one in found if one is not None]
                lines.append(f"| {where} | {method} | {bits} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
