"""Trains embedded:scenes-llava, counted in steps: language on symbols, eye, bridge, all; the last two twice.

    python experiments/train_scenes_llava.py                # about an hour on two cores that others use too
    python experiments/train_scenes_llava.py --smoke        # a few steps of everything

A stage that has left its checkpoint in --work is not done again; delete the file to repeat it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import scenes_llava as L
import torch
from safetensors.torch import load_file, save_file
from scenes_llava_aids import Heads, Symbols
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import LlavaForConditionalGeneration

from sensitivity.files import whole, write_again

ROOT = Path(__file__).resolve().parent.parent
HEAD = '{"log": "training of scenes-llava"}\n'  # by which a later run knows the log as one of its own
NOISE, WOBBLE = 0.15, 0.09
STEPS = {"1a": 1300, "1b": 3600, "2": 1100, "3": 1500, "4": 2600, "5": 400}
SIZES = {"1a": 32, "1b": 48, "2": 48, "3": 32, "4": 48, "5": 32}


# -- what the stages share


@dataclass
class Run:
    work: Path
    steps: dict[str, int]
    sizes: dict[str, int]
    seed: int
    style: L.Style = L.STYLE

    def total(self, stage: str) -> int:
        return self.steps[stage]

    def batches(self, stage: str, **kwargs: object) -> Iterator[tuple[int, float, L.Batch]]:
        """Step, progress from 0 to 1, and the step's scenes, which no other step or stage sees."""
        size, total = self.sizes[stage], self.steps[stage]
        for step in range(total):
            done = step / total
            options = {name: value(done) if callable(value) else value for name, value in kwargs.items()}
            seed = 1000 * self.seed + 1 + list(self.steps).index(stage)
            yield step, done, L.batch(step * size, size, seed, style=self.style, **options)  # type: ignore[arg-type]

    def keep(self, stage: str, **modules: nn.Module) -> None:
        tensors = {f"{name}/{key}": value for name, m in modules.items() for key, value in m.state_dict().items()}
        tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
        with whole(self.work / f"{stage}.safetensors") as unfinished:
            save_file(tensors, unfinished)

    def fetch(self, stage: str, **modules: nn.Module) -> None:
        tensors = load_file(self.work / f"{stage}.safetensors")
        for name, module in modules.items():
            module.load_state_dict({k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(name + "/")})


class Log:
    """Means since the last line, as JSON lines."""

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


class Optimiser:
    """AdamW with a warm-up and a cosine down to nothing; norms, biases and embeddings do not decay."""

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


def see(model: LlavaForConditionalGeneration, batch: L.Batch) -> Tensor:
    """The vision tower's patches, as the projector gets them."""
    return model.model.vision_tower(batch.pixels).last_hidden_state[:, 1:]


def read(
    language: nn.Module, words: Tensor, batch: L.Batch, image: Tensor, style: L.Style = L.STYLE
) -> tuple[Tensor, dict[str, float]]:
    """The loss over the questions to each image, and the share of answers right to the last token, by kind."""
    mask, positions = L.layout(style)
    hidden = language(
        inputs_embeds=torch.cat([image, words[batch.ids]], 1), attention_mask=mask, position_ids=positions
    ).last_hidden_state[:, style.image :]
    asked = batch.labels >= 0
    scores, truth, weight = linear(hidden[asked], words), batch.labels[asked], batch.weights[asked]
    loss = (cross_entropy(scores, truth, reduction="none") * weight).sum() / weight.sum()
    right = torch.ones_like(asked)
    right[asked] = scores.argmax(-1) == truth
    share: dict[str, list[float]] = {}
    for kind, piece in zip(style.slots, right.split(L.lengths(style), 1), strict=True):
        share.setdefault(kind, []).append(float(piece.all(1).float().mean()))
    return loss, {kind: sum(values) / len(values) for kind, values in share.items()}


# -- the stages


def answers(model: LlavaForConditionalGeneration, batch: L.Batch, image: Tensor) -> tuple[Tensor, dict[str, float]]:
    return read(model.model.language_model, model.get_input_embeddings().weight, batch, image)


def language_on_symbols(run: Run) -> None:
    """1a: the language model learns to bind and to answer, from perfect symbols with a little noise."""
    model, symbols = L.build(), Symbols()
    optimiser = Optimiser(run.total("1a"), (2e-3, [model.model.language_model, symbols]))
    log = Log(run, "1a")
    for step, _, batch in run.batches("1a", draw=False, most=lambda done: 2 if done < 0.15 else 4):
        image = symbols(batch, model.get_input_embeddings().weight)
        loss, right = answers(model, batch, image + NOISE * torch.randn_like(image))
        optimiser.step(loss)
        log.add(step, loss=float(loss.detach()), **right)
    run.keep("1a", language=model.model.language_model, symbols=symbols)


def eye(run: Run) -> None:
    """1b: the vision tower alone learns what lies where, straight and centred digits first."""
    model, heads = L.build(), Heads()
    optimiser = Optimiser(run.total("1b"), (1e-3, [model.model.vision_tower, heads]))
    log = Log(run, "1b")
    for step, _, batch in run.batches("1b", hard=lambda done: min(1.0, done / 0.3)):
        loss, right = heads(batch, see(model, batch))
        optimiser.step(loss)
        log.add(step, loss=float(loss.detach()), **right)
    run.keep("1b", vision=model.model.vision_tower, heads=heads)


def bridge(run: Run) -> None:
    """2: the projector alone learns to say in symbols what the eye has seen."""
    model, symbols = L.build(), Symbols()
    run.fetch("1a", language=model.model.language_model, symbols=symbols)
    run.fetch("1b", vision=model.model.vision_tower)
    optimiser = Optimiser(run.total("2"), (3e-3, [model.model.multi_modal_projector]))
    log = Log(run, "2")
    for step, _, batch in run.batches("2"):
        with torch.no_grad():
            seen, target = see(model, batch), symbols(batch, model.get_input_embeddings().weight)
        image = model.model.multi_modal_projector(seen)
        loss = distance(image, target)
        optimiser.step(loss)
        log.add(step, loss=float(loss.detach()))
        if step % log.every == 0:
            with torch.no_grad():
                log.add(step, **answers(model, batch, image)[1])
    run.keep("2", projector=model.model.multi_modal_projector)


def distance(image: Tensor, target: Tensor) -> Tensor:
    """Squared error as a share of the target's variance, so that its weight does not depend on the tables' scale."""
    return (image - target).square().mean() / target.var()


def together(run: Run) -> None:
    """3: everything at once; the crutches (symbols, heads) are let go on the way."""
    model, symbols, heads = L.build(), Symbols(), Heads()
    run.fetch("1a", language=model.model.language_model, symbols=symbols)
    run.fetch("1b", vision=model.model.vision_tower, heads=heads)
    run.fetch("2", projector=model.model.multi_modal_projector)
    parts = model.model
    total = run.total("3")
    optimiser = Optimiser(
        total, (1e-3, [parts.language_model, parts.multi_modal_projector]), (5e-4, [parts.vision_tower, heads])
    )
    log = Log(run, "3")
    for step, done, batch in run.batches("3"):
        seen = see(model, batch)
        image = parts.multi_modal_projector(seen)
        told, right = answers(model, batch, image)
        patches, looked = heads(batch, seen)
        loss = told + (0.5 - 0.4 * done) * patches
        if done < 0.6:
            with torch.no_grad():
                target = symbols(batch, model.get_input_embeddings().weight)
            loss = loss + (1 - done / 0.6) * distance(image, target)
        optimiser.step(loss)
        log.add(step, loss=float(told.detach()), **right, **looked)
        if step % 500 == 499:
            run.keep("3-partial", model=model)
    run.keep("3", model=model)


def eye_again(run: Run) -> None:
    """4: the eye and the projector go on, on bent digits, towards the symbols: a fifth of what a step of all costs."""
    model, symbols, heads = L.build(), Symbols(), Heads()
    run.fetch("1a", symbols=symbols)
    run.fetch("1b", heads=heads)
    run.fetch("3", model=model)
    parts = model.model
    optimiser = Optimiser(run.total("4"), (1e-3, [parts.multi_modal_projector]), (7e-4, [parts.vision_tower, heads]))
    log = Log(run, "4")
    for step, _, batch in run.batches("4", wobble=WOBBLE):
        with torch.no_grad():
            target = symbols(batch, model.get_input_embeddings().weight)
        seen = see(model, batch)
        patches, looked = heads(batch, seen)
        away = distance(parts.multi_modal_projector(seen), target)
        optimiser.step(patches + away)
        log.add(step, loss=float(patches.detach()), distance=float(away.detach()), **looked)
    run.keep("4", model=model, heads=heads)


def together_again(run: Run) -> None:
    """5: everything at once, briefly and gently."""
    model, heads = L.build(), Heads()
    run.fetch("4", model=model, heads=heads)
    parts = model.model
    optimiser = Optimiser(
        run.total("5"), (5e-4, [parts.language_model, parts.multi_modal_projector]), (2e-4, [parts.vision_tower, heads])
    )
    log = Log(run, "5")
    for step, _, batch in run.batches("5", wobble=WOBBLE / 2):
        seen = see(model, batch)
        told, right = answers(model, batch, parts.multi_modal_projector(seen))
        patches, looked = heads(batch, seen)
        optimiser.step(told + 0.3 * patches)
        log.add(step, loss=float(told.detach()), **right, **looked)
    run.keep("5", model=model)


STAGES = {
    "1a": language_on_symbols,
    "1b": eye,
    "2": bridge,
    "3": together,
    "4": eye_again,
    "5": together_again,
}


def write(run: Run, out: Path, log: Path) -> None:
    """The model folder, and the four stages' logs as one file."""
    model = L.build()
    run.fetch("5", model=model)
    out.mkdir(parents=True, exist_ok=True)
    L.save(model, out)
    (out / "model.safetensors").chmod(0o644)
    write_again(log, HEAD + "".join((run.work / f"{stage}.jsonl").read_text() for stage in STAGES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "train-scenes-llava", help="checkpoints")
    parser.add_argument("--out", type=Path, default=ROOT / "sensitivity" / "models" / "embedded" / "scenes-llava")
    parser.add_argument("--log", type=Path, default=Path(__file__).with_suffix(".log"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=STAGES, help="this stage only, and no model folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a few steps of each stage; needs --out and --work")
    args = parser.parse_args()
    if args.smoke and parser.get_default("out") == args.out:
        parser.error("--smoke would overwrite the shipped model; give it another --out, --work and --log")

    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    steps, sizes = (dict.fromkeys(STAGES, few) if args.smoke else full for few, full in ((3, STEPS), (4, SIZES)))
    run = Run(args.work, steps, sizes, args.seed)
    waiting = [stage for stage in STAGES if not (args.work / f"{stage}.safetensors").exists()]
    if args.stage:
        torch.manual_seed(1000 * args.seed + list(STAGES).index(args.stage))
        STAGES[args.stage](run)
        return
    # 1a and 1b need nothing from each other: a thread each.
    aside = [s for s in ("1a", "1b") if s in waiting]
    children = [subprocess.Popen([sys.executable, *sys.argv, "--stage", s, "--threads", "1"]) for s in aside]
    if sum(abs(child.wait()) for child in children):
        sys.exit("stage 1 failed")
    for stage in ("2", "3", "4", "5"):
        if stage in waiting:
            torch.manual_seed(1000 * args.seed + list(STAGES).index(stage))
            STAGES[stage](run)
    write(run, args.out, args.log)


if __name__ == "__main__":
    main()
