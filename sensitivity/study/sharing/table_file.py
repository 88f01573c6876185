"""Writes tidy tables as Parquet or CSV, frame by frame, with a data-set card beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pandas as pd

from sensitivity.spec.errors import UserError
from sensitivity.spec.files import csv_bytes, replacing, write_atomically
from sensitivity.study.sharing import tidy
from sensitivity.study.sharing.markdown import escaped, yaml_text
from sensitivity.study.study import Study

SUFFIXES = (".parquet", ".csv")
# the end of the card of a folder that holds the study itself
CHOOSING_A_PLAN = (
    "## How to choose a plan for a budget of your own", "",
    "`journal.log` holds the trials of the study. With the package `vlm-sensitivity`, and this data set in the folder",
    "`theirs` (`hf download OWNER/NAME --repo-type dataset --local-dir theirs`), no GPU is needed:", "", "```sh",
    "sensitivity recommend theirs --bpw 4.0 --no-run", "sensitivity rank theirs", "sensitivity report theirs",
    "```", "",
)  # fmt: skip
MARK = "# by `sensitivity table`"  # in the front matter of a card: marks the card and its table as ours


def card_of(out: Path) -> Path:
    """The card of a table."""
    return out.with_name(f"{out.name}.md")


def check(out: Path, force: bool) -> None:
    """Raise an error where a table may not be written."""
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out takes a file such as trials{SUFFIXES[0]} or trials{SUFFIXES[1]}, not {out}")
    card = card_of(out)
    ours = is_ours(card)
    there = [str(file) for file in (out, card) if file.exists()]
    if there and not force:
        raise UserError(f"{there[0]} is already there; choose another --out or add --force")
    if there and not ours:
        why = "it was not written by `sensitivity table`" if card.exists() else f"its card {card.name} is missing"
        raise UserError(f"{there[0]} is not replaced: {why}; choose another --out")


def is_ours(card: Path) -> bool:
    """Whether a file is a card that was written here."""
    return card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace")[:200]


def write(study: Study, out: Path, each_example: bool) -> int:
    """Write the table and its card; return the number of rows."""
    columns, rows = write_rows(study, out, each_example)
    card = "\n".join(_card(study, columns, rows, each_example, {"default": out.name}))
    write_atomically(card_of(out), card.encode("utf-8", "replace"))
    return rows


def folder_card(study: Study, out: Path, rows: int, files: Mapping[str, str]) -> str:
    """The card of a folder with the study itself, its table of trials, and maybe one of answers."""
    columns = list(tidy.trials(study).columns)
    return "\n".join([*_card(study, columns, rows, False, files), *CHOOSING_A_PLAN])


def write_rows(study: Study, out: Path, each_example: bool) -> tuple[list[str], int]:
    """Write the table alone; return its columns and the number of rows."""
    out.parent.mkdir(parents=True, exist_ok=True)
    frames = tidy.rows_of_examples(study) if each_example else iter([tidy.trials(study)])
    first = next(frames)  # raises an error where there is nothing to write
    columns = list(first.columns)

    def every() -> Iterator[pd.DataFrame]:
        yield first
        yield from frames

    with replacing(out) as unfinished:
        rows = (_write_csv if out.suffix == ".csv" else _write_parquet)(unfinished, every())
    return columns, rows


def _write_csv(out: Path, frames: Iterable[pd.DataFrame]) -> int:
    rows = 0
    with out.open("wb") as file:
        for frame in frames:
            content = csv_bytes(frame)
            file.write(content if not rows else content.partition(b"\n")[2])
            rows += len(frame)
    return rows


def _write_parquet(out: Path, frames: Iterable[pd.DataFrame]) -> int:
    import pyarrow as pa
    from pyarrow import parquet

    rows, writer = 0, None
    try:
        for frame in frames:
            # Arrow could not infer the type of a column that has no value in the first frame
            texts = {name: frame[name].astype("string") for name in ("question", "right", "answer") if name in frame}
            table = pa.Table.from_pandas(frame.assign(**texts), preserve_index=False)
            writer = writer or parquet.ParquetWriter(out, table.schema)
            writer.write_table(table.cast(writer.schema))
            rows += len(frame)
    finally:
        if writer is not None:
            writer.close()
    return rows


def _card(study: Study, columns: list[str], rows: int, each_example: bool, files: Mapping[str, str]) -> Iterator[str]:
    """The card: what the table is, what it was measured on, what each column means. files: configuration -> file."""
    meta, first = study.meta, next(iter(files.values()))
    suffix = first.rpartition(".")[2]
    model = escaped(Path(study.parts.model).name)
    yield from ("---", MARK, f"pretty_name: {yaml_text(f'sensitivity of {Path(study.parts.model).name}')}")
    yield from ("tags:", "- quantization", "- vision-language models", "configs:")
    for name, file in files.items():
        yield from (f"- config_name: {name}", f"  data_files: {yaml_text(file)}")
    yield from ("---", "")
    yield f"# How far the parts of {model} can be quantized"
    what = "one row per plan and example" if each_example else "one row per plan and task"
    yield from ("", f"{rows:,} rows, {what}, written by `sensitivity table`. Components: by {escaped(study.parts.by)}.")
    yield from ("", "## What was measured", "")
    dtype, data = meta.get("dtype"), meta.get("data", {})
    yield f"* model: {model}" + (f", computed in {escaped(dtype)}" if dtype else "")
    for task in study.tasks:
        hashed = f": {escaped(data[task])} (a hash of questions, answers and images)" if task in data else ""
        yield f"* task {escaped(task)}{hashed}"
    if "seed" in meta:
        yield f"* examples were drawn with seed {meta['seed']}, at most {meta.get('n', 0):,} per task"
    versions = sorted({f"{name} {one}" for trial in study.measured() for name, one in trial.versions.items()})
    if versions:
        yield f"* versions: {escaped(', '.join(versions))}"
    if meta.get("imported"):
        yield "* the scores were imported from a table, and not measured here"
    yield from ("", "## Columns", "", "| column | meaning |", "|---|---|")
    for name in columns:
        head = name.partition(".")[0]
        meaning = tidy.MEANINGS.get(name) or tidy.MEANINGS.get(f"{head}.NAME", "")
        yield f"| {escaped(name)} | {meaning} |"
    yield from ("", "## How to load it", "", "```python", "import datasets", "")
    yield from (f'datasets.load_dataset("{suffix}", data_files={first!r})', "```", "")
    if suffix == "csv":
        yield "Text that begins with =, +, - or @ has an apostrophe in front, so that no spreadsheet runs it."
        yield ""
    yield "The license of the questions and answers is that of the data they are from; images are not in this table."
    yield ""
