"""Measure embedded:scenes-blip2 and embedded:scenes-blip2-itm on unseen handwriting, and with shuffled images.

python -m experiments.embedded.scenes_blip2.evaluate     # 1,024 scenes; writes card.json and README.md in both folders
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.embedded.scenes_blip2 import card as model_card
from experiments.embedded.scenes_blip2 import model as blip2
from experiments.embedded.scenes_llava.evaluate import Reader, measure, summary
from experiments.embedded.training import EMBEDDED
from sensitivity.measure.evaluation import evaluate
from sensitivity.models.loading import load
from sensitivity.spec.files import overwrite
from sensitivity.tasks import retrieval
from sensitivity.tasks import scenes as S
from sensitivity.tasks.examples.types import Task

KINDS = (*S.VQA_KINDS, "caption", "scene")
TARGETS: dict[str, dict[str, float]] = {"caption": {"exact": 0.80}, "VQA": {"exact": 0.90}}
R_AT_1_TARGET = 0.80  # for texts and for images


class Blip2Reader(Reader):
    """BLIP-2 and its processor; its prompts have no chat template."""

    def asked(self, prompt: str) -> str:
        kind = "caption" if prompt == "describe the image." else ""
        return blip2.prompt(S.SceneQuestion(kind, prompt, "")).removeprefix("<s>")  # the tokenizer adds <s> itself


def answering(folder: Path, n: int, seed: int) -> dict[str, Any]:
    """Scores of every kind of question, and the mean of the five that count as VQA."""
    reader, scenes = Blip2Reader(folder), S.draw_scenes("evaluation", n, seed)
    asked = [(i, q) for i, scene in enumerate(scenes) for q in S.questions_about(scene, seed)]
    kinds: dict[str, Any] = {}
    for kind in KINDS:
        mine = [(i, q) for i, q in asked if q.kind == kind]
        kinds[kind] = measure(reader, kind, mine, scenes, TARGETS, surprise=False)
        print(kind, json.dumps(kinds[kind]), flush=True)
    five = [kinds[kind]["exact"] for kind in S.VQA_KINDS]
    mean = {name: round(float(np.mean([one[name] for one in five])), 4) for name in ("mean", "shuffled", "prior")}
    kinds["VQA"] = {"exact": {**mean, "n": sum(one["n"] for one in five), "target": TARGETS["VQA"]["exact"]}}
    return kinds


def searching(folder: Path, n: int, seed: int) -> dict[str, Any]:
    """R@k both ways in pools of 256, by similarity alone and with the ITM head; also with shuffled images."""
    vlm, asked = load(str(folder), dtype="fp32"), retrieval.scene_retrieval("evaluation", n, seed)
    assert asked.gallery is not None
    found: dict[str, Any] = {}
    for name, top in (("compared", 0), ("read together", asked.gallery.top)):
        task = replace(asked, gallery=replace(asked.gallery, top=top))
        rows, wrong = evaluate(vlm, task), evaluate(vlm, shuffled(task))
        for way in retrieval.DIRECTIONS:
            for k in retrieval.RANKS:
                right, other = (hits(one, way, k) for one in (rows, wrong))
                row = {**summary(*right), "shuffled": float(other[0].mean()), "prior": k / asked.gallery.pool}
                if k == 1:
                    row["target"] = R_AT_1_TARGET
                row["high"] = min(1.0, row["high"])
                found.setdefault(f"{way}, {name}", {})[f"R@{k}"] = {key: round(v, 4) for key, v in row.items()}
        print(name, json.dumps(task.measure(rows["answer"])), flush=True)
    return found


def shuffled(task: Task) -> Task:
    """The same captions, each with the image that lies 100 places further in its pool."""
    images = list({example.cluster: example.image for example in task.examples}.values())
    size = task.gallery.pool if task.gallery else len(images)
    places = {e.cluster: i for i, e in enumerate({e.cluster: e for e in task.examples}.values())}

    def other(place: int) -> Any:
        start = place // size * size
        return images[start + (place - start + 100) % len(images[start : start + size])]

    return replace(task, examples=tuple(replace(e, image=other(places[e.cluster])) for e in task.examples))


def hits(rows: dict[str, list[Any]], way: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    mine = [i for i, kind in enumerate(rows["kind"]) if kind == way]
    right = np.array([float(int(rows["answer"][i]) <= k) for i in mine])
    return right, np.array([rows["cluster"][i] for i in mine])


MEASURED = {"scenes-blip2-itm": searching, "scenes-blip2": answering}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=EMBEDDED, help="the folder of both model folders")
    parser.add_argument("--model", choices=MEASURED, help="measure this model only")
    parser.add_argument("--scenes", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in [args.model] if args.model else MEASURED:
        folder = args.folder / name
        kinds = MEASURED[name](folder, args.scenes, args.seed)
        card = {"scenes": args.scenes, "split": "evaluation", "seed": args.seed, "kinds": kinds}
        weights = folder / "model.safetensors"
        card |= {"bytes": weights.stat().st_size, "words": len(blip2.tokenizer(name.endswith("itm")))}
        card["training"] = json.loads((folder / "card.json").read_text())["training"]  # as `train` wrote it
        overwrite(folder / "README.md", model_card.text(name, card))
        overwrite(folder / "card.json", json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
