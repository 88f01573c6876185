"""The choice of method as a feature beside widths, where the plans of a study differ in both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sensitivity.analysis.observations import Observations
from sensitivity.spec.plan import Scheme

METHOD = "(method)"  # in parentheses, as no component can be called that


def with_methods(observations: Observations) -> tuple[Observations, list[int]]:
    """The observations with further columns (1 where a component has a method, else 0), and the positions of these.

    The first method has no column, since zeros in all others imply it. Methods with other settings count as other
    methods. With fewer than two methods, or where plans are not known, there are no such columns.
    """
    # all components of the plans, since one whose width never changes is not ranked and may still change its method
    components = [name for name, _ in observations.plans[0].schemes] if observations.plans else []
    kinds = sorted({_kind(one) for plan in observations.plans for _, one in plan.schemes if one is not None})
    columns = [
        [float(one is not None and _kind(one) == kind) for one in (plan[name] for plan in observations.plans)]
        for kind in kinds[1:]
        for name in components
    ]
    varied = [column for column in columns if len(set(column)) > 1]
    if not varied:
        return observations, []
    first, names = observations.bits.shape[1], tuple(f"{METHOD} {i}" for i in range(len(varied)))
    bits = np.column_stack([observations.bits, *varied])
    return replace(observations, bits=bits, names=(*observations.names, *names)), list(range(first, bits.shape[1]))


def _kind(scheme: Scheme) -> str:
    """What makes a method: everything but the bits; those of activations and cache have columns of their own."""
    return str(replace(scheme.without_rounding, bits=1).to_json())
