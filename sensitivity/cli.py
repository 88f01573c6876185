"""One verb each for inspect, sweep, rank, recommend, export, report; demo runs them all. Reads argv, and prints."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sensitivity.errors import UserError

if TYPE_CHECKING:
    from sensitivity.components import ComponentMap
    from sensitivity.plan import Scheme
    from sensitivity.sweep import Step
    from sensitivity.trials import Study

# torch, pandas and the like are imported inside the verbs: `sensitivity --help` is to answer at once
Facts = dict[str, Any]
WIDTHS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Verb:
    """What a verb is called, how it is explained, which words it takes, and what it does."""

    about: str
    example: str
    words: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Facts]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; 0, or 1 after one clear sentence on standard error."""
    args = parser().parse_args(argv)
    try:
        with quiet(args):
            facts = VERBS[args.verb].run(args)
        if args.json:
            print(json.dumps(facts, indent=2, default=str))
        return 0
    except KeyboardInterrupt:
        return fail(args, "stopped; what was finished is kept, and the same command continues", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError, MemoryError) as error:
        if args.debug:
            raise
        return fail(args, str(error) or type(error).__name__, 1)
    except Exception as error:
        if args.debug:
            raise
        return fail(args, f"unexpected {type(error).__name__}: {error} (a defect; --debug shows where)", 1)


def fail(args: argparse.Namespace, message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": message}))
    return status


@contextlib.contextmanager
def quiet(args: argparse.Namespace) -> Iterator[None]:
    """Keep libraries' own progress bars and warnings off the terminal, unless --debug asks for them."""
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if args.debug else "error")
    with warnings.catch_warnings():
        if not args.debug:
            warnings.simplefilter("ignore")
        yield


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--json", action="store_true", help="print one JSON object, and nothing else, on standard output"
    )
    common.add_argument("--debug", action="store_true", help="show the traceback of an error, and libraries' warnings")
    top = argparse.ArgumentParser(
        prog="sensitivity",
        description="Which parts of a vision-language model can be quantised how far, at what cost to your task?",
        epilog="example: sensitivity demo",
    )
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        one = verbs.add_parser(
            name,
            parents=[common],
            help=verb.about,
            description=verb.about[0].upper() + verb.about[1:] + ".",
            epilog=f"example: {verb.example}",
        )
        verb.words(one)
    return top


# -- words that several verbs share


def model_words(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="a folder, a hub name, or an embedded model: embedded:scenes-llava")


def device_words(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="cpu", help="where to run, such as cuda (default: cpu)")
    p.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored; embedded models in float32)")


def by_words(p: argparse.ArgumentParser, default: str) -> None:
    p.add_argument(
        "--by",
        default=default,
        metavar="GRANULARITY",
        help=f"part, group, kind, group.kind, block or linear (default: {default})",
    )


def method_words(p: argparse.ArgumentParser, bits: Sequence[int], method: str) -> None:
    p.add_argument(
        "--bits",
        type=numbers,
        default=tuple(bits),
        metavar="B,B,...",
        help=f"widths to try (default: {','.join(map(str, bits))})",
    )
    p.add_argument("--method", default=method, help=f"how weights are quantised (default: {method})")
    p.add_argument(
        "--group", type=group, metavar="N|row|tensor", help="weights that share a scale (default: the method's)"
    )
    p.add_argument(
        "--symmetric", action=argparse.BooleanOptionalAction, help="a grid around zero (default: the method's)"
    )
    p.add_argument("--biases", action="store_true", default=None, help="quantise biases too, as the paper's code did")


def budget_words(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--bpw",
        type=float,
        default=4.0,
        metavar="X",
        help="budget in bits per weight, all that is stored counted (default: 4.0)",
    )


def study_words(p: argparse.ArgumentParser) -> None:
    p.add_argument("study", type=Path, metavar="STUDY", help="the folder of a sweep, such as runs/demo")


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(piece) for piece in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of whole numbers such as 2,3,4") from None


def names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(piece.strip() for piece in text.split(",") if piece.strip()))


def group(text: str) -> int | str:
    return int(text) if text.isdigit() else text


# -- inspect


def inspect_words(p: argparse.ArgumentParser) -> None:
    model_words(p)
    by_words(p, "group.kind")
    method_words(p, WIDTHS, "rtn")
    p.add_argument("--config-only", action="store_true", help="read config.json alone; no weights are needed")


def inspect(args: argparse.Namespace) -> Facts:
    from sensitivity import verbs
    from sensitivity.plan import uniform_sizes

    vlm = verbs.load(args.model, config_only=args.config_only)
    parts = verbs.inspect(vlm, by=args.by)
    kept: dict[str, list[int]] = {}
    for weight in parts.kept:
        kept.setdefault(weight.reason, []).append(weight.numel)
    sizes = uniform_sizes(parts, schemes(args))
    facts: Facts = {
        "model": vlm.name,
        "class": type(vlm.model).__name__,
        "parameters": parts.numel,
        "by": parts.by,
        "components": [
            {"name": c.name, "modules": len(c.weights), "parameters": c.numel, "share": c.numel / parts.numel}
            for c in parts.components
        ],
        "kept": [{"reason": why, "tensors": len(n), "parameters": sum(n)} for why, n in kept.items()],
        "uniform": [{"bits": bits, **size.to_json()} for bits, size in sizes.items()],
        "note": vlm.note,
    }
    if not args.json:
        show_inspect(facts, args)
    return facts


def show_inspect(facts: Facts, args: argparse.Namespace) -> None:
    print(f"{facts['model']}: {facts['class']}, {facts['parameters']:,} parameters")
    if facts["note"]:
        print(facts["note"])
    total = facts["parameters"]
    table(
        "Components",
        ("name", "modules", "parameters", "share"),
        [(c["name"], c["modules"], f"{c['parameters']:,}", f"{c['share']:.1%}") for c in facts["components"]],
    )
    table(
        "Kept at native precision",
        ("why", "tensors", "parameters", "share"),
        [(k["reason"], k["tensors"], f"{k['parameters']:,}", f"{k['parameters'] / total:.1%}") for k in facts["kept"]],
    )
    table(
        f"Uniform plans ({args.method})",
        ("bits", "bpw, all stored", "bpw, codes only", "MB"),
        [(u["bits"], f"{u['bpw']:.3f}", f"{u['bpw_codes']:.3f}", f"{u['bytes'] / 1e6:,.1f}") for u in facts["uniform"]],
    )


# -- sweep


def sweep_words(p: argparse.ArgumentParser) -> None:
    model_words(p)
    p.add_argument(
        "--task",
        type=names,
        default=("vqa",),
        metavar="T[,T]",
        help="vqa, caption, scene, ground, or a .jsonl file of your own (default: vqa)",
    )
    by_words(p, "part")
    method_words(p, (2, 3, 4, 6, 8), "rtn")
    p.add_argument(
        "--search", default="grid", help="grid, one-at-a-time, random, tpe, nsga2, gp or frontier (default: grid)"
    )
    p.add_argument("--trials", type=int, metavar="N", help="how many plans a search other than grid may try")
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="runs/NAME",
        help="where the study is kept; the same again continues it",
    )
    sample_words(p)
    device_words(p)
    p.add_argument(
        "--plain", action="store_true", help="load, quantise, run: nothing shared between plans (slow, the reference)"
    )
    p.add_argument(
        "--storage", metavar="URL", help="an Optuna storage for a team, such as postgresql+psycopg://host/db"
    )


def sample_words(p: argparse.ArgumentParser) -> None:
    p.add_argument("--n", type=int, default=1000, help="examples per task, drawn with the seed (default: 1000)")
    p.add_argument("--seed", type=int, default=0, help="of the examples and of any search (default: 0)")


def sweep(args: argparse.Namespace) -> Facts:
    from sensitivity import verbs

    vlm = verbs.load(args.model, device=args.device, dtype=args.dtype)
    parts = verbs.inspect(vlm, by=args.by)
    plans = verbs.plans(parts, schemes(args), args.search, args.trials, args.seed)
    study, steps = verbs.sweeping(
        vlm, parts, plans, args.task, args.out, n=args.n, seed=args.seed, plain=args.plain, storage=args.storage
    )
    walk(steps, f"sweeping {vlm.name}")
    facts = {"study": str(args.out), **study.counts(), "trials": trials(study)}
    if not args.json:
        show_trials(study)
        print(f"{facts['done']} plans in {args.out}; next: sensitivity recommend {args.out} --bpw 4")
    return facts


def schemes(args: argparse.Namespace) -> list[Scheme]:
    from sensitivity.quantize import scheme

    return [
        scheme(args.method, bits, group=args.group, symmetric=args.symmetric, biases=args.biases) for bits in args.bits
    ]


def walk(steps: Iterator[Step], title: str) -> None:
    """Show a bar with what is done, what is left and the time it will take."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("· so far"),
        TimeElapsedColumn(),
        TextColumn("· {task.fields[last]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        line = bar.add_task(title, total=None, last="preparing")
        started = None
        for step in steps:
            started = step.done - 1 if started is None else started  # what earlier runs did says nothing about speed
            last = " ".join(f"{task} {score:.3f}" for task, score in step.scores.items())
            bar.update(line, total=step.done + step.left - started, completed=step.done - started, last=last)
        if started is None:
            bar.update(line, total=1, completed=1, last="nothing was left to do")


def trials(study: Study) -> list[Facts]:
    return json.loads(study.table().to_json(orient="records"))  # type: ignore[no-any-return]


def show_trials(study: Study, most: int = 12) -> None:
    """The plans that no smaller one beats on the first task, and full precision."""
    rows = study.table()
    first = study.tasks[0]
    best = rows.sort_values("bpw")
    best = best[(best[first] > best[first].cummax().shift(fill_value=-1)) | best["native"]].tail(most)
    table(
        f"Frontier on {first}",
        ("bpw", *study.tasks, "plan"),
        [
            (f"{row['bpw']:.2f}", *(interval(row, task) for task in study.tasks), row["plan"])
            for _, row in best.iterrows()
        ],
    )


def interval(row: Any, task: str) -> str:
    return f"{row[task]:.3f} [{row[task + '.low']:.3f}, {row[task + '.high']:.3f}]"


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    grid = Table(*heads, title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(grid.columns):
        numeric = all(str(row[i])[:1].isdigit() for row in rows)
        column.justify = "right" if numeric else "left"
        column.overflow = "fold"
    for row in rows:
        grid.add_row(*(escape(str(cell)) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print()
    console.print(grid)
    console.print()


VERBS: dict[str, Verb] = {
    "inspect": Verb(
        "list the parts of a model, what is kept and why, and what uniform plans weigh",
        "sensitivity inspect embedded:scenes-llava --by part",
        inspect_words,
        inspect,
    ),
    "sweep": Verb(
        "evaluate plans on tasks; resumable",
        "sensitivity sweep embedded:scenes-llava --task vqa --bits 2,3,4,6,8 --by part --out runs/first",
        sweep_words,
        sweep,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
