"""What `sensitivity methods` says a method costs is what the committed benchmark measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.benchmarks import methods_cost
from experiments.benchmarks.methods_cost import BESIDE, SIDES, WHY, cost, in_few_steps, layer, near_4_bits
from sensitivity.quantize.method_seconds import MEASURED_BY, SECONDS, seconds_of
from sensitivity.quantize.presets import PRESETS
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.plan import Scheme

REPORT = Path(__file__).parents[2] / "reports" / "methods-cost.md"


def test_the_table_is_that_of_the_report() -> None:
    text = REPORT.read_text()
    assert f"    {MEASURED_BY}\n" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert f"{SIDES[1]}: seconds" in rows[0]
    reported = {row[0]: float(row[4]) for row in rows[1:]}
    assert reported == SECONDS
    slow = [name for name, seconds in SECONDS.items() if seconds > BESIDE * SECONDS["gptq"]]
    assert slow
    assert all(f"* `{name}`: {WHY[name]}" in text for name in slow)


def test_a_preset_costs_what_its_method_does_unless_its_solver_is_another() -> None:
    assert seconds_of("mbq") == SECONDS[str(PRESETS["mbq"]["method"])]
    assert seconds_of("rsq") != SECONDS["gptq"]
    assert seconds_of("a method of somebody else") is None


def test_the_benchmark_counts_seconds_and_memory() -> None:
    weight, inputs, seen = layer(256, 256)
    cheap, dear = (cost(near_4_bits(name), weight, inputs, seen) for name in ("rtn", "bpdq"))
    assert 0 <= cheap["seconds"] < dear["seconds"]
    assert near_4_bits("llm-int8").bits == 8


def test_steps_that_are_alike_are_not_all_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 2 seconds before the steps and half a second in each, 30 steps take 17, and no more than a few are run."""
    ran: list[int] = []

    def planted(chosen: Scheme, *_: object) -> dict[str, float]:
        ran.append(int(chosen.get("tweak") or 0))
        return {"seconds": 2 + 0.5 * ran[-1], "gb": float(ran[-1])}

    monkeypatch.setattr(methods_cost, "cost", planted)
    assert in_few_steps(scheme("norm-tweak", 4), *layer(16, 16)) == {"seconds": 17.0, "gb": 3.0}
    assert max(ran) == 3
    assert in_few_steps(scheme("gptq", 4), *layer(16, 16))["seconds"] == 2.0
