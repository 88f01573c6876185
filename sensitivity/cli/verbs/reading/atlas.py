"""sensitivity atlas: collects what studies measured, and predicts the frontier of a model that was never measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sensitivity.cli.arguments import flags, path_values, values
from sensitivity.cli.arguments.scheme_flags import schemes
from sensitivity.cli.output.tables import print_table
from sensitivity.spec.errors import Partly, shell_word
from sensitivity.spec.sizes import bytes_in_words

if TYPE_CHECKING:
    from sensitivity.analysis.atlas.predicted_frontier import PredictedFrontier

ABOUT = "collect studies in a file (add), and predict the frontier of a model that was never measured (predict)"
EXAMPLE = "sensitivity atlas predict embedded:scenes-llava --bpw 5,6 --atlas runs/atlas.parquet"
# flags that have an effect only on a prediction
PREDICTION_FLAGS = (
    "--bpw", "--task", "--attributions", "--by", "--bits", "--method", "--group", "--symmetric", "--biases", "--set",
    "--backend",
)  # fmt: skip


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    p.add_argument("action", type=values.choice("add", "predict"), metavar="add|predict", help="what to do")
    p.add_argument(
        "source", type=values.model_or_task, metavar="STUDY|MODEL", help="the study to add, or the model to predict"
    )
    p.add_argument(
        "--to",
        "--atlas",
        dest="atlas",
        type=path_values.file,
        default=Path("runs/atlas.parquet"),
        metavar="FILE",
        help="the atlas: a Parquet file without weights, images or questions (default: runs/atlas.parquet)",
    )
    p.add_argument(
        "--bpw",
        type=values.comma_separated(values.bpw),
        metavar="X[,X]",
        help="budgets in bits per weight, counting all that is stored (default: six, from the smallest to the largest"
        " uniform plan)",
    )
    p.add_argument(
        "--task", type=values.name, metavar="T", help="learn from studies of this task alone (default: of all tasks)"
    )
    p.add_argument(
        "--attributions",
        type=path_values.out_folder,
        metavar="FOLDER",
        help="where `sensitivity explain MODEL --scores gram --out FOLDER` wrote relative errors of the new model; they"
        " count as far as they would have helped to predict the atlas's own models",
    )
    flags.add_granularity(p, "group.kind")
    flags.add_methods(p, (2, 3, 4, 6, 8), "gptq")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Add a study to an atlas, or predict a model's frontier from one."""
    return _add(args) if args.action == "add" else _predict(args)


def _add(args: argparse.Namespace) -> dict[str, object]:
    from sensitivity.analysis.atlas.atlas_file import add_to_atlas
    from sensitivity.study.study import Study

    flags.without_effect(args, PREDICTION_FLAGS, "with add: it is about predictions")
    entries = add_to_atlas(Study(Path(args.source).expanduser()), args.atlas)
    models = sorted({entry.about["model"] for entry in entries})
    if not args.json:
        print_table(
            f"{args.atlas}: what it has",
            ("model", "task", "by", "methods", "plans", "full precision"),
            [
                (one.about["model"], one.about["task"], one.about["by"], ", ".join(one.about["methods"]), one.plans,
                 f"{one.full:.3f}")
                for one in entries
            ],
        )  # fmt: skip
        if len({entry.model for entry in entries}) < 2:
            print("an interval needs studies of at least two models, which show how far models differ")
    return {"atlas": str(args.atlas), "entries": len(entries), "models": models}


def _predict(args: argparse.Namespace) -> dict[str, object]:
    from sensitivity.analysis.allocate.by_scores import met_budgets
    from sensitivity.analysis.atlas.predicted_frontier import predict_frontier
    from sensitivity.models.discovery import inspect
    from sensitivity.models.loading import load
    from sensitivity.spec.components import granularity

    asked = schemes(args)
    granularity(args.by)
    vlm = load(args.source, config_only=True)
    parts = inspect(vlm, by=args.by)
    budgets, unmet = (None, []) if args.bpw is None else met_budgets(parts, asked, args.bpw)
    found = predict_frontier(parts, asked, args.atlas, budgets, args.task, args.attributions)
    if not args.json:
        _show(args, found)
    result = {"model": vlm.name, "atlas": str(args.atlas), **found.to_json()}
    if unmet:
        raise Partly("; ".join(unmet), result)
    return result


def _show(args: argparse.Namespace, found: PredictedFrontier) -> None:
    """Print the frontier, and what would make it surer."""
    one = len(found.models) == 1
    known = "nothing of it was measured"
    if found.measured:
        known = f"{'it' if one else 'one of them'} is this model itself"
    print_table(
        f"{args.source}, predicted from {'one model' if one else f'{len(found.models)} models'} "
        f"({', '.join(found.models)}; {', '.join(found.tasks)}); {known}",
        ("budget", "bpw", "size", "share of full precision", "95 % interval", "plan"),
        [
            (f"{p.bpw:.2f}", f"{p.size.bpw:.2f}", bytes_in_words(p.size.bytes), f"{p.share:.3f}",
             "–" if one else f"{p.low:.3f} to {p.high:.3f}", p.plan.describe())
            for p in found.points
        ],
    )  # fmt: skip
    if found.measured and not one:
        print("the intervals are those of a new model; `sensitivity recommend` knows more from its own study")
    for name, methods in found.other_methods.items():
        print(f"{name} was measured with {' and '.join(methods)}, which stands in for {args.method} here")
    if args.attributions is not None:
        counted = f"count to the power of {found.trust:g}" if found.trust else "do not count"
        print(f"relative errors {counted}, as that predicts each of the atlas's models best from the others")
    if one:
        print("one model says nothing about how far models differ: add studies of others")
    elif found.halved_by is not None:
        on = f" on {found.examples:,} examples each" if found.examples else ""
        plans = "plan" if found.halved_by == 1 else "plans"
        print(f"measuring {found.halved_by} {plans}{on} would halve these intervals: {_sweep(args, found)}")


def _sweep(args: argparse.Namespace, found: PredictedFrontier) -> str:
    """The command that measures as many plans as would halve the intervals, beside full precision."""
    from sensitivity.tasks.table import DATASETS, RETRIEVAL_DATASETS

    assert found.halved_by is not None, "whoever asks knows how many plans"
    name = Path(args.source).name.rpartition(":")[2]
    words = ["sensitivity", "sweep", args.source, "--by", args.by, "--method", args.method]
    words += ["--bits", ",".join(map(str, args.bits)), *_settings(args)]
    words += ["--search", "frontier", "--prior", args.atlas]
    task = args.task or found.tasks[0]
    in_folder = task in (*DATASETS, *RETRIEVAL_DATASETS)  # an atlas does not know where it lies
    words += ["--task", f"{task}:FOLDER" if in_folder else task]
    words += ["--trials", found.halved_by + 1, *(["--n", found.examples] if found.examples else [])]
    return " ".join(map(shell_word, [*words, "--out", f"runs/{name}-frontier"]))


def _settings(args: argparse.Namespace) -> list[str]:
    """The settings of the method that were typed, as they are typed."""
    given = {"--group": args.group, "--backend": args.backend}
    words = [str(word) for flag, value in given.items() if value is not None for word in (flag, value)]
    words += [] if args.symmetric is None else ["--symmetric" if args.symmetric else "--no-symmetric"]
    words += ["--biases"] if args.biases else []
    for name, value in args.set:
        words += ["--set", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    return words
