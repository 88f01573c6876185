"""The page of the comparison: what wins where at equal stored bits, and what each idea adds to its host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from experiments.methods.comparison.record import Record, native
from experiments.methods.comparison.rows import (
    ADDS_TO,
    BOTH,
    BUDGETS,
    MODELS,
    PRUNED,
    ROUNDED,
    ROWS,
    WEIGHTS,
    WHERE,
    Cell,
    kind,
)
from sensitivity.study.scores import Score, paired_difference
from sensitivity.tasks.examples.types import Task

NAMED = 3  # rows that a cell of a table names beside the best one
CHANCE = 0.025  # at which a difference of nothing lies above its 95 % interval, and at which one lies below
# whether an idea is better and worse than its host more often than chance would have it -> what that says
SHOWS = {
    (True, False): "Better than its host more often than by chance, and not worse",
    (True, True): "Both better and worse more often than by chance, by part and model",
    (False, False): "Neither more often than by chance: the published gain does not show",
    (False, True): "Worse more often than by chance, and not better: the opposite of what is published",
}


class Scores:
    """Paired differences between cells, on tasks whose examples are clustered by image."""

    def __init__(self, known: Record, asked: Sequence[Task]) -> None:
        self.known, self.tasks = known, [one.name for one in asked]
        self.clusters = {one.name: np.array([example.cluster for example in one.examples]) for one in asked}

    def has(self, cell: Cell, task: str) -> bool:
        return cell in self.known and task in self.known[cell].right

    def difference(self, one: Cell, other: Cell, task: str) -> Score:
        first, second = self.known[one].right[task], self.known[other].right[task]
        return paired_difference(first, second, self.clusters[task])

    def mean(self, one: Cell, task: str) -> float:
        return float(self.known[one].right[task].mean())


def page(known: Record, every: Sequence[Cell], asked: Sequence[Task], calibration: int) -> list[str]:
    """The whole page; `every` are the cells that were asked for, measured or not."""
    scores, n = Scores(known, asked), len(asked[0].examples)
    measured = [cell for cell in every if cell in known]
    models = list(dict.fromkeys(cell.model for cell in measured))
    full = [
        f"* {model}: {name} {scores.mean(native(model), name):.3f}"
        for model, name in product(models, scores.tasks)
        if scores.has(native(model), name)
    ]
    return [
        "# Methods side by side at equal stored bits",
        "",
        "    python -m experiments.methods.comparison",
        "",
        f"{n} examples of each task, {calibration} calibration examples of the same task, disjoint from them, each of",
        "another image. `tlq` and `tlq-gptq` are calibrated behind quantized layers, as published.",
        "Differences are paired on the same examples, with 95 % intervals clustered by image. Stored bits count codes,",
        "scales, zero points, codebooks, outliers and bin indices, per weight of the quantized part; other parts are",
        "native. Scores of every row are beside this page in `methods-comparison.csv`, with which the command goes on",
        "where it was. The connector of the heavy-tailed model is that of the plain one, so their cells hardly differ.",
        "",
        *coverage(scores, every),
        "",
        "Full precision:",
        "",
        *full,
        "",
        "## How often each row wins",
        "",
        *standing(scores, models),
        "",
        "## The best row within a budget",
        "",
        *winners(scores, models),
        "",
        "## What each idea adds to its host",
        "",
        *against_hosts(scores, measured),
        "",
        "## Rows that round inputs or the cache, or prune",
        "",
        *beside_weights(scores, measured),
    ]


def coverage(scores: Scores, every: Sequence[Cell]) -> list[str]:
    """How many cells are measured, and which are missing."""
    asked = list(product(scores.tasks, every))
    missing = [(task, cell) for task, cell in asked if not scores.has(cell, task)]
    if not missing:
        return [f"All {len(asked)} cells (row, width, part, model, task) are measured."]
    kinds = Counter((task, kind(cell.row, cell.bits), cell.bits) for task, cell in missing)
    return [
        f"{len(asked) - len(missing)} of {len(asked)} cells (row, width, part, model, task) are measured. Missing:",
        "",
        *(f"* {task}, {what} at {bits} bits: {count}" for (task, what, bits), count in kinds.items()),
    ]


def shown(score: Score) -> str:
    return f"{score.mean:+.3f} [{score.low:+.3f}, {score.high:+.3f}]"


def within(scores: Scores, model: str, where: str, budget: float, task: str) -> list[Cell]:
    """Of rows that change weights alone, each at its best width within the budget, the best row first."""
    best: dict[str, Cell] = {}
    for cell, one in scores.known.items():
        here = cell.row in ROWS and (cell.model, cell.where) == (model, where) and task in one.right
        if here and one.stored <= budget and kind(cell.row, cell.bits) in (WEIGHTS, BOTH):
            held = best.get(cell.row)
            if held is None or scores.mean(cell, task) > scores.mean(held, task):
                best[cell.row] = cell
    # of equals the one that stores less
    return sorted(best.values(), key=lambda cell: (-scores.mean(cell, task), scores.known[cell].stored))


def tied(scores: Scores, found: Sequence[Cell], task: str) -> list[Cell]:
    """The rows that are not told apart from the best, which is the first."""
    return [cell for cell in found[1:] if scores.difference(cell, found[0], task).high >= 0]


def standing(scores: Scores, models: Sequence[str]) -> list[str]:
    """For each row, in how many decided cells it is the best or not told apart from the best."""
    won: Counter[tuple[str, float]] = Counter()
    ran: Counter[tuple[str, float]] = Counter()
    decided: Counter[float] = Counter()
    for model, where, budget, task in product(models, WHERE, BUDGETS, scores.tasks):
        found = within(scores, model, where, budget, task)
        ties = tied(scores, found, task) if found else []
        if len(ties) + 1 >= len(found):
            continue
        decided[budget] += 1
        ran.update((cell.row, budget) for cell in found)
        won.update((cell.row, budget) for cell in (found[0], *ties))
    rows = sorted({row for row, _ in ran}, key=lambda row: -share(won, ran, row))
    lines = [
        "Each row at its best width within a budget of stored bits, in every model, part and task where at least one",
        "row is told apart from the best: in how many of these it is the best or not told apart from it. The best of",
        "many is picked on the examples on which it is shown, so its lead is flattered.",
        "",
        "| row | " + " | ".join(f"up to {budget}" for budget in BUDGETS) + " | share |",
        "|---" * (2 + len(BUDGETS)) + "|",
    ]
    for row in rows:
        cells = [f"{won[row, b]} of {ran[row, b]}" if ran[row, b] else "–" for b in BUDGETS]
        lines.append(f"| {row} | {' | '.join(cells)} | {share(won, ran, row):.2f} |")
    counts = ", ".join(f"{decided[budget]} up to {budget}" for budget in BUDGETS)
    return [*lines, "", f"Decided are {counts}."]


def share(won: Mapping[tuple[str, float], int], ran: Mapping[tuple[str, float], int], row: str) -> float:
    """The share of decided cells in which a row is the best or not told apart from it."""
    return sum(won[row, b] for b in BUDGETS) / max(sum(ran[row, b] for b in BUDGETS), 1)


def winners(scores: Scores, models: Sequence[str]) -> list[str]:
    """At each budget: the best row, what it loses to full precision, and what is not told apart from it."""
    tasks = scores.tasks
    lines = [
        "The best row and its stored bits, its difference to full precision, and rows that are not told apart from it.",
        "",
        f"| model | part | up to | {' | '.join(tasks)} |",
        "|---" * (3 + len(tasks)) + "|",
    ]
    for model, where, budget in product(models, WHERE, BUDGETS):
        cells = []
        for task in tasks:
            cells.append("–")
            if len(found := within(scores, model, where, budget, task)) > 1:
                ties = [f"{cell.row} {cell.bits}" for cell in tied(scores, found, task)]
                more = f" and {len(ties) - NAMED} more" if len(ties) > NAMED else ""
                first = found[0]
                head = f"**{first.row} {first.bits}** ({scores.known[first].stored:.2f})"
                lost = scores.difference(first, native(model), task)
                cells[-1] = f"{head} {shown(lost)}; {', '.join(ties[:NAMED]) or 'no other'}{more}"
        if set(cells) != {"–"}:
            lines.append(f"| {short(model)} | {where} | {budget} | {' | '.join(cells)} |")
    return lines


def against_hosts(scores: Scores, measured: Sequence[Cell]) -> list[str]:
    """Each row minus what it adds its idea to, at the same width on the same part, counted over parts and tasks."""
    lines = [
        "A row minus its host, at the same width on the same part, over all parts and tasks: how many differences lie",
        f"above zero, below zero, or are noise. Chance alone puts {CHANCE:.1%} above and as many below. The last",
        "columns are the mean difference, and the largest one either way.",
        "",
        "| row | host | model | bits | above | below | noise | mean | largest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by: dict[tuple[str, str, int], list[tuple[str, Score]]] = {}
    for cell in measured:
        host = Cell(cell.model, ADDS_TO.get(cell.row, ""), cell.bits, cell.where)
        for task in (task for task in scores.tasks if scores.has(host, task) and scores.has(cell, task)):
            score = scores.difference(cell, host, task)
            by.setdefault((cell.row, cell.model, cell.bits), []).append((f"{cell.where}, {task}", score))
    told: Counter[str] = Counter()
    for row in ADDS_TO:
        for (name, model, bits), differences in sorted(by.items()):
            if name == row:
                count = Counter(verdict(score) for _, score in differences)
                told += count
                mean = sum(score.mean for _, score in differences) / len(differences)
                at, largest = max(differences, key=lambda one: abs(one[1].mean))
                counts = " | ".join(str(count[word]) for word in ("above", "below", "noise"))
                head = f"| {row} | {ADDS_TO[row]} | {short(model)} | {bits} | {counts}"
                lines.append(f"{head} | {mean:+.3f} | {shown(largest)} ({at}) |")
    counts = f"{told['above']} are above zero, {told['below']} below, and {told['noise']} are noise"
    return [*lines, "", f"Of {sum(told.values())} differences, {counts}.", "", *claims(by)]


def verdict(score: Score) -> str:
    """Where a difference lies."""
    return "above" if score.low > 0 else "below" if score.high < 0 else "noise"


def claims(by: Mapping[tuple[str, str, int], Sequence[tuple[str, Score]]]) -> list[str]:
    """Of each idea: whether it shows on these models, over all that was measured of it."""
    groups: dict[tuple[bool, bool], list[str]] = {}
    for row in ADDS_TO:
        count = Counter(verdict(score) for (name, _, _), found in by.items() if name == row for _, score in found)
        if not (total := sum(count.values())):
            continue
        by_chance = CHANCE * total + 2 * (CHANCE * total) ** 0.5
        told = count["above"] > by_chance, count["below"] > by_chance
        groups.setdefault(told, []).append(f"`{row}` ({count['above']} above, {count['below']} below, of {total})")
    return [f"* {head}: {', '.join(groups[told])}." for told, head in SHOWS.items() if told in groups]


def beside_weights(scores: Scores, measured: Sequence[Cell]) -> list[str]:
    """Rows whose stored bits do not say what else they change: minus full precision, and minus their host."""
    tasks = scores.tasks
    heads = " | ".join(f"{task} − {other}" for other, task in product(("full precision", "host"), tasks))
    lines = [f"| model | part | row | bits | stored | {heads} |", "|---" * (5 + 2 * len(tasks)) + "|"]
    for cell in sorted(measured, key=place):
        if kind(cell.row, cell.bits) not in (ROUNDED, PRUNED):
            continue
        host = Cell(cell.model, ADDS_TO.get(cell.row, ""), cell.bits, cell.where)
        found = []
        for other, task in product((native(cell.model), host), tasks):
            both = scores.has(cell, task) and scores.has(other, task)
            found.append(shown(scores.difference(cell, other, task)) if both else "–")
        head = f"| {short(cell.model)} | {cell.where} | {cell.row} | {cell.bits} | {scores.known[cell].stored:.2f}"
        lines.append(f"{head} | {' | '.join(found)} |")
    return lines


def place(cell: Cell) -> tuple[int, int, int, str]:
    """The order of cells in a table."""
    model = MODELS.index(cell.model) if cell.model in MODELS else len(MODELS)
    return model, WHERE.index(cell.where), cell.bits, cell.row


def short(model: str) -> str:
    return model.removeprefix("embedded:")
