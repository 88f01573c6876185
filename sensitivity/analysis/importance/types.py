"""Ranking: the importance of each component, as tables and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import NotRequired, TypedDict, cast

import numpy as np
import pandas as pd

from sensitivity.study.counting import count

TITLES = {"shap": "SHAP", "fanova": "fANOVA", "ped_anova": "PED-ANOVA"}  # estimators whose name is not their title
SHOWN = 5  # components that the short form of a ranking names
Values = dict[str, object]  # a row of a table by column, as JSON values


class RankingJson(TypedDict):
    """A ranking as JSON values, with null for NaN and infinity; its tables row by row."""

    task: str
    by: str
    trials: int
    full: float
    noise: float | None
    r2: float
    linear_r2: float
    method: str | None
    near: float | None
    components: dict[str, Values]
    warnings: list[str]
    pairs: list[Values]
    levels: list[Values]
    tau: dict[str, Values]
    choice: NotRequired[Values | None]


@dataclass(frozen=True, repr=False)
class Ranking:
    """How much of the score each component decides. `table` has a row per component, most important first.

    Where plans differ in their methods too, `choice` has the share of that choice, and the shares of components sum to
    the rest of 100.

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
    levels: pd.DataFrame  # what changes without one level: component, bits, trials, shift, moves, before, after, tau,
    # changes_first
    warnings: tuple[str, ...]
    method: str | None = None
    near: float | None = None  # only trials that are predicted to keep at least this share of full precision
    choice: dict[str, float] | None = None  # what the choice of method decides: its shares, as the columns of `table`

    def __repr__(self) -> str:
        """The first few components with their shares, and what is to be known of them; tables hold the rest."""
        first = [f"{name} {share:.0f} %" for name, share in self.table["consensus"].head(SHOWN).items()]
        shares = ", ".join(first) + (", …" if len(self.table) > SHOWN else "")
        cautions = f"; {count(len(self.warnings), 'warning')}" if self.warnings else ""
        told = f". {self.no_intervals[0].upper()}{self.no_intervals[1:]}" if self.no_intervals else ""
        return f"<Ranking for {self.task} of {count(self.trials, 'trial')}: {shares}{cautions}{told}>"

    @property
    def order(self) -> tuple[str, ...]:
        """Components, most important first."""
        return tuple(self.table.index)

    @property
    def no_intervals(self) -> str:
        """A sentence on why no interval is known; empty where they are known, or were not asked for."""
        if not self.table.get("consensus.low", pd.Series(dtype=float)).isna().any():
            return ""
        return (
            f"{count(self.trials, 'trial')} give no intervals: some resamples of so few hold nothing that differs in "
            "score, and more plans would give them"
        )

    def to_json(self) -> RankingJson:
        """Everything as JSON values, with null for NaN and infinity."""
        return {
            "task": self.task,
            "by": self.by,
            "trials": self.trials,
            "full": self.full,
            "noise": self.noise,
            "r2": self.r2,
            "linear_r2": self.linear_r2,
            "method": self.method,
            "near": self.near,
            "components": {str(name): _values(row) for name, row in self.table.iterrows()},
            "warnings": list(self.warnings),
            "pairs": [_values(row) for _, row in self.pairs.iterrows()],
            "levels": [_values(row) for _, row in self.levels.iterrows()],
            "tau": {str(name): _values(row) for name, row in self.tau.iterrows()},
            "choice": {k: _number(v) for k, v in self.choice.items()} if self.choice else None,
        }

    @classmethod
    def from_json(cls, data: RankingJson) -> Ranking:
        """The ranking that `to_json` wrote."""
        pairs = pd.DataFrame(data["pairs"])
        return cls(
            task=data["task"],
            by=data["by"],
            trials=data["trials"],
            full=data["full"],
            noise=data["noise"],
            r2=data["r2"],
            linear_r2=data["linear_r2"],
            table=_table(data["components"]).rename_axis("component"),
            tau=_table(data["tau"]),
            pairs=pairs.astype({"strength": float, "both_low": float}) if len(pairs) else pairs,
            levels=pd.DataFrame(data["levels"]),
            warnings=tuple(data["warnings"]),
            method=data["method"],
            near=data["near"],
            choice=_shares(data.get("choice")),
        )

    def dumps(self) -> str:
        """The ranking as JSON text."""
        return json.dumps(self.to_json(), indent=1)


def _shares(row: Values | None) -> dict[str, float] | None:
    return {name: math.nan if value is None else cast(float, value) for name, value in row.items()} if row else None


def _table(rows: dict[str, Values]) -> pd.DataFrame:
    return pd.DataFrame.from_dict(rows, orient="index").astype(float)


def _values(row: pd.Series) -> Values:
    return {str(name): _number(value) for name, value in row.items()}


def _number(value: object) -> object:
    """A value that JSON can hold: Python's own numbers instead of NumPy's, None for NaN and infinity."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
