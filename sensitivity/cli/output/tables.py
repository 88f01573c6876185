"""Prints tables in the terminal: frontier, answers, forecast, ranking and recommendation."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sensitivity.spec.plan import KEY_LENGTH
from sensitivity.spec.sizes import bytes_in_words
from sensitivity.spec.threads import threads_in_words

if TYPE_CHECKING:
    import pandas as pd

    from sensitivity.analysis.importance.types import Ranking
    from sensitivity.analysis.recommending.recommendation import Recommendation
    from sensitivity.measure.forecast.forecast import Forecast
    from sensitivity.spec.components import ComponentMap
    from sensitivity.spec.plan import Plan
    from sensitivity.spec.runtimes.layer_times import LayerTimes
    from sensitivity.study.study import Study


COUNT_HEADS = {  # count of answers -> the head of its column
    "to_wrong": "right → wrong",
    "to_right": "wrong → right",
    "empty": "empty",
    "cut": "cut off",
    "malformed": "malformed",
}
WIDTH = 120  # columns where there is no terminal to ask
GAP = 2  # between columns
LONG_WORD = 24  # a longer word, such as a path, may be cut


def print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; columns of numbers are right-aligned, and long cells wrap between words.

    Where the terminal is too narrow for that, each row is printed as lines of a head and a cell.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else WIDTH)
    console.print()
    console.print(escape(title), style="bold", soft_wrap=True, highlight=False)
    cells = [[str(cell) for cell in row] for row in rows]
    widths = _widths([heads, *cells], console.width)
    if widths is None:
        for row in cells:
            for i, (head, cell) in enumerate(zip(heads, row, strict=True)):
                if not cell:  # such as the name of a plan that stands above
                    continue
                console.print(f"{'  ' if i else ''}{escape(head)}: {escape(cell)}", highlight=False)
        return
    grid = Table(*heads, box=None, pad_edge=False)
    for i, (column, width) in enumerate(zip(grid.columns, widths, strict=True)):
        numbers = cells and all(row[i].lstrip("+-")[:1].isdigit() for row in cells)
        # a plan may begin with its key, and a key with a digit
        column.justify = "right" if numbers and "plan" not in heads[i].split() else "left"
        column.overflow, column.width = "fold", width
    for row in cells:
        grid.add_row(*(escape(cell) for cell in row))
    console.print(grid, highlight=False)


def _widths(rows: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """The widths of columns that together fit, the widest ones narrowed first; None if words would have to be cut."""
    from rich.cells import cell_len

    columns = list(zip(*rows, strict=True))
    widths = [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in columns]
    words = [max((cell_len(word) for cell in column for word in cell.split()), default=0) for column in columns]
    least = [min(word, LONG_WORD) for word in words]
    while sum(widths) + GAP * (len(widths) - 1) > room:
        wide = [i for i, width in enumerate(widths) if width > least[i]]
        if not wide:
            return None
        widths[max(wide, key=lambda i: widths[i])] -= 1
    return widths


def print_frontier(study: Study, most: int = 12) -> None:
    """Print the plans that no smaller plan beats on the first task; of many, some over all sizes."""
    from sensitivity.analysis.reporting.table_rows import shown_of_frontier

    rows = study.table()
    best, left_out = shown_of_frontier(study, rows, study.tasks[0], most)
    stored = f" as {study.format} stores it" if study.format else ""
    print_table(
        f"Frontier: no smaller plan{stored} scores higher on {study.tasks[0]} (95 % intervals where they are known"
        f"{'' if rows['complete'].all() else '; n where not all examples were seen'}{_images(study)})",
        ("bpw", *study.tasks, "plan"),
        [
            (f"{row['bpw']:.2f}", *(_interval(row, task) for task in study.tasks), row["plan"])
            for _, row in best.iterrows()
        ],
    )
    if left_out:
        print(left_out)
    print_answer_counts(
        {
            f"{row['key'][:KEY_LENGTH]} {row['plan']}": [
                {"task": task, **{name: row.get(f"{task}.{name}") for name in ("n", *COUNT_HEADS)}, "score": row[task]}
                for task in study.tasks
                if f"{task}.empty" in row
            ]
            for _, row in best.iterrows()
        }
    )


def _images(study: Study) -> str:
    """On how many images the tasks' examples are, where there are fewer images than examples."""
    from sensitivity.study.counting import count

    found = []
    for task in study.tasks:
        score = max((trial.scores[task] for trial in study.measured()), key=lambda one: one.get("n", 0))
        if 0 < score.get("clusters", 0) < score.get("n", 0):
            found.append(f"; {task}: n {score['n']:,} on {count(score['clusters'], 'image')}")
    return "".join(found)


def print_answer_counts(plans: Mapping[str, Sequence[Mapping[str, object]]]) -> None:
    """Print what happened to the answers of some plans, for each task and kind of question."""
    # a plan is named in the first of its rows
    rows = [("" if i else plan, row) for plan, counts in plans.items() for i, row in enumerate(counts)]
    known = [name for name in COUNT_HEADS if any(_number(row.get(name)) for _, row in rows)]
    if not known:
        return  # an imported table has no answers; a study of an earlier version did not count
    kinds = any(row.get("kind") for _, row in rows)
    of = f" of {next(iter(plans))}" if len(plans) == 1 else ""  # a single plan is named only here
    print_table(
        f"What happened to the answers{of} (changes against full precision, on the same examples)",
        (
            *([] if of else ["plan"]),
            "task",
            *(["kind"] if kinds else []),
            "n",
            "score",
            *(COUNT_HEADS[name] for name in known),
        ),
        [
            (
                *([] if of else [plan]),
                row["task"],
                *([row.get("kind") or "all"] if kinds else []),
                _number(row["n"]),
                f"{row['score']:.3f}",
                *(_number(row.get(name)) or "–" for name in known),
            )
            for plan, row in rows
        ],
    )


def _number(count: object) -> str:
    """A count as text; nothing where it is not known (None, or NaN in a table)."""
    return f"{count:.0f}" if isinstance(count, int | float) and count == count else ""


def print_forecast(predicted: Forecast) -> None:
    """Print the predicted cost of a sweep."""
    from sensitivity.study.counting import count

    rate = f"{predicted.flops / 1e9:,.0f} GFLOP/s in products of this model's shapes"
    of = f"{count(predicted.examples, 'example')} of {count(predicted.images, 'image')}"
    if predicted.measured:
        every = predicted.measured + predicted.plans
        print(f"{predicted.measured:,} of {every:,} plans are measured already; the forecast is of what is left")
    print_table(f"{count(predicted.plans, 'plan')}, {of}; {rate}", ("what", "how much", "of which"), predicted.rows())


def print_ranking(ranked: Ranking) -> None:
    """Print the importance of each component, with the estimators side by side."""
    rows = []
    every = [*ranked.table.iterrows(), *([("choice of method", ranked.choice)] if ranked.choice else [])]
    for name, row in every:
        shares = [f"{row[column]:.1f}" for column in ("forest", "permutation", "shap") if column in row]
        known = row["consensus.low"] == row["consensus.low"]  # NaN: see Ranking.no_intervals
        interval = f" [{row['consensus.low']:.1f}, {row['consensus.high']:.1f}]" if known else ""
        span = f"{row['consensus']:.1f}{interval}"
        rows.append((name, span, *shares))
    print_table(
        f"Importance for {ranked.task}, in percent ({ranked.trials} trials; R2 of the forest on plans that it has not "
        f"seen {ranked.r2:.2f}, of a linear model on those that it has {ranked.linear_r2:.2f})",
        ("component", "consensus", "forest", "permutation", "SHAP"),
        rows,
    )
    for warning in (*ranked.warnings, *filter(None, [ranked.no_intervals])):
        print(f"  note: {warning}")


def print_recommendation(best: Recommendation) -> None:
    """Print a plan with its size, and its score beside full precision and the best uniform plan."""
    print()
    size, asked = best.size, best.provenance.get("asked")
    allowed = f" ({bytes_in_words(size.bytes * best.budget / size.bpw)})" if size.sized else ""
    print(f"Best plan for {best.budget:.4g} bits per weight{allowed}, judged by {best.task}:")
    print(f"  {best.plan.describe()}")
    native = [name for name, scheme in best.plan.schemes if scheme is None]
    if 0 < len(native) < len(best.plan.schemes) and not (asked and asked.get("allow")):
        which = native[0] if len(native) == 1 else f"{len(native)} parts"
        print(f"  {which} at native precision, as any part may be; --allow '*=B,B,...' leaves only the widths named")
    in_bytes = f" ({size.bpw_codes:.2f} codes only), {bytes_in_words(size.bytes)}" if size.sized else ""
    print(f"  {size.bpw:.2f} bpw {size.counted}{in_bytes}")
    # with several tasks, scores are shares of full precision, whose own is 1
    share = "share of full precision" if len(best.weights) > 1 else ""
    what = f"{share} in {best.task}" if share else best.task
    if best.measured is None:
        expected = best.predicted
        print(f"  predicted {what} {expected.score:.3f} [{expected.low:.3f}, {expected.high:.3f}]")
    else:
        where = "examples that had no part in the choice" if best.fresh else "examples that had a part in the choice"
        print(f"  {what} {best.measured}, measured on {where}")
        for task in best.weights if share else ():
            full = f", full precision {best.full_by_task[task]}" if task in best.full_by_task else ""
            print(f"  {task} {best.by_task[task]}{full}")
        if best.full is not None and not share:
            print(f"  full precision {best.full}")
        if best.uniform is not None:
            of = f"{share} " if share else ""
            print(f"  best uniform plan within the budget: {best.uniform.other.describe()}, {of}{best.uniform.score}")
    print(f"  {best.words}")


def print_runtime_costs(plan: Plan, parts: ComponentMap, times: LayerTimes, limits: Mapping[str, float]) -> None:
    """Print a plan's predicted costs in its runtime, and each stage's share of the time of an answer."""
    from sensitivity.analysis.allocate.run_time_limits import cost_in_words
    from sensitivity.spec.runtimes.layer_times import COSTS, LIMITED

    took = {cost: times.plan_cost(parts, plan, cost) for cost in COSTS}
    each = [
        cost_in_words(cost, took[cost]) + (f" of at most {limits[cost]:g}" if cost in limits else "")
        for cost in LIMITED
    ]
    print(f"  predicted in {times.runtime}, {threads_in_words(times.threads)}: {', '.join(each)}")
    tokens = (times.tokens["answer"] - 1) * took["ms_per_token"]
    stages = {"image": took["ms_per_image"], "prompt": took["ms_per_prompt"], "tokens after the first": tokens}
    shares = [f"{name} {100 * ms / sum(stages.values()):.0f} %" for name, ms in stages.items()]
    print(f"  time of an answer: {', '.join(shares)}")


def _interval(row: pd.Series, task: str) -> str:
    low, high, repeated = (row.get(f"{task}.{name}") for name in ("low", "high", "repetitions"))
    seen = "" if row["complete"] else f" (n {row[f'{task}.n']:,.0f})"
    if repeated is not None and repeated == repeated:  # NaN: another plan is repeated
        seen = f" (mean of {repeated:.0f})"
    if low is None or low != low:  # NaN: an imported table has intervals of repeated plans alone
        return f"{row[task]:.3f}{seen}"
    return f"{row[task]:.3f} [{low:.3f}, {high:.3f}]{seen}"
