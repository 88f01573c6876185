"""LayerTimes: measured times of a model's layers in a runtime on one machine; they predict a plan's time and memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from sensitivity.spec.components import VOCABULARY, ComponentMap, Weight
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.plan import KEEP, Plan, Scheme, scheme_of
from sensitivity.spec.runtimes.table import RUNTIMES
from sensitivity.spec.sizes import GB
from sensitivity.spec.stored_bits import openvino_width

NATIVE = "native"  # the layout of a weight that is not quantized
STAGES = ("image", "prompt", "token")  # one image; the whole prompt; one new token
ANSWER, RESIDENT = "ms_per_answer", "gb_resident"
# cost of a plan -> the stage whose time it is; an answer has all stages, memory none
COSTS = {"ms_per_image": "image", "ms_per_prompt": "prompt", "ms_per_token": "token", ANSWER: "", RESIDENT: ""}
LIMITED = ("ms_per_token", ANSWER, RESIDENT)  # costs that a request can limit
# runtime -> a function from a scheme to the layout of its codes; times depend on nothing else of a scheme
LAYOUTS = {
    "openvino": lambda scheme: (
        f"{'symmetric' if scheme.symmetric else 'asymmetric'} {openvino_width(scheme.bits)} {scheme.group}"
    )
}


class EntryJson(TypedDict):
    """The time of one layer as JSON values."""

    rows: int
    cols: int
    layout: str
    at_once: int
    ms: float


class MemoryJson(TypedDict):
    """The memory of a layout as JSON values."""

    half: str
    layout: str
    bytes: float


class TimesJson(TypedDict):
    """The times of a model's layers as JSON values."""

    runtime: str
    machine: dict[str, object]
    threads: int
    versions: dict[str, str]
    task: str
    at_once: dict[str, int]
    tokens: dict[str, int]
    rest: dict[str, float]
    resident: float
    memory: NotRequired[list[MemoryJson]]  # not in tables from before memory was measured
    layers: list[EntryJson]


Key = tuple[int, int, str, int]  # rows, columns, layout, tokens at once


@dataclass(frozen=True)
class LayerTimes:
    """The time of each layer at each layout and number of tokens, and the time and memory beside the layers.

    at_once: the tokens that each weight of the vision tower and the connector reads for one image. tokens: how many
    an image, the prompt and an answer have. rest: milliseconds of each stage that belong to no layer. resident: bytes
    that the whole model takes in memory in full precision. memory: the bytes that each element of a weight in a layout
    adds to them, below 0 where it takes less; halves differ, since what reads prompts and single tokens may be held
    twice.
    """

    runtime: str
    machine: Mapping[str, object]
    threads: int
    versions: Mapping[str, str]
    task: str
    at_once: Mapping[str, int]
    tokens: Mapping[str, int]
    rest: Mapping[str, float]
    resident: float
    memory: Mapping[tuple[str, str], float]  # (half, layout) -> bytes per element
    layers: Mapping[Key, float]

    def component_cost(self, parts: ComponentMap, name: str, scheme: Scheme | None, cost: str) -> float:
        """The cost of one component at one scheme: milliseconds, or GB for memory."""
        weights = parts[name].weights
        if cost == RESIDENT:
            return sum(self._bytes(weight, scheme) for weight in weights) / GB
        return sum(times * self._weight_ms(w, scheme, stage) for stage, times in self._stages(cost) for w in weights)

    def fixed_cost(self, cost: str) -> float:
        """The cost beside the layers, which is the same for every plan."""
        if cost == RESIDENT:
            return self.resident / GB
        return sum(times * self.rest[stage] for stage, times in self._stages(cost))

    def plan_cost(self, parts: ComponentMap, plan: Plan, cost: str) -> float:
        """The predicted cost of a plan."""
        return self.fixed_cost(cost) + sum(
            self.component_cost(parts, c.name, plan[c.name], cost) for c in parts.components
        )

    def knows(self, parts: ComponentMap, plan: Plan, costs: Iterable[str] = (ANSWER, RESIDENT)) -> bool:
        """Whether all layers of a plan were measured."""
        try:
            for cost in costs:
                self.plan_cost(parts, plan, cost)
        except UserError:
            return False
        return True

    def answer_by_stage(self, parts: ComponentMap, plan: Plan) -> dict[str, float]:
        """The milliseconds of an answer, by stage; those of an image are split into vision and connector.

        Each stage includes the time that belongs to no layer.
        """
        connector = sum(
            self.component_cost(parts, c.name, plan[c.name], "ms_per_image")
            for c in parts.components
            if c.part == "connector"
        )
        took = {stage: self.plan_cost(parts, plan, f"ms_per_{stage}") for stage in STAGES}
        tokens = (self.tokens["answer"] - 1) * took["token"]
        return {
            "vision": took["image"] - connector, "connector": connector, "prompt": took["prompt"], "new tokens": tokens,
        }  # fmt: skip

    def _stages(self, cost: str) -> list[tuple[str, float]]:
        """The stages that a cost in milliseconds counts, and how often."""
        if cost != ANSWER:
            return [(COSTS[cost], 1.0)]
        return [("image", 1.0), ("prompt", 1.0), ("token", self.tokens["answer"] - 1.0)]

    def _weight_ms(self, weight: Weight, scheme: Scheme | None, stage: str) -> float:
        at_once = tokens_at_once(weight, stage, self.at_once, self.tokens)
        if not at_once:
            return 0.0
        layout = layout_of(weight, scheme, self.runtime)
        key = (weight.rows, weight.cols, layout, at_once)
        if key not in self.layers:
            raise self._unknown(weight, scheme, layout, "time")
        return self.layers[key]

    def _bytes(self, weight: Weight, scheme: Scheme | None) -> float:
        """The bytes in memory that a weight adds to full precision; none if the runtime never reads it."""
        layout = layout_of(weight, scheme, self.runtime)
        if layout == NATIVE or not is_read(weight, self.at_once, self.tokens):
            return 0.0
        if (half_of(weight), layout) not in self.memory:
            raise self._unknown(weight, scheme, layout, "memory")
        return weight.numel * self.memory[half_of(weight), layout]

    def _unknown(self, weight: Weight, scheme: Scheme | None, layout: str, what: str) -> UserError:
        timed = {one for rows, cols, one, _ in self.layers if (rows, cols) == (weight.rows, weight.cols)}
        weighed = {one for half, one in self.memory if half == half_of(weight)}
        known = sorted(timed if what == "time" else weighed)
        return UserError(
            f"no {what} is known of {weight.name} at {scheme}, which {self.runtime} stores as '{layout}'; known are "
            f"{', '.join(known) or 'none'}; `sensitivity profile MODEL --runtime "
            f"{self.runtime}` measures those of its --bits, --group and --symmetric"
        )

    def to_json(self) -> TimesJson:
        """The times as JSON values."""
        layers: list[EntryJson] = [
            {"rows": rows, "cols": cols, "layout": layout, "at_once": at_once, "ms": ms}
            for (rows, cols, layout, at_once), ms in self.layers.items()
        ]
        return {
            "runtime": self.runtime,
            "machine": dict(self.machine),
            "threads": self.threads,
            "versions": dict(self.versions),
            "task": self.task,
            "at_once": dict(self.at_once),
            "tokens": dict(self.tokens),
            "rest": dict(self.rest),
            "resident": self.resident,
            "memory": [{"half": half, "layout": one, "bytes": value} for (half, one), value in self.memory.items()],
            "layers": layers,
        }

    @classmethod
    def from_json(cls, data: TimesJson) -> LayerTimes:
        """The times that `to_json` wrote."""
        layers = {(one["rows"], one["cols"], one["layout"], one["at_once"]): one["ms"] for one in data["layers"]}
        memory = {(one["half"], one["layout"]): one["bytes"] for one in data.get("memory", ())}
        return cls(
            data["runtime"], data["machine"], data["threads"], data["versions"], data["task"], data["at_once"],
            data["tokens"], data["rest"], data["resident"], memory, layers,
        )  # fmt: skip


def check_timed(runtime: str | None) -> None:
    """Raise an error for a runtime in which no layers are timed."""
    if runtime not in LAYOUTS:
        if runtime not in RUNTIMES:
            raise unknown("runtime", runtime, LAYOUTS)
        raise UserError(
            f"layers are not timed in {runtime}, so that no plan's time or memory there can be predicted; name "
            f"{', '.join(LAYOUTS)}, or time an export with `sensitivity bench`"
        )


def half_of(weight: Weight) -> str:
    """The half of the model that holds a weight: the image half has the vision tower and the connector."""
    return "language" if weight.part == "language" else "image"


def layout_of(weight: Weight, scheme: Scheme | None, runtime: str) -> str:
    """How a runtime stores the codes of a weight, as a text that is equal for schemes that it stores alike."""
    if scheme is None or scheme.method == KEEP:
        return NATIVE
    return LAYOUTS[runtime](scheme_of(weight, scheme))


def tokens_at_once(weight: Weight, stage: str, at_once: Mapping[str, int], tokens: Mapping[str, int]) -> int:
    """How many tokens a weight reads at once in a stage; 0 where it reads none, or is looked up."""
    if weight.is_embedding:
        return 0
    if weight.part != "language":
        return at_once[weight.name] if stage == "image" else 0
    if weight.kind in VOCABULARY:
        return 0 if stage == "image" else 1  # logits are computed for the last token alone
    return {"image": 0, "prompt": tokens["prompt"], "token": 1}[stage]


def is_read(weight: Weight, at_once: Mapping[str, int], tokens: Mapping[str, int]) -> bool:
    """Whether a weight is read in any stage; one that is not, as in a layer behind the used output, takes no memory."""
    return any(tokens_at_once(weight, stage, at_once, tokens) for stage in STAGES)
