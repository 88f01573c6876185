"""A process that opens one model in its runtime, and times one answer for each request."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import IO, TYPE_CHECKING, TypedDict, cast

from sensitivity.formats.timing.memory import Memory, begin_peak, memory_now, resident
from sensitivity.spec import standard_output
from sensitivity.spec.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from sensitivity.formats.halved.model import HalvedModel

PROGRAM = "from sensitivity.formats.timing.timed_process import serve; serve()"
NEW_TOKENS = 16  # of each answer, past any end token: real answers can be too short to time
LAST_LINES, LAST_BYTES = 3, 1000  # of a process's standard error that the message on its failure shows


@dataclass(frozen=True)
class Asked:
    """The model that a process opens, and the prompts with which it is timed."""

    model: str  # a folder, or the name of a model
    processor: str  # the model whose processor turns prompts into tensors
    runtime: str
    dtype: str
    threads: int
    task: str
    n: int
    seed: int
    counted: bool = False  # whether the time of each layer is counted


@dataclass(frozen=True)
class TimedStage:
    """One stage of an answer: its wall-clock and CPU seconds, and its number of images or tokens."""

    wall: float
    cpu: float
    count: int


@dataclass(frozen=True)
class Round:
    """One answer: its images, then its prompt, then tokens one by one."""

    image: TimedStage
    prompt: TimedStage
    new: TimedStage
    image_tokens: int  # per image


class Counted(TypedDict):
    """What was counted inside a model."""

    layers: dict[str, dict[str, float]]  # stage -> weight -> mean seconds per image, per prompt, per new token
    memory: dict[str, int]  # half -> bytes that it added to its process; 0 where the system does not report them


class _Reply(TypedDict, total=False):
    memory: Memory | None
    round: dict[str, dict[str, float] | int]
    counted: Counted
    error: str  # a sentence for the user
    failed: str  # anything else, of which libraries may say more on standard error


class TimedModel:
    """A model that is timed in a separate process, so that its memory can be measured, too."""

    def __init__(self, running: subprocess.Popen[str], name: str, errors: IO[bytes] | None = None) -> None:
        self.running, self.name, self.errors = running, name, errors
        self._reply()

    def round(self, number: int) -> Round:
        """Time one answer; its prompt is the example of that number."""
        found = self._ask(number)["round"]
        image, prompt, new = (TimedStage(**cast(dict[str, int], found[name])) for name in ("image", "prompt", "new"))
        return Round(image, prompt, new, cast(int, found["image_tokens"]))

    def memory(self) -> Memory | None:
        """What the process holds beyond what it held before it opened the model."""
        return self._ask("memory")["memory"]

    def counted(self) -> Counted:
        """The times of layers and the memory of both halves, if they were asked for."""
        return self._ask("counted")["counted"]

    def _ask(self, what: int | str) -> _Reply:
        _send(self.running, what)
        return self._reply()

    def _reply(self) -> _Reply:
        assert self.running.stdout is not None
        line = self.running.stdout.readline()
        found: _Reply = json.loads(line) if line else {"failed": "its process ended (was it killed, or out of memory?)"}
        if "failed" in found:
            found["error"] = found["failed"] + self._last_lines()
        if "error" in found:
            raise UserError(f"{self.name} cannot be timed: {found['error']}")
        return found

    def _last_lines(self) -> str:
        """The end of the process's standard error, as a part of a message."""
        if self.errors is None:
            return ""
        self.errors.seek(max(self.errors.seek(0, os.SEEK_END) - LAST_BYTES, 0))
        lines = [line.strip() for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        return f"; it wrote last: {' | '.join(lines[-LAST_LINES:])}" if lines else ""


def _send(running: subprocess.Popen[str], what: object) -> None:
    """Write a line to a process; one that has ended is noticed when its reply is read."""
    assert running.stdin is not None
    try:
        running.stdin.write(json.dumps(what) + "\n")
        running.stdin.flush()
    except BrokenPipeError:  # closing later would try to write again
        with suppress(OSError):
            running.stdin.close()


@contextmanager
def timed_model(asked: Asked) -> Iterator[TimedModel]:
    """Start a process for a model, and end it with the block."""
    # standard error goes to a file: nobody reads it while the process runs, and a full pipe would block the process
    with tempfile.TemporaryFile() as errors, subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(asked.threads)},
    ) as running:  # fmt: skip
        try:
            _send(running, asdict(asked))
            yield TimedModel(running, asked.model, errors)
        finally:
            running.kill()


def serve() -> None:
    """Open the model, then time one answer for each number that arrives; this runs in the separate process."""
    answers = os.fdopen(os.dup(1), "w")  # for replies only; what libraries print goes to standard error

    def reply(**content: object) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    with standard_output.reserved():
        try:
            timed = _Timed(Asked(**json.loads(sys.stdin.readline())))
            reply()
            for line in sys.stdin:
                what = json.loads(line)
                if what == "memory":
                    reply(memory=timed.memory())
                elif what == "counted":
                    reply(counted=timed.counted())
                else:
                    reply(round=asdict(timed.round(what)))
        except UserError as error:
            reply(error=str(error))
        except Exception as error:
            reply(failed=f"{type(error).__name__}: {error}")


class _Timed:
    """A model in its runtime, with the examples of a task as tensors."""

    def __init__(self, asked: Asked) -> None:
        import torch

        from sensitivity.formats.timing.open_models import open_model, warm_up
        from sensitivity.measure.generate.batches import batches_by_image
        from sensitivity.models.config_only import without_weights
        from sensitivity.tasks.table import task as find_task

        torch.set_num_threads(asked.threads)
        vlm = without_weights(asked.processor)
        task = find_task(asked.task, "evaluation", asked.n, asked.seed)
        alone = (replace(task, examples=(example,)) for example in task.examples)
        self.inputs = [batch.inputs for one in alone for batch in batches_by_image(vlm, one, plain=True)]
        warm_up(asked.runtime)
        begin_peak()
        self.before, self.held = memory_now(), resident()
        self.model = open_model(asked.model, asked.runtime, asked.dtype, asked.threads, asked.counted)
        self.layers = LayerSeconds(asked.threads) if asked.counted else None
        self.after_image = -1  # bytes that were added by the first image: the language half opens when it first runs

    def round(self, number: int) -> Round:
        """Time the answer to one example."""
        inputs = self.inputs[number % len(self.inputs)]
        if self.layers is None:
            return answered(self.model, inputs)
        totals = [self.model.layer_seconds()]

        def between() -> None:
            totals.append(self.model.layer_seconds())
            if self.after_image < 0:
                self.after_image = self._added()

        found = answered(self.model, inputs, between)
        self.layers.add(found, totals)
        return found

    def counted(self) -> Counted:
        """The times of layers, and the memory of both halves."""
        assert self.layers is not None
        halves = {"image": self.after_image, "language": self._added() - self.after_image}
        return {"layers": self.layers.means(), "memory": halves}

    def _added(self) -> int:
        now = self.memory()
        return now["anonymous"] + now["mapped"] if now else 0

    def memory(self) -> Memory | None:
        """What opening and running the model has added."""
        now = memory_now()
        if now is None or self.before is None:
            return None
        anonymous = now["anonymous"] - self.before["anonymous"]
        mapped = now["mapped"] - self.before["mapped"]
        # pages of libraries that the system dropped meanwhile were in memory before, and would be missing in the peak
        return {"peak": max(now["peak"] - self.held, anonymous + mapped), "anonymous": anonymous, "mapped": mapped}


class LayerSeconds:
    """The mean seconds of each layer in each stage of an answer, over all rounds but the first, which is slower."""

    def __init__(self, threads: int) -> None:
        self.threads, self.rounds = threads, -1
        self.sums: dict[str, dict[str, float]] = {"image": {}, "prompt": {}, "new": {}}

    def add(self, one: Round, totals: Sequence[Mapping[str, float]]) -> None:
        """Add a round: the seconds that layers had taken before it, and after each of its stages.

        With one thread, seconds are scaled to CPU time: what other processes took from this one is left out.
        """
        self.rounds += 1
        if not self.rounds:
            return
        stages = ((one.image, one.image.count), (one.prompt, 1), (one.new, one.new.count))
        for sums, (stage, count), (before, after) in zip(
            self.sums.values(), stages, itertools.pairwise(totals), strict=True
        ):
            own = stage.cpu / stage.wall if self.threads == 1 else 1.0
            for name, total in after.items():
                took = total - before.get(name, 0.0)  # a difference of rounded totals, so that some are below 0
                sums[name] = sums.get(name, 0.0) + own * took / count

    def means(self) -> dict[str, dict[str, float]]:
        """Stage -> weight -> seconds per image, per prompt or per new token."""
        return {stage: {name: took / self.rounds for name, took in sums.items()} for stage, sums in self.sums.items()}


def answered(model: HalvedModel, inputs: Mapping[str, Tensor], between: Callable[[], None] = lambda: None) -> Round:
    """Compute one answer, and time its stages; `between` is called after each of them, and is not timed."""
    ids = inputs["input_ids"][0].tolist()
    spent, began = [], _now()

    def ended() -> None:
        nonlocal began
        spent.append([now - before for now, before in zip(_now(), began, strict=True)])
        between()
        began = _now()

    features = model.image_features(**model.image_inputs(inputs))
    ended()
    model.forget()
    logits = model.logits(ids, 1, features)
    ended()
    for _ in range(NEW_TOKENS):
        logits = model.logits([int(logits[-1].argmax())], 1)
    ended()
    images = model.image_count(inputs)
    counts = (images, len(ids), NEW_TOKENS)
    image, prompt, new = (TimedStage(wall, cpu, count) for (wall, cpu), count in zip(spent, counts, strict=True))
    return Round(image, prompt, new, len(features) // images)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
