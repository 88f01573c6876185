"""Job: everything that a format needs to write a plan; Written: what the format wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sensitivity.formats.writing.packing import reused_buffer
from sensitivity.formats.writing.source import SourceCheckpoint, open_checkpoint
from sensitivity.formats.writing.stream import AT_ONCE
from sensitivity.measure.install.plan_in_model import targets
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.solving import solve
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.quantize.stored.weight import StoredWeight
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.sizes import Size, bits_of, size

# for formats that are a configuration without weights: RUNTIME_QUANTIZES is their note, LOAD_WITH_SETTINGS their code
RUNTIME_QUANTIZES = (
    "The runtime's own tool makes the weights: widths and groups are the plan's, values can differ by a rounding step."
)
LOAD_WITH_SETTINGS = """\
import json
from transformers import AutoModelForImageTextToText, {kind}

settings = {kind}.from_dict(json.load(open("quantization_config.json")))
model = AutoModelForImageTextToText.from_pretrained(MODEL, quantization_config=settings)
"""
# (parameter name, its tensor, its scheme) -> what is stored of it, or None if its method rounds nothing
Codes = Callable[[str, Tensor, Scheme], StoredWeight | None]
BY_ROW = ("rtn",)  # methods that quantize each row independently
NUMBERS_AT_ONCE = 2**20  # numbers that are quantized at once: intermediate values then stay in the CPU's shared cache


def codes_from_weights(name: str, weight: Tensor, scheme: Scheme) -> StoredWeight | None:
    """The codes of a weight, by a method that needs nothing but the weight; an error for calibrated methods."""
    from sensitivity.quantize.methods import METHODS

    if scheme.method in METHODS and METHODS[scheme.method].calibrated:
        raise UserError(
            f"{scheme.method} needs its calibration data again to be exported; give `codes`, such as those of "
            "sensitivity.formats.writing.calibrated_codes.codes(vlm, parts, plan, statistics)"
        )
    rows = max(NUMBERS_AT_ONCE // weight.shape[1], 1)
    if scheme.method not in BY_ROW or scheme.group == "tensor" or len(weight) <= rows:
        ((result,),) = solve(Linears((name,), (weight,)), [scheme])
        return result
    # a few rows at a time get the same codes, and their intermediate values fit the cache
    codes, pieces = reused_buffer(weight.numel()).reshape(weight.shape), []
    for into, piece in zip(torch.split(codes, rows), torch.split(weight, rows), strict=True):
        ((result,),) = solve(Linears((name,), (piece,)), [scheme])
        assert isinstance(result, QuantizedWeight)
        into.copy_(result.codes)
        pieces.append(replace(result, codes=into))
    return QuantizedWeight(
        codes, torch.cat([r.scale for r in pieces]), torch.cat([r.zero for r in pieces]), pieces[0].group
    )


@dataclass(frozen=True)
class Job:
    """A plan for a model, and how the codes of its weights are computed."""

    model: VLM | str
    parts: ComponentMap
    plan: Plan
    facts: Mapping[str, object] = field(default_factory=dict)
    dtype: torch.dtype = torch.float16  # in which the plan was measured and codes are computed
    codes: Codes = codes_from_weights
    changed: Mapping[str, Tensor] = field(default_factory=dict)  # tweaked norms, and parameters that absorbed scales

    @cached_property
    def source(self) -> SourceCheckpoint:
        """The checkpoint of the model, opened when it is first needed."""
        return open_checkpoint(self.model, self.dtype)

    @property
    def name(self) -> str:
        """The model's name, by which it can be loaded."""
        return self.model.name if isinstance(self.model, VLM) else self.model

    @property
    def reads(self) -> list[Path]:
        """The folders of the model and of the study: an export reads them, so it must not replace them."""
        named = [self.name, self.facts.get("study")]
        places = [end for one in named if one for end in str(one).split("@")]  # ADAPTER@BASE
        return [Path(place) for place in places if Path(place).exists()]

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of each parameter that the plan quantizes, biases included."""
        return targets(self.parts, self.plan)

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """The weights that the plan quantizes, by name, in data-flow order."""
        flow = (weight for block in self.parts.regroup("block").components for weight in block.weights)
        return {weight.name: weight for weight in flow if weight.name in self.schemes}

    @property
    def at_once(self) -> int:
        """How many weights are quantized at once: one for calibrated methods, which need them in data-flow order."""
        return AT_ONCE if self.codes is codes_from_weights else 1

    def by_component(self, stored: Mapping[str, int]) -> dict[str, int]:
        """The bytes of each component, and of 'kept' for the rest, from the bytes of each parameter."""
        home = {weight.name: component.name for component in self.parts.components for weight in component.weights}
        found = dict.fromkeys([*self.parts.names, "kept"], 0)
        for name, count in stored.items():
            found[home.get(name, "kept")] += count
        return found

    @property
    def scale_dtype(self) -> torch.dtype:
        """The 16-bit dtype to which scales were rounded, and in which they are stored."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16

    @property
    def dtype_name(self) -> str:
        """The name of the dtype, such as float16."""
        return str(self.dtype).removeprefix("torch.")

    def stored_as(self, format: str) -> str:
        """The name under which `stored_bits.FILES` counts a format: for `fake`, the dtype of its values."""
        return self.dtype_name if format == "fake" else format

    def modules(self, component: str) -> list[str]:
        """The modules of a component's weights."""
        return [weight.module for weight in self.parts[component].weights]

    def native(self) -> list[str]:
        """Modules that stay at native precision: components without a scheme, heads and routers.

        Runtimes quantize every linear layer that they are not told to skip.
        """
        left = [w.module for c in self.parts.components if self.plan[c.name] is None for w in c.weights]
        heads = [
            k.name.removesuffix(".weight")
            for k in self.parts.kept
            if k.reason in ("output head", "router") and k.name.endswith(".weight")
        ]
        # lm_head: a tied head has no weight of its own, but runtimes see its module
        modules = list(dict.fromkeys([*left, *heads, "lm_head"]))
        changed = {w.reader for w in self.weights.values()}
        return [module for module in modules if module not in changed]

    def groups(self) -> Iterator[tuple[str, Scheme, list[str]]]:
        """The quantized components: name, scheme, modules."""
        for component in self.parts.components:
            if (scheme := self.plan[component.name]) is not None:
                yield component.name, scheme, self.modules(component.name)

    def most_common_scheme(self) -> Scheme:
        """The scheme of the most modules, or an error if the plan quantizes nothing."""
        count: Counter[Scheme] = Counter()
        for _, scheme, modules in self.groups():
            count[scheme] += len(modules)
        if not count:
            raise UserError("the plan quantizes nothing; export it as --format fake")
        return count.most_common(1)[0][0]


@dataclass(frozen=True)
class Written:
    """What a format wrote, and what the model card says about it."""

    load: str  # a few lines of Python or shell that load it
    bytes: Mapping[str, int] = field(default_factory=dict)  # bytes of tensors per component, and of 'kept' for the rest
    hashes: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    runs: bool = False  # whether `sensitivity verify` can run it
    headers: int = 0  # bytes of the files that are not tensors
    unread: Sequence[str] = ()  # parameters that were left out, since the model never reads them


def predicted_size(job: Job, written: Written, format: str) -> Size:
    """The predicted size of an export's files, without the parameters that were left out."""
    stored_as = job.stored_as(format)
    whole = size(job.parts, job.plan, stored_as)
    return replace(whole, bits=whole.bits - bits_of(job.parts, job.plan, written.unread, stored_as))
