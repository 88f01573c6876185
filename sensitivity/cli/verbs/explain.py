"""sensitivity explain: what quantizing each component costs, and where the damage of a plan comes from."""

from __future__ import annotations

import argparse
from pathlib import Path

from sensitivity.cli.arguments import flags, path_values, values
from sensitivity.cli.arguments.model_and_tasks import loaded
from sensitivity.cli.arguments.scheme_flags import checked
from sensitivity.cli.output.explained_tables import print_attributions, print_explanation
from sensitivity.cli.output.progress import show_stages
from sensitivity.spec.errors import UserError, shell_word

ABOUT = "score every component from a few backward passes; or say where the damage of a measured plan comes from"
EXAMPLE = "sensitivity explain embedded:scenes-llava --task vqa --bits 2,3,4 --out runs/why"
# flags that have an effect only with a model
MODEL_FLAGS = ("--bits", "--method", "--group", "--symmetric", "--biases", "--set", "--backend", "--by", "--scores",
            "--check", "--out", "--path", "--calibration")  # fmt: skip

MODEL_FILES = ("config.json", "adapter_config.json")  # a folder with one of these holds a model


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    p.add_argument(
        "source",
        type=values.model_or_task,
        metavar="MODEL|STUDY",
        help="a model, whose components are scored; or a study, of which --plan is explained",
    )
    flags.add_tasks(p, "vqa; with a study, all of its tasks")
    flags.add_granularity(p, "group.kind")
    flags.add_methods(p, (2, 3, 4, 6, 8), "gptq")
    p.add_argument(
        "--scores",
        type=values.comma_separated(values.name),
        default=("weight", "gram", "kfac", "swing", "fisher", "change"),
        metavar="S[,S]",
        help="weight and gram (relative errors of weights and of outputs), kfac, swing, fisher and change (from"
        " gradients); slower: kl, loss and higgs (a component at a time), path and coverage (from integrated gradients)"
        " (default: weight,gram,kfac,swing,fisher,change)",
    )
    p.add_argument(
        "--check",
        type=values.checks,
        default=8,
        metavar="N",
        help="random plans that are run on the calibration data to check each score; 0 for none (default: 8)",
    )
    p.add_argument(
        "--out",
        type=path_values.out_folder,
        metavar="runs/NAME",
        help="folder for attributions.json, such as that of a study",
    )
    p.add_argument(
        "--plan",
        type=values.name,
        metavar="KEY",
        help="a measured plan of the study: its number, or how its key begins",
    )
    p.add_argument(
        "--failures",
        type=values.examples,
        metavar="N",
        help="explain the plan on the N evaluated answers that it made worst, instead of on calibration examples;"
        " `sensitivity failures` and the report then show where in each image and question the damage enters",
    )
    flags.add_calibration(p)
    flags.add_device(p)
    p.set_defaults(include=(), whole_answers=False, n=1, seed=0, dry_run=False, runtime=None)


def run(args: argparse.Namespace) -> dict[str, object]:
    """Score the components of a model, or explain a plan of a study."""
    from sensitivity.study.storage.paths import is_study
    from sensitivity.study.study import Study

    folder = Path(args.source).expanduser()
    if is_study(folder):
        return _plan(args)
    embedded_or_adapter = args.source.startswith("embedded:") or "@" in args.source
    model = embedded_or_adapter or any((folder / name).exists() for name in MODEL_FILES)
    if not (model or args.plan is args.failures is None):
        Study(folder)  # raises the error that there is none
    if folder.is_dir() and not model:
        raise UserError(f"{args.source} is neither a study nor a model: it has no trials, and no config.json")
    return _components(args)


def _components(args: argparse.Namespace) -> dict[str, object]:
    """Score every component at every width."""
    from sensitivity.api.attribution_file import (
        agreements,
        attributions_json,
        check_scores_apply,
        check_writable,
        save_attributions,
        study_beside,
    )
    from sensitivity.api.one_calibration import check_calibration
    from sensitivity.api.planning import check_float_path
    from sensitivity.api.scoring import scored
    from sensitivity.measure.attribution import checks as score_checks
    from sensitivity.measure.generate.batches import check_tasks_fit
    from sensitivity.study.storage.paths import is_study

    flags.without_effect(args, ["--plan", "--failures"], "with a model: it is about a plan of a study")
    if args.out is None:
        raise UserError("still needed: --out, the folder for the scores (or, for a study, --plan)")
    requested, _ = checked(args, "grid")
    check_float_path(requested, args.path)
    check_writable(args.out)
    data = args.calibration or args.task
    if is_study(args.out):  # scores alone are replaced by new ones
        check_calibration(args.out, requested, data, args.calibration_n, 0)
    args.model = args.source
    check_scores_apply((), args.scores)
    vlm, parts, tasks = loaded(args)
    check_scores_apply(tasks, args.scores)
    check_tasks_fit(vlm, tasks)
    study = study_beside(args.out, vlm, parts.names)
    with show_stages(args.json):
        scoring = scored(vlm, parts, requested, data, args.scores, args.calibration_n, 0, (), args.cache_gb)
    measured = agreements(study, scoring.scores)
    have_loss = not any(task.gallery for task in tasks)  # checks compare losses of answers; retrieval has no answers
    checks = score_checks.check_scores(scoring.given, scoring.scores, args.check) if have_loss else None
    content = attributions_json(vlm, scoring.scores, measured, checks)
    file = save_attributions(args.out, content)
    if not args.json:
        print_attributions(scoring.scores, measured, checks)
        print(f"  all of it: {file}")
    return content | {"path": str(file)}


def _plan(args: argparse.Namespace) -> dict[str, object]:
    """Explain a measured plan."""
    from sensitivity.analysis.failures.changes import study_of
    from sensitivity.api.explaining import explain_plan, plan_to_explain, save_explanation, tasks_to_explain
    from sensitivity.models.loading import device_of, dtype_of, load
    from sensitivity.study.storage.location import check_stores
    from sensitivity.study.study import Study

    if args.plan is None:
        every = f"`sensitivity table {shell_word(args.source)} --out plans.csv` lists them"
        raise UserError(f"still needed: --plan, the number or key of a plan; {every}")
    flags.without_effect(args, MODEL_FLAGS, "with a study, of which one plan is explained")
    if args.failures is not None:
        flags.without_effect(
            args, ["--calibration-n", "--task"], "with --failures, which uses evaluated answers instead"
        )
    device_of(args.device)
    dtype_of(args.dtype)
    study = Study(Path(args.source).expanduser())
    plan = plan_to_explain(study, args.plan)
    if "fingerprint" not in study.meta:
        raise UserError(f"{args.source} was imported from a table, and there is no model to explain its plans with")
    check_stores(study.path)
    tasks = tasks_to_explain(study, args.task if "task" in getattr(args, "given", ()) else ())
    vlm = load(str(study.meta["model"]), device=args.device, dtype=args.dtype or study.meta["dtype"])
    n, failures = args.failures or args.calibration_n, args.failures is not None
    measured_in = study_of(study, plan) if failures else study
    explained = explain_plan(vlm, measured_in, plan, n, tasks, args.cache_gb, failures)
    file = save_explanation(study, explained, tasks)
    if not args.json:
        print_explanation(explained)
        print(f"  all of it: {file}")
    return explained.to_json() | {"path": str(file)}
