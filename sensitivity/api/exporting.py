"""export(): writes a plan of a study as files that a runtime loads; also finds the best plan that it can load."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

import torch

from sensitivity.analysis.allocate.budget import Candidate
from sensitivity.analysis.allocate.legal import Legal, best_legal_plan, legalize
from sensitivity.analysis.recommending.kept_recommendation import verified_for
from sensitivity.analysis.recommending.recommendation import Recommendation
from sensitivity.api.imported_plans import best_of_model, over_budget, plan_of_model
from sensitivity.api.recommending import FRESH
from sensitivity.api.saved_recommendations import measured_facts
from sensitivity.api.sweeping import sweep, with_calibration
from sensitivity.formats.table import CHECKPOINTS, CHECKS, FORMATS, may_be_written, write
from sensitivity.formats.verification import verify
from sensitivity.formats.writing.calibrated_codes import CalibratedCodes
from sensitivity.formats.writing.calibrated_codes import codes as calibrated_codes
from sensitivity.formats.writing.job import Codes, Job, codes_from_weights
from sensitivity.formats.writing.manifest import TrialFacts
from sensitivity.formats.writing.unfinished import remove_unfinished
from sensitivity.measure.calibrate.statistics import check_path
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.methods import needs_data
from sensitivity.quantize.scheme_settings import check_scheme
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import Failed, Notice, UserError, check_is, check_is_path, reason, shell_word, unknown
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.plan_file import read
from sensitivity.spec.runtimes.rules import violations
from sensitivity.spec.runtimes.table import RUNTIMES, files_of
from sensitivity.spec.sizes import budget_bits, size
from sensitivity.spec.stored_bits import FILES
from sensitivity.study import exports
from sensitivity.study.scores import paired_difference, summarize
from sensitivity.study.storage import paths
from sensitivity.study.storage.location import check_stores
from sensitivity.study.study import Study

__all__ = ["export", "export_from", "legalize", "legalize_from", "may_be_written", "remove_unfinished", "verify"]


class ExportOptions(TypedDict, total=False):
    """Further options of `export`."""

    model: VLM | str | None
    runtime: str | None
    codes: Codes | None
    path: str | None


def export(
    study: Study,
    plan: Plan,
    out: Path | str,
    format: str = "plan",
    force: bool = False,
    facts: Mapping[str, object] | None = None,
    *,
    model: VLM | str | None = None,
    runtime: str | None = None,
    codes: Codes | None = None,
    path: str | None = None,
    keep: Iterable[Path] = (),
    note: bool = True,
) -> Path:
    """Write a plan as files that a runtime loads; if it cannot, the error names the best plan that it can load.

    With `force` it replaces what is at `out`, but only if an earlier export wrote that; it never replaces what is in
    `keep`. With another `path` (float, exposed or both), it calibrates again on that path, and measures the gain.
    Without `note` the study does not list the export.

    Examples:
        >>> from sensitivity import export
        >>> folder = export(study, choice.plan, "out/vqa", format="fake", model=vlm)
    """
    check_is("study", study, Study)
    check_is("plan", plan, Plan)
    check_is_path("out", out)
    out, meta, parts = Path(out), study.meta, study.parts
    if "imported" in meta and not (format == "plan" and out.suffix == ".json"):  # which holds no weights
        parts, plan = plan_of_model(study, plan, model, format)
        if note_on_size := over_budget(study, parts, plan, (facts or {}).get("budget_bpw"), runtime or format):
            warnings.warn(note_on_size, Notice, stacklevel=2)
    _check_loadable(study, parts, plan, format, runtime or format)
    may_be_written(out, format, force, [study.path, *keep])  # before anything that takes long
    if format in CHECKS:
        CHECKS[format](model or meta.get("model", ""))
    gain: TrialFacts = {}
    if path is not None:
        check_stores(study.path, verifies=True)
        if not isinstance(model, VLM):
            model = load(model or meta["model"], dtype=meta["dtype"])
        plan, gain = _on_path(study, plan, path, model)
    job = Job(
        model=model or meta.get("model", ""),
        parts=parts,
        plan=plan,
        facts={"study": str(study.path), **(facts or {})},
        dtype=getattr(torch, meta.get("dtype", "float16")),
    )
    if format != "plan" and meta.get("fingerprint") not in (None, job.source.fingerprint):
        raise UserError(f"{study.path} was measured on {meta['model']}, and {job.source.name} is another model")
    trial, expected = measured_facts(study, plan)
    with _codes(study, job, format) as computed:
        job = replace(job, codes=codes or computed.codes, changed=computed.changed)
        summary = write(job, out, format, force, {**trial, **gain}, runtime, expected, lambda: computed.notes)
    if format == "plan":
        return out if out.suffix == ".json" else out / "plan.json"
    if not note:
        return out
    stored = summary.get("written") or summary["predicted_size"]
    about = {"format": format, "plan": plan.describe(), "bytes": stored["bytes"], "bpw": stored["bpw"]}
    _note(study.path, out, {**about, "written": "written" in summary, **gain})
    return out


def _note(study: Path, out: Path, facts: Mapping[str, object]) -> None:
    """List an export in its study; a study that cannot be written, such as another user's, does not undo the export."""
    try:
        exports.write_note(study, out, facts)
    except (OSError, Failed) as error:
        warnings.warn(f"{out} is whole, but {study} does not list it ({reason(error)})", Notice, stacklevel=2)


def _check_loadable(study: Study, parts: ComponentMap, plan: Plan, format: str, loader: str) -> None:
    """Raise an error for an unknown format, or a plan that the runtime (or the format's own) cannot load."""
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if broken := violations(parts, plan, loader):
        raise UserError(f"{loader} cannot hold this plan: {'; '.join(broken)}. {_instead(study, plan, loader)}")


def _on_path(study: Study, plan: Plan, path: str, model: VLM) -> tuple[Plan, TrialFacts]:
    """The plan calibrated on another path, and the paired difference between both on the same fresh examples."""
    check_path(path)

    def on_path(scheme: Scheme | None) -> Scheme | None:
        if scheme is None or not needs_data(scheme):
            return scheme
        return replace(scheme, settings=tuple({**dict(scheme.settings), "path": path}.items()))

    other = Plan(tuple((name, on_path(scheme)) for name, scheme in plan.schemes))
    if other == plan:
        is_calibrated = any(map(needs_data, plan.distinct_schemes))
        why = f"was measured on the {path} path already" if is_calibrated else "has no method that is calibrated"
        raise UserError(f"--path {path} changes nothing: this plan {why}; leave it out")
    # one sweep for each plan, as their calibration statistics differ; both on the same fresh examples, in one study
    fresh, meta = study, study.meta
    for one in (plan, other):
        _, statistics = with_calibration(model, study.parts, one.distinct_schemes, meta["tasks"])
        n, seed, out = meta["n"], meta["seed"] + FRESH, paths.verification_folder(study.path)
        fresh = sweep(model, study.parts, [one], meta["tasks"], out, n=n, seed=seed, statistics=statistics)
    return other, {"path_gain": {"path": path, **{task: _gain(fresh, other, plan, task) for task in study.tasks}}}


def _gain(study: Study, ours: Plan, theirs: Plan, task: str) -> dict[str, object]:
    """Paired differences in score and in the log-likelihood of right answers, which shows smaller differences."""
    frames = [rows[rows["task"] == task] for rows in map(study.examples, (ours, theirs)) if rows is not None]
    both = frames[0].merge(frames[1], on="example", suffixes=("", "_base"))
    columns = (("ours", "score"), ("theirs", "score_base"))
    gain: dict[str, object] = {
        **paired_difference(both["score"], both["score_base"], both["cluster"]).to_json(),
        "scores": {name: summarize(both[column], both["cluster"]).to_json() for name, column in columns},
    }
    both = both.dropna(subset=["nll", "nll_base"])
    if len(both):
        gain["log_likelihood"] = paired_difference(-both["nll"], -both["nll_base"], both["cluster"]).to_json()
    return gain


def _codes(study: Study, job: Job, format: str) -> AbstractContextManager[CalibratedCodes]:
    """The source of quantized weights: computed from the weights alone, or calibrated on the data that schemes name."""
    schemes = job.plan.distinct_schemes
    if format not in CHECKPOINTS or not any(needs_data(scheme) for scheme in schemes):
        return nullcontext(CalibratedCodes(codes_from_weights))
    vlm = load(job.model, dtype=study.meta["dtype"]) if isinstance(job.model, str) else job.model
    _, statistics = with_calibration(vlm, study.parts, schemes, study.meta["tasks"])
    assert statistics is not None
    return calibrated_codes(vlm, study.parts, job.plan, statistics, folding=format in FILES)


def export_from(
    source: Path, bpw: float | None, out: Path, format: str, force: bool, **options: Unpack[ExportOptions]
) -> Path:
    """Export a plan.json, or of a study the plan that was verified for a budget, or else is predicted to be best there.

    Of a study, only plans count that `runtime`, or else the format, can hold.
    """
    may_be_written(out, format, force, [source])  # before anything is read
    runtime = options.get("runtime") or format
    if source.suffix == ".json":
        study, plan, facts = _read_plan(source)
    elif found := _verified_plan(study := Study(source), bpw, runtime):
        file, chosen = found
        warnings.warn(_verified_in_words(file, chosen), Notice, stacklevel=2)
        study, plan, facts = _read_plan(file)
    else:
        best = _best_plan(study, bpw, runtime)
        if "imported" in study.meta and best.size.sized and format != "plan":
            best = best_of_model(study, best, runtime, options.get("model"), format)
        warnings.warn(_choice_in_words(study, best, runtime), Notice, stacklevel=2)
        plan, facts = best.plan, {}
    return export(study, plan, out, format, force, facts, keep=[source], **options)


def legalize_from(source: Path, runtime: str, bpw: float | None, task: str | None = None) -> tuple[Study, Legal]:
    """The best plan that a runtime can load, given a plan.json, or a study and a budget."""
    if source.suffix == ".json":
        study, plan, _ = _read_plan(source)
    else:
        study = Study(source)
        plan = _best_plan(study, bpw, runtime).plan
    return study, legalize(study, plan, runtime, bpw, task)


def _read_plan(source: Path) -> tuple[Study, Plan, Mapping[str, object]]:
    """The study, the plan and the other facts of a plan.json."""
    _, plan, facts = read(source)
    study = Study(source.parent if paths.is_study(source.parent) else str(facts.get("study", source.parent)))
    plan.check(study.parts)
    for scheme in plan.distinct_schemes:
        check_scheme(scheme)
    return study, plan, facts


def _verified_plan(study: Study, bpw: float | None, runtime: str) -> tuple[Path, Recommendation] | None:
    """The plan that was verified for a budget, with its file, if a runtime or format can hold it within that budget."""
    if bpw is None:
        return None
    for file, one in verified_for(study, bpw).items():
        small = size(study.parts, one.plan, files_of(runtime)).bits <= budget_bits(study.parts, bpw)
        if small and not violations(study.parts, one.plan, runtime):
            return file, one
    return None


def _verified_in_words(file: Path, one: Recommendation) -> str:
    """Which plan was verified for a budget, and its scores."""
    scores = ", ".join(f"{task} {score.mean:.3f}" for task, score in one.by_task.items())
    return f"the plan that was verified for {one.budget:g} bpw ({file}): {one.plan.describe()}; {scores}"


def _best_plan(study: Study, bpw: float | None, runtime: str) -> Candidate:
    """The plan of a study that is predicted to be best for a budget, of those that a runtime or format can hold."""
    if bpw is None:
        raise UserError(f"a study holds many plans: name a budget, `{study.path} --bpw 4.0`, or give a plan.json")
    return best_legal_plan(study, runtime, bpw)


def _choice_in_words(study: Study, best: Candidate, runtime: str) -> str:
    """Which plan was chosen for a budget, and its scores as measured, or else as predicted and how to measure it."""
    counted = "" if best.size.sized else f" {best.size.counted}"
    chosen = f"chosen for {best.budget:g} bpw{counted}"
    if unfit := next(iter(verified_for(study, best.budget)), None):
        chosen += f", within which {runtime} does not hold the plan that was verified for it ({unfit})"
    chosen += f": {best.plan.describe()}"
    if scores := measured_facts(study, best.plan)[0].get("scores"):
        means = {task: score["mean"] for task, score in scores.items()}
        return f"{chosen}; measured: {', '.join(f'{task} {mean:.3f}' for task, mean in means.items())}"
    native = next((trial.scores for trial in study.measured() if trial.plan.is_native), {})
    predicted = {task: (one.possible.score, native.get(task)) for task, one in best.predicted.items()}
    shares = (
        f"{task} {score:.3f}" + (f", beside {full['mean']:.3f} of full precision" if full else "")
        for task, (score, full) in predicted.items()
    )
    typed = f"{shell_word(study.path)} --bpw {best.budget:g}" + (
        f" --runtime {runtime}" if RUNTIMES[runtime].title else ""
    )
    how = f"; `sensitivity recommend {typed}` measures the best plans, for an export of its plan.json"
    if "imported" in study.meta:  # a table has no model to run
        how = ""
    return f"{chosen}, which was never measured; predicted: {', '.join(shares)}{how}"


def _instead(study: Study, plan: Plan, name: str) -> str:
    """A sentence that offers the best plan that a runtime can load instead of this one."""
    try:
        best = legalize(study, plan, name)
    except UserError as error:
        return f"There is no plan to offer instead: {error}"
    return (
        f"The best plan of its size that fits is {best.plan.describe()}: {best.words}. "
        f"`sensitivity legalize {shell_word(study.path)} --runtime {name} "
        f"--bpw {math.ceil(1000 * best.before.bpw) / 1000:g} --out plan.json` writes it"
    )
