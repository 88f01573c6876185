"""What pruning image tokens costs: score against the share that is kept, after each block, at two precisions.

python -m experiments.methods.pruning            # writes reports/pruning.md; killed, it goes on where it was
"""

from __future__ import annotations

from collections.abc import Iterator

from experiments.methods.measured import parser, write
from sensitivity.api.sweeping import sweep
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.plan import KEEP, Plan, Scheme
from sensitivity.study.scores import difference, summarize
from sensitivity.study.study import Study

PRUNED = (0.5, 0.75, 0.9, 1.0)
PRECISIONS = {"full precision": (KEEP, 16), "bivlm": ("bivlm", 1)}


def schemes(method: str, bits: int, blocks: int) -> Iterator[tuple[int, float, Scheme]]:
    """A scheme for each block after which tokens are pruned, and each share; the last block has none behind it."""
    for after in range(blocks - 1):
        for share in PRUNED:
            yield after, share, scheme(method, bits, prune=share, prune_after=after)


def rows(study: Study, unpruned: Plan, plans: dict[tuple[int, float], Plan], task: str) -> list[str]:
    """A row for each block: the paired difference to pruning nothing at each share."""
    base = study.examples(unpruned)
    assert base is not None
    lines = []
    for after in dict.fromkeys(after for after, _ in plans):
        cells = []
        for share in PRUNED:
            frame = study.examples(plans[after, share])
            assert frame is not None
            score = difference(frame, base, task)
            assert score is not None
            cells.append(f"{score.mean:+.3f} [{score.low:+.3f}, {score.high:+.3f}]")
        lines.append(f"| {after} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    p = parser(__doc__, "pruning", 300)
    p.add_argument("--tasks", default="vqa,ground")
    args = p.parse_args()
    vlm, tasks = load(args.model), args.tasks.split(",")
    parts = inspect(vlm, by="part")
    blocks = max(int(w.block or 0) for w in parts["language"].weights) + 1
    lines = [
        "# Image tokens that are pruned",
        "",
        f"    python -m experiments.methods.pruning --model {args.model} --tasks {args.tasks} --n {args.n}",
        "",
        f"The language part of {args.model}, which has {blocks} blocks; the other parts are native. After a block, the",
        "share of an image's tokens that got least attention there from the last token of the prompt is hidden from",
        f"the blocks that follow. {args.n} examples of each task, the same everywhere; paired differences to pruning",
        "nothing, with 95 % intervals clustered by image.",
    ]
    for name, (method, bits) in PRECISIONS.items():
        plans = {(a, share): Plan.of(parts, {"language": one}) for a, share, one in schemes(method, bits, blocks)}
        unpruned = Plan.of(parts, {"language": None if method == KEEP else scheme(method, bits)})
        every = [unpruned, *plans.values()]
        study = sweep(vlm, parts, every, tasks, f"{args.work}-{method}", n=args.n)
        for task in tasks:
            frame = study.examples(unpruned)
            assert frame is not None
            own = frame[frame["task"] == task]
            score = summarize(own["score"], own["cluster"])
            lines += ["", f"## {name}, {task}: {score.mean:.3f} with all tokens", ""]
            lines += ["| after block | " + " | ".join(f"{1 - share:.0%} kept" for share in PRUNED) + " |"]
            lines += ["|---" * (1 + len(PRUNED)) + "|", *rows(study, unpruned, plans, task)]
    write(args.out, lines)


if __name__ == "__main__":
    main()
