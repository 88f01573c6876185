"""QSpec: drafts answers with rounded activations, verifies them without rounding, and counts the accepted tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.generate.answer_tokens import decoded_answers, end_tokens, greedy_takes_argmax, logits_from
from sensitivity.measure.generate.batches import Batch, batches_by_image, on_device
from sensitivity.measure.generate.drafts import Drafts
from sensitivity.measure.generate.whole_prompts import answer_logits
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.install.rounding import rounding_hooks
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import KEEP, NOT_ROUNDED, Plan
from sensitivity.study.scores import clustered_se
from sensitivity.tasks.examples.types import Task

GAMMA = 3  # tokens of a draft, as in QSpec's demonstration


@dataclass(frozen=True)
class Speculation:
    """The answers of the verifying model, and how many tokens of each answer were drafted and accepted."""

    answers: list[str]
    counts: list[tuple[int, int]]  # drafted and accepted, answer by answer
    clusters: list[str]  # answers to questions about one image belong together

    @property
    def drafted(self) -> int:
        """All drafted tokens."""
        return sum(drafted for drafted, _ in self.counts)

    @property
    def accepted(self) -> int:
        """The drafted tokens that the verifying model would have chosen itself."""
        return sum(accepted for _, accepted in self.counts)

    @property
    def rate(self) -> float:
        """The share of drafted tokens that are accepted."""
        return self.accepted / self.drafted if self.drafted else 1.0

    @property
    def error(self) -> float:
        """The standard error of the rate, a ratio of two sums over images; infinite for one image."""
        counts = np.array(self.counts, dtype=float)
        drafted, accepted = counts[:, 0], counts[:, 1]
        return clustered_se((accepted - self.rate * drafted) / max(drafted.mean(), 1e-9), np.array(self.clusters))[0]


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
    components are to the bits of activations, and needs no right answers. QSpec's code drafts with 4 bits in the whole
    model; a rate for each component is our addition.
    """
    ((_, _, found),) = acceptance(vlm, parts, plan, task, (activations,), (components,), gamma, statistics)
    return found


def acceptance(
    vlm: VLM,
    parts: ComponentMap,
    plan: Plan,
    task: Task,
    widths: Sequence[int],
    components: Sequence[str],
    gamma: int = GAMMA,
    statistics: Statistics | None = None,
) -> Iterator[tuple[str, int, Speculation]]:
    """The result of `speculate` for each pattern of components at each width; the plan is put into the model once."""
    if any(scheme and scheme.activations != NOT_ROUNDED for _, scheme in plan.schemes):
        raise UserError(
            "the plan rounds activations already; give one that leaves them at 16 bits, since only drafts round them"
        )
    check_drafts(vlm, task)
    for pattern in components:
        parts.match(pattern)  # raises an error if it matches nothing
    with quantized(vlm.model, parts, plan, statistics=statistics), torch.inference_mode():
        for pattern in components:
            for bits in widths:
                yield pattern, bits, _drafted(vlm, parts, task, pattern, bits, gamma)


def check_drafts(vlm: VLM, task: Task) -> None:
    """Raise an error where answers cannot be drafted and verified."""
    if not vlm.model.can_generate():
        raise UserError(f"{vlm.name} generates no text, so that nothing can be drafted; choose a model that answers")
    if task.gallery:
        raise UserError(f"{task.name} has no answers to draft; choose a task that a model answers in words")
    if task.search:
        raise UserError(f"{task.name} searches among several answers; drafts are verified one token at a time")
    if not greedy_takes_argmax(vlm):
        raise UserError(f"{vlm.name} does not generate the most likely token, so drafts cannot be verified")


def _drafted(vlm: VLM, parts: ComponentMap, task: Task, components: str, bits: int, gamma: int) -> Speculation:
    """The answers of the model with its present weights, drafted with rounded activations."""
    found = Speculation([], [], [])
    for batch in batches_by_image(vlm, task, plain=True):
        rounds = _Rounds(vlm, parts, batch, components, bits)
        while rounds.state.unfinished:
            rounds.one_round(gamma, task.max_new_tokens)
        found.answers.extend(answer.text for answer in decoded_answers(vlm, rounds.state.answers, task))
        found.counts.extend(zip(rounds.drafted, rounds.accepted, strict=True))
        found.clusters.extend(example.cluster for example in batch.examples)
    return found


class _Rounds:
    """Rounds of drafting and verifying on one batch of whole prompts, without a cache of keys and values."""

    def __init__(self, vlm: VLM, parts: ComponentMap, batch: Batch, components: str, activations: int) -> None:
        self.vlm, self.parts, self.batch = vlm, parts, batch
        self.inputs, self.ends = on_device(vlm, batch.inputs), end_tokens(vlm)
        self.rounding = scheme(KEEP, 16, activations=activations)
        self.components = components
        self.state = Drafts.of([[] for _ in batch.examples])
        self.drafted, self.accepted = ([0] * len(batch.examples) for _ in range(2))

    def one_round(self, gamma: int, max_tokens: int) -> None:
        """Draft up to `gamma` tokens for every row that is not finished, and verify them."""
        state = self.state
        rows = list(state.unfinished)
        before = {row: state.accepted[row] for row in rows}
        for row in rows:  # drop what follows the first wrong token of the last draft
            del state.tokens[row][before[row] :]
        with self._rounded(self.vlm.model):
            for _ in range(gamma):
                going = [row for row in rows if len(state.tokens[row]) < max_tokens and not self._ended(row)]
                if not going:
                    break
                drafts = [state.tokens[row] for row in going]
                logits = self._forward(going, drafts, [len(draft) for draft in drafts])
                for row, token in zip(going, logits[:, 0].argmax(-1).tolist(), strict=True):
                    state.tokens[row] = [*state.tokens[row], token]
        drafted = {row: state.tokens[row][before[row] :] for row in rows}
        state.verify(self._forward, self.ends, max_tokens)
        for row, draft in drafted.items():
            kept = state.tokens[row][before[row] : state.accepted[row]]
            same = [ours == theirs for ours, theirs in zip(draft, kept, strict=False)]
            self.drafted[row] += len(draft)
            self.accepted[row] += same.index(False) if False in same else len(same)

    def _ended(self, row: int) -> bool:
        tokens = self.state.tokens[row]
        return bool(tokens) and tokens[-1] in self.ends

    def _forward(self, rows: list[int], drafts: list[list[int]], accepted: list[int]) -> Tensor:
        """Logits for the draft tokens after the accepted ones, and for one token more (a ForwardPass of drafts.py)."""
        image = getattr(self.vlm.model.config, "image_token_id", None)
        drafts_of_batch: list[list[int]] = [[] for _ in self.batch.examples]
        for row, draft in zip(rows, drafts, strict=True):
            if image in draft:
                raise UserError(
                    f"an answer of {self.vlm.name} holds an image's placeholder, which cannot be read again"
                )
            drafts_of_batch[row] = draft
        logits = answer_logits(self.vlm, self.inputs, drafts_of_batch)[rows]
        return logits_from(logits, accepted, logits.shape[1] - min(accepted))

    @contextmanager
    def _rounded(self, model: nn.Module) -> Iterator[None]:
        """Inside the `with` block, the model drafts: same weights, but the chosen components round their inputs."""
        with ExitStack() as installed:
            for component in self.parts.match(self.components):
                for weight in component.weights:
                    for hook in rounding_hooks(model, weight, self.rounding):
                        installed.callback(hook.remove)
            yield
