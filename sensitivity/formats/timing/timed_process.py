"""A process that opens one model in its runtime, and times one answer for each request."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import IO, TYPE_CHECKING, TypedDict, cast

from sensitivity.formats.timing.memory import Memory, begin_peak, memory, resident
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


@dataclass(frozen=True)
class Stage:
    """One stage of an answer: its wall-clock and CPU seconds, and its number of images or tokens."""

    wall: float
    cpu: float
    count: int


@dataclass(frozen=True)
class Round:
    """One answer: its images, then its prompt, then tokens one by one."""

    image: Stage
    prompt: Stage
    new: Stage
    image_tokens: int  # per image


class _Reply(TypedDict, total=False):
    memory: Memory | None
    round: dict[str, dict[str, float] | int]
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
        image, prompt, new = (Stage(**cast(dict[str, int], found[name])) for name in ("image", "prompt", "new"))
        return Round(image, prompt, new, cast(int, found["image_tokens"]))

    def memory(self) -> Memory | None:
        """What the process holds beyond what it held before it opened the model."""
        return self._ask(None)["memory"]

    def _ask(self, number: int | None) -> _Reply:
        _send(self.running, number)
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
def timed_process(asked: Asked) -> Iterator[TimedModel]:
    """Start a process for a model, and end it with the block."""
    with tempfile.TemporaryFile() as errors, subprocess.Popen(  # a file, since nobody reads a pipe until it is full
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
                number = json.loads(line)
                if number is None:
                    reply(memory=timed.memory())
                else:
                    reply(round=asdict(timed.round(number)))
        except UserError as error:
            reply(error=str(error))
        except Exception as error:
            reply(failed=f"{type(error).__name__}: {error}")


class _Timed:
    """A model in its runtime, with the examples of a task as tensors."""

    def __init__(self, asked: Asked) -> None:
        import torch

        from sensitivity.formats.timing.opened import opened, warm_up
        from sensitivity.measure.generate.batches import batches
        from sensitivity.models.config_only import without_weights
        from sensitivity.tasks.table import task as find_task

        torch.set_num_threads(asked.threads)
        vlm = without_weights(asked.processor)
        task = find_task(asked.task, "evaluation", asked.n, asked.seed)
        alone = (replace(task, examples=(example,)) for example in task.examples)
        self.inputs = [batch.inputs for one in alone for batch in batches(vlm, one, plain=True)]
        warm_up(asked.runtime)
        begin_peak()
        self.before, self.held = memory(), resident()
        self.model = opened(asked.model, asked.runtime, asked.dtype, asked.threads)

    def round(self, number: int) -> Round:
        """Time the answer to one example."""
        return answered(self.model, self.inputs[number % len(self.inputs)])

    def memory(self) -> Memory | None:
        """What opening and running the model has added."""
        now = memory()
        if now is None or self.before is None:
            return None
        return {
            "peak": now["peak"] - self.held,
            "anonymous": now["anonymous"] - self.before["anonymous"],
            "mapped": now["mapped"] - self.before["mapped"],
        }


def answered(model: HalvedModel, inputs: Mapping[str, Tensor]) -> Round:
    """Compute one answer, and time its stages."""
    ids = inputs["input_ids"][0].tolist()
    times = [_now()]
    features = model.image_features(**model.image_inputs(inputs))
    times.append(_now())
    model.forget()
    logits = model.logits(ids, 1, features)
    times.append(_now())
    for _ in range(NEW_TOKENS):
        logits = model.logits([int(logits[-1].argmax())], 1)
    times.append(_now())
    images = model.image_count(inputs)
    spent = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(times)]
    counts = (images, len(ids), NEW_TOKENS)
    image, prompt, new = (Stage(*took, count) for took, count in zip(spent, counts, strict=True))
    return Round(image, prompt, new, len(features) // images)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
