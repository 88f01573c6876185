"""Ranking: the importance of each component, as tables and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Ranking:
    """How much of the score each component decides. `table` has a row per component, most important first.

    Columns: consensus, forest, permutation, shap, fanova, ped_anova (shares in percent); for the first four also
    NAME.low and NAME.high (95 % interval); NAME.raw before normalizing; gain (how much the predicted score rises from
    the component's lowest to its highest width, averaged over the other components as in the trials); gain_per_mb.
    """

    task: str
    by: str
    trials: int
    full: float  # score at full precision
    noise: float | None  # standard deviation of one score
    r2: float  # of the forest, on plans that it has not seen
    linear_r2: float  # of a linear regression, on the plans that it was fitted to
    table: pd.DataFrame
    tau: pd.DataFrame  # Kendall's, between estimators
    pairs: pd.DataFrame  # a, b, strength, both_low: how far a pair departs from the sum of its two effects
    levels: pd.DataFrame  # component, bits, trials, shift, tau, changes_first: the ranking without that level
    warnings: tuple[str, ...]
    method: str | None = None
    near: float | None = None  # only trials with at least this share of full precision

    @property
    def order(self) -> tuple[str, ...]:
        """Components, most important first."""
        return tuple(self.table.index)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values, with null for NaN and infinity."""
        frames = ("tau", "pairs", "levels")
        plain = {k: v for k, v in self.__dict__.items() if k not in (*frames, "table", "warnings")}
        found = {
            **{name: _number(value) for name, value in plain.items()},
            "components": {str(name): _clean(row) for name, row in self.table.iterrows()},
            "warnings": list(self.warnings),
        }
        return (
            found
            | {name: [_clean(row) for _, row in getattr(self, name).iterrows()] for name in frames[1:]}
            | {"tau": {str(name): _clean(row) for name, row in self.tau.iterrows()}}
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Ranking:
        """The ranking that `to_json` wrote."""

        def frame(by_row: Mapping[str, Any]) -> pd.DataFrame:
            return pd.DataFrame.from_dict(by_row, orient="index").astype(float)

        plain = {k: v for k, v in data.items() if k != "components"}
        lists = {name: pd.DataFrame(data[name]) for name in ("pairs", "levels")}
        if len(lists["pairs"]):
            lists["pairs"] = lists["pairs"].astype({"strength": float, "both_low": float})
        table = frame(data["components"]).rename_axis("component")
        return cls(**{**plain, **lists, "table": table, "tau": frame(data["tau"]), "warnings": tuple(data["warnings"])})

    def dumps(self) -> str:
        """The ranking as JSON text."""
        return json.dumps(self.to_json(), indent=1)


def _clean(row: pd.Series) -> dict[str, Any]:
    return {str(name): _number(value) for name, value in row.items()}


def _number(value: Any) -> Any:
    """A value that JSON can hold: Python's own numbers instead of NumPy's, None for NaN and infinity."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
