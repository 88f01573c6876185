"""Memory of a sweep as the number of images grows, and of the texts of 200,000 questions.

python -m experiments.benchmarks.memory            # writes reports/memory.md
python -m experiments.benchmarks.memory --smoke    # a few images
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

from sensitivity.spec.files import overwrite

ROOT = Path(__file__).parent.parent.parent

SIDE = 224  # of an image in pixels: 0.6 MB as float32
IMAGES = (200, 1280, 2560)
QUESTIONS = 200_000  # VQAv2 has 214,354 in its validation part
WORDS = ("is", "the", "a", "man", "woman", "dog", "red", "what", "color", "how", "many", "people", "are", "there", "in")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "memory.md")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # number of images to measure in this process
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(swept(args.one)))
        return
    counts = (4, 16) if args.smoke else IMAGES
    here = {**os.environ, "OMP_NUM_THREADS": "1"}
    lines = ["# Memory and the size of the evaluation set", "", "    python -m experiments.benchmarks.memory", ""]
    lines += [
        f"{platform.machine()}, one thread. Sweeps of two plans over images on disk, each in a process of its own. An",
        f"image is {4 * 3 * SIDE**2 / 1e6:.1f} MB as float32; at most 512 are in memory at once.",
        "",
        "| images | all of them as float32, MB | peak memory beyond the loaded model, MB |",
        "|---|---|---|",
    ]
    for count in counts:
        command = [sys.executable, "-m", "experiments.benchmarks.memory", "--one", str(count)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=here, cwd=ROOT)
        found = json.loads(done.stdout.splitlines()[-1])
        lines.append(f"| {count:,} | {count * 4 * 3 * SIDE**2 / 1e6:.0f} | {found / 1e6:.0f} |")
        print(lines[-1], file=sys.stderr)
    asked = 1000 if args.smoke else QUESTIONS
    kept, most = texts(asked)
    lines += [
        "",
        f"{asked:,} questions in VQAv2's layout, each with ten answers, take {kept:.0f} bytes a question while a sweep",
        f"runs ({kept * asked / 1e6:.0f} MB together), and {most:.0f} at the peak of reading the files.",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    overwrite(args.out, "\n".join(lines) + "\n")
    print("\n".join(lines))


def swept(images: int) -> int:
    """Peak memory in bytes of a sweep over this many images, beyond the loaded model."""
    import torch

    from experiments.small import datasets, models
    from sensitivity.api.sweeping import one_at_a_time, sweep
    from sensitivity.models.discovery import inspect
    from sensitivity.models.loading import load

    torch.set_num_threads(1)
    models.BUILDERS["large"] = lambda: models.llava(side=SIDE)
    datasets.COUNT = images
    with tempfile.TemporaryDirectory() as folder:
        vlm = load(str(models.save("large", Path(folder) / "model")), dtype="float32")
        datasets.gqa(Path(folder) / "data")
        parts = inspect(vlm, by="part")
        plans = one_at_a_time(parts, bits=(8,))[:2]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sweep(vlm, parts, plans, [f"gqa:{folder}/data"], Path(folder) / "run", n=images, memory_gb=0.2)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def texts(questions: int) -> tuple[float, float]:
    """Bytes per question of a task, and at the peak of reading it, images left out."""
    from experiments.small import datasets
    from sensitivity.tasks.datasets import source
    from sensitivity.tasks.examples import images
    from sensitivity.tasks.table import task

    draw = random.Random(0)
    asked, said = [], []
    for number in range(questions):
        name, image = 1000 * (number // 5) + number % 5, number // 5
        words = " ".join(draw.choices(WORDS, k=7)) + "?"
        people = [{"answer": draw.choice(WORDS), "answer_id": k, "answer_confidence": "yes"} for k in range(10)]
        asked.append({"image_id": image, "question": words, "question_id": name})
        said.append({"question_id": name, "image_id": image, "answer_type": "other", "answers": people})
    images.why_unusable = lambda _: None
    source.Part.contains = lambda *_: True  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "val2014").mkdir()
        datasets.write(Path(folder) / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
        datasets.write(Path(folder) / "v2_mscoco_val2014_annotations.json", {"annotations": said})
        del asked, said
        tracemalloc.start()
        found = task(f"vqav2:{folder}", n=questions)
        kept, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(found.examples) == questions
    return kept / questions, most / questions


if __name__ == "__main__":
    main()
