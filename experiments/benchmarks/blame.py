"""Whether blame is right: planted defects are found, and putting back what has most blame mends answers.

    python -m experiments.benchmarks.blame [--models scenes-llava,...] [--only tokens,quarter] [--minutes 20]

For each embedded model and each part of this program; what reports/blame.csv and reports/blame-planted.csv hold already
is not run again, and no case is begun after so many minutes:

* tokens: the vision tower (and the projector of a LLaVA) at 3 and at 2 bits. Of each answer that was right and is
  wrong now, the 10 % of image tokens with most blame, or others, get their float features back behind the tower.
* parts: everything at 3 bits; the linears with most blame, up to 10 % of all weights, are put back to float, or others.
  Both also for answers that are clearly wrong: the right one has a loss above 3 under the plan.
* component: all at 8 or at 4 bits by group.kind, and in one component noise, two or four times as large as its rounding
  error at 2 bits. Each component in turn is put back to float weights: which one lowers the loss most in truth?
* quarter: all at 8 or at 4 bits, and in the first feed-forward of the tower an error that acts on the tokens of one
  quarter of the image. The tokens of each quarter in turn are computed with float weights in all layers.
* flat: how unevenly blame lies over the places of an image, beside the model with shuffled weights.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pandas as pd
from scipy import stats

from experiments.benchmarks.planted_defects import EXAMPLES, Subject, cases, component
from experiments.benchmarks.planted_quarters import ERRORS, FLAT_DRAWS, QUARTERS, flat, quarter, tenth_of_noise
from experiments.benchmarks.put_back import CLEAR_LOSS, SHARE, parts_back, tokens
from sensitivity.spec.files import overwrite

ROOT = Path(__file__).parent.parent.parent
TABLE, PLANTED = ROOT / "reports" / "blame.csv", ROOT / "reports" / "blame-planted.csv"
MODELS = ("scenes-llava", "scenes-llava-heavy", "scenes-blip2")
PUT_BACK = ("asked", "flipped", "most", "random", "least", "all")
FLAT = ("tenth", "deviation", "chance", "rank", "order")
CLEARLY = ", clearly wrong"
PLACES = 36  # of an image in the embedded models
COLUMNS = {
    TABLE: ("model", "what", *PUT_BACK, *(f"{weights} {name}" for weights in ("trained", "shuffled") for name in FLAT),
            "cpu_s"),
    PLANTED: ("model", "what", "beside", "level", "seed", "planted", "blamed", "worst", "share", "change", "mends",
              "next", "missing", "passes", "inside", "cpu_s"),
}  # fmt: skip
KINDS = {"component": ("group.kind", component), "quarter": ("part", quarter)}
# a defect: putting the place back mends so many times what putting back any other mends, and lowers the mean loss of an
# answer by so much at least; the float model's own is .012
CLEAR, DAMAGE = 2.0, 0.01
Work = Iterator[Callable[[], None]]


def measured(models: list[str], answers: int, only: list[str]) -> Work:
    """What is missing in reports/blame.csv, one row at a time."""
    subjects = {model: Subject(model, "part") for model in models}
    wanted: dict[str, list[tuple[str, Callable[[Subject], dict[str, object]]]]] = {
        "tokens": [
            (f"tokens, {bits} bits{CLEARLY * clear}", lambda one, b=bits, c=clear: tokens(one.vlm, answers, b, c))
            for clear in (False, True)
            for bits in (3, 2)
        ],
        "parts": [
            (f"parts, 3 bits{CLEARLY * clear}", lambda one, c=clear: parts_back(one.vlm, 2 * answers, clearly=c))
            for clear in (False, True)
        ],
        "flat": [("flat", flat)],
    }
    for part, model in itertools.product([part for part in only if part in wanted], models):
        for what, compute in wanted[part]:
            if not held(TABLE, {"model": model, "what": what}):
                yield partial(add, TABLE, {"model": model, "what": what}, partial(compute, subjects[model]))


def planted(models: list[str], only: list[str]) -> Work:
    """The missing cases of planted defects; models and kinds take turns, so that a part of all is a fair one."""
    lists = []
    for model, kind in itertools.product(models, [kind for kind in only if kind in KINDS]):
        by, compute = KINDS[kind]
        subject = Subject(model, by)
        wanted = cases(len(subject.parts.components)) if kind == "component" else cases(2 * len(QUARTERS), ERRORS)
        lists.append([(subject, kind, compute, case) for case in wanted])
    for subject, kind, compute, case in filter(None, itertools.chain(*itertools.zip_longest(*lists))):
        key = {"model": subject.name, "what": kind, "beside": case.beside, "level": case.level, "seed": case.seed}
        if not held(PLANTED, key):
            yield partial(add, PLANTED, key, partial(compute, subject, case))


def held(file: Path, key: dict[str, object]) -> bool:
    if not file.exists():
        return False
    table = pd.read_csv(file)
    return bool((table[list(key)] == pd.Series(key)).all(axis=1).any())


def add(file: Path, key: dict[str, object], compute: Callable[[], dict[str, object]]) -> None:
    began = time.process_time()
    row = {**key, **compute(), "cpu_s": round(time.process_time() - began, 1)}
    print(row, flush=True)
    rows = pd.read_csv(file).to_dict("records") if file.exists() else []
    overwrite(file, pd.DataFrame([*rows, row], columns=list(COLUMNS[file])).to_csv(index=False, float_format="%.5g"))


def put_back(table: pd.DataFrame) -> list[str]:
    lines = [f"| model | put back | {' | '.join(PUT_BACK)} | most : random |", "|---|---|" + "---|" * 7]
    for _, row in table[table["what"].str.contains("tokens|parts")].iterrows():
        counts = " | ".join(f"{row[name]:.4g}" for name in PUT_BACK)
        lines.append(f"| {row['model']} | {row['what']} | {counts} | {row['most'] / max(row['random'], 0.5):.1f} |")
    return lines


def defects(rows: pd.DataFrame) -> list[str]:
    """Counts of a kind of defect: only where the planted place is in truth the worst can blame find it."""
    worst, harm = rows["worst"] == rows["planted"], rows["mends"] >= DAMAGE
    clear = worst & harm & (rows["mends"] >= CLEAR * rows["next"])
    lines = ["| cases | in number | blame finds the worst | share (95 %) |", "|---|---|---|---|"]
    for name, some in (
        (
            f"**defects**: the planted place is the worst, {CLEAR:g} times any other, and mends {DAMAGE:g} or more",
            clear,
        ),
        (f"it is the worst and mends {DAMAGE:g} or more, but less than {CLEAR:g} times another", worst & harm & ~clear),
        (f"it is the worst, but mends less than {DAMAGE:g}", worst & ~harm),
        ("it is the worst: these three", worst),
        ("another place is the worst", ~worst),
        ("all", worst | ~worst),
    ):
        own = rows[some]
        lines.append(f"| {name} | {len(own)} | {share(own['blamed'] == own['worst'])} |")
    lines += ["", "| model | beside | noise | cases | planted is worst | of these found | not found: blamed |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for (model, beside, level), own in rows.groupby(["model", "beside", "level"], sort=False):
        true = own[own["worst"] == own["planted"]]
        missed = true[true["blamed"] != true["planted"]]
        said = "; ".join(f"{row['planted']}: {row['blamed']}" for _, row in missed.iterrows()) or "–"
        lines.append(f"| {model} | {beside} bits | x {level:g} | {len(own)} | {len(true)} | "
                     f"{len(true) - len(missed)} | {said} |")  # fmt: skip
    return lines


def share(right: pd.Series) -> str:
    if not len(right):
        return "– | –"
    sure = stats.binomtest(int(right.sum()), len(right)).proportion_ci()  # exact (Clopper and Pearson)
    return f"{right.sum()} | {right.mean():.1%} ({sure.low:.1%} to {sure.high:.1%})"


def flatness(rows: pd.DataFrame) -> list[str]:
    lines = ["| model | weights | share of the tenth of the places with most | deviation of the mean image | in random "
             "order | rank | reading order |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for (_, row), weights in itertools.product(rows.iterrows(), ("trained", "shuffled")):
        tenth, *rest = (row[f"{weights} {name}"] for name in FLAT)
        lines.append(f"| {row['model']} | {weights} | {tenth:.0%} | {' | '.join(f'{one:.2f}' for one in rest)} |")
    return lines


def page(answers: int) -> str:
    table, planted = pd.read_csv(TABLE), pd.read_csv(PLANTED)
    parts, quarter = (planted[planted["what"] == kind] for kind in ("component", "quarter"))
    lines = [
        "# Whether blame is right", "",
        f"`python -m experiments.benchmarks.blame --answers {answers}`; its first lines say what each part does.",
        f"Together {table['cpu_s'].sum() + planted['cpu_s'].sum():.0f} CPU s.", "",
        "## Answers that are right again", "",
        f"{SHARE:.0%} of the image tokens, or of the weights, are put back to float, and answers are counted that are",
        "right again; `random` is a mean of draws, `all` is everything put back. Where right and wrong were nearly",
        "tied, any change mends the answer; of those that are *clearly wrong* the right one has a loss above",
        f"{CLEAR_LOSS:g} (of each token) under the plan. That limit was chosen on other examples.", "",
        *put_back(table), "",
        "## Noise planted in one component", "",
        f"By group.kind; the loss of {EXAMPLES} calibration examples, others in each case. A place is *the worst* if",
        "putting it back to float, everything else left as it is, lowers the loss most; blame finds it if it has the",
        "most blame. Nothing but the order of the places is counted. 95 % intervals are exact.", "",
        *defects(parts), "",
        "## Error planted in one quarter of the image", "",
        f"Counted likewise. {quarter['inside'].mean():.0%} of the planted squared error lie in the quarter.", "",
        *defects(quarter), "",
    ]  # fmt: skip
    if (rows := table[table["what"] == "flat"]).size:
        lines += [
            "## Blame of a model with shuffled weights", "",
            f"All at 3 bits, {FLAT_DRAWS * EXAMPLES} examples. Were blame normal noise, alike and independent at all",
            f"places, the tenth of the places with most would have {tenth_of_noise(PLACES):.0%} of it by chance,",
            "as the largest of each image.",
            "`rank`: in which share of random orders of each image's places their mean image is at least as uneven; a",
            "small one says that the same places have more blame in all images. `reading order`: the rank correlation",
            "of the mean image with the order in which the language model reads the places. It reads causally: with",
            "random weights each token is an average of all before it, so the first ones count most.", "",
            *flatness(rows), "",
        ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--answers", type=int, default=60)
    parser.add_argument("--only", default="tokens,parts,flat,component,quarter")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    args = parser.parse_args()
    ends = time.monotonic() + 60 * args.minutes
    models, only = args.models.split(","), args.only.split(",")
    for work in itertools.chain(measured(models, args.answers, only), planted(models, only)):
        if time.monotonic() >= ends:
            break
        work()
    overwrite(ROOT / "reports" / "blame.md", page(args.answers))


if __name__ == "__main__":
    main()
