"""Calibration on the float model's inputs against inputs that passed quantized layers: do scores or ranking change?

python -m experiments.methods.calibration_path [--model embedded:scenes-llava] [--plans 64] [--n 300]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import bootstrap, kendalltau, spearmanr

from experiments.methods.measured import measured, parser, write
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.plan import Plan
from sensitivity.study.study import Study

BITS = (2, 3, 4, 5)


def plans(parts: ComponentMap, method: str, count: int, facts: Mapping[str, object]) -> list[Plan]:
    """Plans with a random width for every group; the same plans for both paths."""
    rng = np.random.default_rng(0)
    of = {bits: scheme(method, bits, calibration=facts) for bits in BITS}  # type: ignore[arg-type]
    return [Plan(tuple((name, of[int(rng.choice(BITS))]) for name in parts.names)) for _ in range(count)]


def halves(study: Study, chosen: list[Plan], name: str) -> float:
    """Rank correlation between the plans' scores on one half of the images and on the other half."""
    scores: list[list[float]] = [[], []]
    for plan in chosen:
        rows = study.examples(plan)
        assert rows is not None
        rows = rows[rows["task"] == name]
        odd = rows["cluster"].isin(sorted(set(rows["cluster"]))[::2])
        for half, these in enumerate((rows[odd], rows[~odd])):
            scores[half].append(float(these["score"].mean()))
    return float(spearmanr(*scores).statistic)


def between(a: np.ndarray, b: np.ndarray, of: Callable[..., Any]) -> str:
    """A rank correlation with its 95 % interval over plans."""
    spread = bootstrap((a, b), lambda x, y: of(x, y).statistic, paired=True, vectorized=False,
                       n_resamples=1999, rng=0, method="percentile").confidence_interval  # fmt: skip
    return f"{of(a, b).statistic:.3f} [{spread.low:.3f}, {spread.high:.3f}]"


def main() -> None:
    p = parser(__doc__, "calibration-path", 300)
    p.add_argument("--tasks", default="vqa")
    p.add_argument("--method", default="paper-gptq")
    p.add_argument("--plans", type=int, default=64)
    args = p.parse_args()
    tasks, vlm = args.tasks.split(","), load(args.model)
    parts = inspect(vlm, by="group")
    choose = partial(plans, parts, args.method, args.plans)
    scores: dict[tuple[str, str], np.ndarray] = {}
    native, noise, seconds = {}, {}, {}
    for path in ("float", "exposed"):
        study, chosen = measured(vlm, parts, tasks, choose, args, path)
        table = study.table().set_index("key")
        for name in tasks:
            scores[path, name] = np.array([float(table.loc[plan.key, name]) for plan in chosen])
            native[name] = float(table.loc[study.native.key, name])
            noise.setdefault(name, halves(study, chosen, name))
        seconds[path] = float(np.median([trial.seconds for trial in study.trials()]))
    lines = [
        "# Calibration on the float model's inputs, or on inputs that passed quantized layers",
        "",
        f"`python -m experiments.methods.calibration_path --model {args.model} --tasks {args.tasks} "
        f"--method {args.method} --plans {args.plans} --n {args.n} --examples {args.examples}`",
        "",
        f"{args.plans} random plans over {len(parts.names)} groups of {args.model}, {args.method} at "
        f"{', '.join(map(str, BITS))} bits, each quantized with",
        f"statistics of one pass over the float model (`float`) and block by block (`exposed`), on {args.n} examples",
        "of each task. Rank correlations of the two columns of scores, with 95 % bootstrap intervals over plans; the",
        "difference is exposed minus float. For reference, the rank correlation between the float path's scores on two",
        "halves of the images: noise alone lowers a correlation of 1 to this, at half as many examples.",
        "",
        "| task | native | float | Spearman | Kendall | two halves | mean difference | largest gain | largest loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in tasks:
        a, b = scores["float", name], scores["exposed", name]
        gain = b - a
        se = gain.std(ddof=1) / len(gain) ** 0.5
        lines.append(
            f"| {name} | {native[name]:.3f} | {a.mean():.3f} ({a.min():.3f} to {a.max():.3f}) | "
            f"{between(a, b, spearmanr)} | {between(a, b, kendalltau)} | {noise[name]:.3f} | "
            f"{gain.mean():+.4f} ± {1.96 * se:.4f} | {gain.max():+.3f} | {gain.min():+.3f} |"
        )
    lines += ["", f"Median seconds of a trial: float {seconds['float']:.1f}, exposed {seconds['exposed']:.1f}."]
    write(args.out, lines)


if __name__ == "__main__":
    main()
