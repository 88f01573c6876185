"""Q-VLM's optional last step: the vision encoder is trained for 4 bits of weights and inputs, with its three losses.

python -m experiments.methods.qvlm_encoder [--models embedded:scenes-llava] [--epochs 6]

It writes reports/qvlm-encoder.md.

A model whose encoder was trained is another model, so this stands beside the sweeps and not in them: what it leaves can
be saved, inspected and swept as any model is. The language model stays frozen at 4 bits, with inputs of 4 bits. The
encoder's weights are kept in float32 and rounded in each forward pass; gradients pass through every rounding as if it
were not there. The losses, as the paper names them: of the next token; of the discretization error, here of each
layer's input, over its own size; and the entropy of each layer's input, weighted by how much the error of the blocks
depends on that input. How the paper weighs the three could not be read: here each is divided by its first value, and
the last two count half (inferred). It trains on calibration data alone, and the steps with the least loss of the next
token on calibration data of their own are kept; no step at all is one of them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from experiments.methods.comparison.rows import MODELS
from sensitivity.api.sweeping import sweep, with_calibration
from sensitivity.measure.calibrate.calibration import calibration_examples
from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.gradients.backward import answer_loss
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.measure.passes.block_modules import block_paths, layer_input
from sensitivity.measure.passes.token_batches import TokenBatch, answer_batches, calibration_pass
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import Plan
from sensitivity.study.scores import paired_difference
from sensitivity.tasks.table import task

N, CALIBRATION, HELD_OUT, ROWS = 500, 128, 64, 16
LOSSES = {"next token alone": (1.0, 0.0, 0.0), "all three": (1.0, 0.5, 0.5)}


class StraightThrough(TorchFunctionMode):
    """Inside, rounding has the gradient of doing nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in (Tensor.round, Tensor.round_, torch.round):
            return args[0] + (torch.round(args[0].detach()) - args[0].detach())
        return func(*args, **(kwargs or {}))


class Encoder:
    """A model, one plan of it, and the encoder's parameters, which are trained while the plan is in the model."""

    def __init__(self, vlm: VLM, asked: str) -> None:
        self.vlm, self.asked, self.parts = vlm, asked, inspect(vlm, by="part")
        self.blocks = [vlm.model.get_submodule(p) for p in block_paths(vlm.model, self.parts.weights).values()]
        self.layers = [vlm.model.get_submodule(w.reader) for w in self.parts.weights if not w.is_embedding]
        own = {weight.name for weight in self.parts.weights if weight.part == "vision"}
        own |= {weight.bias for weight in self.parts.weights if weight.part == "vision" and weight.bias}
        self.trained = [p for name, p in vlm.model.named_parameters() if name in own]
        (drawn,) = calibration_examples([asked], CALIBRATION + HELD_OUT, 0)
        self.data, self.held_out = (
            list(answer_batches(vlm, [replace(drawn, examples=some)], ROWS))
            for some in (drawn.examples[:CALIBRATION], drawn.examples[CALIBRATION:])
        )
        self.ranges: dict[Any, Any] = {}  # of inputs; searched once for a training

    def plan(self) -> tuple[Plan, Statistics]:
        """Q-VLM's plan, calibrated on the model as it is now."""
        (one,), statistics = with_calibration(
            self.vlm, self.parts, [scheme("qvlm", 4)], [self.asked], CALIBRATION, cache_gb=0
        )
        assert statistics is not None
        return Plan.uniform(self.parts, one), statistics

    @contextmanager
    def rounded(self, plan: Plan, statistics: Statistics) -> Iterator[None]:
        """The plan in the model, with ranges that were searched before."""
        codes = WeightCodes(0)  # weights change with every step, so that no codes are kept
        codes.run_time = self.ranges
        with quantized(self.vlm.model, self.parts, plan, codes, statistics):
            yield

    def loss(self, plan: Plan, statistics: Statistics) -> float:
        """The loss of the next token on calibration data that the encoder is not trained on."""
        with self.rounded(plan, statistics), torch.no_grad():
            return sum(float(answer_loss(self.vlm, batch)) for batch in self.held_out) / HELD_OUT

    @contextmanager
    def seen(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """What each layer would read, and what it reads once that is rounded, in the order of the pass."""
        found: list[tuple[Tensor, Tensor]] = []
        before: dict[nn.Module, Tensor] = {}

        def first(module: nn.Module, args: Any, kwargs: Any) -> None:
            before[module] = layer_input(args, kwargs)

        def then(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            found.append((before.pop(module), layer_input(args, kwargs)))

        with ExitStack() as hooks:
            for layer in dict.fromkeys(self.layers):
                for handle in (
                    layer.register_forward_pre_hook(first, prepend=True, with_kwargs=True),
                    layer.register_forward_hook(then, with_kwargs=True),
                ):
                    hooks.callback(handle.remove)
            yield found

    def dependence(self, plan: Plan, statistics: Statistics) -> list[float]:
        """How much the error of the blocks depends on each layer's input, over the mean of all layers."""
        batch = self.data[0]
        with torch.no_grad(), self.outputs() as exact:
            calibration_pass(self.vlm, batch)
        with self.rounded(plan, statistics), StraightThrough(), self.seen() as seen, self.outputs() as found:
            calibration_pass(self.vlm, batch)
            errors = [(a - b).square().mean() / b.square().mean() for a, b in zip(found, exact, strict=True)]
            trained = [x for x, _ in seen if x.requires_grad]  # what stands before the first trained layer is fixed
            slopes = iter(torch.autograd.grad(torch.stack(errors).sum(), trained, allow_unused=True))
            found_at = [next(slopes) if x.requires_grad else None for x, _ in seen]
        sizes = np.array([0.0 if slope is None else float(slope.abs().mean()) for slope in found_at])
        return list(sizes / sizes.mean())

    @contextmanager
    def outputs(self) -> Iterator[list[Tensor]]:
        """What the blocks return, in the order of the pass."""
        found: list[Tensor] = []

        def note(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        handles = [block.register_forward_hook(note) for block in self.blocks]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def terms(self, batch: TokenBatch, depends: list[float]) -> list[Tensor]:
        """The three losses of a batch, with the plan in the model."""
        with self.seen() as seen:
            token = answer_loss(self.vlm, batch).float() / len(batch.examples)
        errors = [(x - rounded).square().mean() / x.detach().square().mean() for x, rounded in seen]
        entropies = []
        for (x, _), weight in zip(seen, depends, strict=True):
            share = x.abs() / x.abs().sum(-1, keepdim=True).clamp(min=1e-12)
            entropies.append(weight * -(share * share.clamp(min=1e-12).log()).sum(-1).mean())
        return [token, torch.stack(errors).mean(), torch.stack(entropies).mean()]

    def train(self, weights: tuple[float, ...], epochs: int, rate: float) -> list[float]:
        """Train, and leave the encoder at the step with the least held-out loss; the losses after each epoch."""
        plan, statistics = self.plan()
        self.ranges.clear()
        for parameter in self.trained:
            parameter.requires_grad_(True)
        depends, first = self.dependence(plan, statistics), list[float]()
        best, kept = self.loss(plan, statistics), [p.detach().clone() for p in self.trained]
        losses, steps = [best], torch.optim.Adam(self.trained, rate)
        draw = np.random.default_rng(0)
        for _ in range(epochs):
            for index in draw.permutation(len(self.data)):
                with self.rounded(plan, statistics), StraightThrough():
                    terms = self.terms(self.data[index], depends)
                    first = first or [max(float(term.detach()), 1e-12) for term in terms]
                    loss = sum(w * term / start for w, term, start in zip(weights, terms, first, strict=True))
                    steps.zero_grad()
                    torch.autograd.backward(torch.as_tensor(loss))
                steps.step()  # on the weights in float32, which are the model's own again
            losses.append(self.loss(plan, statistics))
            if losses[-1] < best:
                best, kept = losses[-1], [p.detach().clone() for p in self.trained]
        self.put(kept)
        for parameter in self.trained:
            parameter.requires_grad_(False).grad = None
        return losses

    def put(self, values: list[Tensor]) -> None:
        """Put weights into the encoder."""
        for parameter, value in zip(self.trained, values, strict=True):
            parameter.data = value.clone()

    def scores(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Scores in full precision and under the plan, on examples of no calibration, with their images."""
        plan, statistics = self.plan()
        with tempfile.TemporaryDirectory() as place:
            study = sweep(self.vlm, self.parts, [plan], [self.asked], Path(place) / "s", n=N, statistics=statistics)
            frames = {"full precision": study.examples(study.native), "qvlm": study.examples(plan)}
        order = [example.id for example in task(self.asked, n=N).examples]
        found = {}
        for name, frame in frames.items():
            assert frame is not None
            rows = frame.set_index("example").loc[order]
            found[name] = rows["score"].to_numpy(dtype=float), rows["cluster"].to_numpy()
        return found


def compared(model: str, asked: str, epochs: int, rate: float) -> list[str]:
    """Lines of the table: what each training changes, in full precision and under the plan."""
    encoder = Encoder(load(model, dtype="float32"), asked)
    own = [p.detach().clone() for p in encoder.trained]
    before, lines = encoder.scores(), []
    for name, weights in LOSSES.items():
        encoder.put(own)
        losses = encoder.train(weights, epochs, rate)
        after = encoder.scores()
        cells = []
        for kind in ("full precision", "qvlm"):
            gain = paired_difference(after[kind][0], before[kind][0], before[kind][1])
            cells.append(f"{before[kind][0].mean():.3f} | {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")
        text = " | ".join(cells)
        kept = int(np.argmin(losses))
        lines.append(
            f"| {model.removeprefix('embedded:')} | {asked} | {name} | {text} | "
            f"{losses[0]:.4f} → {min(losses):.4f} (epoch {kept} of {epochs}) |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", default=",".join(MODELS))
    p.add_argument("--tasks", default="caption,vqa")
    p.add_argument("--epochs", type=int, default=6)
    p.add_argument("--rate", type=float, default=1e-4)
    p.add_argument("--out", type=Path, default=Path("reports/qvlm-encoder.md"))
    args = p.parse_args()
    lines = [
        "# Training the vision encoder for 4 bits, as Q-VLM does",
        "",
        "    python -m experiments.methods.qvlm_encoder",
        "",
        f"`qvlm` on all parts (weights and inputs of 4 bits), {N} examples of each task, paired intervals clustered",
        f"by image. Trained on {CALIBRATION} calibration examples, kept where the loss of the next token on {HELD_OUT}",
        f"others is least; Adam, rate {args.rate:g}, {args.epochs} epochs. A change is against the score before it.",
        "",
        "| model | task | losses | full precision | change | qvlm | change | held-out loss under the plan |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in args.models.split(","):
        for asked in args.tasks.split(","):
            lines += compared(model, asked, args.epochs, args.rate)
            overwrite(args.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
