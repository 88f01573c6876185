"""Prints what `explain` found: scores of components with their checks, and where the damage of a plan comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sensitivity.cli.output.tables import print_table

if TYPE_CHECKING:
    from sensitivity.analysis.surrogate.score_agreement import ScoreAgreement
    from sensitivity.api.explaining import Explanation
    from sensitivity.measure.attribution.checks import Checks
    from sensitivity.measure.attribution.scores import Attribution

CANCEL = 3  # times the change of the loss: where the components' shares add up to more, they nearly cancel


def print_attributions(
    scored: Sequence[Attribution], measured: Mapping[str, ScoreAgreement | str], checks: Checks | None = None
) -> None:
    """Print the scores of all components, each scaled so that the largest is 100, with their costs and errors below."""
    largest = [max((v for row in one.scores.values() for v in row.values()), default=0.0) for one in scored]
    rows = [
        (
            name,
            str(scheme),
            *(f"{100 * one.scores[name][scheme] / (top or 1):.3g}" for one, top in zip(scored, largest, strict=True)),
        )
        for name, row in scored[0].scores.items()
        for scheme in row
    ]
    print_table(
        "Scores on calibration data: 100 is the most damage",
        ("component", "scheme", *(one.name for one in scored)),
        rows,
    )
    _score_checks(scored, measured, checks)


def _score_checks(
    scored: Sequence[Attribution], measured: Mapping[str, ScoreAgreement | str], checks: Checks | None
) -> None:
    """Print what each score cost, and how well it predicts the damage of plans that were run."""
    if checks is None:
        print_score_costs(scored)
        return
    rows = []
    compared = any(not isinstance(one, str) for one in measured.values())
    for one in scored:
        check, study = checks.by_score.get(one.name), measured.get(one.name)
        found = ("–", "–")
        if study is not None and not isinstance(study, str):
            found = (f"{study.rank_correlation:.2f}", f"{study.error:.4f}")
        rows.append((
            one.name,
            f"{one.seconds:.1f}",
            f"{one.seconds / checks.pass_seconds:.1f}",
            f"{check.rank_correlation:.2f}" if check and check.rank_correlation is not None else "–",
            "–" if check is None or check.error is None else f"{100 * check.error:.0f} %",
            *(found if compared else ()),
        ))  # fmt: skip
    plans = next((check.plans for check in checks.by_score.values()), 0)
    of_study = ("rank correlation, study", "error of task score, study") if compared else ()
    print_table(
        f"Cost of each score, and how well it predicts {plans} random plan{'' if plans == 1 else 's'} on "
        f"calibration data{', and the plans of the study' if compared else ''}",
        ("score", "CPU s", "passes", "rank correlation", "error", *of_study),
        rows,
    )
    if plans:
        print("  error: root mean square of what the prediction misses, in percent of the damage; 100 if it is none")
        if no_unit := [name for name, check in checks.by_score.items() if check.error is None]:
            print(f"  –: {', '.join(no_unit)} only order{'s' if len(no_unit) == 1 else ''} plans, in no unit of damage")
        if too_few := [name for name, check in checks.by_score.items() if check.rank_correlation is None]:
            several = len({scheme for row in scored[0].scores.values() for scheme in row}) > 1
            how = "--check runs more plans" if several else "plans of one width do not: name more, --bits"
            print(f"  –: too few sums of {', '.join(too_few)} differ for a rank correlation ({how})")
    for why in dict.fromkeys(one for one in measured.values() if isinstance(one, str)):
        print(f"  not compared with the study: {why}")


def print_explanation(explained: Explanation) -> None:
    """Print where the damage of a plan comes from, in percent of the change of the loss."""
    from sensitivity.study.counting import count as counted

    facts, change = explained.integral, explained.integral.change
    count = len(explained.examples)
    print(f"\n{explained.plan.describe()}")
    which = (
        f"{counted(count, 'answer')} that got worse" if explained.of_failures else counted(count, "calibration example")
    )
    tasks = ", ".join(source["task"] for source in explained.data)
    if not change:
        stays = f"the loss of right answers stays at {facts.after / count:.4f} on {which} of {tasks}"
        print(f"  {stays}: nothing is shared out")
        return
    moves = "rises" if change > 0 else "falls"
    # four decimals, or as many digits as tell two small losses apart
    kind = ".4f" if round(facts.before / count, 4) != round(facts.after / count, 4) else ".4g"
    print(
        f"  the loss of right answers {moves} from {facts.before / count:{kind}} to {facts.after / count:{kind}} on "
        f"{which} of {tasks} ({facts.passes} backward passes; the shares below miss {100 * facts.missing:.1f} % of "
        "that change)"
    )
    if sum(map(abs, explained.blame.components.values())) > CANCEL * abs(change):
        print("  components raise and lower it by far more than it changes: shares of so small a change say little")
    for title, shares in (("component", explained.blame.components), ("modality", explained.blame.modalities)):
        rows = [(name, _percent(value, change)) for name, value in shares.items()]
        print_table(f"Share of that change by {title}, in percent", (title, "share"), rows)
    if explained.boxes:
        _boxes(explained)
    _places(explained)


def _places(explained: Explanation) -> None:
    """Print the share of each place in the image, where all images have as many."""
    grids, change = list(explained.blame.regions.values()), explained.integral.change
    if len({grid.shape for grid in grids}) != 1:
        return
    mean = sum(grids[1:], start=grids[0])
    in_all = float(mean.sum())
    other = _percent(explained.blame.modalities["vision"] - in_all, change)
    more = f"; {other} more is of vision tokens that are no patches" if other.strip("-") != "0.0" else ""
    print_table(
        f"Share by place in the image (row and column of patches), in percent: {_percent(in_all, change)} in all{more}",
        ("row", *(str(column) for column in range(1, mean.shape[1] + 1))),
        [(str(number), *(_percent(float(value), change) for value in row)) for number, row in enumerate(mean, start=1)],
    )


def _percent(part: float, whole: float) -> str:
    """A share in percent, without a minus before a zero."""
    return f"{100 * part / whole if whole else 0:z.1f}"


def _boxes(explained: Explanation) -> None:
    """Print how far each number of a box moves, and each component's share of the rise of its loss."""
    names = list(explained.blame.components)
    rows = [
        (
            name,
            f"{one.moved:.2f}" if one.moved == one.moved else "–",  # NaN where no answer is a box
            f"{one.integral.change / len(explained.examples):z.4f}",
            f"{100 * one.integral.missing:.1f}",
            *(_percent(one.blame.components[part], one.integral.change) for part in names),
        )
        for name, one in explained.boxes.items()
    ]
    print_table(
        "Boxes: how far each number moves from full precision's, how much the loss of its tokens rises, and in "
        "percent of that what the shares miss and each component's share",
        ("number", "moved", "loss", "missing", *names),
        rows,
    )


def print_score_costs(scored: Sequence[Attribution]) -> None:
    """Print what each score of the components cost."""
    costs = ", ".join(
        f"{one.name} {one.seconds:.1f} s{' (kept on this machine from an earlier run)' if one.kept else ''}"
        for one in scored
    )
    print(f"\nScored on calibration data, in CPU seconds: {costs}")
