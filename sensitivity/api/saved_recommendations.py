"""Recommendations saved in a study, each with a card that says how it scores."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from optuna.trial import TrialState

from sensitivity.analysis.recommending.kept_recommendation import (
    budget_of,
    budgets_asked,
    files_for,
    moved_files,
    save,
    verified_for,
)
from sensitivity.analysis.recommending.recommendation import Recommendation
from sensitivity.analysis.recommending.request import PlanRequest
from sensitivity.formats.writing.manifest import TrialFacts
from sensitivity.formats.writing.model_card import plan_card, why_foreign_card
from sensitivity.spec.errors import Notice
from sensitivity.spec.files import check_may_replace, rename_ours, write_atomically
from sensitivity.spec.plan import Plan
from sensitivity.spec.plan_file import why_foreign
from sensitivity.study.storage import paths
from sensitivity.study.study import Study


def check_may_save(study: Path, budgets: Sequence[float]) -> None:
    """Raise an error if recommendations for these budgets, or their cards, would replace files of other origin."""
    moved = moved_files(study, budgets)
    for file in dict.fromkeys([*files_for(study, budgets), *moved, *moved.values()]):
        check_may_replace(file, why_foreign)
        check_may_replace(paths.card_file(file), why_foreign_card)


def save_with_cards(study: Study, recommendations: Sequence[Recommendation]) -> list[Path]:
    """Write recommendations into the study's folder, and a card beside each, which says how it scores.

    Returns the files. What an earlier call recommended for other budgets keeps files of its own.
    """
    budgets = budgets_asked(recommendations)
    check_may_save(study.path, budgets)
    for file, name in moved_files(study.path, budgets).items():
        if paths.card_file(file).exists():
            rename_ours(paths.card_file(file), paths.card_file(name), why_foreign_card)
        rename_ours(file, name, why_foreign)
        if name != paths.recommendation_file(study.path):
            told = f"{file.name} was the plan for {budget_of(name):.4g} bpw, which is kept as {name}"
            warnings.warn(f"{told}: {file.name} is for {budgets[0]:.4g} bpw now", Notice, stacklevel=2)
    for one in recommendations:
        for file, before in verified_for(study, one.budget).items() if one.measured is None else ():
            asked = before.provenance.get("asked")
            conditions = f" for {PlanRequest.from_json(asked).typed}" if asked else ""
            told = f"{file.name} held a plan that was verified{conditions}, and holds one that is only predicted now"
            warnings.warn(f"{told}; without --no-run it is verified", Notice, stacklevel=2)
    files = save(study, recommendations)
    for one, file in zip(recommendations, files, strict=True):
        facts, _ = measured_facts(study, one.plan)
        content = plan_card(study.parts, one.plan, facts, one.words)
        write_atomically(paths.card_file(file), content.encode("utf-8", "replace"))
    return files


def measured_facts(study: Study, plan: Plan) -> tuple[TrialFacts, Path | None]:
    """What the trial of a plan measured, on fresh examples where it was verified, and the file of its answers."""
    verification = paths.verification_folder(study.path)
    verified = [Study(verification)] if (verification / paths.JOURNAL).exists() else []
    for one in (*verified, study):
        trials = {trial.key: trial for trial in one.measured() if trial.state == TrialState.COMPLETE}
        if trial := trials.get(plan.key):
            native = trials.get(study.native.key)
            facts: TrialFacts = {
                "scores": trial.scores,
                "path": trial.path,
                "versions": trial.versions or None,
                "full_precision_scores": native.scores if native else {},
                "answers": one.counts_by_kind(plan),
                "meta": one.meta,
                "note": one.meta.get("note"),
            }
            return facts, paths.answers_file(one.path, plan.key) if one.examples(plan) is not None else None
    return {}, None
