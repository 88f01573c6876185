"""Who chooses plans: scores as other tools compute them, real runs one at a time, `plan`, a sweep, uniform plans."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from experiments.benchmarks.put_back import ROUGHLY
from experiments.benchmarks.quick_plans import BITS, Asked, budgets, by_plan, by_sweep, described
from experiments.peers.autoround import delta_loss
from sensitivity import inspect, load, scheme
from sensitivity.analysis.allocate.by_scores import Scores, optimum
from sensitivity.api.planning import MAX_EVALUATIONS
from sensitivity.api.scoring import scored
from sensitivity.api.sweeping import sweep, with_calibration
from sensitivity.measure.attribution.blame import blame_of
from sensitivity.measure.attribution.calibrated import Calibrated
from sensitivity.measure.attribution.scores import NEEDS, SCORES
from sensitivity.measure.attribution.weight_errors import plan_changes
from sensitivity.measure.calibrate.calibration import calibration_examples
from sensitivity.measure.gradients.path_integral import integrate_path
from sensitivity.measure.passes.token_batches import answer_batches
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import NOT_ROUNDED, Plan, Scheme
from sensitivity.spec.sizes import budget_bits, size

INTEGRATED, PASSES = 32, 12  # examples, and backward passes at most, of a path integral
BASE = "sweep"  # what all others are compared with
PLANS = {"plan": MAX_EVALUATIONS, "plan, 40 trials": 40}  # how many plans it may run before the verification


GPTQ = Asked()


@dataclass(frozen=True)
class Setting:
    """A model and a task, and what plans are chosen from and calibrated on."""

    model: str
    says: str  # what is particular, for the page
    task: str = "vqa"
    asked: Asked = GPTQ

    @property
    def rounds_inputs(self) -> bool:
        return any(one.activations != NOT_ROUNDED for one in self.asked.schemes)


HEAVY = "scenes-llava-heavy"
ROUNDED = tuple(scheme("gptq", bits, activations=max(bits, 4)) for bits in BITS)
SETTINGS = {
    "heavy": Setting(HEAVY, "heavy-tailed weights, calibrated on the task's own data"),
    "activations": Setting(HEAVY, "inputs rounded to as many bits as weights, at least 4", asked=Asked(ROUNDED)),
    "other task": Setting(HEAVY, "calibrated on questions about the background", asked=Asked(calibration="scene")),
    "8 examples": Setting(HEAVY, "calibrated on 8 examples", asked=Asked(examples=8)),
    "plain": Setting("scenes-llava", "weights without heavy tails"),
    "rtn": Setting(HEAVY, "rounded to nearest", asked=Asked(tuple(scheme("rtn", bits) for bits in BITS))),
    "blip2": Setting("scenes-blip2", "a Q-Former between tower and language model"),
    "captions": Setting(HEAVY, "captions, word for word", task="caption"),
}  # fmt: skip
WHO = {"fisher": "ModelOpt's gradient", "kl": "ModelOpt's KL", "autoround": "AutoRound's DeltaLoss", "higgs": "HIGGS",
       "coverage": "Aumann-Shapley coverage", "weight": "relative weight error", "gram": "relative Gram error",
       "kfac": "fisher by K-FAC", "swing": "roots of each example's kfac", "change": "absolute gradient x change",
       "path": "integral along the path", "loss": "loss one at a time",
       "one at a time": "each component run alone, scores added"}  # fmt: skip


@dataclass
class Chosen:
    """The plan of each chooser at each budget, and its CPU seconds; kept in a file, which a killed run goes on from."""

    file: Path
    plans: dict[str, list[Plan]]
    seconds: dict[str, float]

    @classmethod
    def of(cls, file: Path) -> Chosen:
        known = json.loads(file.read_text()) if file.exists() else {}
        plans = {name: [Plan.from_json(one) for one in row["plans"]] for name, row in known.items()}
        return cls(file, plans, {name: row["seconds"] for name, row in known.items()})

    def add(self, name: str, plans: list[Plan], seconds: float) -> None:
        self.plans[name], self.seconds[name] = plans, seconds
        rows = {
            name: {"plans": [one.to_json() for one in chosen], "seconds": self.seconds[name]}
            for name, chosen in self.plans.items()
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        overwrite(self.file, json.dumps(rows, indent=1))
        print(name, f"{seconds:.1f} CPU s", flush=True)


def choices(setting: Setting, n: int, folder: Path, before: pd.DataFrame) -> tuple[VLM, ComponentMap, Chosen]:
    """What every chooser picks, as far as it was not picked before; scores count from calibration on.

    before: rows of the table with what others than `plan` picked.
    """
    vlm = load(f"embedded:{setting.model}")
    parts = inspect(vlm, by="group.kind")
    found = Chosen.of(folder / "chosen.json")
    if len(before):
        asked = setting.asked
        schemes, _ = with_calibration(vlm, parts, asked.schemes, [asked.calibration or setting.task], asked.examples)
        for name, rows in before.dropna(subset="plan").groupby("chooser"):
            if name not in {*PLANS, *found.plans}:
                found.add(str(name), described(rows["plan"], schemes, parts), float(rows["cpu_s"].iloc[0]))
    if BASE not in found.plans:
        with tempfile.TemporaryDirectory() as place:
            found.add(BASE, *by_sweep(vlm, parts, setting.task, n, 0, Path(place) / "sweep", setting.asked))
    for name, trials in PLANS.items():
        if name not in found.plans:
            with tempfile.TemporaryDirectory() as place:
                plans, costs, _ = by_plan(vlm, parts, setting.task, n, 0, Path(place) / "plan", setting.asked, trials)
            found.add(name, plans["plan"], costs["plan"])
    with tempfile.TemporaryDirectory() as place:
        os.environ["SENSITIVITY_CACHE"] = place
        if "one at a time" not in found.plans:
            run_alone(setting, vlm, parts, n, found, Path(place) / "study")
        if "weight" not in found.plans:
            by_scores(setting, vlm, parts, found)
    return vlm, parts, found


def run_alone(setting: Setting, vlm: VLM, parts: ComponentMap, n: int, found: Chosen, folder: Path) -> None:
    """Each component at each width really run on n examples; what it loses is added up."""
    schemes, statistics = with_calibration(
        vlm, parts, setting.asked.schemes, [setting.asked.calibration or setting.task], setting.asked.examples
    )
    began = time.process_time()
    alone = {(name, one): Plan.of(parts, {name: one}) for name in parts.names for one in schemes}
    study = sweep(vlm, parts, [Plan.uniform(parts, None), *alone.values()], [setting.task], folder, n=n,
                  statistics=statistics)  # fmt: skip
    scores = {trial.key: trial.scores[setting.task]["mean"] for trial in study.measured()}
    full = scores[study.native.key]
    lost: dict[str, dict[Scheme, float]] = {name: {} for name in parts.names}
    for (name, one), plan in alone.items():
        lost[name][one] = full - scores[plan.key]
    found.add("one at a time", optima(parts, lost), time.process_time() - began)


def by_scores(setting: Setting, vlm: VLM, parts: ComponentMap, found: Chosen) -> None:
    """The best plan by each score; an integral along the path sees no rounding of inputs, and is left out there."""
    names = [name for name in SCORES if "path_integral_shares" not in NEEDS[name]]
    asked, task = setting.asked, setting.asked.calibration or setting.task
    known = scored(vlm, parts, asked.schemes, [task], names, asked.examples)
    smallest = [Plan.uniform(parts, one) for one in known.schemes]
    found.add("uniform", [largest(parts, smallest, bpw) for bpw in budgets(parts)], 0.0)
    if not setting.rounds_inputs:  # AutoRound's second term, of rounded inputs, is not computed here
        began = time.process_time()
        scores = delta_loss(known.given)
        found.add("autoround", optima(parts, scores), time.process_time() - began)
        began = time.process_time()
        integrate(known.given, task, asked.examples)
        seconds = time.process_time() - began
        for name in ("path", "coverage"):
            found.add(name, optima(parts, SCORES[name](known.given)), seconds)
    for one in reversed(known.scores):  # `weight`, by which a later run knows that all are there, comes last
        found.add(one.name, optima(parts, one.scores), one.seconds)


def integrate(given: Calibrated, task: str, examples: int) -> None:
    """Path integrals up to the uniform plans, of fewer examples and passes than `explain` takes: minutes otherwise."""
    some = min(examples, INTEGRATED)
    data = list(answer_batches(given.vlm, calibration_examples([task], some, 0)))
    shares: dict[Scheme, dict[str, float]] = {}
    for one in given.schemes:
        changes = plan_changes(given.vlm.model, given.parts, Plan.uniform(given.parts, one), given.statistics)
        integral = integrate_path(given.vlm, given.parts, changes, lambda: data, ROUGHLY, PASSES)
        found = blame_of(given.parts, given.vlm.family, integral).components
        shares[one] = {name: value * examples / some for name, value in found.items()}
    given.path_integral_shares = shares


def optima(parts: ComponentMap, scores: Scores) -> list[Plan]:
    return [optimum(parts, scores, bpw) for bpw in budgets(parts)]


def largest(parts: ComponentMap, plans: list[Plan], bpw: float) -> Plan:
    """The largest plan within a budget."""
    fitting = [plan for plan in plans if size(parts, plan).bits <= budget_bits(parts, bpw)]
    return max(fitting, key=lambda plan: size(parts, plan).bits)
