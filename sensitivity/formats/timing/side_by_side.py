"""bench(): times an export and full precision in turn in one runtime, and measures the memory of each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypedDict

import torch

from sensitivity.formats.table import write
from sensitivity.formats.timing.intervals import FEWEST, Interval, times, times_faster
from sensitivity.formats.timing.machine import Machine, this_machine, versions_of
from sensitivity.formats.timing.memory import Memory
from sensitivity.formats.timing.open_models import CHECK
from sensitivity.formats.timing.timed_process import Asked, Round, TimedModel, timed_model
from sensitivity.formats.writing import manifest
from sensitivity.formats.writing.job import Job
from sensitivity.formats.writing.manifest import Manifest
from sensitivity.formats.writing.unfinished import temporary_folder
from sensitivity.models.discovery import inspect
from sensitivity.spec.errors import UserError, shell_word, unknown
from sensitivity.spec.files import finite, write_atomically
from sensitivity.spec.plan import Plan
from sensitivity.spec.runtimes.table import RUNTIMES, files_of
from sensitivity.spec.stage import each
from sensitivity.study.exports import BENCH
from sensitivity.tasks.table import task as find_task

ROUNDS = 20


class Measured(TypedDict):
    """What was measured of one model in its runtime."""

    bytes: int | None  # on disk; None if the model is not a local folder
    memory: Memory | None
    times: dict[str, Interval]


class Tokens(TypedDict):
    """How many tokens were timed."""

    per_image: int
    prompt: int
    new: int


class Bench(TypedDict):
    """An export and full precision, timed in one run."""

    runtime: str
    task: str
    n: int
    threads: int
    machine: Machine
    versions: dict[str, str]
    tokens: Tokens
    export: Measured
    full_precision: Measured
    times_faster: dict[str, Interval]


def bench(
    folder: Path | str,
    runtime: str | None = None,
    n: int = ROUNDS,
    *,
    task: str | None = None,
    model: str | None = None,
    threads: int = 0,
) -> Bench:
    """Time an export and full precision round by round in one run, and store the outcome in the export.

    Each round is the answer to one example of a task: its image, its prompt, and a fixed number of new tokens. `model`
    is the folder of the base model, if it is not the one that the export names.
    """
    folder = Path(folder)
    facts = manifest.read(folder)
    runtime, base, timed_task = _checked(folder, facts, runtime, n, task, model)
    threads = threads or torch.get_num_threads()
    with full_precision(base, runtime, facts["dtype"]) as full:
        asked = {
            name: Asked(path, base, runtime, facts["dtype"], threads, timed_task, n, 0)
            for name, path in (("export", str(folder)), ("full", full))
        }
        rounds, memory = in_turn(asked, n)
        sizes = {name: _bytes(Path(one.model)) for name, one in asked.items()}
    ours, theirs = rounds["export"], rounds["full"]
    found: Bench = {
        "runtime": runtime,
        "task": timed_task,
        "n": n,
        "threads": threads,
        "machine": this_machine(),
        "versions": {**versions_of(runtime), "threads": str(threads)},
        "tokens": tokens_of(theirs),
        "export": {"bytes": sizes["export"], "memory": memory["export"], "times": times(ours)},
        "full_precision": {"bytes": sizes["full"], "memory": memory["full"], "times": times(theirs)},
        "times_faster": times_faster(ours, theirs),
    }
    write_atomically(folder / BENCH, (json.dumps(finite(found), indent=1) + "\n").encode())
    return found


def _checked(
    folder: Path, facts: Manifest, runtime: str | None, n: int, task: str | None, model: str | None
) -> tuple[str, str, str]:
    """Raise an error before any slow work if something is wrong; returns the runtime, the base model and the task."""
    format = facts["format"]
    own = format if format in CHECK else "transformers"
    if format == "plan":
        raise UserError(
            f"{folder} is a plan and holds no weights: "
            f"`sensitivity export {shell_word(folder / 'plan.json')} --format NAME --out DIR` writes some"
        )
    if not facts["runs"]:
        *some, last = CHECK
        timed = f"{', '.join(some)} and {last}"
        raise UserError(f"{folder} is of the format {format}, which only its own runtime loads; here {timed} are timed")
    if runtime is not None and runtime not in CHECK:
        raise unknown("runtime", runtime, CHECK)
    if runtime not in (None, own) and (runtime not in RUNTIMES or files_of(runtime) != format):
        raise UserError(f"{folder} is of the format {format}, which {own} runs and not {runtime}; leave out --runtime")
    if n < FEWEST:
        raise UserError(f"an interval of a median takes at least {FEWEST} rounds, not {n}")
    if damage := manifest.damaged_files(folder, facts):
        raise UserError(f"{folder} is not as it was written: {'; '.join(damage)}; export again")
    timed_task = task or next(iter(facts["trial"].get("meta", {}).get("tasks", [])), None)
    if timed_task is None:
        raise UserError(
            f"the plan of {folder} was never measured; name the task whose prompts are timed, as --task vqa"
        )
    base = model or facts["model"]
    if find_task(timed_task, "evaluation", 1).gallery:
        raise UserError(f"the task {timed_task} ranks captions; name one with answers to generate, as --task vqa")
    CHECK[runtime or own](base)
    return runtime or own, base, timed_task


@contextmanager
def full_precision(base: str, runtime: str, dtype: str) -> Iterator[str]:
    """The unquantized model, as the runtime reads it: the model itself, or a temporary export of it."""
    if runtime == "transformers":
        yield base
        return
    with temporary_folder("bench") as space:
        parts = inspect(base, by="part")
        out = space / "native"
        job = Job(base, parts, Plan.uniform(parts, None), dtype=getattr(torch, dtype))
        write(job, out, files_of(runtime) or runtime)
        yield str(out)


def in_turn(asked: Mapping[str, Asked], n: int) -> tuple[dict[str, list[Round]], dict[str, Memory | None]]:
    """Time the models in turn, so that other load on the machine affects all alike; returns rounds and memory."""
    with ExitStack() as stack:
        running: dict[str, TimedModel] = {name: stack.enter_context(timed_model(one)) for name, one in asked.items()}
        for one in running.values():
            one.round(0)  # the first round is slower, and is not counted
        rounds: dict[str, list[Round]] = {name: [] for name in running}
        for number in each(range(n), "timing", "rounds", n):
            for name in list(running)[:: 1 if number % 2 else -1]:  # in alternating order
                rounds[name].append(running[name].round(number))
        return rounds, {name: one.memory() for name, one in running.items()}


def tokens_of(rounds: list[Round]) -> Tokens:
    """Tokens of an image, of a prompt (the median) and of what was generated."""
    prompts = sorted(one.prompt.count for one in rounds)
    return {"per_image": rounds[0].image_tokens, "prompt": prompts[len(prompts) // 2], "new": rounds[0].new.count}


def _bytes(path: Path) -> int | None:
    """The bytes of a folder on disk; None if the path is not a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else None
