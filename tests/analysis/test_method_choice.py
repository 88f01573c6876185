"""The share of the choice of method, on planted studies that mix methods."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import planted
import pytest

from sensitivity.analysis.importance.method_choice import METHOD, with_methods
from sensitivity.analysis.importance.ranking import rank
from sensitivity.analysis.importance.types import Ranking
from sensitivity.analysis.observations import Observations
from sensitivity.cli.output.tables import print_ranking as show
from sensitivity.spec.plan import Plan, Scheme

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


def mixed(score: Score, trials: int = 120, noise: float = 0.01) -> Observations:
    """Random plans over three components, two methods and native; `score` gets bits, and who has the second method."""
    draw = np.random.default_rng(0)
    bits = draw.choice([2, 3, 4, 8, 16], (trials, 3)).astype(float)
    second = draw.integers(0, 2, (trials, 3)).astype(bool) & (bits < 16)
    plans = tuple(
        Plan(
            tuple(
                (name, None if b == 16 else Scheme("awq" if other else "gptq", int(b)))
                for name, b, other in zip(planted.PARTS, row, others, strict=True)
            )
        )
        for row, others in zip(bits, second, strict=True)
    )
    values, unknown = score(bits, second) + noise * draw.standard_normal(trials), np.full(trials, np.nan)
    keys = tuple(plan.key for plan in plans)
    return Observations("planted", planted.PARTS, bits, values, unknown, keys, unknown, ("mixed",) * trials, plans)


def widths_alone(bits: np.ndarray, second: np.ndarray) -> np.ndarray:
    return -planted.damage(bits[:, 2], 3.0) - 0.3 * planted.damage(bits[:, 0], 3.0)


def also_the_method(bits: np.ndarray, second: np.ndarray) -> np.ndarray:
    return widths_alone(bits, second) - 1.5 * second[:, 2]


def test_a_method_that_matters_has_a_share_and_one_that_does_not_has_none() -> None:
    found = rank(mixed(also_the_method), bootstraps=4, thorough=False)
    assert found.choice is not None
    assert 20 < found.choice["consensus"] < 90
    assert found.choice["consensus.low"] > 5
    assert found.table["consensus"].sum() + found.choice["consensus"] == pytest.approx(100)
    assert set(found.table.index) == set(planted.PARTS)
    without = rank(mixed(widths_alone), bootstraps=4, thorough=False)
    assert without.choice is not None
    assert without.choice["consensus"] < 12
    assert without.choice["consensus.low"] == 0
    assert without.order[0] == "language"


def test_the_whole_ranking_is_written_and_read(capsys: pytest.CaptureFixture[str]) -> None:
    found = rank(mixed(also_the_method, trials=60), bootstraps=2)
    assert set(found.pairs["a"]) | set(found.pairs["b"]) == set(planted.PARTS)
    assert set(found.levels["component"]) <= set(planted.PARTS)
    again = Ranking.from_json(found.to_json())
    assert again.choice == found.choice
    show(found)
    assert "choice of method" in capsys.readouterr().out


def test_one_method_is_no_choice() -> None:
    observations = mixed(widths_alone, trials=40)
    one = observations.where(
        np.array([all(s is None or s.method == "gptq" for _, s in p.schemes) for p in observations.plans])
    )
    assert with_methods(one) == (one, [])
    plain = planted.observations(planted.additive)
    assert with_methods(plain) == (plain, [])


def test_columns_say_who_has_which_method() -> None:
    observations = mixed(widths_alone, trials=40)
    found, columns = with_methods(observations)
    assert columns == [3, 4, 5]
    assert all(name.startswith(METHOD) for name in found.names[3:])
    # in alphabetical order awq is first, so the columns say who has gptq
    for i, name in enumerate(planted.PARTS):
        expected = [float((s := plan[name]) is not None and s.method == "gptq") for plan in observations.plans]
        assert found.bits[:, 3 + i].tolist() == expected
