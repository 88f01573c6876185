"""What the pictures of a report cost: a study of 500 photographs, with 60 of them on the page and without any.

python -m experiments.benchmarks.gallery             # writes reports/gallery.md; about three minutes

The embedded model is asked about scenes that were enlarged to photographs of 1280 x 960 pixels, and a plan is
recommended for them. The report is then written in a process of its own, with its galleries and without.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image

from sensitivity.spec.files import overwrite
from sensitivity.tasks.table import task

ROOT = Path(__file__).parent.parent.parent
MODEL, N, SPARE, BPW, SIZE, RUNS = "embedded:scenes-llava", 500, 200, 4.0, (1280, 960), 3


def photographs(folder: Path, n: int) -> Path:
    """Questions, each about a photograph of its own: an enlarged scene with a camera's noise."""
    draw, lines = np.random.default_rng(0), []
    for number, example in enumerate(task("vqa", n=n).examples):
        scene = np.asarray(Image.fromarray(np.asarray(example.image)).resize(SIZE), dtype=float)
        noisy = (scene + 8 * draw.standard_normal(scene.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number}.jpg", quality=88)
        words = {"prompt": example.prompt, "answers": [example.answers[0]], "kind": example.kind}
        lines.append({"image": f"{number}.jpg", "split": "evaluation", **words})
    file = folder / "photographs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def run(*words: str) -> None:
    """A command of the package in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "sensitivity", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def one(study: Path, out: Path, pictures: bool) -> dict[str, object]:
    """Write the report in this process; what it took, and what came of it."""
    from sensitivity.analysis.recommending.kept_recommendation import recommended
    from sensitivity.analysis.reporting import page
    from sensitivity.study.study import Study

    if not pictures:
        page.failing = lambda *_: ([], [])  # type: ignore[attr-defined]
    made = Study(study)
    chosen = recommended(made)
    work, wall = time.process_time(), time.perf_counter()
    file = page.report(made, out, chosen)
    took = {"work": time.process_time() - work, "wall": time.perf_counter() - wall}
    shown = file.read_text(encoding="utf-8").count('<div class="thumb">')
    return {**took, "bytes": file.stat().st_size, "pictures": shown, "model": "torch" in sys.modules}


def best(study: Path, folder: Path, pictures: bool) -> dict[str, float]:
    """The quickest of several runs."""
    found = []
    for number in range(RUNS):
        words = ["--one", str(study), str(folder / f"{pictures}-{number}"), *(["--pictures"] if pictures else [])]
        done = subprocess.run(
            [sys.executable, "-m", "experiments.benchmarks.gallery", *words], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return min(found, key=lambda each: float(each["work"]))


def page_of(rows: dict[str, dict[str, float]]) -> str:
    """The report of this benchmark."""
    lines = "\n".join(
        f"| {name} | {row['pictures']} | {row['work']:.1f} | {row['wall']:.1f} | {row['bytes'] / 1e6:.2f} |"
        for name, row in rows.items()
    )
    more = rows["with"]["work"] - rows["without"]["work"]
    size = rows["with"]["bytes"] / 1e6
    torch = "imports PyTorch" if any(row["model"] for row in rows.values()) else "does not import PyTorch"
    return f"""# What the pictures of a report cost

`python -m experiments.benchmarks.gallery`: a study of {N} photographs of {SIZE[0]} x {SIZE[1]} pixels, and the
report of its recommended plan, the runner-up and the best uniform plan, with galleries of what breaks and without. One
thread; the quickest of {RUNS} runs, each in a process of its own, after the ranking was computed once.

| galleries | pictures | CPU s | wall s | page, MB |
|---|---|---|---|---|
{lines}

The pictures take **{more:.1f} s** more (the aim is at most 10 s), on a page of **{size:.2f} MB** (the aim is at most
8 MB). No model is run: the process that writes the report {torch}.
"""


def main() -> None:
    """Sweep, recommend, and write the report both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, type=Path, help="a study and a folder: write the report here, and print JSON")
    parser.add_argument("--pictures", action="store_true")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], args.one[1], args.pictures)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder, study = Path(place), Path(place, "study")
        file = photographs(folder, N + SPARE)
        ask = ("--task", f"exact:{file}", "--n", str(N), "--by", "part", "--bits", "2,3,4,8", "--method", "uniform")
        run("sweep", MODEL, *ask, "--search", "one-at-a-time", "--out", str(study))
        run("recommend", str(study), "--bpw", str(BPW))
        run("report", str(study))  # the ranking is kept
        rows = {name: best(study, folder, name == "with") for name in ("without", "with")}
    overwrite(ROOT / "reports" / "gallery.md", page_of(rows))
    print(rows)


if __name__ == "__main__":
    main()
