"""Train embedded:scenes-llava in six stages of a fixed number of steps.

    python -m experiments.embedded.scenes_llava.train            # about an hour on two cores that others use too
    python -m experiments.embedded.scenes_llava.train --smoke --out OUT --work WORK    # a few steps of every stage

A stage whose checkpoint is in --work is not run again; delete the file to repeat it. The stages' logs are kept there,
too; the last line of each goes into card.json beside the model, which `evaluate` turns into a model card.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from experiments.embedded.batches import Batch
from experiments.embedded.scenes_llava import model as llava
from experiments.embedded.scenes_llava.training_heads import PatchHeads, Symbols
from experiments.embedded.training import (
    EMBEDDED,
    ROOT,
    WOBBLE,
    Log,
    Optimizer,
    Run,
    answer_loss,
    arguments,
    begin,
    distance,
    learn,
    learn_from_symbols,
    start_card,
)

STEPS = {"1a": 1300, "1b": 3600, "2": 1100, "3": 1500, "4": 2600, "5": 400}
SIZES = {"1a": 32, "1b": 48, "2": 48, "3": 32, "4": 48, "5": 32}


def see(model: LlavaForConditionalGeneration, batch: Batch) -> Tensor:
    """The hidden states of the patches, as the projector reads them."""
    return model.model.vision_tower(batch.pixels).last_hidden_state[:, 1:]


# -- the stages


def answers(model: LlavaForConditionalGeneration, batch: Batch, image: Tensor) -> tuple[Tensor, dict[str, float]]:
    return answer_loss(model.model.language_model, model.get_input_embeddings().weight, batch, image)


def language_on_symbols(run: Run) -> None:
    """1a: train the language model to answer from symbols."""
    model, symbols = llava.build(), Symbols()
    language, words = model.model.language_model, model.get_input_embeddings().weight
    learn_from_symbols(run, "1a", [language, symbols], lambda batch: symbols(batch, words), partial(answers, model))
    run.save("1a", language=language, symbols=symbols)


def eye(run: Run) -> None:
    """1b: train the vision tower with linear heads per patch, upright and centered digits first."""
    model, heads = llava.build(), PatchHeads()
    optimizer = Optimizer(run.total("1b"), (1e-3, [model.model.vision_tower, heads]))
    log = Log(run, "1b")
    for step, _, batch in run.batches("1b", hard=lambda done: min(1.0, done / 0.3)):
        loss, right = heads(batch, see(model, batch))
        optimizer.step(loss)
        log.add(step, loss=float(loss.detach()), **right)
    run.save("1b", vision=model.model.vision_tower, heads=heads)


def bridge(run: Run) -> None:
    """2: train the projector alone to output the symbols that describe the image."""
    model, symbols = llava.build(), Symbols()
    run.restore("1a", language=model.model.language_model, symbols=symbols)
    run.restore("1b", vision=model.model.vision_tower)
    optimizer = Optimizer(run.total("2"), (3e-3, [model.model.multi_modal_projector]))
    log = Log(run, "2")
    for step, _, batch in run.batches("2"):
        with torch.no_grad():
            seen, target = see(model, batch), symbols(batch, model.get_input_embeddings().weight)
        image = model.model.multi_modal_projector(seen)
        loss = distance(image, target)
        optimizer.step(loss)
        log.add(step, loss=float(loss.detach()))
        if step % log.every == 0:
            with torch.no_grad():
                log.add(step, **answers(model, batch, image)[1])
    run.save("2", projector=model.model.multi_modal_projector)


def together(run: Run) -> None:
    """3: train all parts on questions, while the losses of symbols and heads fade out."""
    model, symbols, heads = llava.build(), Symbols(), PatchHeads()
    run.restore("1a", language=model.model.language_model, symbols=symbols)
    run.restore("1b", vision=model.model.vision_tower, heads=heads)
    run.restore("2", projector=model.model.multi_modal_projector)
    parts = model.model
    total = run.total("3")
    optimizer = Optimizer(
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
        optimizer.step(loss)
        log.add(step, loss=float(told.detach()), **right, **looked)
        if step % 500 == 499:
            run.save("3-partial", model=model)
    run.save("3", model=model)


def eye_again(run: Run) -> None:
    """4: train vision tower and projector to output symbols for bent digits; a step costs a fifth of one of stage 3."""
    model, symbols, heads = llava.build(), Symbols(), PatchHeads()
    run.restore("1a", symbols=symbols)
    run.restore("1b", heads=heads)
    run.restore("3", model=model)
    parts = model.model
    optimizer = Optimizer(run.total("4"), (1e-3, [parts.multi_modal_projector]), (7e-4, [parts.vision_tower, heads]))
    log = Log(run, "4")
    for step, _, batch in run.batches("4", wobble=WOBBLE):
        with torch.no_grad():
            target = symbols(batch, model.get_input_embeddings().weight)
        seen = see(model, batch)
        patches, looked = heads(batch, seen)
        away = distance(parts.multi_modal_projector(seen), target)
        optimizer.step(patches + away)
        log.add(step, loss=float(patches.detach()), distance=float(away.detach()), **looked)
    run.save("4", model=model, heads=heads)


def together_again(run: Run) -> None:
    """5: train all parts again, for a few steps and with low learning rates."""
    model, heads = llava.build(), PatchHeads()
    run.restore("4", model=model, heads=heads)
    parts = model.model
    optimizer = Optimizer(
        run.total("5"), (5e-4, [parts.language_model, parts.multi_modal_projector]), (2e-4, [parts.vision_tower, heads])
    )
    log = Log(run, "5")
    for step, _, batch in run.batches("5", wobble=WOBBLE / 2):
        seen = see(model, batch)
        told, right = answers(model, batch, parts.multi_modal_projector(seen))
        patches, looked = heads(batch, seen)
        optimizer.step(told + 0.3 * patches)
        log.add(step, loss=float(told.detach()), **right, **looked)
    run.save("5", model=model)


STAGES = {
    "1a": language_on_symbols,
    "1b": eye,
    "2": bridge,
    "3": together,
    "4": eye_again,
    "5": together_again,
}


def write(run: Run, out: Path) -> None:
    """The model folder, with the last line of each stage's log in card.json."""
    model = llava.build()
    run.restore("5", model=model)
    out.mkdir(parents=True, exist_ok=True)
    llava.save(model, out)
    (out / "model.safetensors").chmod(0o644)
    start_card(out, run.work, STAGES)


def main() -> None:
    args = arguments(__doc__, "train-scenes-llava", EMBEDDED / "scenes-llava", STAGES, threads=2)
    run = begin(args, STEPS, SIZES)
    if args.only:
        learn(run, STAGES, args.only)
        return
    # 1a and 1b do not depend on each other, so they run side by side with a thread each
    again = [sys.executable, "-m", "experiments.embedded.scenes_llava.train", *sys.argv[1:], "--threads", "1"]
    children = [subprocess.Popen([*again, "--only", stage], cwd=ROOT) for stage in ("1a", "1b")]
    if sum(abs(child.wait()) for child in children):
        sys.exit("stage 1 failed")
    learn(run, STAGES, STAGES)
    write(run, args.out)


if __name__ == "__main__":
    main()
