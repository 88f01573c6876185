"""CPU seconds of a sweep of an lmms-eval task against our own reader of the same questions and images.

python -m experiments.benchmarks.lmms                # writes reports/lmms.md; needs the extra lmms

ChartQA's layout with 500 questions about scenes, 27 plans of the embedded model, one thread, each way in a process of
its own. The prompts and the limit of tokens are the same, and so are the images; the scores are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from PIL import Image

from sensitivity.api.sweeping import begin_sweep, grid
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.spec.files import overwrite
from sensitivity.tasks import table
from sensitivity.tasks.examples.types import Task

ROOT = Path(__file__).parent.parent.parent
MODEL, BITS, N, ASKED = "embedded:scenes-llava", (3, 4, 8), 500, "\nAnswer the question with a single word."
TOKENS = 16  # ChartQA's limit in lmms-eval


def write(folder: Path, n: int) -> dict[str, str]:
    """The same questions in ChartQA's saved layout and as lines of our own; the tasks that read them."""
    import datasets

    datasets.disable_progress_bars()
    (folder / "images").mkdir()
    lines, rows = [], []
    for place, example in enumerate(table.task("vqa", n=n).examples):
        file = folder / "images" / f"{example.cluster}.png"
        Image.fromarray(example.image).save(file)
        asked = {"prompt": example.prompt + ASKED, "answers": [example.answers[0]], "split": "evaluation"}
        lines.append({"id": f"test-{place:06d}", "image": f"images/{file.name}", **asked})
        stored = {"bytes": file.read_bytes(), "path": file.name}
        kind = ("augmented_test", "human_test")[place % 2]
        rows.append({"type": kind, "question": example.prompt, "answer": example.answers[0], "image": stored})
    texts = dict.fromkeys(("type", "question", "answer"), datasets.Value("string"))
    saved = datasets.Dataset.from_list(rows, features=datasets.Features({**texts, "image": datasets.Image()}))
    datasets.DatasetDict({"test": saved, "train": saved.select(range(8))}).save_to_disk(str(folder / "chartqa"))
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"own": f"exact:{folder / 'q.jsonl'}", "lmms-eval": f"lmms-eval:chartqa:{folder / 'chartqa'}"}


def one(name: str, out: Path, n: int) -> dict[str, object]:
    """Sweep one task in this process: CPU seconds until the task stands, and in all; the mean score of each plan."""
    vlm = load(MODEL)
    parts = inspect(vlm, by="part")
    began = time.process_time()
    table.task(name, n=n)
    ready = time.process_time() - began
    shortened(TOKENS)
    study, steps = begin_sweep(vlm, parts, grid(parts, bits=BITS, method="uniform"), [name], out, n=n, whole=True)
    for _ in steps:
        pass
    trials = study.table()
    used = resource.getrusage(resource.RUSAGE_SELF)
    scores = {str(row["key"]): float(row[study.tasks[0]]) for _, row in trials.iterrows()}
    return {"ready": ready, "total": used.ru_utime + used.ru_stime, "scores": scores, "plans": len(trials)}


def shortened(tokens: int) -> None:
    """Give all tasks of this process the same limit of tokens."""
    from sensitivity.api import sweeping

    find = sweeping.find_task  # type: ignore[attr-defined]

    def same_limit(*asked: object) -> Task:
        return dataclasses.replace(find(*asked), max_new_tokens=tokens)  # type: ignore[arg-type]

    sweeping.find_task = same_limit  # type: ignore[attr-defined]


def page(found: dict[str, dict[str, object]], n: int) -> str:
    """The report."""
    own, theirs = (found[name] for name in ("own", "lmms-eval"))
    same = sum(theirs["scores"][plan] == mean for plan, mean in own["scores"].items())  # type: ignore[index, attr-defined]
    rows = "\n".join(
        f"| {name} | {one['plans']} | {one['ready']:.1f} | {one['total']:.1f} |" for name, one in found.items()
    )
    ratio = float(str(theirs["total"])) / float(str(own["total"]))
    command = "python -m experiments.benchmarks.lmms" + ("" if n == N else f" --n {n}")
    return f"""# What a task of lmms-eval costs

`{command}`: CPU seconds of one thread, {n} questions about scenes in ChartQA's layout, plans of
`{MODEL}` at {", ".join(map(str, BITS))} bits by part and at full precision. Each way ran in a
process of its own and has everything in it: imports, reading, sweeping. Our own reader is `exact:FILE.jsonl` on the
same questions, images and prompts, with whole answers and the same limit of tokens.

| reader | plans | CPU s until the task stands | CPU s in all |
|---|---|---|---|
{rows}

The task of lmms-eval costs **{ratio:.2f} times** our own reader (the aim is at most 1.3). The mean score
of {same} of {own["plans"]} plans is the same by both.
"""


def main() -> None:
    """Run both ways, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=N)
    parser.add_argument("--one", nargs=2, help="a task and a folder: run it here and print what it cost as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], Path(args.one[1]), args.n)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, task in write(Path(folder), args.n).items():
            words = ["--one", task, str(Path(folder, f"study-{name}")), "--n", str(args.n)]
            run = [sys.executable, "-m", "experiments.benchmarks.lmms", *words]
            done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            found[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, {key: value for key, value in found[name].items() if key != "scores"})
    overwrite(ROOT / "reports" / "lmms.md", page(found, args.n))


if __name__ == "__main__":
    main()
