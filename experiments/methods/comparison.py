"""Every method and preset at 1 to 4 stored bits on every part of the embedded models: which wins at equal stored bits?

python -m experiments.methods.comparison            # writes reports/methods-comparison.md
python -m experiments.methods.comparison --rows gptq,awq --models embedded:scenes-llava --tasks vqa --n 40
python -m experiments.methods.comparison --minutes 40     # reports what is measured by then; again, and it goes on
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from experiments.methods.measured import parser, write
from sensitivity.api.sweeping import calibrated, sweep
from sensitivity.models.discover import inspect
from sensitivity.models.loading import load
from sensitivity.quantize.methods import METHODS, needs_both_paths
from sensitivity.quantize.presets import PRESETS
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.sizes import component_bits
from sensitivity.study.scores import Score, difference
from sensitivity.tasks.table import task

MODELS = ("embedded:scenes-llava", "embedded:scenes-llava-heavy", "embedded:scenes-blip2")
TASKS = ("vqa", "scene")
BUDGETS = (
    1.5,
    2.5,
    3.5,
    4.5,
)  # stored bits per weight of the quantized part: what 1, 2, 3 and 4 bits and their scales take
WIDTHS = (1, 2, 3, 4)
WHERE = ("vision", "connector", "language", "all")
ROWS = [*METHODS, *PRESETS]
# of these a published method is made by adding to a host: the host with the same grid, group and order
ADDED = ("importance", "shift", "strength", "transform", "gradient", "tweak")
EXPOSED = "exposed"  # in the name of a host that is calibrated behind quantized layers, as the row that it is host of


@dataclass(frozen=True)
class Row:
    """One method or preset at one width on one part, with its examples."""

    name: str
    bits: int
    where: str
    stored: float  # bits per weight of the part
    frame: pd.DataFrame

    def to(self, other: Row, name: str) -> Score:
        """The paired difference to another row on one task."""
        found = difference(self.frame, other.frame, name)
        assert found is not None
        return found


def host_of(name: str, bits: int) -> tuple[str, Scheme] | None:
    """What a row adds its idea to: a name, and the scheme without the idea."""
    if name == "salq-vlm":
        return "gptaq", scheme("gptaq", bits)
    if name == "vlm-ptq":
        return "gptq, asymmetric, exposed", scheme("gptq", bits, symmetric=False)
    preset = dict(PRESETS.get(name, {}))
    if not any(key in preset for key in ADDED):
        return None
    method = str(preset.pop("method"))
    own = {key: value for key, value in preset.items() if key not in ADDED}
    words = [f"{key} {value}" for key, value in own.items() if METHODS[method].settings.get(key) not in (value, None)]
    # the host sees the same inputs, so that what is compared is the idea and not the path
    path = [EXPOSED] if needs_both_paths(scheme(name, bits)) else []
    return ", ".join([method, *words, *path]), scheme(method, bits, **own)


def asked(rows: Sequence[str], chosen: Sequence[int]) -> dict[tuple[str, int], Scheme]:
    """The schemes of all rows and their hosts, by name and width."""
    found: dict[tuple[str, int], Scheme] = {}
    for name in rows:
        widths = METHODS[str(PRESETS.get(name, {"method": name})["method"])].widths
        for bits in (b for b in chosen if b in widths):
            found[name, bits] = scheme(name, bits)
            if (host := host_of(name, bits)) is not None:
                found.setdefault((host[0], bits), host[1])
    return found


def stored_bits(parts: ComponentMap, where: str, one: Scheme) -> float:
    """Bits per weight of a part, everything counted."""
    names = parts.names if where == "all" else (where,)
    return sum(component_bits(parts, n, one) for n in names) / sum(parts[n].numel for n in names)


def measure(model: str, args: argparse.Namespace, ends: float) -> tuple[pd.DataFrame, list[Row], list[str]]:
    """Full precision, every row on every part, and what was not measured before the time was over.

    Methods that need both calibration paths are in a study of their own.
    """
    vlm, tasks = load(model), args.tasks.split(",")
    parts = inspect(vlm, by="part")
    every = asked(args.rows.split(","), [int(b) for b in args.widths.split(",")])
    limits = {w: {key: stored_bits(parts, w, one) for key, one in every.items()} for w in args.where.split(",")}
    native, rows, missing = pd.DataFrame(), [], []
    for both in (False, True):
        chosen = {key: one for key, one in every.items() if (needs_both_paths(one) or EXPOSED in key[0]) == both}
        if not chosen:
            continue
        path = "both" if both else "float"
        against = [task(name, n=args.n) for name in tasks]
        named, statistics = calibrated(
            vlm, parts, list(chosen.values()), tasks, n=args.examples, path=path, against=against
        )
        schemes = dict(zip(chosen, named, strict=True))
        plans = {
            (key, where): Plan.uniform(parts, one) if where == "all" else Plan.of(parts, {where: one})
            for key, one in schemes.items()
            for where, stored in limits.items()
            if stored[key] <= BUDGETS[-1]
        }
        out = f"{args.work}/{model.removeprefix('embedded:')}-{'both' if both else 'float'}"
        left = (f"{max(ends - time.monotonic(), 1):.0f}s",) if ends < float("inf") else ()
        study = sweep(vlm, parts, list(plans.values()), tasks, out, n=args.n, statistics=statistics, until=left)
        full = study.examples(study.native)
        assert full is not None
        native = full
        for ((name, bits), where), plan in plans.items():
            frame = study.examples(plan)
            if frame is None or len(frame) < len(full):  # only whole measurements are compared
                missing.append(f"{name} {bits} on {where}")
            else:
                rows.append(Row(name, bits, where, limits[where][name, bits], frame))
        print(f"{model}: {len(rows)} rows, {len(missing)} left", file=sys.stderr, flush=True)
    return native, rows, missing


def shown(score: Score) -> str:
    return f"{score.mean:+.3f} [{score.low:+.3f}, {score.high:+.3f}]"


def loss(row: Row, native: Row, tasks: Sequence[str]) -> float:
    """The mean over tasks of a row's difference to full precision."""
    return sum(row.to(native, name).mean for name in tasks) / len(tasks)


def winners(rows: Sequence[Row], native: Row, tasks: Sequence[str], known: Sequence[str]) -> list[str]:
    """At each budget of stored bits: each row at its best width within it, and which are no worse than the best."""
    lines = [
        "| part | stored bits up to | task | best | full precision − best | not told apart from it | gptq − best |",
        "|---|---|---|---|---|---|---|",
    ]
    for where in dict.fromkeys(row.where for row in rows):
        for budget in BUDGETS:
            for name in tasks:
                best_of: dict[str, Row] = {}
                for row in rows:
                    if row.where == where and row.stored <= budget and row.name in known:
                        held = best_of.get(row.name)
                        if held is None or row.to(held, name).mean > 0:
                            best_of[row.name] = row
                if len(best_of) < 2:
                    continue
                first = max(best_of.values(), key=lambda row: row.frame[row.frame["task"] == name]["score"].mean())
                tied = [r for r in best_of.values() if r is not first and r.to(first, name).high >= 0]
                others = ", ".join(f"{r.name} {r.bits}" for r in tied[:6]) + (
                    f" and {len(tied) - 6} more" if len(tied) > 6 else ""
                )
                host = best_of.get("gptq")
                beside = "–" if host is None or host is first else shown(host.to(first, name))
                lines.append(
                    f"| {where} | {budget} | {name} | {first.name} {first.bits} ({first.stored:.2f}) | "
                    f"{shown(native.to(first, name))} | {others or 'none'} | {beside} |"
                )
    return lines


def against_hosts(rows: Sequence[Row], tasks: Sequence[str]) -> list[str]:
    """Each row minus the host that it adds its idea to, at the same width on the same part."""
    lines = ["| row | host | part | bits | " + " | ".join(tasks) + " |", "|---" * (4 + len(tasks)) + "|"]
    by = {(row.name, row.bits, row.where): row for row in rows}
    told = {"better": 0, "worse": 0, "noise": 0}
    for (name, bits, where), row in by.items():
        host = host_of(name, bits)
        if host is None or (other := by.get((host[0], bits, where))) is None:
            continue
        cells = []
        for one in tasks:
            score = row.to(other, one)
            told["better" if score.low > 0 else "worse" if score.high < 0 else "noise"] += 1
            cells.append(f"**{shown(score)}**" if score.low > 0 or score.high < 0 else shown(score))
        lines.append(f"| {name} | {host[0]} | {where} | {bits} | {' | '.join(cells)} |")
    if not (total := sum(told.values())):
        return ["No row here adds an idea to another one."]
    summary = (
        f"Of {total} differences, {told['better']} are above zero, {told['worse']} below, and {told['noise']} are "
        f"noise at 95 %; chance alone would call {0.05 * total:.0f} of them something else."
    )
    return [summary, "", *lines]


def table(rows: Sequence[Row], native: Row, tasks: Sequence[str]) -> list[str]:
    """All rows on all parts, by stored bits."""
    lines = ["| part | stored | row | bits | " + " | ".join(tasks) + " |", "|---" * (4 + len(tasks)) + "|"]
    for row in sorted(rows, key=lambda row: (WHERE.index(row.where), row.stored, row.name)):
        cells = [shown(row.to(native, name)) for name in tasks]
        lines.append(f"| {row.where} | {row.stored:.2f} | {row.name} | {row.bits} | {' | '.join(cells)} |")
    return lines


def not_measured(missing: Sequence[str], measured: int) -> list[str]:
    """Says what the time was not enough for."""
    if not missing:
        return []
    some = f"{', '.join(missing[:12])}{f' and {len(missing) - 12} more' if len(missing) > 12 else ''}"
    return ["", f"{measured} rows are measured; there was no time for {len(missing)} others: {some}."]


def main() -> None:
    p = parser(__doc__, "methods-comparison", 500)
    p.add_argument("--models", default=",".join(MODELS))
    p.add_argument("--tasks", default=",".join(TASKS))
    p.add_argument("--rows", default=",".join(ROWS))
    p.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    p.add_argument("--where", default=",".join(WHERE))
    p.add_argument("--minutes", type=float, default=float("inf"), help="no further plan is begun afterwards")
    args = p.parse_args()
    tasks, known = args.tasks.split(","), args.rows.split(",")
    options = [
        ("models", ",".join(MODELS)),
        ("tasks", ",".join(TASKS)),
        ("rows", ",".join(ROWS)),
        ("widths", ",".join(map(str, WIDTHS))),
        ("where", ",".join(WHERE)),
    ]
    typed = [f"--{key} {getattr(args, key)}" for key, default in options if getattr(args, key) != default]
    typed += [f"--n {args.n} --examples {args.examples}"]
    lines = [
        "# Methods side by side at equal stored bits",
        "",
        f"    python -m experiments.methods.comparison {' '.join(typed)}",
        "",
        f"{args.n} examples of each task, {args.examples} calibration examples of the same tasks. Scores are paired",
        "differences on the same examples with 95 % intervals clustered by image. `stored` counts codes, scales, zero",
        "points, codebooks, outliers and bin indices, per weight of the quantized part; the other parts are native.",
        "The best of many rows is picked on the same examples on which it is shown, so its lead is flattered.",
    ]
    ends = time.monotonic() + 60 * args.minutes
    for model in args.models.split(","):
        frame, rows, missing = measure(model, args, ends)
        native = Row("native", 16, "all", 16.0, frame)
        full = ", ".join(f"{name} {frame[frame['task'] == name]['score'].mean():.3f}" for name in tasks)
        lines += ["", f"## {model}", "", f"Full precision: {full}.", *not_measured(missing, len(rows))]
        lines += ["", "### The best row within a budget", ""]
        lines += winners(rows, native, tasks, known)
        lines += ["", "### What each idea adds to its host", "", *against_hosts(rows, tasks)]
        lines += ["", "### Every row, minus full precision", "", *table(rows, native, tasks)]
    write(args.out, lines)


if __name__ == "__main__":
    main()
