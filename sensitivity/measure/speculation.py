"""QSpec: answers drafted with rounded activations, and verified by the same weights without: how many drafts hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.generate.answer_tokens import decoded_answers, end_tokens, greedy_takes_argmax, logits_from
from sensitivity.measure.generate.batches import Batch, batches, on_device
from sensitivity.measure.generate.drafts import Drafts
from sensitivity.measure.generate.whole_prompts import answer_logits
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.install.rounding import rounding_hooks
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import KEEP, NOT_ROUNDED, Plan
from sensitivity.tasks.examples.types import Task

GAMMA = 3  # tokens of a draft, as in QSpec's demonstration


@dataclass(frozen=True)
class Speculation:
    """The answers of the verifying model, and how many tokens were drafted and accepted."""

    answers: list[str]
    drafted: int
    accepted: int

    @property
    def rate(self) -> float:
        """The share of drafted tokens that the verifying model would have chosen itself."""
        return self.accepted / self.drafted if self.drafted else 1.0


def speculate(
    vlm: VLM,
    parts: ComponentMap,
    plan: Plan,
    task: Task,
    activations: int = 4,
    components: str = "*",
    gamma: int = GAMMA,
    statistics: Statistics | None = None,
) -> Speculation:
    """A plan's own answers, token for token, from drafts of the same weights with rounded activations.

    Drafts round the inputs of the components that a pattern names. One forward pass without rounding then verifies up
    to `gamma` tokens, and each pass gains at least one. The rate at which tokens are accepted says how sensitive these
    components are to the bits of activations, and needs no right answers (QSpec, code read: drafts with 4 bits in the
    whole model; rates by component are ours).
    """
    if any(scheme and scheme.activations != NOT_ROUNDED for _, scheme in plan.schemes):
        raise UserError("the plan that verifies leaves activations at 16 bits; its drafts round them")
    if not greedy_takes_argmax(vlm):
        raise UserError(f"{vlm.name} does not generate the most likely token, so drafts cannot be verified")
    answers: list[str] = []
    drafted = accepted = 0
    with quantized(vlm.model, parts, plan, statistics=statistics), torch.inference_mode():
        for batch in batches(vlm, task, plain=True):
            drafts = _Speculating(vlm, parts, batch, components, activations)
            while drafts.state.unfinished:
                drafts.one_round(gamma, task.max_new_tokens)
            answers += [answer.text for answer in decoded_answers(vlm, drafts.state.answers, task)]
            drafted, accepted = drafted + drafts.drafted, accepted + drafts.accepted
    return Speculation(answers, drafted, accepted)


class _Speculating:
    """A batch of whole prompts: rounds of drafting and verifying, without a cache of keys and values."""

    def __init__(self, vlm: VLM, parts: ComponentMap, batch: Batch, components: str, activations: int) -> None:
        self.vlm, self.parts, self.batch = vlm, parts, batch
        self.inputs, self.ends = on_device(vlm, batch.inputs), end_tokens(vlm)
        self.rounding = scheme(KEEP, 16, activations=activations)
        self.components = components
        self.state = Drafts.of([[] for _ in batch.examples])
        self.drafted = self.accepted = 0

    def one_round(self, gamma: int, most: int) -> None:
        """Draft up to `gamma` tokens for every row that is not finished, and verify them."""
        state = self.state
        rows = list(state.unfinished)
        before = {row: state.accepted[row] for row in rows}
        for row in rows:  # what follows a wrong token of the last draft
            del state.tokens[row][before[row] :]
        with self._rounded(self.vlm.model):
            for _ in range(gamma):
                going = [row for row in rows if len(state.tokens[row]) < most and not self._ended(row)]
                if not going:
                    break
                drafts = [state.tokens[row] for row in going]
                logits = self._forward(going, drafts, [len(draft) for draft in drafts])
                for row, token in zip(going, logits[:, 0].argmax(-1).tolist(), strict=True):
                    state.tokens[row] = [*state.tokens[row], token]
        drafted = {row: state.tokens[row][before[row] :] for row in rows}
        state.verify(self._forward, self.ends, most)
        for row, draft in drafted.items():
            kept = state.tokens[row][before[row] : state.accepted[row]]
            same = [ours == theirs for ours, theirs in zip(draft, kept, strict=False)]
            self.drafted += len(draft)
            self.accepted += same.index(False) if False in same else len(same)

    def _ended(self, row: int) -> bool:
        tokens = self.state.tokens[row]
        return bool(tokens) and tokens[-1] in self.ends

    def _forward(self, rows: list[int], drafts: list[list[int]], accepted: list[int]) -> Tensor:
        """Logits for the tokens of drafts from the accepted ones on, and for one more (see Drafts)."""
        image = getattr(self.vlm.model.config, "image_token_id", None)
        every: list[list[int]] = [[] for _ in self.batch.examples]
        for row, draft in zip(rows, drafts, strict=True):
            if image in draft:
                raise UserError(
                    f"an answer of {self.vlm.name} holds an image's placeholder, which cannot be read again"
                )
            every[row] = draft
        logits = answer_logits(self.vlm, self.inputs, every)[rows]
        return logits_from(logits, accepted, logits.shape[1] - min(accepted))

    @contextmanager
    def _rounded(self, model: nn.Module) -> Iterator[None]:
        """Inside the block, the drafting model: the same weights, with rounded activations."""
        with ExitStack() as installed:
            for component in self.parts.match(self.components):
                for weight in component.weights:
                    for hook in rounding_hooks(model, weight, self.rounding):
                        installed.callback(hook.remove)
            yield
