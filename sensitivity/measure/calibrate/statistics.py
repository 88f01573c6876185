"""Statistics of each layer's inputs from calibration, collected in advance or when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from torch import Tensor

from sensitivity.measure.calibrate.absorbers import Absorber
from sensitivity.measure.calibrate.blockwise import Installed
from sensitivity.measure.calibrate.cache import Cache
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.methods import UNIFORM, method_of, needs_both_paths, needs_fisher, token_weighting
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.plan import Scheme, Setting

PATHS = ("float", "exposed", "both")


def check_path(path: str, schemes: Iterable[Scheme] = ()) -> None:
    """Raise an error for an unknown calibration path, or for one that does not give a scheme what it needs."""
    if path not in PATHS:
        raise unknown("calibration path", path, PATHS)
    if path != "both" and (lacking := [one for one in schemes if needs_both_paths(one)]):
        # a scheme made from a preset has only the name of its method, so the message gives the setting, too
        by = f" with shift={shift}" if (shift := lacking[0].get("shift")) else ""
        raise UserError(
            f"{lacking[0].method}{by} compares inputs behind quantized layers with those of the float model, and the "
            f"calibration path is {path}; type --path both, or leave it out"
        )


class Gather(Protocol):
    """The curvature of the inputs of some weights, by input; `installed` lists the quantized weights in the model."""

    def __call__(self, weights: Sequence[Weight], installed: Installed | None = None, /) -> Mapping[str, Curvature]: ...


def by_importance(
    linears: Linears, schemes: Iterable[Scheme], curvatures: Mapping[str, Curvature]
) -> Iterator[tuple[Linears, list[Scheme]]]:
    """For each kind of importance, the weights with the curvature that it gives them, and the schemes that ask for it.

    `curvatures` is by importance. The factor of each, as large as the Gram matrix, is freed before the next is used.
    """
    kinds: dict[str, list[Scheme]] = {}
    for scheme in sorted(schemes, key=str):
        kinds.setdefault(token_weighting(scheme), []).append(scheme)
    for kind, alike in sorted(kinds.items()):
        curvature = curvatures.get(kind)
        yield replace(linears, curvature=curvature), alike
        if curvature is not None:
            curvature.free_factor()


@dataclass(frozen=True)
class Statistics:
    """The curvature of each layer's input, and the facts of its calibration, which schemes record."""

    facts: Mapping[str, Setting]  # calibration, examples, seed, data and path
    gather: Gather
    # finds, by input, the module into which its scales can be folded
    find_absorbers: Callable[[], Mapping[str, Absorber]] = field(default=dict)
    cache: Cache | None = None  # of quantized weights
    weighted: Mapping[str, Gather] = field(default_factory=dict)  # by importance: `gather` with token weights
    # takes a weight's name and the model's own weights, which are not kept here (see OwnWeights), and returns the
    # squared gradients of the loss with respect to that weight
    fisher: Callable[[str, Mapping[str, Tensor]], Tensor] | None = None
    # what `gather` and `weighted` depend on, for the cache; None: also on the plan that is installed
    origin: Mapping[str, object] | None = None
    # forward passes over the calibration data through the model as it is, one by one
    passes: Callable[[], Iterator[object]] = field(default=lambda: iter(()))

    def fisher_of(
        self, names: Sequence[str], schemes: Iterable[Scheme], own: Mapping[str, Tensor]
    ) -> tuple[Tensor, ...] | None:
        """The squared gradients of some weights, if a scheme needs them."""
        if self.fisher is None or not any(map(needs_fisher, schemes)):
            return None
        return tuple(self.fisher(name, own) for name in names)

    def gather_for(
        self, schemes_of: Mapping[str, Iterable[Scheme]], readers: Mapping[str, Sequence[Weight]], installed: Installed
    ) -> dict[str, dict[str, Curvature]]:
        """The curvature that the calibrated schemes of some inputs need: by input, and by kind of importance."""
        curvatures: dict[str, dict[str, Curvature]] = {name: {} for name in schemes_of}
        kinds: dict[str, set[str]] = {}
        for name, schemes in schemes_of.items():
            for scheme in schemes:
                if method_of(scheme).calibrated:
                    kinds.setdefault(token_weighting(scheme), set()).add(name)
        for kind, names in sorted(kinds.items()):
            if kind != UNIFORM and kind not in self.weighted:
                raise UserError(
                    f"a scheme weighs tokens by {kind}, and these statistics have no such weights; calibrate with "
                    f"importance=({kind!r},)"
                )
            gather = self.gather if kind == UNIFORM else self.weighted[kind]
            gathered = gather([readers[name][0] for name in sorted(names)], installed)
            for name, curvature in gathered.items():
                curvatures[name][kind] = curvature
        return curvatures

    @cached_property
    def absorbers(self) -> Mapping[str, Absorber]:
        """The module into which each input's scales can be folded, found by one forward pass when first asked for."""
        return self.find_absorbers()

    def after_norm(self, name: str) -> bool:
        """Whether a norm stands before an input, and nothing else reads the norm's output."""
        return name in self.absorbers and self.absorbers[name].norm

    def after_norm_for(self, name: str, schemes: Iterable[Scheme]) -> bool:
        """`after_norm`, only where a scheme asks for it, since it takes a forward pass to find out."""
        return any(scheme.get("scales") == "norms" for scheme in schemes) and self.after_norm(name)

    @property
    def depends_on_plan(self) -> bool:
        """Whether inputs come through quantized layers; then they differ from plan to plan."""
        return self.facts["path"] != "float"

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise an error unless the scheme names this calibration data; else two trials with one key could differ."""
        if needs_both_paths(scheme):
            check_path(str(self.facts["path"]), [scheme])
        for fact, value in self.facts.items():
            if scheme.get(fact) != value:
                raise UserError(
                    f"{scheme.method} asks for calibration with {fact} = {scheme.get(fact)!r}, and these statistics "
                    f"have {value!r}; make schemes with calibration=statistics.facts"
                )
