"""How many drafts with rounded activations hold, part by part, beside what the same rounding does to the loss.

python -m experiments.methods.drafts            # writes reports/drafts.md; measured rows are kept and not run again
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from experiments.methods.measured import parser, write
from sensitivity.api.sweeping import sweep
from sensitivity.measure.speculation import acceptance
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.plan import KEEP, Plan
from sensitivity.tasks.table import task

MODELS = ("embedded:scenes-llava", "embedded:scenes-llava-heavy", "embedded:scenes-blip2")
WIDTHS = (2, 3, 4, 6)
TASK = "caption"  # the longest answers


def rates(vlm: VLM, parts: ComponentMap, n: int, record: Path) -> list[dict[str, Any]]:
    """The rate at which drafts hold for each part and width; rows that `record` holds are not measured again."""
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    known = {(row["part"], row["bits"]) for row in rows}
    native = Plan.uniform(parts, None)
    for part in (*parts.names, "*"):
        if not (left := [bits for bits in WIDTHS if (part, bits) not in known]):
            continue
        for name, bits, found in acceptance(vlm, parts, native, task(TASK, n=n), left, [part]):
            rows.append({"part": name, "bits": bits, "rate": found.rate, "error": found.error})
            with record.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    return rows


def losses(vlm: VLM, parts: ComponentMap, n: int, out: str) -> dict[tuple[str, int], tuple[float, float]]:
    """By how much the loss of right answers rises, and the score falls, where the same activations are rounded."""
    plans = {}
    for bits in WIDTHS:
        one = scheme(KEEP, 16, activations=bits)
        plans |= {(part, bits): Plan.of(parts, {part: one}) for part in parts.names}
        plans["*", bits] = Plan.uniform(parts, one)
    study = sweep(vlm, parts, list(plans.values()), [TASK], out, n=n)
    native = study.examples(study.native)
    assert native is not None
    found = {}
    for key, plan in plans.items():
        frame = study.examples(plan)
        assert frame is not None
        found[key] = (frame["nll"].mean() - native["nll"].mean(), frame["score"].mean() - native["score"].mean())
    return found


def of_model(name: str, args: argparse.Namespace) -> list[str]:
    """One model's table, and whether rates order parts and widths as losses do."""
    vlm, work = load(name), Path(args.work)
    parts = inspect(vlm, by="part")
    work.mkdir(parents=True, exist_ok=True)
    stem = f"{name.removeprefix('embedded:')}-{args.n}"
    rows = rates(vlm, parts, args.n, work / f"{stem}.jsonl")
    beside = losses(vlm, parts, args.n, str(work / stem))
    order = spearmanr([-row["rate"] for row in rows], [beside[row["part"], row["bits"]][0] for row in rows])[0]
    lines = [f"## {name}", "", "| rounded | bits | drafts that hold | loss | score |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: ((*parts.names, "*").index(row["part"]), row["bits"])):
        loss, score = beside[row["part"], row["bits"]]
        part = "all" if row["part"] == "*" else row["part"]
        lines.append(
            f"| {part} | {row['bits']} | {row['rate']:.3f} ± {row['error']:.3f} | {loss:+.4f} | {score:+.3f} |"
        )
    return [*lines, "", f"Rank correlation of rates with losses over these {len(rows)} rows: {order:.2f}.", ""]


def main(typed: Sequence[str] | None = None) -> None:
    p = parser(__doc__, "drafts", 40)
    p.add_argument("--models", default=",".join(MODELS))
    args = p.parse_args(typed)
    which = "" if args.models == ",".join(MODELS) else f" --models {args.models}"
    lines = [
        "# Drafts with rounded activations that hold",
        "",
        f"    python -m experiments.methods.drafts --n {args.n}{which}",
        "",
        f"{args.n} captions, weights as they are. Three tokens at a time are drafted with the inputs of one part",
        "rounded, and verified by one pass without (QSpec; `sensitivity speculate`). Beside the share that holds, plus",
        "or minus its standard error, stands what the same rounding does to the answers: how the loss of the right",
        "caption rises, and how its score changes. The rate needs no right answers.",
        "",
    ]
    for name in args.models.split(","):
        lines += of_model(name, args)
    write(args.out, lines[:-1])


if __name__ == "__main__":
    main()
