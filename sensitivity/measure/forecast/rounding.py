"""The seconds that rounding activations, keys and values adds to the forward passes of plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from sensitivity.measure.forecast.cost_model import TaskSample
from sensitivity.measure.forecast.hardware import Hardware
from sensitivity.measure.loop import data_flow_order
from sensitivity.spec.components import Component, ComponentMap
from sensitivity.spec.plan import NOT_ROUNDED, Plan, Scheme


def in_queue_order(plans: Sequence[Plan]) -> list[Plan]:
    """The order in which the loop queues plans: neighbors share the longest prefix."""
    return sorted(plans, key=data_flow_order)


def rounding_seconds(
    parts: ComponentMap, plans: Sequence[Plan], samples: Sequence[TaskSample], hardware: Hardware, plain: bool
) -> float:
    """Seconds over all plans: once per distinct prefix that plans share, and once per plan for what it reads itself.

    Every linear layer rounds its own input, also where several read the same one.
    """
    total, ordered = 0.0, in_queue_order(plans)
    for place, component in enumerate(parts.components):
        every = [plan.schemes[: place + 1] for plan in ordered]
        distinct = [*every[:1], *(path for before, path in pairwise(every) if path != before)]
        for sample in samples:
            shared = sample.shares(component.part) and not plain
            once, again = _tokens(sample, component.part)
            for paths, tokens in ((distinct if shared else every, once), (every, again)):
                for scheme, times in Counter(path[place][1] for path in paths).items():
                    total += times * _one_pass(component, scheme, tokens, hardware)
    return total


def _one_pass(component: Component, scheme: Scheme | None, tokens: int, hardware: Hardware) -> float:
    """Seconds to round the inputs, keys and values of so many tokens in one component."""
    if scheme is None or not tokens:
        return 0.0
    weights, found = [weight for weight in component.weights if not weight.is_embedding], 0.0
    if scheme.activations != NOT_ROUNDED:
        found += sum(hardware.rounding(tokens, weight.cols) for weight in weights)
    if scheme.cache != NOT_ROUNDED:
        found += sum(hardware.rounding(tokens, weight.rows, cached=True) for weight in weights if weight.cached)
    return found


def _tokens(sample: TaskSample, part: str) -> tuple[int, int]:
    """How many tokens a part reads for a whole task, and how many each plan reads again to check earlier answers."""
    rows = sample.images if sample.shared_image else sample.examples
    if part == "vision":
        return rows * sample.patches, 0
    if part == "connector":
        captions = (sample.examples - sample.images) * sample.prompt_tokens if sample.task.gallery else 0
        return rows * sample.image_tokens + captions, 0
    questions = sample.examples * sample.question_tokens if sample.shared_image else 0
    whole = rows * sample.prompt_tokens
    return whole + questions, 0 if sample.task.exact else questions or whole
