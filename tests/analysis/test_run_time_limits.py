"""Limits on time and memory: the solver against brute force, predictions against plain sums, and every refusal."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pytest

from sensitivity.analysis.allocate.budget import best_uniform, spend
from sensitivity.analysis.allocate.knapsack import Knapsack
from sensitivity.analysis.allocate.run_time_limits import RunTimeLimits
from sensitivity.analysis.recommending.kept_recommendation import check_request, proposed
from sensitivity.analysis.recommending.request import PlanRequest
from sensitivity.analysis.reporting.page import report
from sensitivity.api.in_runtime import InRuntime
from sensitivity.formats.timing.kept_times import keep, load_kept_times
from sensitivity.spec.components import ComponentMap, Kept, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.layer_times import LayerTimes, layout_of
from sensitivity.study.storage import layer_times
from sensitivity.study.study import Study

NAMES = ("vision.front", "vision.end", "connector", "language")
FOUR = planted.parts(NAMES, (700, 900, 100, 2500))
TOKENS = {"image": 16, "prompt": 30, "answer": 5}
LAYOUTS = {16: "native", 8: "symmetric 8 row", 4: "symmetric 4 row", 2: "symmetric 2 row"}
HALVES = ("image", "language")
STORED = {2: 2, 3: 4, 4: 4, 6: 8, 8: 8, 16: 16}  # bits -> those of the layout that holds them


def times(seed: int = 0) -> LayerTimes:
    """Times at random: low bits need not be faster."""
    draw = np.random.default_rng(seed)
    layers = {
        (1, weight.cols, layout, at_once): float(draw.uniform(0.5, 4))
        for weight in FOUR.weights
        for layout in LAYOUTS.values()
        for at_once in ((64,) if weight.part == "vision" else (16,) if weight.part == "connector" else (30, 1))
    }
    at_once = {w.name: 64 if w.part == "vision" else 16 for w in FOUR.weights if w.part != "language"}
    rest = {"image": 2.0, "prompt": 3.0, "token": -0.25}
    machine = {"processor": "one", "instructions": ["avx2"]}
    memory = {(half, layout): float(draw.uniform(-2, 1)) for half in HALVES for layout in LAYOUTS.values()}
    return LayerTimes("openvino", machine, 1, {"openvino": "1"}, "vqa", at_once, TOKENS, rest, 5e4, memory, layers)


def plain(of: LayerTimes, bits: Mapping[str, int]) -> dict[str, float]:
    """The slow, plain version: each stage as a sum over the four weights."""

    def ms(name: str, at_once: int) -> float:
        return of.layers[1, FOUR[name].weights[0].cols, LAYOUTS[STORED[bits[name]]], at_once]

    image = 2.0 + ms("vision.front", 64) + ms("vision.end", 64) + ms("connector", 16)
    prompt, token = 3.0 + ms("language", 30), -0.25 + ms("language", 1)
    held = 5e4
    for name in NAMES:
        if bits[name] != 16:
            half = "language" if name == "language" else "image"
            held += FOUR[name].numel * of.memory[half, LAYOUTS[STORED[bits[name]]]]
    return {
        "ms_per_token": token, "ms_per_answer": image + prompt + 4 * token, "gb_resident": held / 1e9,
    }  # fmt: skip


@pytest.mark.parametrize("bits", [(16, 16, 16, 16), (2, 3, 4, 8), (8, 2, 16, 3)])
def test_the_cost_of_a_plan_is_the_sum_of_its_layers(bits: tuple[int, ...]) -> None:
    plan, of = planted.plan(NAMES, bits), times()
    for cost, value in plain(of, dict(zip(NAMES, bits, strict=True))).items():
        assert of.plan_cost(FOUR, plan, cost) == pytest.approx(value), cost


def rough(bits: np.ndarray) -> np.ndarray:
    each = np.column_stack([planted.damage(bits[:, i], half) for i, half in enumerate((3.0, 1.5, 0.5, 2.5))])
    return np.asarray(np.exp(-each.sum(axis=1) - 2 * each[:, 0] * each[:, -1]))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    space = tmp_path_factory.mktemp("timed")
    return planted.study(space, {"a": rough}, 0.01, levels=(2, 3, 4, 8, 16), components=FOUR)


@pytest.mark.parametrize("seed", range(5))
def test_several_limits_at_once_equal_brute_force(study: Study, seed: int) -> None:
    knapsack, of, draw = Knapsack.of(study, ["a"]), times(seed), np.random.default_rng(seed)
    index = np.array(list(itertools.product(*(range(len(o)) for o in knapsack.space.choices))))
    plans = [knapsack.space.decode(row) for row in index]
    bits = np.array([knapsack.size(plan).bits for plan in plans])
    costs = {
        cost: np.array([of.plan_cost(FOUR, plan, cost) for plan in plans])
        for cost in plain(of, dict.fromkeys(NAMES, 4))
    }
    scores = knapsack.models["a"].predict(index)
    told = 0
    for _ in range(6):
        budget = int(np.quantile(bits, draw.uniform(0.3, 1)))
        most = {cost: float(np.quantile(values, draw.uniform(0.2, 0.9))) for cost, values in costs.items()}
        for cost in draw.choice(sorted(most), draw.integers(0, 3), replace=False):  # alone, or together
            del most[cost]
        fine = (bits <= budget) & np.all([costs[cost] <= limit for cost, limit in most.items()], axis=0)
        limited = replace(knapsack, limits=RunTimeLimits(of, most))
        if not fine.any():
            with pytest.raises(UserError, match=r"at once|can be reached"):
                spend(limited, budget, {"a": 1.0})
            continue
        told += 1
        found = spend(limited, budget, {"a": 1.0}, top=2)
        np.testing.assert_allclose(
            [one.predicted["a"].score for one in found], np.sort(scores[fine])[::-1][:2], atol=1e-6
        )
        assert all(limited.limits is not None and limited.limits.hold(FOUR, one.plan) for one in found)
        uniform = best_uniform(limited, budget / FOUR.numel, {"a": 1.0})
        same = np.array([len({o.bits if o else 16 for _, o in plan.schemes}) == 1 for plan in plans])
        assert (uniform is not None) == bool((fine & same).any())
    assert told >= 3


def test_a_limit_that_no_plan_meets_says_what_can_be_reached(study: Study) -> None:
    of = times()
    least = min(ms for (_, cols, _, at_once), ms in of.layers.items() if (cols, at_once) == (2500, 1)) - 0.25
    limited = replace(Knapsack.of(study, ["a"]), limits=RunTimeLimits(of, {"ms_per_token": 0.01}))
    says = f"takes at most 0.01 ms per token in openvino on this machine: {least:.4g} ms per token can be reached"
    with pytest.raises(UserError, match=re.escape(says)):
        spend(limited, 10**9, {"a": 1.0})
    with pytest.raises(UserError, match=r"no plan fits"):  # the budget is named where it is what fails
        spend(limited, 10, {"a": 1.0})


def test_schemes_that_are_stored_alike_share_a_time() -> None:
    weight = FOUR.weights[0]
    alike = {layout_of(weight, Scheme("rtn", bits, 32, True), "openvino") for bits in (3, 4)}
    assert alike == {"symmetric 4 32"}
    assert layout_of(weight, Scheme("rtn", 4, 32, False), "openvino") not in alike
    assert layout_of(weight, None, "openvino") == "native"


def test_a_scheme_that_was_not_timed_is_named() -> None:
    plan = Plan.uniform(FOUR, Scheme("rtn", 4, 32, False))
    with pytest.raises(UserError, match=r"no time is known of .*'asymmetric 4 32'; known are native, symmetric 2 row"):
        times().plan_cost(FOUR, plan, "ms_per_answer")


def test_memory_that_was_not_measured_lists_the_layouts_whose_memory_was() -> None:
    """All times are known, as in tables from before memory was measured."""
    plan = Plan.uniform(FOUR, Scheme("rtn", 4, "row"))
    of = times()
    assert of.plan_cost(FOUR, plan, "ms_per_answer") > 0
    kept = {key: value for key, value in of.memory.items() if key == ("image", "symmetric 8 row")}
    for memory, known in ((kept, "symmetric 8 row"), ({}, "none")):
        with pytest.raises(UserError, match=f"no memory is known of .*'symmetric 4 row'; known are {known}; "):
            replace(of, memory=memory).plan_cost(FOUR, plan, "gb_resident")


def test_choices_that_were_never_timed_are_not_chosen(study: Study) -> None:
    """Eight bits were not timed anywhere; two bits of the language model alone were not."""
    of = times()
    known = {key: ms for key, ms in of.layers.items() if "8" not in key[2] and (key[1], key[2]) != (2500, LAYOUTS[2])}
    limited = replace(
        Knapsack.of(study, ["a"]), limits=RunTimeLimits(replace(of, layers=known), {"ms_per_answer": 1e9})
    )
    for one in spend(limited, 10**9, {"a": 1.0}, top=20):
        chosen = dict(one.plan.schemes)
        assert all(scheme is None or scheme.bits != 8 for scheme in chosen.values())
        assert chosen["language"] is None or chosen["language"].bits != 2
    none = {key: ms for key, ms in of.layers.items() if key[2] == "native"}
    limited = replace(limited, limits=RunTimeLimits(replace(of, layers=none), {"ms_per_answer": 1e9}))
    with pytest.raises(UserError, match=r"no time is known of vision\.front\.weight"):
        spend(limited, 10**9, {"a": 1.0})


@pytest.mark.usefixtures("undrawn")
def test_the_report_says_what_bits_buy(tmp_path: Path) -> None:
    """A planted machine: two bits of the language model halve the time; the connector's change nothing."""
    study = Study.create(tmp_path / "rtn", FOUR, ["a"], {"model": "planted"})
    bits = np.array([[16] * 4, [2] * 4, *(np.where(np.eye(4, dtype=bool)[i], 2, 16) for i in range(4))])
    rows = [[None if b == 16 else Scheme("rtn", int(b)) for b in row] for row in bits]
    plans = [Plan(tuple(zip(NAMES, row, strict=True))) for row in rows]
    study.append(plans, [{"a": float(score)} for score in rough(bits)])
    of = times()
    layers = {key: 0.0 if key[3] != 1 else 100.0 if key[2] == "native" else 50.0 for key in of.layers}
    memory = dict.fromkeys(of.memory, -4.0)
    layer_times.save(study.path, replace(of, layers=layers, resident=2e4, memory=memory))
    page = report(study, tmp_path / "report").read_text(encoding="utf-8")
    section = page[page.index('id="run-time"') :]
    for name, buys in (("language", "memory and time"), ("vision.end", "memory"), ("connector", "hardly anything")):
        row = re.search(rf"<td>{re.escape(name)}</td>.*?</tr>", section)
        assert row is not None
        assert row[0].endswith(f"{buys}</td></tr>")
    assert (tmp_path / "report" / "time.csv").exists()
    assert "new tokens 9" in section  # the share of new tokens in the time of an answer
    assert pd.read_csv(tmp_path / "report" / "time.csv")["ms"].max() == pytest.approx(5 + 4 * 99.75)


def test_times_survive_the_journey_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENSITIVITY_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"not timed on this machine with 1 thread; `sensitivity profile planted --run"):
        load_kept_times(FOUR, "openvino", 1)
    keep(FOUR, times())
    assert load_kept_times(FOUR, "openvino", 1) == times()
    more = replace(times(), layers={(1, 700, "asymmetric 4 32", 64): 1.0, (1, 700, "native", 64): 9.0})
    keep(FOUR, more)  # another layout joins those that are known; what is measured again is replaced
    found, slower = load_kept_times(FOUR, "openvino", 1).layers, 9 / times().layers[1, 700, "native", 64]
    # as in full precision, all that was timed before with so many tokens would take longer now
    at_this_speed = {key: took * (slower if key[-1] == 64 else 1) for key, took in times().layers.items()}
    assert found == {**at_this_speed, **more.layers}
    keep(FOUR, replace(more, tokens={**TOKENS, "prompt": 99}))  # of other prompts: nothing is comparable
    assert load_kept_times(FOUR, "openvino", 1).layers == more.layers
    other = ComponentMap("planted", "linear", (*FOUR.weights[1:], Weight("x", 1, 7, "language", None, 0, None)), ())
    with pytest.raises(UserError, match="not timed"):  # of another shape
        load_kept_times(other, "openvino", 1)
    with pytest.raises(UserError, match="not timed"):
        load_kept_times(FOUR, "openvino", 2)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(json.dumps({**times().to_json(), "threads": "two"}))
    with pytest.raises(UserError, match=r"cannot be used: 'threads' is .*`sensitivity profile planted"):
        load_kept_times(FOUR, "openvino", 1)
    with pytest.raises(UserError, match="layers are not timed in gptq"):
        load_kept_times(FOUR, "gptq")


def test_a_request_with_limits(study: Study) -> None:
    asked = PlanRequest((4.0,), {"a": 1.0}, limits={"ms_per_token": 3.0})
    again = PlanRequest.from_json(json.loads(json.dumps(asked.to_json())))
    assert again.limits == {"ms_per_token": 3.0}
    assert "limits" not in PlanRequest((4.0,), {"a": 1.0}).to_json()  # as studies made before have it
    with pytest.raises(UserError, match="--ms-per-token is about a runtime on this machine; name it"):
        check_request(study, asked)
    with pytest.raises(UserError, match="need the times of layers: `sensitivity profile planted --runtime "):
        proposed(study, replace(asked, runtime="openvino"))


def test_kept_weights_need_no_time() -> None:
    more = ComponentMap("planted", "linear", FOUR.weights, (Kept("embedding", 9, "embedding"), Kept("b", 9, "bias")))
    plan = planted.plan(NAMES, (4, 4, 4, 4))
    assert times().plan_cost(more, plan, "ms_per_answer") == times().plan_cost(FOUR, plan, "ms_per_answer")


def test_the_verdict_covers_answers_time_and_memory() -> None:
    costs = {"ms_per_token": (11.2, 10.9, 11.6), "ms_per_answer": (90.0, 80.0, 99.0), "gb_resident": (0.21, 0.21, 0.21)}
    most = {"ms_per_token": 12.0, "ms_per_answer": 85.0, "gb_resident": 0.2}
    words = InRuntime("openvino", "all 40 answers and scores are those that were measured", True, costs, most).words
    assert "Run in openvino: all 40 answers" in words
    assert "11.2 ms per token [10.9, 11.6], within 12" in words
    assert "90 ms per answer [80, 99], about the 85 that were asked for" in words
    assert "0.21 GB resident, more than 0.2" in words
