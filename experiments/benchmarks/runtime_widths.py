"""What low bits buy in each runtime: a model of true shape at each width, beside full precision in the same run.

    python -m experiments.true_shapes smolvlm-256m SPACE/smolvlm-256m
    python -m experiments.benchmarks.runtime_widths SPACE/smolvlm-256m --write
    python -m experiments.benchmarks.runtime_widths SPACE/smolvlm-256m [--runtimes openvino,gguf] [--bits 2,4,8]

With --write only the exports are written, beside the model; without it they are timed. A line of
`reports/runtime-widths.csv` is a measurement, added as soon as it is made, and not made again; the tables of
`reports/runtime-widths.md` are made from all of them, and its words above the first table are kept.

All layers of the vision tower, the connector and the language model have symmetric codes of one width in groups of 32,
rounded to nearest; embedding and output head stay in bfloat16, as does all of full precision, which OpenVINO and ONNX
Runtime expand to float32 when they open it. Widths that a runtime stores alike are measured once. Weights are random,
on which times do not depend. Times are CPU time in one thread.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pandas as pd
import torch

from experiments.benchmarks.true_shapes import pictures
from sensitivity.formats.table import write
from sensitivity.formats.timing.intervals import CLOCKS, FEWEST, STAGES, interval
from sensitivity.formats.timing.machine import this_machine, versions_of
from sensitivity.formats.timing.open_models import CHECK
from sensitivity.formats.timing.timed_process import Asked, Round, TimedModel, timed_model
from sensitivity.formats.writing.job import Job
from sensitivity.models.discovery import inspect
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.files import csv_bytes, write_atomically
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.table import files_of
from sensitivity.spec.sizes import GB
from sensitivity.spec.stored_bits import GGUF_BLOCK, GGUF_BLOCK_BYTES, gguf_type, openvino_width

REPORT = Path(__file__).parents[2] / "reports" / "runtime-widths.md"
RUNTIMES = ("openvino", "onnx", "onnx-int8", "gguf")
BITS = (2, 3, 4, 5, 6, 8)
FULL = 16  # the width of full precision: bfloat16, as published
KEY = ["model", "runtime", "bits"]
EDGES = ("median", "low", "high")
SIZES = ("GB on disk", "GB resident", "GB anonymous")
TIMES = tuple(f"CPU ms per {name}" for name in STAGES)


def scheme(bits: int) -> Scheme:
    return Scheme("rtn", bits, 32, symmetric=True)


def stored(runtime: str, bits: int) -> float:
    """Bits of a stored code and its share of a scale: in all three formats 32 codes share one of 16 bits."""
    if bits == FULL:
        return bits
    if files_of(runtime) == "gguf":
        return 8 * GGUF_BLOCK_BYTES[gguf_type(scheme(bits))] / GGUF_BLOCK
    return openvino_width(bits) + 0.5


def alike(runtime: str, bits: int) -> list[int]:
    """The widths that a runtime stores alike; the last of them is written and timed."""
    return [other for other in (*BITS, FULL) if stored(runtime, other) == stored(runtime, bits)]


def place(model: Path, runtime: str, bits: int) -> Path:
    """The folder of an export."""
    return model.parent / f"{model.name}-{files_of(runtime)}-{bits}"


class Rows:
    """The lines of the file, to which each measurement is added at once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.table = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=KEY)

    def known(self, model: Path, runtime: str) -> set[int]:
        """The widths that are not measured again; 0 stands for a runtime that refuses the model."""
        found = self.table[(self.table["model"] == model.name) & (self.table["runtime"] == runtime)]
        return set(found["bits"].astype(int))

    def add(self, model: Path, runtime: str, bits: int, **row: object) -> None:
        if bits in self.known(model, runtime):
            return
        added = pd.DataFrame([{"model": model.name, "runtime": runtime, "bits": bits, **row}])
        self.table = pd.concat([self.table, added]) if len(self.table) else added
        write_atomically(self.file, csv_bytes(self.table))
        print({key: value for key, value in added.iloc[0].items() if not str(key).endswith(EDGES[1:])}, flush=True)


def write_exports(model: Path, parts: ComponentMap, runtime: str, widths: Sequence[int], rows: Rows) -> None:
    """Write the exports that are missing; a plan that is refused gets its row."""
    for bits in widths:
        plan = Plan.uniform(parts, None if bits == FULL else scheme(bits))
        job = Job(str(model), parts, plan, {"model": str(model)}, dtype=torch.float32)
        try:
            if not place(model, runtime, bits).exists():
                write(job, place(model, runtime, bits), str(files_of(runtime)))
        except UserError as error:
            rows.add(model, runtime, bits, refused=str(error))


@contextmanager
def running(model: Path, runtime: str, bits: int, task: str) -> Iterator[TimedModel]:
    """A process that holds an export, after a first round, which is slower."""
    asked = Asked(str(place(model, runtime, bits)), str(model), runtime, "float32", 1, task, 1, 0)
    with timed_model(asked) as one:
        one.round(0)
        yield one


def measure(model: Path, runtime: str, widths: Sequence[int], n: int, task: str, rows: Rows) -> None:
    """Time full precision and some widths in turn, and add a row for each."""
    with ExitStack() as stack:
        models = {bits: stack.enter_context(running(model, runtime, bits, task)) for bits in (FULL, *widths)}
        took: dict[int, list[Round]] = {bits: [] for bits in models}
        for number in range(n):
            for bits in list(models)[:: -1 if number % 2 else 1]:
                took[bits].append(models[bits].round(0))
        size = {bits: sizes(place(model, runtime, bits), one) for bits, one in models.items()}
    for bits, rounds in took.items():
        one = rounds[0]
        tokens = {"image tokens": one.image_tokens, "prompt tokens": one.prompt.count, "new tokens": one.new.count}
        shares = {f"share of {key}": value / size[FULL][key] for key, value in size[bits].items()}
        found = {**size[bits], **shares, **figures(rounds, took[FULL])}
        found = {key: float(f"{value:.4g}") for key, value in found.items()}
        versions = ", ".join(f"{name} {version}" for name, version in list(versions_of(runtime).items())[:1])
        rows.add(model, runtime, bits, **found, **tokens, n=n, processor=this_machine()["processor"], version=versions)


def sizes(folder: Path, one: TimedModel) -> dict[str, float]:
    """GB on disk and in memory."""
    memory = one.memory()
    assert memory is not None
    stored = sum(file.stat().st_size for file in folder.iterdir())
    held = (stored, memory["anonymous"] + memory["mapped"], memory["anonymous"])
    return {name: value / GB for name, value in zip(SIZES, held, strict=True)}


def figures(rounds: Sequence[Round], full: Sequence[Round]) -> dict[str, float]:
    """Times of each stage, and their shares of full precision's in the same round, by the clock and in CPU time."""
    found: dict[str, float] = {}
    for clock, ms in CLOCKS.items():
        for name, stage in STAGES.items():
            took, beside = ([ms(stage(one)) for one in some] for some in (rounds, full))
            share = [mine / its for mine, its in zip(took, beside, strict=True)]
            for what, values in ((f"{clock} per {name}", took), (f"share of {clock} per {name}", share)):
                found |= {f"{what} {edge}": dict(interval(values))[edge] for edge in EDGES}
    return found


def report(table: pd.DataFrame) -> str:
    """The tables, one for each model; the first columns name a row."""
    text = ""
    for model, some in table.groupby("model", sort=False):
        timed = some[some["n"] > 0]
        tokens = {name: int(timed[name].iloc[0]) for name in ("image tokens", "prompt tokens", "new tokens")}
        text += f"\n## {model}\n\n{', '.join(f'{count} {name}' for name, count in tokens.items())} an answer. "
        text += f"{timed['processor'].iloc[0]}; {', '.join(timed['version'].unique())}. {by_the_clock(timed)}\n\n"
        heads = ["runtime", "width", "stored bits", *SIZES, *TIMES, "n"]
        text += f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n"
        order = some.assign(
            place=some["runtime"].map(RUNTIMES.index), width=some["bits"] % FULL
        )  # full precision first
        for _, row in order.sort_values(["place", "width"]).iterrows():
            text += f"| {' | '.join(cells(row, len(heads)))} |\n"
    return text


def by_the_clock(timed: pd.DataFrame) -> str:
    """How much longer times are by the clock than in CPU time."""
    more = [(timed[f"{key.removeprefix('CPU ')} median"] / timed[f"{key} median"]) for key in TIMES]
    least, most = min(one.min() for one in more), max(one.max() for one in more)
    return f"By the clock, times are {least:.2f} to {most:.2f} times as long (in the file beside this page)."


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def cells(row: pd.Series, count: int) -> list[str]:
    """One row of a table."""
    name, bits = str(row["runtime"]), int(row["bits"])
    if isinstance(row.get("refused"), str):
        return [name, str(bits or "all"), f"refused: {row['refused']}", *[""] * (count - 3)]
    widths = "full precision" if bits == FULL else ", ".join(map(str, alike(name, bits)))
    found = [name, widths, f"{stored(name, bits):g}"]
    for key in SIZES:
        found.append(f"{row[key]:.3g}" + ("" if bits == FULL else f" (x {row[f'share of {key}']:.2f})"))
    for key in TIMES:
        median, *edges = (row[f"{key} {edge}"] for edge in EDGES)
        share, *around = (row[f"share of {key} {edge}"] for edge in EDGES)
        if bits == FULL:
            found.append(f"{number(median)} [{', '.join(map(number, edges))}]")
        else:
            found.append(f"{number(median)} (x {share:.2f} [{around[0]:.2f}, {around[1]:.2f}])")
    return [*found, str(int(row["n"]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder that experiments.true_shapes made")
    parser.add_argument("--write", action="store_true", help="write the exports, and time nothing")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    parser.add_argument("--bits", default=",".join(map(str, BITS)))
    parser.add_argument("--side", type=int, default=512, help="pixels of the image's side")
    parser.add_argument("--at-once", type=int, default=3, help="widths in memory beside full precision")
    parser.add_argument("--rounds", type=int, default=FEWEST)
    parser.add_argument("--out", type=Path, default=REPORT.with_suffix(".csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, parts = Rows(args.out), inspect(str(args.model), by="part")
    for runtime in args.runtimes.split(","):
        try:
            CHECK[runtime](str(args.model))
        except UserError as error:
            rows.add(args.model, runtime, 0, refused=str(error))
            continue
        widths = dict.fromkeys(alike(runtime, int(bits))[-1] for bits in args.bits.split(","))
        missing = [bits for bits in widths if bits not in rows.known(args.model, runtime)]
        if args.write:
            write_exports(args.model, parts, runtime, [FULL, *missing], rows)
            continue
        with tempfile.TemporaryDirectory() as space:
            task = str(pictures(Path(space), 1, 0, args.side))
            for start in range(0, len(missing), args.at_once):
                measure(args.model, runtime, missing[start : start + args.at_once], args.rounds, task, rows)
    report_file = args.out.with_suffix(".md")
    before = (
        report_file.read_text(encoding="utf-8") if report_file.exists() else "# What low bits buy in each runtime\n"
    )
    words = before.partition("\n## ")[0].rstrip()
    report_file.write_text(f"{words}\n{report(rows.table)}", encoding="utf-8")


if __name__ == "__main__":
    main()
