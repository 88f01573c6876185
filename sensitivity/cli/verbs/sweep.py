"""sensitivity sweep: evaluates plans on tasks, and continues where it was stopped."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from sensitivity.cli.arguments import flags, path_values, values
from sensitivity.cli.arguments.model_and_tasks import loaded
from sensitivity.cli.arguments.scheme_flags import checked, loadable_schemes
from sensitivity.cli.output.progress import show_progress, show_progress_in_json, show_stages
from sensitivity.cli.output.sweep_summary import show_summary
from sensitivity.cli.output.tables import print_forecast, print_frontier
from sensitivity.cli.processes import ray_workers, workers

if TYPE_CHECKING:
    from sensitivity.analysis.search.plan_lists import Plans
    from sensitivity.api.sweeping import SweepOptions
    from sensitivity.measure.attribution.scores import Attribution
    from sensitivity.measure.calibrate.statistics import Statistics
    from sensitivity.measure.loop import Step
    from sensitivity.models.vlm import VLM
    from sensitivity.spec.components import ComponentMap
    from sensitivity.spec.plan import Scheme
    from sensitivity.study.study import Study
    from sensitivity.tasks.examples.types import Task

ABOUT = "evaluate plans on tasks; the same command continues where it was stopped"
EXAMPLE = "sensitivity sweep embedded:scenes-llava --task vqa --bits 2,3,4,6,8 --by part --out runs/first"


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.add_model(p)
    flags.add_tasks(p)
    flags.add_granularity(p, "part")
    flags.add_include(p)
    flags.add_methods(p, (2, 3, 4, 6, 8), "rtn", several=True)
    flags.add_run_time(p)
    p.add_argument(
        "--search",
        type=values.name,
        default="grid",
        help="grid, one-at-a-time, random, tpe, nsga2, gp or frontier (default: grid)",
    )
    flags.add_prior(p)
    p.add_argument(
        "--scores",
        type=values.comma_separated(values.name),
        default=(),
        metavar="S[,S]",
        help="scores of `sensitivity explain`, such as swing; the surrogate of --search frontier expects the damage"
        " that they predict from calibration data, until measured scores disagree",
    )
    flags.add_limits(p)
    flags.add_runtime(p, "only plans that this runtime can load, such as vllm or gptq")
    p.add_argument(
        "--trials",
        type=values.plans,
        metavar="N",
        help="how many plans are tried (default: all of grid and one-at-a-time, 100 of the other searches)",
    )
    flags.add_study_folder(p)
    flags.add_samples(p)
    flags.add_calibration(p)
    _run_flags(p)
    p.set_defaults(plans=None)  # no flag: a program may set a function of parts and schemes


def _run_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags that say where, with how much memory and for how long plans are run."""
    p.add_argument(
        "--until",
        type=values.name,
        action="append",
        default=[],
        metavar="WHEN",
        help="when to stop: complete (the default); a time such as 10min; or error<0.5%%, as soon as half the 95 %%"
        " interval of each frontier plan's difference to full precision is below 0.005. All plans get a first shard of"
        " examples, then those that matter get more; the same command without it completes the sweep. A search that"
        " learns from scores, such as frontier, runs each plan on all examples: only a time ends it early",
    )
    p.add_argument(
        "--memory-gb",
        type=values.gigabytes,
        default=8.0,
        metavar="GB",
        help="memory for quantized weights and hidden states that plans share (default: 8); less is only slower",
    )
    p.add_argument(
        "--workers",
        type=values.workers_or_auto,
        default="auto",
        metavar="N",
        help="processes on this machine, which share its cores (default: auto, one per core as far as memory and the"
        " work that is left allow, one on a GPU)",
    )
    p.add_argument(
        "--executor",
        type=values.choice("local", "ray"),
        metavar="local|ray",
        default="local",
        help="where the workers run: on this machine, or as Ray actors, with a GPU each where --device is cuda, on the"
        " cluster that RAY_ADDRESS names or on this machine (default: local)",
    )
    flags.add_device(p)
    p.add_argument(
        "--plain",
        action="store_true",
        help="load, quantize and run each plan by itself, sharing nothing (slow; the reference)",
    )
    p.add_argument(
        "--whole-answers",
        action="store_true",
        help="generate every answer to its end; without it, one that can no longer be right is cut off and ends with …",
    )
    p.add_argument(
        "--storage",
        type=path_values.address,
        metavar="URL",
        help="an Optuna storage for a team, such as postgresql+psycopg://host/db",
    )
    p.add_argument("--dry-run", action="store_true", help="predict time, disk and memory; no weights are loaded")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Run the sweep, or forecast it with --dry-run."""
    workers.stop_with_launcher()  # before the imports, which take longer than a launcher may live
    requested = _checked(args)
    if args.executor == "ray" and not workers.is_child() and not args.dry_run:
        return _on_a_cluster(args)
    from sensitivity.api.attribution_file import check_scores_apply
    from sensitivity.measure.generate.batches import check_tasks_fit

    vlm, parts, tasks = loaded(args)
    check_scores_apply(tasks, args.scores)
    requested, plans_of = _search_space(args, parts, requested)
    check_tasks_fit(vlm, tasks)
    # plans are built twice: here to count them, since calibration already needs the number of processes; and below
    # from the schemes that calibration returns
    searched = plans_of(requested, args.search)
    expected = len(searched) if isinstance(searched, Sequence) else args.trials or 100
    processes = 1 if args.dry_run else workers.count(args, parts, expected, len(requested))
    with workers.sharing_cores(processes):  # for calibration too: float sums depend on the number of threads
        with show_stages(args.json):
            schemes, statistics, scores = _calibrated(args, vlm, parts, requested, tasks)
        if args.dry_run:
            # a search chooses plans only as scores arrive; for the forecast, random plans stand in for them
            plans = plans_of(schemes, "random" if callable(searched) else args.search)
            return _forecast(args, vlm, parts, plans, tasks, stand_in=callable(searched))
        study = _run_plans(
            args, vlm, parts, plans_of(schemes, args.search), schemes, statistics, scores, processes, expected
        )
    return {} if workers.is_child() else show_summary(args, study)


def _calibrated(
    args: argparse.Namespace, vlm: VLM, parts: ComponentMap, requested: list[Scheme], tasks: Sequence[Task]
) -> tuple[list[Scheme], Statistics | None, list[Attribution]]:
    """The schemes with their calibration data, the statistics that they need, and the scores that were asked for."""
    from sensitivity.api.scoring import scored
    from sensitivity.api.sweeping import with_calibration

    data, n = args.calibration or args.task, args.calibration_n
    if args.scores and not args.dry_run and not _reads_expected(args):
        found = scored(vlm, parts, requested, data, args.scores, n, args.seed, tasks, args.cache_gb)
        return found.schemes, found.given.statistics, found.scores
    return *with_calibration(vlm, parts, requested, data, n, args.seed, args.path, tasks, args.cache_gb), []


def _reads_expected(args: argparse.Namespace) -> bool:
    """Whether another process writes the expected damages into the study; no launcher does so on a cluster."""
    return workers.is_child() and args.executor == "local"


def _search_space(
    args: argparse.Namespace, parts: ComponentMap, requested: list[Scheme]
) -> tuple[list[Scheme], Callable[[Sequence[Scheme], str], Plans]]:
    """The schemes that the runtime allows, and a function that makes the plans of a search from schemes."""
    from sensitivity.analysis.allocate.legal import plans_for
    from sensitivity.analysis.search.plan_lists import plans as plans_
    from sensitivity.spec.limits import allowed_by, tied_groups

    allow = allowed_by(parts.names, dict(flags.distinct("--allow", args.allow)))
    tie = tied_groups(parts.names, args.tie)
    requested = loadable_schemes(args, parts, requested, allow)

    def plans_of(schemes: Sequence[Scheme], search: str) -> Plans:
        if args.plans:
            listed: Plans = args.plans(parts, schemes)
            return listed
        space = (parts, schemes, search, args.trials, args.seed, allow, tie)
        return plans_for(args.runtime, *space) if args.runtime else plans_(*space)

    return requested, plans_of


def _run_plans(
    args: argparse.Namespace,
    vlm: VLM,
    parts: ComponentMap,
    plans: Plans,
    schemes: Sequence[Scheme],
    statistics: Statistics | None,
    scores: Sequence[Attribution],
    processes: int,
    expected: int,
) -> Study:
    """Run the plans that the study lacks, with workers beside this process; then those of a worker that died."""
    from sensitivity.analysis.atlas.priors import expect_from
    from sensitivity.api.sweeping import begin_sweep
    from sensitivity.study.owner import this_process

    options: SweepOptions = {
        "n": args.n,
        "seed": args.seed,
        "plain": args.plain,
        "storage": args.storage,
        "statistics": statistics,
        "whole": args.whole_answers,
        "runtime": args.runtime,
        "until": args.until,
        "memory_gb": args.memory_gb,
    }
    study, steps = begin_sweep(vlm, parts, plans, args.task, args.out, **options)
    if (args.prior or args.scores) and not _reads_expected(args):
        expect_from(study, args.prior, schemes, {one.name: one.scores for one in scores})
    try:
        with workers.beside_workers(args, processes, steps) as shared:
            _show_steps(args, shared, f"sweeping {vlm.name}", study, 0 if isinstance(plans, Sequence) else expected)
    except KeyboardInterrupt:
        study.release_lost(this_process())  # Ctrl-C inside ask or tell leaves its plan marked as running
        if not args.json and study.measured():
            print_frontier(study)
        raise
    if study.release_lost():  # plans of a worker that died
        rest = begin_sweep(vlm, parts, [], args.task, args.out, **options)[1]
        _show_steps(args, rest, "plans of a lost worker", study)
    return study


def _checked(args: argparse.Namespace) -> list[Scheme]:
    """The schemes, after every check that needs no model, so that a mistake is found before anything is loaded."""
    from sensitivity.api.sweeping import check_same_study
    from sensitivity.study.storage.location import check_begins, check_stores

    check_begins(args.out)
    if not args.dry_run:
        check_stores(args.out)
    requested, calibrated = checked(args, args.search, args.until, args.storage)
    check_same_study(args.out, args.task, args.n, args.seed)
    if args.search != "frontier":
        flags.without_effect(
            args, ["--prior", "--scores"], f"with --search {args.search}; only frontier starts from what is expected"
        )
    if args.prior:
        from sensitivity.analysis.atlas.priors import check_priors

        check_priors(args.prior, args.out)
    if args.scores:
        from sensitivity.api.attribution_file import check_scores_apply
        from sensitivity.api.planning import check_float_path

        check_scores_apply((), args.scores)
        check_float_path(requested, args.path)
    elif not calibrated:
        idle = ("--calibration", "--calibration-n", "--path", "--cache-gb")
        flags.without_effect(args, idle, f"with --method {','.join(args.method)}, which is not calibrated")
    if calibrated:
        from sensitivity.api.one_calibration import check_calibration

        data = args.calibration or args.task
        check_calibration(args.out, requested, data, args.calibration_n, args.seed, args.path)
    if args.plain:
        flags.without_effect(args, ["--memory-gb"], "with --plain, where plans share nothing")
    if args.executor == "ray":
        ray_workers.check()
    return requested


def _forecast(
    args: argparse.Namespace,
    vlm: VLM,
    parts: ComponentMap,
    plans: Plans,
    tasks: Sequence[Task],
    stand_in: bool,
) -> dict[str, object]:
    """The forecast of time, disk and memory for the plans that are not measured yet, or that stand in for those."""
    from sensitivity.api.sweeping import keys_of_measured
    from sensitivity.measure.forecast.forecast import forecast_sweep

    assert not callable(plans)
    options = {"device": args.device, "dtype": args.dtype, "plain": args.plain, "calibration": args.calibration_n}
    options |= {"cache_gb": args.cache_gb, "memory_gb": args.memory_gb}
    measured = keys_of_measured(args.out)
    if stand_in:
        measured = [plan.key for plan in plans][: len(measured)]
    predicted = forecast_sweep(vlm, parts, list(plans), tasks, **options, scores=args.scores, measured=measured)
    if not args.json:
        print_forecast(predicted)
    return predicted.to_json()


def _on_a_cluster(args: argparse.Namespace) -> dict[str, object]:
    """Run the sweep on Ray: the actors run the same command, and this process only watches the queue."""
    args.workers = 1 if args.workers == "auto" else args.workers
    study = ray_workers.sweep_on_ray(
        args, lambda steps, study: _show_steps(args, steps, f"sweeping {args.model}", study)
    )
    return show_summary(args, study)


def _show_steps(args: argparse.Namespace, steps: Iterator[Step], title: str, study: Study, plans: int = 0) -> None:
    """Run the steps behind a progress bar, or as lines of JSON with --json."""
    from sensitivity.study.stopping import Until

    seconds = Until.parse(args.until).seconds
    if args.json:
        show_progress_in_json(steps, study, plans, seconds)
    else:
        show_progress(steps, title, study, plans, seconds)
