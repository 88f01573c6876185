"""Measure embedded:scenes-llava on unseen handwriting, beside shuffled images and the best blind guess.

python -m experiments.embedded.scenes_llava.evaluate    # 1,024 scenes; writes card.json and README.md
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor

from experiments.embedded.scenes_llava import card as model_card
from experiments.embedded.training import EMBEDDED
from sensitivity.spec.files import overwrite
from sensitivity.tasks import scenes as S
from sensitivity.tasks.examples.types import Box
from sensitivity.tasks.scoring.boxes import oriented_iou, parse

TARGETS = {kind: {"exact": 0.97} for kind in (*S.VQA_KINDS, "scene")}
TARGETS |= {"caption": {"exact": 0.92}, "ground": {"upright IoU >= .5": 0.95, "oriented IoU >= .5": 0.85}}


def score(kind: str, answer: str, truth: str) -> dict[str, float]:
    """Every metric of one answer."""
    metrics = {"exact": float(answer == truth)}
    if kind == "caption":
        said, meant = answer.split(), truth.split()
        same = sum(a == b for a, b in zip(said, meant, strict=False))
        metrics["words in place"] = same / max(len(said), len(meant))
    if kind == "ground":
        meant_box, said_boxes = parse(truth)[0], parse(answer)
        upright = upright_iou(said_boxes[0], meant_box) if said_boxes else 0.0
        oriented = oriented_iou(said_boxes[0], meant_box) if said_boxes else 0.0
        metrics |= {"upright IoU >= .5": float(upright >= 0.5), "oriented IoU >= .5": float(oriented >= 0.5)}
        metrics |= {"upright IoU": upright, "oriented IoU": oriented}
        metrics["angle"] = float(bool(said_boxes) and said_boxes[0][4] == meant_box[4])
    return metrics


def upright_iou(a: Box, b: Box) -> float:
    """Intersection over union of the boxes without their rotation."""
    return oriented_iou((*a[:4], 0.0), (*b[:4], 0.0))


def summary(values: np.ndarray, cluster: np.ndarray) -> dict[str, float]:
    """Mean with a 95 % interval, clustered by scene: questions about one scene are not independent."""
    mean, n = values.mean(), len(values)
    _, scene = np.unique(cluster, return_inverse=True)
    sums = np.bincount(scene, values - mean)
    error = float(np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / n)
    # without a single error the variance is 0 and the interval would be empty: use the rule of three, 3/n
    reach = 1.96 * error if error > 0 else 3 / len(sums)
    return {"mean": float(mean), "low": max(0.0, float(mean) - reach), "high": float(mean) + reach, "n": n}


class Reader:
    """The model and its processor, loaded and called as a user of transformers would."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def asked(self, prompt: str) -> str:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        return str(self.processor.apply_chat_template(chat, add_generation_prompt=True))

    def inputs(self, prompts: list[str], images: list[np.ndarray]) -> dict[str, torch.Tensor]:
        pictures = [Image.fromarray(image) for image in images]
        return dict(self.processor(images=pictures, text=list(map(self.asked, prompts)), return_tensors="pt"))

    @torch.inference_mode()
    def answers(self, prompts: list[str], images: list[np.ndarray]) -> list[str]:
        inputs = self.inputs(prompts, images)
        # passed here because BLIP-2 does not pass the limit in its generation_config to its language model
        out = self.model.generate(**inputs, max_new_tokens=40)[:, inputs["input_ids"].shape[1] :]
        return list(self.processor.batch_decode(out, skip_special_tokens=True))

    @torch.inference_mode()
    def surprise(self, prompts: list[str], images: list[np.ndarray], answers: list[str]) -> list[float]:
        """Mean negative log-likelihood per token of the right answers, end token included, in nats."""
        words = self.processor.tokenizer
        ends = [[*words.encode(a, add_special_tokens=False), words.eos_token_id] for a in answers]
        width = max(map(len, ends))
        labels = torch.tensor([[*e, *[-100] * (width - len(e))] for e in ends])
        inputs = self.inputs(prompts, images)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], labels.clamp(min=0)], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], (labels >= 0).long()], 1)
        logits = self.model(**inputs).logits[:, -width - 1 : -1]
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        return list((loss.sum(1) / (labels >= 0).sum(1)).tolist())


def measure(
    reader: Reader,
    kind: str,
    asked: list[tuple[int, S.SceneQuestion]],
    scenes: list[S.Scene],
    targets: dict[str, dict[str, float]] = TARGETS,
    surprise: bool = True,
) -> dict:
    """Scores of one kind of question: with the right images, with others', and of the best constant answer."""
    most_common = Counter(q.answer for _, q in asked).most_common(1)[0][0]
    found: dict[str, dict[str, list[float]]] = {w: defaultdict(list) for w in ("right", "shuffled", "prior")}
    for start in range(0, len(asked), 256):
        part = asked[start : start + 256]
        prompts, truths = [q.prompt for _, q in part], [q.answer for _, q in part]
        for which, shift in (("right", 0), ("shuffled", len(scenes) // 2)):
            images = [scenes[(i + shift) % len(scenes)].image for i, _ in part]
            if surprise:
                found[which]["NLL"] += reader.surprise(prompts, images, truths)
            for answer, truth in zip(reader.answers(prompts, images), truths, strict=True):
                for name, value in score(kind, answer, truth).items():
                    found[which][name].append(value)
        for truth in truths:
            for name, value in score(kind, most_common, truth).items():
                found["prior"][name].append(value)
    cluster = np.array([i for i, _ in asked])
    metrics = {}
    for name, values in found["right"].items():
        row = summary(np.array(values), cluster)
        if name != "NLL":
            row["high"] = min(1.0, row["high"])
        row["shuffled"] = float(np.mean(found["shuffled"][name]))
        if name in found["prior"]:
            row["prior"] = float(np.mean(found["prior"][name]))
        if name in targets.get(kind, {}):
            row["target"] = targets[kind][name]
        metrics[name] = {k: round(v, 4) for k, v in row.items()}
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=EMBEDDED / "scenes-llava", help="the model folder")
    parser.add_argument("--scenes", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    reader, scenes = Reader(args.folder), S.draw_scenes("evaluation", args.scenes, args.seed)
    asked = [(i, q) for i, scene in enumerate(scenes) for q in S.questions_about(scene, args.seed)]
    kinds = {}
    for kind in S.KINDS:
        kinds[kind] = measure(reader, kind, [(i, q) for i, q in asked if q.kind == kind], scenes)
        print(kind, json.dumps(kinds[kind]), flush=True)
    card = {"scenes": len(scenes), "split": "evaluation", "seed": args.seed, "kinds": kinds}
    card |= {"bytes": (args.folder / "model.safetensors").stat().st_size, "words": len(reader.processor.tokenizer)}
    card["training"] = json.loads((args.folder / "card.json").read_text())["training"]  # as `train` wrote it
    overwrite(args.folder / "README.md", model_card.text(card))
    overwrite(args.folder / "card.json", json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
