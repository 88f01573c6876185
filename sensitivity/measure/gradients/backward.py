"""One backward pass of the answer loss in bounded memory: each layer's inputs, with the gradient of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from sensitivity.measure.generate.batches import images_at_once
from sensitivity.measure.memory.out_of_memory import run_or_halve
from sensitivity.measure.passes.block_modules import block_paths, layer_input, replaced_forward
from sensitivity.measure.passes.token_batches import ROWS, TokenBatch, calibration_pass
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.linears import input_of
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError

TIMES_THE_MEMORY = 4  # how much more a backward pass needs for an image than a forward pass, roughly
FEWER_ROWS = ROWS // TIMES_THE_MEMORY
T = TypeVar("T")
# gets a weight, what its layer reads (tokens x inputs) and the gradient of what it returns (tokens x outputs)
Visit = Callable[[Weight, Tensor, Tensor], None]
# gets the tokens of right answers (rows x positions), and returns 1 for those whose loss counts, 0 for the others
Counted = Callable[[Tensor], Tensor]


class RunsOnce:
    """Raises an error where a layer runs twice in a pass, since its tokens could then not be told apart."""

    def __init__(self) -> None:
        self.reached: set[str] = set()

    def check(self, weight: Weight) -> None:
        """Note that a weight's layer has run; an error if it had run before."""
        if weight.name in self.reached:
            raise UserError(
                f"{weight.reader} runs several times in a forward pass, and the importance of its tokens is not "
                "known then; choose importance=uniform"
            )
        self.reached.add(weight.name)


def add_per_token(sums: dict[str, Tensor], weight: Weight, values: Tensor) -> None:
    """Add a number for each token of a weight's input, over all weights that read this input."""
    name = input_of(weight)
    sums[name] = sums[name] + values if name in sums else values


def teacher_forced_logits(vlm: VLM, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """The logits of the right answers with teacher forcing (rows x positions x vocabulary), and the right tokens."""
    logits: Tensor | None = getattr(calibration_pass(vlm, batch), "logits", None)  # a model for retrieval has none
    if batch.targets is None or logits is None:
        raise UserError(
            "this model and task have no answers in words, of which the gradient could be taken; choose a method that "
            "needs none, such as gptq"
        )
    logits = logits[:, -batch.targets.shape[1] :]
    # in float32 the probability of a sure answer rounds to 1, and its gradient is 0
    return logits.float() if logits.device.type == "mps" else logits.double(), batch.targets


def answer_loss(vlm: VLM, batch: TokenBatch, counted: Counted | None = None) -> Tensor:
    """Cross-entropy of the right answers with teacher forcing: the mean over an answer's tokens, summed over rows.

    It is a sum over rows, so that the gradient of an example does not depend on which examples share its batch. With
    `counted`, only the tokens for which it returns 1 are summed; the mean is still over all tokens.
    """
    logits, targets = teacher_forced_logits(vlm, batch)
    each = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").reshape(targets.shape)
    return (each if counted is None else each * counted(targets).to(each)).mean(1).sum()


def backward_pass(
    vlm: VLM, weights: Sequence[Weight], batch: TokenBatch, visit: Visit, counted: Counted | None = None
) -> float:
    """Call `visit` for each weight when the backward pass reaches its layer; return the loss.

    Only the hidden states between blocks are kept from the forward pass: each block runs again when the backward pass
    comes to it, so that one block's activations are in memory at a time.
    """
    # added to what a layer returns, so that gradients reach it even where nothing before it requires one
    zero = torch.zeros((), device=vlm.device, dtype=vlm.model.dtype, requires_grad=True)
    with ExitStack() as patches, torch.enable_grad():
        for path in block_paths(vlm.model, weights).values():
            module = vlm.model.get_submodule(path)
            patches.enter_context(replaced_forward(module, _checkpointed(module.forward, zero)))
        for weight in weights:
            layer, hook = vlm.model.get_submodule(weight.reader), _gradient_hook(weight, visit, zero)
            patches.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        loss = answer_loss(vlm, batch, counted)
        try:
            torch.autograd.backward(loss)
        except RuntimeError as error:
            if "derivative" not in str(error) and "does not require grad" not in str(error):
                raise
            raise UserError(f"this model has an operation without a gradient: {error}") from error
    return float(loss.detach())


def _gradient_hook(weight: Weight, visit: Visit, zero: Tensor) -> Callable[..., Tensor | None]:
    """A forward hook of a weight's layer that calls `visit` once the gradient of the layer's output is known."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():  # the first of two runs of a block
            return None
        inputs = layer_input(args, kwargs).detach()
        output = output if output.requires_grad else output + zero

        def reached(gradient: Tensor) -> None:
            if not bool(torch.isfinite(gradient).all()):
                raise UserError(
                    f"the gradient of the answer loss at {weight.name} is NaN or infinite; run the model in "
                    "float32 (--dtype fp32)"
                )
            visit(weight, inputs.flatten(0, -2), gradient.detach().flatten(0, -2))

        output.register_hook(reached)  # type: ignore[no-untyped-call]
        return output

    return hook


def rows_backward(data: Callable[[int], Iterable[TokenBatch]]) -> int:
    """How many rows a batch of a backward pass has at first: as many as a forward pass if images are small."""
    first = next(iter(data(1)), None)
    pixels = 0 if first is None else first.inputs["pixel_values"].numel()
    return max(FEWER_ROWS, min(ROWS, images_at_once(TIMES_THE_MEMORY * pixels)))


def in_rows_that_fit(
    vlm: VLM,
    data: Callable[[int], Iterable[TokenBatch]],
    run: Callable[[Callable[[], Iterable[TokenBatch]]], T],
    rows: int = 0,
    release: Callable[[], bool] | None = None,
) -> T:
    """The result of a function of data, in batches whose rows are halved until memory suffices.

    `data` makes batches of at most so many rows; `run` gets a function that makes those of one pass. Without `rows`,
    as many as suit a backward pass come first. `release` frees memory that `run` can do without.
    """
    rows = rows or rows_backward(data)
    while True:
        attempt = partial(run, partial(data, rows))
        if (result := run_or_halve(attempt, rows, "the calibration data", vlm.device, release)) is not None:
            return result
        rows = max(rows // 2, 1)


def _is_cache(value: object) -> bool:
    return isinstance(value, Cache)


def _without_cache(value: object) -> object:
    return None if _is_cache(value) else value


def _checkpointed(forward: Callable[..., object], zero: Tensor) -> Callable[..., object]:
    """The same forward with gradient checkpointing: it keeps only its inputs, and runs again in the backward pass."""

    def run(*args: object, **kwargs: object) -> object:
        # a cache holds the keys of the first run, which the second would attend to as well
        args, kwargs = tree_map(_without_cache, (args, kwargs), is_leaf=_is_cache)
        leaves, inputs = tree_flatten((args, kwargs))
        outputs: list[TreeSpec] = []

        def flat(_: Tensor, *values: object) -> tuple[object, ...]:
            again_args, again_kwargs = tree_unflatten(values, inputs)
            found, shape = tree_flatten(forward(*again_args, **again_kwargs))
            outputs[:] = [shape]
            return tuple(found)

        found = checkpoint(flat, zero, *leaves, use_reentrant=True, preserve_rng_state=False)
        return tree_unflatten(list(found), outputs[0])

    return run
