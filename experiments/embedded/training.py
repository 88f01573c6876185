"""What the training stages of both embedded models share: batches, checkpoints, logs, the optimizer and the loss."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from experiments.embedded.batches import LLAVA_STYLE, Batch, PromptStyle, attention_layout, draw_batch, lengths
from sensitivity.spec.files import overwrite, replacing

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "sensitivity" / "models" / "embedded"
NOISE = 0.15  # standard deviation of the noise on symbols that stand in for an image
WOBBLE = 0.09  # how far digits are bent, where they are


@dataclass
class Run:
    """One training run: how long each stage is, and where its checkpoints and its log are kept."""

    work: Path
    steps: dict[str, int]
    sizes: dict[str, int]  # of a batch, in scenes
    seed: int
    style: PromptStyle = LLAVA_STYLE

    def total(self, stage: str) -> int:
        return self.steps[stage]

    def batches(self, stage: str, **kwargs: object) -> Iterator[tuple[int, float, Batch]]:
        """Step, progress from 0 to 1, and a batch of scenes that no other step or stage sees."""
        size, total = self.sizes[stage], self.steps[stage]
        for step in range(total):
            done = step / total
            options = {name: value(done) if callable(value) else value for name, value in kwargs.items()}
            seed = 1000 * self.seed + 1 + list(self.steps).index(stage)
            yield step, done, draw_batch(step * size, size, seed, style=self.style, **options)  # type: ignore[arg-type]

    def checkpoint(self, stage: str) -> Path:
        return self.work / f"{stage}.safetensors"

    def save(self, stage: str, **modules: nn.Module) -> None:
        tensors = {f"{name}/{key}": value for name, m in modules.items() for key, value in m.state_dict().items()}
        tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
        with replacing(self.checkpoint(stage)) as unfinished:
            save_file(tensors, unfinished)

    def restore(self, stage: str, **modules: nn.Module) -> None:
        """Load weights that an earlier stage saved; others in its checkpoint are ignored."""
        tensors = load_file(self.checkpoint(stage))
        for name, module in modules.items():
            module.load_state_dict({k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(name + "/")})


Stages = Mapping[str, Callable[[Run], None]]


def arguments(about: str, work: str, out: Path, stages: Stages, threads: int) -> argparse.Namespace:
    """The command line of a training program."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / work, help="checkpoints and logs")
    parser.add_argument("--out", type=Path, default=out, help="where the trained model is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=stages, help="run these stages only, and write no model")
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--smoke", action="store_true", help="a few steps of each stage; needs --out and --work")
    args = parser.parse_args()
    if args.smoke and args.out == out:
        parser.error("--smoke would overwrite a model that is shipped; name another --out and --work")
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def begin(
    args: argparse.Namespace, steps: Mapping[str, int], sizes: Mapping[str, int], style: PromptStyle = LLAVA_STYLE
) -> Run:
    """The run that the command line asks for; with --smoke, each stage has three steps of four scenes."""
    few, small = (dict.fromkeys(steps, count) for count in (3, 4))
    return Run(args.work, few if args.smoke else dict(steps), small if args.smoke else dict(sizes), args.seed, style)


def learn(run: Run, stages: Stages, names: Iterable[str]) -> None:
    """Run those of the named stages whose checkpoints are missing, each with a seed of its own."""
    for number, (name, stage) in enumerate(stages.items()):
        if name in names and not run.checkpoint(name).exists():
            torch.manual_seed(1000 * run.seed + number)
            stage(run)


class Log:
    """A stage's log as JSON lines, each with the means since the line before."""

    def __init__(self, run: Run, stage: str) -> None:
        self.stage, self.total, self.sums, self.n = stage, run.total(stage), {}, 0  # type: ignore[var-annotated]
        self.every = max(1, min(50, self.total // 4))
        self.file = (run.work / f"{stage}.jsonl").open("w")

    def add(self, step: int, **values: float) -> None:
        self.n += 1
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)
        if (step + 1) % self.every == 0 or step + 1 == self.total:
            means = {name: round(total / count, 4) for name, (total, count) in self.sums.items()}
            print(json.dumps({"stage": self.stage, "step": step + 1, **means}), file=self.file, flush=True)
            self.sums = {}


class Optimizer:
    """AdamW with warm-up and cosine decay to zero; norms, biases and embeddings have no weight decay."""

    def __init__(self, total: int, *groups: tuple[float, list[nn.Module]]) -> None:
        listed = []
        for rate, modules in groups:
            found = {id(p): p for m in modules for p in m.parameters()}
            tables = {id(e.weight) for m in modules for e in m.modules() if isinstance(e, nn.Embedding)}
            plain = [p for p in found.values() if p.dim() < 2 or id(p) in tables]
            decayed = [p for p in found.values() if p.dim() >= 2 and id(p) not in tables]
            listed += [
                {"params": plain, "lr": rate, "weight_decay": 0.0},
                {"params": decayed, "lr": rate, "weight_decay": 0.05},
            ]
        self.inner = torch.optim.AdamW(listed, betas=(0.9, 0.98))
        self.parameters = [p for group in listed for p in group["params"]]  # type: ignore[attr-defined]
        warm = min(100, total // 4)

        def factor(step: int) -> float:
            return min((step + 1) / max(1, warm), 0.5 * (1 + math.cos(math.pi * step / total)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.inner, factor)

    def step(self, loss: Tensor) -> None:
        self.inner.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.inner.step()
        self.schedule.step()


def answer_loss(
    language: nn.Module, words: Tensor, batch: Batch, image: Tensor, style: PromptStyle = LLAVA_STYLE
) -> tuple[Tensor, dict[str, float]]:
    """The loss over the questions to each image, and the share of answers right to the last token, by kind."""
    mask, positions = attention_layout(style)
    hidden = language(
        inputs_embeds=torch.cat([image, words[batch.ids]], 1), attention_mask=mask, position_ids=positions
    ).last_hidden_state[:, style.image_tokens :]
    asked = batch.labels >= 0
    scores, truth, weight = linear(hidden[asked], words), batch.labels[asked], batch.weights[asked]
    loss = (cross_entropy(scores, truth, reduction="none") * weight).sum() / weight.sum()
    right = torch.ones_like(asked)
    right[asked] = scores.argmax(-1) == truth
    share: dict[str, list[float]] = {}
    for kind, piece in zip(style.kinds, right.split(lengths(style), 1), strict=True):
        share.setdefault(kind, []).append(float(piece.all(1).float().mean()))
    return loss, {kind: sum(values) / len(values) for kind, values in share.items()}


def learn_from_symbols(
    run: Run,
    stage: str,
    learning: list[nn.Module],
    symbols: Callable[[Batch], Tensor],
    answers: Callable[[Batch, Tensor], tuple[Tensor, dict[str, float]]],
) -> None:
    """Train a language model to answer from symbols in place of an image, with noise, as it will see imperfect ones."""
    optimizer, log = Optimizer(run.total(stage), (2e-3, learning)), Log(run, stage)
    for step, _, batch in run.batches(stage, draw=False, most=lambda done: 2 if done < 0.15 else 4):
        image = symbols(batch)
        loss, right = answers(batch, image + NOISE * torch.randn_like(image))
        optimizer.step(loss)
        log.add(step, loss=float(loss.detach()), **right)


def distance(image: Tensor, target: Tensor) -> Tensor:
    """Squared error divided by the target's variance, so that the weight of this loss does not depend on its scale."""
    return (image - target).square().mean() / target.var()


def last_lines(work: Path, stages: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What each stage's log says at its end: every value it logged, as last seen."""
    found: dict[str, dict[str, Any]] = {}
    for stage in stages:
        for line in (work / f"{stage}.jsonl").read_text().splitlines():
            found.setdefault(stage, {}).update(json.loads(line))
        del found[stage]["stage"]
    return found


def start_card(folder: Path, work: Path, stages: Iterable[str]) -> None:
    """A model folder's card.json with its training alone; `evaluate` adds the scores and writes the model card."""
    overwrite(folder / "card.json", json.dumps({"training": last_lines(work, stages)}, indent=1) + "\n")
