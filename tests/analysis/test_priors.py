"""Expectations: how far they are trusted; what other studies let expect of other components, schemes and models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest

from sensitivity.analysis.allocate.budget import Candidate, best_of_each, solve
from sensitivity.analysis.allocate.knapsack import Knapsack
from sensitivity.analysis.atlas.priors import check_priors, expect_from, schemes_of
from sensitivity.analysis.recommending.kept_recommendation import proposed
from sensitivity.analysis.recommending.request import PlanRequest
from sensitivity.analysis.search.frontier_sampler import FrontierSampler, PlanSizes
from sensitivity.analysis.surrogate import fitting
from sensitivity.analysis.surrogate.fitting import fit_surrogate
from sensitivity.analysis.surrogate.space import Expected, Space
from sensitivity.analysis.surrogate.surrogate import Surrogate
from sensitivity.analysis.surrogate.transfer import measured_damages, transfer_damages
from sensitivity.cli import main as cli
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.sizes import size
from sensitivity.study.storage.expected import note_on, read
from sensitivity.study.storage.expected import save as save_expected
from sensitivity.study.storage.paths import expected_file
from sensitivity.study.study import Study

WHOLE, FINE = (
    planted.parts(),
    planted.parts(("vision.front", "vision.end", "connector", "language"), (500, 500, 100, 2500)),
)
SCHEMES = [Scheme("codes", bits) for bits in (2, 3, 4, 6, 8)]

BITS = planted.grid()
PLANS = [planted.plan(planted.PARTS, row) for row in BITS]
SPACE = Space.of(PLANS)


def study(path: Path, count: int = 60, noise: float = 0.005) -> Study:
    rows = planted.grid((2, 3, 4, 8, 16))
    some = np.random.default_rng(0).permutation(len(rows))[:count]
    return planted.study(path, {"a": planted.product}, noise, rows=rows[some])


def transfer_from(source: Study, parts: ComponentMap, schemes: Sequence[Scheme]) -> dict[str, dict[Scheme, float]]:
    return transfer_damages(measured_damages(source), parts, schemes, source.path)


def test_damages_go_over_to_the_same_parts_and_other_widths(tmp_path: Path) -> None:
    found = transfer_from(study(tmp_path / "s"), WHOLE, SCHEMES)
    truth = {"vision": 3.0, "connector": 0.5, "language": 2.5}
    unit = np.mean([np.log(found[name][SCHEMES[1]]) - (half - 3) for name, half in truth.items()])
    for name, half in truth.items():
        for scheme in SCHEMES[1:4]:  # six bits were never measured
            assert np.log(found[name][scheme]) - unit == pytest.approx(half - scheme.bits, abs=0.8)
        assert list(found[name].values()) == sorted(found[name].values(), reverse=True)


def test_a_part_shares_its_damage_among_its_components_and_gathers_it_from_them(tmp_path: Path) -> None:
    source = study(tmp_path / "s")
    coarse, fine = transfer_from(source, WHOLE, SCHEMES), transfer_from(source, FINE, SCHEMES)
    for scheme in SCHEMES:
        assert fine["vision.front"][scheme] == fine["vision.end"][scheme] == pytest.approx(coarse["vision"][scheme] / 2)
        assert fine["connector"][scheme] == coarse["connector"][scheme]

    def four(bits: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(-sum(planted.damage(bits[:, c], half) for c, half in enumerate((2.5, 2, 0.5, 2)))))

    rows = planted.grid((2, 3, 4, 16), 4)
    parts = planted.study(tmp_path / "f", {"a": four}, components=FINE, rows=rows[::5])
    whole, own = transfer_from(parts, WHOLE, SCHEMES), transfer_from(parts, FINE, SCHEMES)
    for scheme in SCHEMES:
        assert whole["vision"][scheme] == pytest.approx(own["vision.front"][scheme] + own["vision.end"][scheme])


def test_another_method_takes_the_curve_of_the_only_one(tmp_path: Path) -> None:
    source = study(tmp_path / "s")
    other = [Scheme("gptq", scheme.bits, group=128) for scheme in SCHEMES]
    same, found = transfer_from(source, WHOLE, SCHEMES), transfer_from(source, WHOLE, other)
    for name in WHOLE.names:
        np.testing.assert_allclose(list(found[name].values()), list(same[name].values()))


def test_what_cannot_be_a_prior_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no study at .*nowhere"):
        check_priors([tmp_path / "nowhere"], tmp_path / "new")
    with pytest.raises(UserError, match=r"has measured 3 plans, too few to learn damages from; at least 5 are needed"):
        measured_damages(study(tmp_path / "few", 3))
    two = planted.parts(("vision", "language"), (1000, 2500))
    rows = planted.grid((2, 4, 16), 2)
    source = planted.study(tmp_path / "two", {"a": lambda bits: np.exp(-planted.damage(bits[:, 0], 2))},
                           components=two, rows=rows)  # fmt: skip
    with pytest.raises(UserError, match=r"says nothing about connector: it has vision, language; choose a prior"):
        transfer_from(source, WHOLE, SCHEMES)


def test_several_priors_are_averaged_and_kept_in_the_study(tmp_path: Path) -> None:
    one, two = study(tmp_path / "one"), study(tmp_path / "two", noise=0.01)
    new = study(tmp_path / "new", 6)
    expect_from(new, [one.path, two.path], schemes_of(new))
    file = expected_file(new.path)
    assert file.exists()
    expected = read(new.path)
    assert expected is not None
    assert set(expected) == set(WHOLE.names)
    assert {scheme.bits for scheme in expected["vision"]} <= {2, 3, 4, 8}
    assert f"`sensitivity recommend {new.path} --prior none` leaves that out" in note_on(new.path)


def test_what_was_expected_can_be_forgotten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prior that is named once counts for later commands, which say so; `none` is the way back."""
    monkeypatch.chdir(tmp_path)
    for name, noise in (("new", 0.0), ("other", 0.05)):
        study(tmp_path / name, noise=noise)
    told = []
    for more in ("", " --prior other", "", " --prior none", "", " --prior none"):
        assert cli.main(f"recommend new --bpw 4 --no-run --json{more}".split()) == 0
        told.append(json.loads(capsys.readouterr().out))
    noted = ["predictions start from what other let expect" in " ".join(one["notes"]) for one in told]
    assert noted == [False, True, True, False, False, False]
    assert told[1]["predicted"] == told[2]["predicted"] != told[0]["predicted"] == told[4]["predicted"]
    (tmp_path / "new" / "expected.json").write_text("mine")
    assert cli.main(["recommend", "new", "--bpw", "4", "--no-run", "--prior", "none"]) == 2
    assert (tmp_path / "new" / "expected.json").read_text() == "mine"
    (tmp_path / "new" / "expected.json").unlink()
    study(tmp_path / "none")  # a folder of that name is meant
    assert cli.main(["recommend", "new", "--bpw", "4", "--no-run", "--prior", "none"]) == 0
    assert "start from what none let expect" in " ".join(capsys.readouterr().out.split())


def test_a_study_is_no_prior_of_its_own(tmp_path: Path) -> None:
    """Its measurements would count twice. A link or another spelling is the same study."""
    own = study(tmp_path / "own")
    (tmp_path / "link").symlink_to(own.path)
    for path in (own.path, tmp_path / "link", own.path / ".." / "own"):
        with pytest.raises(UserError, match="is this study itself, whose measurements count already; name a --prior"):
            check_priors([path], own.path)
        with pytest.raises(UserError, match="is this study itself"):
            expect_from(own, [path], SCHEMES)
    assert read(own.path) is None


def sizes_of(space: Space) -> PlanSizes:
    kept = size(WHOLE, Plan.uniform(WHOLE, None)).bits - sum(16 * one.numel for one in WHOLE.components)
    bits = tuple(np.array([(o.bits if o else 16) * one.numel for o in options], dtype=float)
                 for one, options in zip(WHOLE.components, space.choices, strict=True))  # fmt: skip
    return PlanSizes(bits, kept, WHOLE.numel)


def wrong_parts(right: Expected) -> Expected:
    """The damages, each of another component."""
    return {name: right[other] for name, other in zip(right, ("connector", "language", "vision"), strict=True)}


def steps_to(truth: np.ndarray, expected: Expected | None, seed: int) -> int:
    """After how many plans the best of two that `recommend` would verify lacks at most .3 %; at most 25."""
    index, sizes = SPACE.encode(PLANS), sizes_of(SPACE)
    bpw, place = sizes.bpw(index), {tuple(row): i for i, row in enumerate(index)}
    sampler, rows = FrontierSampler(SPACE, sizes, seed=seed, expected=expected), list[int]()
    while len(rows) < 25:
        rows.append(place[tuple(sampler.next(index[rows], truth[rows][:, None]))])
        if len(rows) < 4:
            continue
        ranks = [
            np.argsort(-fit_surrogate(SPACE, index[rows], truth[rows], expected=one).predict(index))
            for one in ([None] if expected is None else [expected, None])
        ]
        in_turn = np.column_stack(ranks).ravel()
        short = []
        for budget in np.arange(3.5, 8.1, 0.5):
            two = list(dict.fromkeys(in_turn[bpw[in_turn] <= budget].tolist()))[:2]
            short.append(truth[bpw <= budget].max() - truth[two].max())
        if np.mean(short) <= 0.003:
            break
    return len(rows)


def test_a_search_needs_fewer_plans_with_a_prior_and_no_more_with_a_wrong_one(tmp_path: Path) -> None:
    right = transfer_from(study(tmp_path / "s"), WHOLE, SCHEMES)
    found = {
        # the median: rounding alone makes one search in ten twice as long
        name: np.median([steps_to(planted.product(BITS), expected, seed) for seed in range(5)])
        for name, expected in (("right", right), ("none", None), ("wrong", wrong_parts(right)))
    }
    assert found["right"] < found["none"]
    assert found["wrong"] <= 1.1 * found["none"]


def test_every_second_plan_is_proposed_by_measurements_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = transfer_from(study(tmp_path / "s"), WHOLE, SCHEMES)
    truth, index, sizes = planted.product(BITS), SPACE.encode(PLANS), sizes_of(SPACE)
    fitted_with: list[Expected | None] = []

    def fit(*args: Any, expected: Expected | None = None, **more: Any) -> Surrogate:
        fitted_with.append(expected)
        return fit_surrogate(*args, expected=expected, **more)

    monkeypatch.setattr(fitting, "fit_surrogate", fit)
    uniform = np.flatnonzero((index == index[:, :1]).all(axis=1)).tolist()
    for count in range(8, 12):
        rows = [*uniform, *(i for i in range(11, 31) if i not in uniform)][:count]
        FrontierSampler(SPACE, sizes, expected=right).next(index[rows], truth[rows][:, None])
    assert fitted_with == [None, right, None, right]


def test_the_best_plan_by_measurements_alone_is_a_candidate_beside_what_was_expected(tmp_path: Path) -> None:
    # uniform plans alone do not say which part is worth more bits, so that what is expected decides
    rows = np.array([[bits] * 3 for bits in (2, 3, 4, 8, 16)])
    one, request = planted.study(tmp_path / "s", {"a": planted.product}, rows=rows), PlanRequest((5.0,), {"a": 1.0})
    ((alone, _),) = proposed(one, request)
    measured = [scheme for scheme in SCHEMES if scheme.bits != 6]
    worth = {"vision": 1.0, "connector": 1.0, "language": 100.0}
    expected = {name: {s: damage * np.exp(-s.bits) for s in measured} for name, damage in worth.items()}
    save_expected(one.path, expected, "a guess")
    ((believing, _),) = proposed(one, replace(request, top=1))
    ((both, _),) = proposed(one, request)
    assert believing[0].plan != alone[0].plan  # else this study would show nothing
    assert [c.plan for c in both[:2]] == [believing[0].plan, alone[0].plan]
    assert [c.rank for c in both] == [0, 1, 2]
    plans = [candidate.plan for candidate in both]
    each = [Knapsack.of(one, ["a"], expecting=expecting).predicted(plans) for expecting in (True, False)]
    for candidate, *predictions in zip(both, *each, strict=True):  # the interval allows for either being wrong
        mine, scores = candidate.predicted["a"], [by["a"] for by in predictions]
        assert mine.score == pytest.approx(np.mean([by.score for by in scores]))
        assert (mine.low, mine.high) == (min(by.low for by in scores), max(by.high for by in scores))


def test_a_surrogate_that_sees_no_plan_is_an_error_only_where_the_other_sees_none_either(tmp_path: Path) -> None:
    one = study(tmp_path / "s", 12)
    pair = [Knapsack.of(one, ["a"]), Knapsack.of(one, ["a"])]

    def of_the_second(knapsack: Knapsack) -> list[Candidate]:
        if knapsack is pair[0]:
            raise UserError("no plan is predicted to keep a")
        return solve(one, bpw=5, knapsack=knapsack)

    assert [c.plan for c in best_of_each(pair, of_the_second, 2)] == [c.plan for c in solve(one, bpw=5, top=2)]
    with pytest.raises(UserError, match="no plan is predicted to keep a"):
        best_of_each(pair[:1], of_the_second, 2)


def test_scores_drop_damages_of_the_wrong_parts_and_keep_the_right_ones(tmp_path: Path) -> None:
    right = transfer_from(study(tmp_path / "s"), WHOLE, SCHEMES)
    index, truth, draw = SPACE.encode(PLANS), planted.product(BITS), np.random.default_rng(0)
    dropped = {"right": 0, "wrong": 0}
    for _ in range(20):
        some = draw.permutation(len(index))[:12]
        scores = truth[some] + 0.005 * draw.standard_normal(len(some))
        alone = fit_surrogate(SPACE, index[some], scores).predict(index)
        for name, expected in (("right", right), ("wrong", wrong_parts(right))):
            found = fit_surrogate(SPACE, index[some], scores, expected=expected).predict(index)
            dropped[name] += int(np.array_equal(found, alone))
    assert dropped["right"] <= 1
    assert dropped["wrong"] >= 15
