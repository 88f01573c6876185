"""sensitivity bench: times an export in its runtime beside full precision, and measures the memory of both."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sensitivity.cli.arguments import flags, path_values, values
from sensitivity.cli.output.progress import show_stages
from sensitivity.cli.output.tables import print_table
from sensitivity.spec.sizes import bytes_in_words
from sensitivity.spec.threads import threads_in_words

if TYPE_CHECKING:
    from sensitivity.formats.timing.intervals import Interval
    from sensitivity.formats.timing.side_by_side import Bench

ABOUT = "time an export in its runtime beside full precision, round by round, and measure the memory of both"
EXAMPLE = "sensitivity bench out/first --n 20"


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    p.add_argument("folder", type=path_values.path, metavar="DIR", help="a folder that `sensitivity export` wrote")
    flags.add_runtime(p, "what runs it: openvino, onnx, onnx-int8, gguf or transformers (default: that of its format)")
    p.add_argument(
        "--n", type=values.rounds, default=20, metavar="N", help="rounds, each the answer to an example (default: 20)"
    )
    p.add_argument(
        "--task",
        type=values.model_or_task,
        metavar="T",
        help="task whose prompts are timed (default: the one that was measured)",
    )
    flags.add_moved_model(p)


def run(args: argparse.Namespace) -> dict[str, object]:
    """Time the export, print a table, and return all of it."""
    from sensitivity.formats.timing.side_by_side import bench

    with show_stages(args.json):
        found = bench(args.folder, args.runtime, args.n, task=args.task, model=args.model, threads=args.threads or 0)
    if not args.json:
        show(found)
    return dict(found)


def show(found: Bench) -> None:
    """Print the times and the memory of both, and how many times faster the export is."""
    ours, full, tokens = found["export"], found["full_precision"], found["tokens"]
    # a model that is no folder, such as an embedded one, has no size on disk
    on_disk = "folder on disk", _size(ours["bytes"]), _size(full["bytes"]) if full["bytes"] else "no folder", ""
    rows: list[tuple[str, ...]] = [on_disk]
    if ours["memory"] and full["memory"]:
        for kind, count in ours["memory"].items():
            rows.append((f"memory, {kind}", _size(count), _size(dict(full["memory"])[kind]), ""))
    for name, interval in ours["times"].items():
        ratio = found["times_faster"].get(name)
        rows.append((name, _words(interval), _words(full["times"][name]), _words(ratio) if ratio else ""))
    print_table(
        f"{found['runtime']}, {threads_in_words(found['threads'])}, {found['n']} rounds in turn: "
        f"{tokens['per_image']} tokens per image, {tokens['prompt']} per prompt, {tokens['new']} new ones",
        ("", "export", "full precision", "times faster"),
        rows,
    )
    machine = found["machine"]
    print(f"medians with 95 % intervals; {machine['processor']} ({' '.join(machine['instructions'])})")


def _size(count: object) -> str:
    return bytes_in_words(count) if isinstance(count, int) else "–"


def _words(of: Interval) -> str:
    return f"{_number(of['median'])} ({_number(of['low'])} to {_number(of['high'])})"


def _number(value: float) -> str:
    """Three digits, and no powers of ten."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
