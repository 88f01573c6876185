"""Runs a recommended plan in its runtime, from packed codes: compares its answers, and measures its time and memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sensitivity.analysis.allocate.run_time_limits import cost_in_words
from sensitivity.api.exporting import export
from sensitivity.formats.timing.side_by_side import Bench, bench
from sensitivity.formats.verification import verify
from sensitivity.formats.writing.unfinished import temporary_folder
from sensitivity.models.vlm import VLM
from sensitivity.spec.plan import Plan
from sensitivity.spec.runtimes.layer_times import LIMITED, LayerTimes
from sensitivity.spec.runtimes.table import files_of
from sensitivity.spec.sizes import GB
from sensitivity.study.study import Study

ROUNDS = 10  # how often each answer is timed


@dataclass(frozen=True)
class InRuntime:
    """The time and memory that a plan took in its runtime, as medians with intervals, beside the requested limits."""

    runtime: str
    answers: str  # a sentence that compares them with the measured answers
    same: bool  # whether they are the measured answers
    costs: Mapping[str, tuple[float, float, float]]  # cost -> median, low, high
    limits: Mapping[str, float]  # cost -> its requested limit

    @property
    def words(self) -> str:
        """The verdict on answers, time and memory, as one sentence."""
        took = [self._verdict(cost, *self.costs[cost]) for cost in LIMITED if cost in self.costs]
        return f"Run in {self.runtime}: {self.answers}; {'; '.join(took)}."

    def _verdict(self, cost: str, median: float, low: float, high: float) -> str:
        taken = cost_in_words(cost, median) + (f" [{low:.4g}, {high:.4g}]" if low < high else "")
        if cost not in self.limits:
            return taken
        limit = self.limits[cost]
        if high <= limit:
            return f"{taken}, within {limit:g}"
        return f"{taken}, more than {limit:g}" if low > limit else f"{taken}, about the {limit:g} that were asked for"

    def to_json(self) -> dict[str, object]:
        """The verdict as JSON values."""
        costs = {cost: dict(zip(("median", "low", "high"), span, strict=True)) for cost, span in self.costs.items()}
        return {
            "runtime": self.runtime, "same_answers": self.same, "costs": costs, "limits": dict(self.limits),
            "words": self.words,
        }  # fmt: skip


def run_in_runtime(
    study: Study,
    plan: Plan,
    vlm: VLM,
    times: LayerTimes,
    limits: Mapping[str, float],
) -> InRuntime:
    """Export a plan to a temporary folder, compare its answers with torch's, and time it."""
    format = files_of(times.runtime)
    assert format is not None  # a runtime with times reads files that we write
    with temporary_folder("recommend") as temporary:
        folder = export(study, plan, temporary / "plan", format, model=vlm, note=False)
        outcome = verify(folder)
        timed = bench(folder, times.runtime, ROUNDS, task=times.task, model=vlm.name, threads=times.threads)
    same = outcome["verdict"] in ("as measured", "whole")
    return InRuntime(times.runtime, str(outcome["words"]), same, costs_of(timed, times), dict(limits))


def costs_of(timed: Bench, times: LayerTimes) -> dict[str, tuple[float, float, float]]:
    """The costs that a request can limit: median, low and high, for the tokens of the profile's task."""
    found = timed["export"]["times"]
    clock = "CPU ms" if times.threads == 1 else "ms"  # as the profile counts
    image, prompt, token = (found[f"{clock} per {stage}"] for stage in ("image", "prompt token", "new token"))
    costs = {"ms_per_token": (token["median"], token["low"], token["high"])}
    ends = [
        one[0] + times.tokens["prompt"] * one[1] + (times.tokens["answer"] - 1) * one[2]
        for one in zip(*((span["median"], span["low"], span["high"]) for span in (image, prompt, token)), strict=True)
    ]
    costs["ms_per_answer"] = (ends[0], ends[1], ends[2])
    if memory := timed["export"]["memory"]:
        resident = (memory["anonymous"] + memory["mapped"]) / GB
        costs["gb_resident"] = (resident, resident, resident)
    return costs
