"""The sweep's loop: takes a plan from the queue, quantizes, evaluates and records it; a killed sweep resumes."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version

import torch

from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.evaluation import Rows, answer, example_rows
from sensitivity.measure.generate.batches import Batch, batches_by_image
from sensitivity.measure.install.plan_in_model import prepare, quantized
from sensitivity.measure.memory.out_of_memory import room_beside
from sensitivity.measure.memory.prefix_cache import PrefixCache
from sensitivity.measure.memory.weight_codes import BYTES_PER_CODE, WeightCodes, parameter_bytes
from sensitivity.measure.shards import shard, shard_ends
from sensitivity.models.vlm import VLM
from sensitivity.quantize.methods import weights_of
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import Notice, UserError, is_defect, reason
from sensitivity.spec.plan import KEEP, Plan
from sensitivity.spec.sizes import GB
from sensitivity.spec.version import __version__
from sensitivity.study.racing import still_in_race
from sensitivity.study.stopping import Until
from sensitivity.study.study import Study
from sensitivity.study.trial import RunFacts, Trial, mixed_versions
from sensitivity.tasks.examples.types import Task

MEMORY_GB = 8.0  # half for codes of quantized weights (the running plan's weights come on top), half for hidden states
# examples on which the prefix cache is verified: which blocks may be skipped depends on the model, not on the image
VERIFYING_EXAMPLES = 2
PRUNED_PLANS_TAKE_LONGER = (
    "plans that prune image tokens read whole prompts and share only quantized weights with other plans, since the "
    "last token of a prompt decides what is pruned; they take longer"
)
LIBRARIES = ("torch", "transformers", "optuna", "numpy")  # whose versions each trial records


@dataclass(frozen=True)
class Step:
    """One shard of one plan, which was just run; and the sweep's progress, in images summed over all plans."""

    plan: Plan
    scores: Mapping[str, float]
    seconds: float
    complete: bool  # whether the plan has now seen all examples
    done: int
    left: int
    images: int  # that a plan has seen when it is complete
    new: int = 1  # images of this shard


def run_plans(
    vlm: VLM,
    study: Study,
    tasks: Sequence[Task],
    plans: Iterable[Plan],
    plain: bool = False,
    statistics: Statistics | None = None,
    until: Until | None = None,
    memory_gb: float = MEMORY_GB,
) -> Iterator[Step]:
    """Run every plan that the study does not hold yet, full precision first, since all scores are compared with it.

    A list of plans is queued at once, before the first step is yielded, so that any number of processes can take
    plans from the queue; every plan runs on a first shard of examples before any plan runs on more. From any other
    iterable, such as a sampler, a plan is drawn only after the previous one was recorded, and runs on all examples.
    """
    queued = isinstance(plans, Sequence)
    shared = _SharedWork(vlm, study.parts, tasks, plain, statistics, queued, memory_gb)
    study.release_lost()
    if mixed := mixed_versions(study.measured(), versions()):
        warnings.warn(mixed, Notice, stacklevel=2)
    first = Plan.uniform(study.parts, None)
    if not isinstance(plans, Sequence):
        study.enqueue([first])
        return _run_queue(study, shared, plans, until or Until())
    # `run` is no generator itself: the queue is filled now, not when the caller asks for the first step
    shared.prepare(plans)
    study.enqueue([first, *sorted(plans, key=data_flow_order)])
    return _run_queue(study, shared, (), until or Until())


def check_runs(vlm: VLM, tasks: Sequence[Task]) -> None:
    """Raise an error if the model cannot run an example of each task, before anything of a study is written.

    A processor, a chat template or a config can be valid by itself and still belong to another model.
    """
    for task in tasks:
        first = [example for example in task.examples if example.cluster == task.examples[0].cluster]
        one = replace(task, examples=tuple(first if task.gallery else first[:1]), max_new_tokens=1)
        try:
            for batch in batches_by_image(vlm, one):
                answer(vlm, one, batch)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a shape or index may fail anywhere in the model, with any type of error
            if is_defect(error):
                raise
            raise UserError(
                f"{vlm.name} cannot be run on the first example of {task.name} ({reason(error)}); most often its "
                "processor or tokenizer is another model's, or its config.json was changed: fetch them again"
            ) from error


def data_flow_order(plan: Plan) -> list[str]:
    """Sort key of plans in the direction of data flow, so that neighboring plans share the longest prefixes."""
    return [str(scheme) for _, scheme in plan.schemes]


def _run_queue(study: Study, shared: _SharedWork, more: Iterable[Plan], until: Until) -> Iterator[Step]:
    """Run the plans in the queue, then those that `more` draws, one at a time."""
    yield from _run_until_empty(study, shared, until)
    for plan in more:
        # no error ends a search: plans that it has not drawn yet have no score
        if until.out_of_time:
            return
        study.enqueue([plan])
        yield from _run_until_empty(study, shared, until)


def _run_until_empty(study: Study, shared: _SharedWork, until: Until) -> Iterator[Step]:
    """Run plans from the queue until it is empty or `until` is reached."""
    last: Trial | None = None
    racing: set[str] | None = None
    while not (last and until.reached(study)):
        if (asked := study.ask(last, racing)) is None:
            return
        began = time.perf_counter()
        end = shared.end(asked.done)
        try:
            rows = shared.run(asked.plan, asked.done, end)
            not_finite = count_not_finite(rows, asked.plan) + asked.not_finite
        except UserError as error:
            study.give_up(asked, str(error))
            raise
        except BaseException:  # Ctrl-C, most often: the plan goes back into the queue
            study.requeue(asked)
            raise
        seconds = time.perf_counter() - began
        total = shared.ends[-1]
        complete = end == total
        facts: RunFacts = {
            "seconds": seconds,
            "images": total,
            "versions": versions(),
            "path": "plain" if shared.plain else "fast",
            "not_finite": not_finite,
        }
        if complete:
            facts["metrics"] = _metrics(study, shared, asked, rows)
        scores = study.tell(asked, rows, facts, None if complete else end)
        # the first plan of a new shard: the plans have seen the same images by now, and can be compared
        if until.may_stop_early and (last is None or asked.done != last.done):
            racing = still_in_race(study, len(shared.ends))
        yield Step(asked.plan, scores, seconds, complete, *study.progress(total, racing), total, end - asked.done)
        last = asked


def _metrics(study: Study, shared: _SharedWork, asked: Trial, rows: Rows) -> dict[str, dict[str, float]]:
    """Each task's further metrics over all examples of a trial, including those of earlier shards."""
    before = study.examples(asked.plan) if asked.done else None
    every = rows if before is None else {name: [*before[name], *rows[name]] for name in rows}
    return {task.name: metrics for task in shared.tasks if (metrics := task.quick(every))}


def count_not_finite(rows: Rows, plan: Plan) -> int:
    """How many examples had NaN or infinite logits and so score 0; an error at full precision."""
    named = zip(rows["task"], rows["example"], rows["nll"], strict=True)
    affected = [
        f"{task} {example}" for task, example, nll in named if isinstance(nll, float) and not math.isfinite(nll)
    ]
    if affected and plan.is_native:
        raise UserError(
            f"the model's logits are not numbers at full precision, on {len(affected)} of {len(rows['nll'])} examples "
            f"({', '.join(affected[:3])}); choose another --dtype, such as float32 or bfloat16"
        )
    return len(affected)


class _SharedWork:
    """What plans share: the examples as tensors, quantized weights, and hidden states of the previous plan."""

    def __init__(
        self,
        vlm: VLM,
        parts: ComponentMap,
        tasks: Sequence[Task],
        plain: bool = False,
        statistics: Statistics | None = None,
        growing: bool = True,
        memory_gb: float = MEMORY_GB,
    ) -> None:
        self.vlm, self.parts, self.tasks, self.plain, self.statistics = vlm, parts, tasks, plain, statistics
        self.ends = shard_ends(tasks, growing)
        self.batches: dict[str, list[Batch]] = {}
        self.whole_prompts: dict[str, list[Batch]] = {}  # for plans that prune image tokens
        self.warned_of_pruning = False
        self.shard_begin: int | None = None  # first image of the shard that `batches` holds
        self.cache_bytes = int(memory_gb * GB / 2)
        self.weights = None if plain else WeightCodes(self.cache_bytes, vlm.model)
        self.prefix_cache = None if plain else self._verified_prefix_cache()

    def _verified_prefix_cache(self) -> PrefixCache:
        """A prefix cache with only those boundaries that change no answer and no likelihood on a few examples."""
        room = room_beside(self.vlm.device, parameter_bytes(self.vlm.model))
        also = self.weights.release if self.weights is not None else lambda: False
        prefix_cache = PrefixCache(self.vlm.model, self.parts, min(self.cache_bytes, room), also)
        prefix_cache.set_plan(Plan.uniform(self.parts, None))
        task = replace(self.tasks[0], examples=self.tasks[0].examples[:VERIFYING_EXAMPLES])
        few = next(batches_by_image(self.vlm, task))
        prefix_cache.verify_boundaries(lambda: answer(self.vlm, task, few, prefix_cache, "proof"))
        return prefix_cache

    def prepare(self, plans: Sequence[Plan]) -> None:
        """Quantize every layer at all schemes of these plans, solving each layer once, if the results fit in memory."""
        widths = {weights_of(s) for plan in plans for _, s in plan.schemes if s and s.method != KEEP}
        room = sum(w.numel for w in self.parts.weights) * BYTES_PER_CODE * len(widths)
        # otherwise `quantized` solves a layer when a plan needs it, and the least recently used codes are dropped
        if self.weights is not None and room <= self.cache_bytes + self.weights.room:
            prepare(self.vlm.model, self.parts, plans, self.weights, self.statistics)

    def end(self, begin: int) -> int:
        """The end of the shard that begins after `begin` images."""
        return next(end for end in self.ends if end > begin)

    def run(self, plan: Plan, begin: int, end: int) -> Rows:
        """Per-example rows of all tasks under a plan, for the images of one shard."""
        if begin != self.shard_begin:
            self._load_shard(begin, end)
        rows: Rows = {}
        # a block that the prefix cache skips cannot decide which tokens are pruned
        prefix_cache = None if plan.prunes else self.prefix_cache
        if prefix_cache:
            prefix_cache.set_plan(plan)
        with quantized(self.vlm.model, self.parts, plan, self.weights, self.statistics):
            for task in self.tasks:
                for number, batch in enumerate(self._batches_of(task, plan)):
                    columns = example_rows(
                        task, batch, *answer(self.vlm, task, batch, prefix_cache, (task.name, number))
                    )
                    for name, values in columns.items():
                        rows.setdefault(name, []).extend(values)
        if self.weights is not None:
            # only between plans, since the running plan needs all of its codes
            self.weights.trim()
        return rows

    def _batches_of(self, task: Task, plan: Plan) -> list[Batch]:
        """A shard's examples as a plan reads them: as whole prompts if it prunes image tokens."""
        if not plan.prunes or self.plain or task.gallery:
            return self.batches[task.name]
        if task.name not in self.whole_prompts:
            if not self.warned_of_pruning:
                warnings.warn(PRUNED_PLANS_TAKE_LONGER, Notice, stacklevel=2)
                self.warned_of_pruning = True
            of_shard = replace(task, examples=tuple(e for batch in self.batches[task.name] for e in batch.examples))
            self.whole_prompts[task.name] = (
                list(batches_by_image(self.vlm, of_shard, plain=True)) if of_shard.examples else []
            )
        return self.whole_prompts[task.name]

    def _load_shard(self, begin: int, end: int) -> None:
        """Load a shard's examples as tensors and drop the previous shard's: memory holds one shard at a time."""
        self.batches, self.whole_prompts = {}, {}
        if self.prefix_cache:
            self.prefix_cache.clear()
        for task in self.tasks:
            of_shard = replace(task, examples=tuple(shard(task, begin, end, self.ends[-1])))
            self.batches[task.name] = (
                list(batches_by_image(self.vlm, of_shard, self.plain)) if of_shard.examples else []
            )
        self.shard_begin = begin


def comparability(vlm: VLM, tasks: Sequence[Task], sources: Sequence[str], n: int, seed: int) -> dict[str, object]:
    """What must be equal for trials to be comparable: model, dtype, data and seed."""
    return {
        "model": vlm.name,
        "fingerprint": vlm.fingerprint,
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "note": vlm.note,
        "tasks": list(sources),
        "n": n,
        "seed": seed,
        "data": {task.name: f"{len(task.examples)} examples {task.fingerprint}" for task in tasks},
        "chance": {task.name: task.chance for task in tasks},
    }


@cache
def versions() -> dict[str, str]:
    """What each trial records of its environment: the versions of the libraries, and the number of threads."""
    libraries = {name: version(name) for name in LIBRARIES}
    return {"sensitivity": __version__, **libraries, "threads": str(torch.get_num_threads())}
