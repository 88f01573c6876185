"""sensitivity profile: times the layers of a model in a runtime, from which the time of every plan is predicted."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sensitivity.cli.arguments import flags, values
from sensitivity.cli.output.progress import show_stages
from sensitivity.cli.output.tables import print_table
from sensitivity.spec.runtimes.layer_times import check_timed
from sensitivity.spec.threads import threads_in_words

if TYPE_CHECKING:
    from sensitivity.spec.components import ComponentMap
    from sensitivity.spec.plan import Scheme
    from sensitivity.spec.runtimes.layer_times import LayerTimes

ABOUT = "time the layers of a model in a runtime, at each width, so that `recommend` can keep to a time limit"
FULL = "full precision"
EXAMPLE = "sensitivity profile embedded:scenes-llava --runtime openvino --bits 2,4,8"


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.add_model(p)
    flags.add_runtime(p, "runtime that will run the plans, such as openvino", required=True)
    flags.add_widths(p, (2, 4, 8))
    flags.add_grid(p)
    p.add_argument(
        "--n", type=values.rounds, default=12, metavar="N", help="how often each layer is timed (default: 12)"
    )
    p.add_argument(
        "--task",
        type=values.model_or_task,
        default="vqa",
        metavar="T",
        help="task whose images, prompts and answers set the numbers of tokens (default: vqa)",
    )


def run(args: argparse.Namespace) -> dict[str, object]:
    """Time the layers, print the times of uniform plans and of layers, and return the table."""
    check_timed(args.runtime)  # before torch is imported
    from sensitivity.formats.timing.kept_times import file_of, kept_times_if_any
    from sensitivity.formats.timing.profile import checked, profile_layers
    from sensitivity.quantize.scheme_settings import schemes_of

    schemes = schemes_of(("rtn",), args.bits, group=args.group, symmetric=args.symmetric)
    with show_stages(args.json):
        parts, _ = checked(args.model, schemes, args.runtime, args.task)
        before = kept_times_if_any(parts, args.runtime, args.threads or 0)
        times = profile_layers(args.model, schemes, args.runtime, args.task, args.n, threads=args.threads or 0)
    plans, file = uniform(parts, schemes, times), file_of(parts, times.runtime, times.threads)
    if not args.json:
        show(times, plans, args.n)
        print(kept_words(times, before, file))
    return {**times.to_json(), "uniform": plans, "file": str(file)}


def kept_words(times: LayerTimes, before: LayerTimes | None, file: Path) -> str:
    """Where the times are kept, and which earlier ones they replace."""
    replaced = [layout for layout in _layouts(times) if before and layout in _layouts(before)]
    said = f"; they replace earlier ones of {', '.join(replaced)}" if replaced else ""
    return f"the times are kept in {file}{said}"


def _layouts(times: LayerTimes) -> list[str]:
    return list(dict.fromkeys(layout for _, _, layout, _ in times.layers))


def uniform(parts: ComponentMap, schemes: Sequence[Scheme], times: LayerTimes) -> dict[str, dict[str, float]]:
    """The predicted costs of the uniform plan of each scheme, if the runtime can run it."""
    from sensitivity.spec.plan import Plan
    from sensitivity.spec.runtimes.layer_times import COSTS
    from sensitivity.spec.runtimes.rules import violations

    found = {}
    for option in (None, *schemes):
        plan = Plan.uniform(parts, option)
        if not violations(parts, plan, times.runtime):
            found[str(option or FULL)] = {cost: times.plan_cost(parts, plan, cost) for cost in COSTS}
    return found


def show(times: LayerTimes, plans: Mapping[str, Mapping[str, float]], rounds: int) -> None:
    """Print the times of uniform plans and of layers, and the plans that are no faster than full precision."""
    tokens, full = times.tokens, plans[FULL]
    heads = {"ms_per_image": "ms, image", "ms_per_prompt": "prompt", "ms_per_token": "new token"}
    heads |= {"ms_per_answer": "answer", "gb_resident": "GB resident"}
    print_table(
        f"{times.runtime}, {threads_in_words(times.threads)}: uniform plans, predicted, with "
        f"{tokens['image']} tokens an image, {tokens['prompt']} a prompt and {tokens['answer']} an answer "
        f"({times.task}); ÷: how many times less than full precision",
        ("plan", *heads.values()),
        [(name, *(f"{of[cost]:.3g} (÷ {full[cost] / of[cost]:.2f})" for cost in heads)) for name, of in plans.items()],
    )
    layouts = _layouts(times)
    shapes = list(dict.fromkeys((rows, cols, count) for rows, cols, _, count in times.layers))
    print_table(
        "milliseconds of one layer",
        ("rows", "columns", "tokens at once", *layouts),
        [
            (rows, cols, count, *(_ms(times.layers.get((rows, cols, layout, count))) for layout in layouts))
            for rows, cols, count in shapes
        ],
    )
    for cost, what in (("ms_per_image", "an image"), ("ms_per_prompt", "a prompt"), ("ms_per_token", "a new token")):
        if slower := [name for name, of in plans.items() if name != FULL and of[cost] >= full[cost]]:
            print(f"{what}: no faster than full precision, as far as {rounds} rounds tell: {', '.join(slower)}")


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
