"""Job: all that a format needs to write a plan; and checkpoint(), which streams a model's tensors through a packer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sensitivity.components import ComponentMap, Weight
from sensitivity.errors import UserError
from sensitivity.export import shards
from sensitivity.export.packing import fresh
from sensitivity.export.shards import Piece, Spec
from sensitivity.export.source import Source, Stored, open_source
from sensitivity.models import VLM
from sensitivity.plan import Plan, Scheme
from sensitivity.quantize import Linears, solve, targets
from sensitivity.quantize.grid import Quantised

# what formats that are a configuration alone have to say about it, and how transformers takes one
REMADE = (
    "The runtime's own tool makes the weights: widths and groups are the plan's, values can differ by a rounding step."
)
WITH = """\
import json
from transformers import AutoModelForImageTextToText, {kind}

settings = {kind}.from_dict(json.load(open("quantization_config.json")))
model = AutoModelForImageTextToText.from_pretrained(MODEL, quantization_config=settings)
"""
# parameter name, its tensor, its scheme -> the weight as it is stored (with dequantise()); None: nothing to round
Codes = Callable[[str, Tensor, Scheme], Any]


BY_ROW = ("rtn",)  # methods to which one row of a weight says nothing about another
PIECE = 2**20  # weights at a time, so that what they become on the way stays in the cache that cores share


def from_weights_alone(name: str, weight: Tensor, scheme: Scheme) -> Any:
    """Codes of methods that look at nothing but the weight."""
    from sensitivity.quantize import METHODS

    if scheme.method in METHODS and METHODS[scheme.method].calibrated:
        raise UserError(
            f"{scheme.method} needs its calibration data again to be exported; give `codes`, such as those of "
            "sensitivity.export.calibrated.codes(vlm, parts, plan, statistics)"
        )
    rows = max(PIECE // weight.shape[1], 1)
    if scheme.method not in BY_ROW or scheme.group == "tensor" or len(weight) <= rows:
        ((result,),) = solve(Linears((name,), (weight,)), [scheme])
        return result
    codes, found = fresh(weight.numel()).reshape(weight.shape), []
    for into, piece in zip(torch.split(codes, rows), torch.split(weight, rows), strict=True):
        ((result,),) = solve(Linears((name,), (piece,)), [scheme])
        assert isinstance(result, Quantised)
        into.copy_(result.codes)
        found.append(replace(result, codes=into))
    return Quantised(codes, torch.cat([r.scale for r in found]), torch.cat([r.zero for r in found]), found[0].group)


@dataclass(frozen=True)
class Job:
    """A plan for a model, and how its weights are found."""

    model: VLM | str
    parts: ComponentMap
    plan: Plan
    facts: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float16  # in which the plan was measured: codes and scales are found in it
    codes: Codes = from_weights_alone
    changed: Mapping[str, Tensor] = field(default_factory=dict)  # parameters that change as codes are found

    @cached_property
    def source(self) -> Source:
        return open_source(self.model, self.dtype)

    @property
    def reads(self) -> list[Path]:
        """What an export reads and must not replace: the folders of the model and of the study."""
        named = [self.model.name if isinstance(self.model, VLM) else self.model, self.facts.get("study")]
        places = [end for one in named if one for end in str(one).split("@")]  # ADAPTER@BASE
        return [Path(place) for place in places if Path(place).exists()]

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """The parameters that the plan changes."""
        return targets(self.parts, self.plan)

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """The weights that the plan changes, by name, in the direction of data flow."""
        flow = (weight for block in self.parts.regroup("block").components for weight in block.weights)
        return {weight.name: weight for weight in flow if weight.name in self.schemes}

    @property
    def half(self) -> torch.dtype:
        """The 16-bit type of scales, the one that they were rounded to."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16

    def stored_as(self, format: str) -> str:
        """How a format stores weights, by the name under which `plan.size` knows it."""
        return str(self.dtype).removeprefix("torch.") if format == "fake" else format

    def modules(self, component: str) -> list[str]:
        return [weight.module for weight in self.parts[component].weights]

    def native(self) -> list[str]:
        """Modules that stay in full precision: components that the plan leaves alone, heads and routers."""
        left = [w.module for c in self.parts.components if self.plan[c.name] is None for w in c.weights]
        heads = [
            k.name.removesuffix(".weight")
            for k in self.parts.kept
            if k.reason in ("output head", "router") and k.name.endswith(".weight")
        ]
        found = list(dict.fromkeys([*left, *heads, "lm_head"]))  # a tied head has no weight of its own
        changed = {w.reader for w in self.weights.values()}
        return [module for module in found if module not in changed]

    def groups(self) -> Iterator[tuple[str, Scheme, list[str]]]:
        """Components that are quantised: name, scheme, modules."""
        for component in self.parts.components:
            if (scheme := self.plan[component.name]) is not None:
                yield component.name, scheme, self.modules(component.name)


@dataclass(frozen=True)
class Written:
    """What a format wrote, and what a reader of the model card should be told."""

    load: str  # a few lines of Python or shell that load it
    bytes: Mapping[str, int] = field(default_factory=dict)  # of tensors, by component; 'kept' for all else
    hashes: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    runs: bool = False  # whether `sensitivity verify` can run it
    headers: int = 0  # bytes of tensor names, shapes and places


@dataclass(frozen=True)
class Layout:
    """How a format stores one quantised weight: what it will write, and how that comes from codes."""

    specs: Callable[[str, Weight, Scheme], tuple[Spec, ...]]  # key without its last word, weight, scheme
    tensors: Callable[[Quantised, Weight, Scheme], Sequence[Tensor]]


def checkpoint(
    job: Job, folder: Path, layout: Layout | None, config: Mapping[str, Any], renamed: bool = False
) -> tuple[dict[str, int], dict[str, str]]:
    """Stream all tensors, quantised weights in the direction of data flow; and the files that stand beside them.

    Without a layout the weights are written as numbers. `renamed` writes the names that transformers gives parameters
    instead of those of the checkpoint, for runtimes that do not rename on loading. Returns the bytes of each
    component, and the files' hashes.
    """
    tensors = [replace(t, key=t.parameter) if renamed else t for t in job.source.tensors]
    stored = {tensor.parameter: tensor for tensor in tensors}
    pieces: dict[str, Piece] = {}
    for name, weight in job.weights.items():
        pieces[name] = _values(job, stored[name]) if layout is None else _packed(job, stored[name], weight, layout)
    for name in job.schemes:
        if name not in pieces:
            pieces[name] = _values(job, stored[name])  # a bias
    for tensor in tensors:  # last: codes may have changed what stands before them
        if tensor.parameter not in job.schemes:
            pieces[tensor.parameter] = _copied(job, tensor)
    home = {w.name: c.name for c in job.parts.components for w in c.weights}
    weights = dict.fromkeys([*job.parts.names, "kept"], 0)
    for name, piece in pieces.items():
        weights[home.get(name, "kept")] += piece.bytes
    # other codes than these are found in the direction of data flow, one after the other
    hashes = shards.write(folder, pieces.values(), ahead=shards.AHEAD if job.codes is from_weights_alone else 1)
    (folder / "config.json").write_text(json.dumps({**job.source.config, **config}, indent=2) + "\n", encoding="utf-8")
    job.source.beside(folder)
    return weights, hashes


def save(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def headers(folder: Path, weight: Mapping[str, int]) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) - sum(weight.values())


def _read(job: Job, tensor: Stored) -> Tensor:
    """A parameter in the type in which the plan was measured."""
    weight = tensor.read().to(job.dtype)
    if weight.numel() and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(weight)):
        raise UserError(f"{tensor.parameter} holds NaN or infinite values and cannot be quantised")
    return weight


def _copied(job: Job, tensor: Stored) -> Piece:
    def make() -> Sequence[Tensor]:
        changed = job.changed.get(tensor.parameter)
        return (tensor.read() if changed is None else changed.to(tensor.dtype),)

    return Piece((Spec(tensor.key, tensor.dtype, tensor.shape),), make)


def _packed(job: Job, tensor: Stored, weight: Weight, layout: Layout) -> Piece:
    scheme = job.schemes[tensor.parameter]

    def make() -> Sequence[Tensor]:
        found = job.codes(tensor.parameter, _read(job, tensor), scheme)
        if getattr(found, "inputs", None) is not None:
            raise UserError(
                f"{tensor.parameter} was quantised with a factor for each input, which this layout cannot hold; sweep "
                "with --set scales=folded, or use --format fake, or a method without scales, such as gptq"
            )
        if not isinstance(found, Quantised) or not bool((found.zero == found.zero.round()).all()):
            raise UserError(f"{tensor.parameter} has no codes on an integer grid; use --method rtn, or --format fake")
        return layout.tensors(found, weight, scheme)

    return Piece(layout.specs(tensor.key.removesuffix("weight"), weight, scheme), make)


def _values(job: Job, tensor: Stored) -> Piece:
    """A parameter as the numbers that its codes stand for."""

    def make() -> Sequence[Tensor]:
        own = _read(job, tensor)
        flat = own.reshape(1, -1) if own.dim() == 1 else own
        found = job.codes(tensor.parameter, flat, job.schemes[tensor.parameter])
        return (own if found is None else found.dequantise().to(job.dtype).reshape(own.shape),)

    return Piece((Spec(tensor.key, job.dtype, tensor.shape),), make)
