"""sensitivity sweep: evaluate plans on tasks."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sensitivity import terminal
from sensitivity.cli import words, workers

ABOUT = "evaluate plans on tasks; the same command continues where it was stopped"
EXAMPLE = "sensitivity sweep embedded:scenes-llava --task vqa --bits 2,3,4,6,8 --by part --out runs/first"


def arguments(p: argparse.ArgumentParser) -> None:
    words.model(p)
    p.add_argument(
        "--task",
        type=words.names,
        default=("vqa",),
        metavar="T[,T]",
        help="vqa, caption, scene, ground; DATASET:FOLDER such as vqav2:FOLDER; your own FILE.jsonl, or"
        " SCORER:FILE.jsonl with exact, vqa, iou or caption (default: vqa)",
    )
    words.by(p, "part")
    words.methods(p, (2, 3, 4, 6, 8), "rtn")
    p.add_argument(
        "--search", default="grid", help="grid, one-at-a-time, random, tpe, nsga2, gp or frontier (default: grid)"
    )
    p.add_argument("--trials", type=int, metavar="N", help="how many plans a search other than grid may try")
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="runs/NAME",
        help="where the study is kept; the same again continues it",
    )
    words.samples(p)
    words.calibration(p)
    p.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this machine (default: 1)")
    words.device(p)
    p.add_argument(
        "--plain", action="store_true", help="load, quantise, run: nothing shared between plans (slow, the reference)"
    )
    p.add_argument(
        "--storage", metavar="URL", help="an Optuna storage for a team, such as postgresql+psycopg://host/db"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from sensitivity import verbs
    from sensitivity.tasks import task

    workers.share_cores(args.workers)
    vlm = verbs.load(args.model, device=args.device, dtype=args.dtype)
    parts = verbs.inspect(vlm, by=args.by)
    chosen = [task(name, n=args.n, seed=args.seed) for name in args.task]  # first of all: it may be misspelt
    for one in chosen:
        for note in one.notes:
            print(f"{one.name}: {note}", file=sys.stderr)
    schemes, statistics = verbs.calibrated(
        vlm,
        parts,
        words.schemes(args),
        args.calibration or args.task,
        n=args.calibration_n,
        seed=args.seed,
        path=args.path,
        against=chosen,
        cache_gb=args.cache_gb,
    )
    expected = 0 if args.search in ("grid", "one-at-a-time") else args.trials or 100
    plans = verbs.plans(parts, schemes, args.search, args.trials, args.seed)
    how = {"n": args.n, "seed": args.seed, "plain": args.plain, "storage": args.storage, "statistics": statistics}
    study, steps = verbs.sweeping(vlm, parts, plans, args.task, args.out, **how)
    with workers.crew(args):
        terminal.walk(steps, f"sweeping {vlm.name}", expected)
    if study.release_lost():  # of a worker that died
        terminal.walk(verbs.sweeping(vlm, parts, [], args.task, args.out, **how)[1], "what a lost worker left")
    facts = {"study": str(args.out), **study.counts(), "trials": json.loads(study.table().to_json(orient="records"))}
    if not args.json:
        terminal.frontier(study)
        print(f"{facts['done']} plans in {args.out}; next: sensitivity recommend {args.out} --bpw 4")
    return facts
