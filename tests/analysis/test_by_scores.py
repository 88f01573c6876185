"""Plans by scores alone: equal to brute force; scores as expectations of the surrogate; and what is believed."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from sensitivity.analysis.allocate.budget import solve
from sensitivity.analysis.allocate.by_scores import combined, optimum
from sensitivity.analysis.allocate.knapsack import Knapsack
from sensitivity.analysis.recommending.believed import predicted_shares
from sensitivity.analysis.recommending.request import PlanRequest
from sensitivity.analysis.search.openings import openings_then_proposals
from sensitivity.analysis.surrogate.fitting import fit_surrogate
from sensitivity.analysis.surrogate.score_agreement import ScoreAgreement, agreement_of_scores
from sensitivity.analysis.surrogate.space import Space
from sensitivity.api.planning import candidates
from sensitivity.cli.output.explained_tables import print_attributions
from sensitivity.measure.attribution.checks import Check, Checks
from sensitivity.measure.attribution.scores import Attribution
from sensitivity.spec.components import ComponentMap, Kept, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.limits import allowed_by
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.sizes import size
from sensitivity.study.storage import expected
from sensitivity.study.study import Study

NAMES = ("vision", "connector", "language")
SCHEMES = [Scheme("codes", bits) for bits in (2, 3, 4, 8)]
PARTS = ComponentMap(
    "planted",
    "linear",
    tuple(Weight(f"{n}.w", 1, s, n, None, 0, None) for n, s in zip(NAMES, (300, 60, 2500), strict=True)),
    (Kept("rest", 100, "rest"),),
)


def harms(seed: int) -> dict[str, dict[Scheme, float]]:
    draw = np.random.default_rng(seed)
    level = {name: float(np.exp(draw.normal(0, 2))) for name in NAMES}
    return {name: {s: level[name] * float(np.exp(-s.bits + draw.normal(0, 0.2))) for s in SCHEMES} for name in NAMES}


def every_plan() -> list[Plan]:
    return [Plan(tuple(zip(NAMES, row, strict=True))) for row in itertools.product([None, *SCHEMES], repeat=3)]


def harm(plan: Plan, scores: dict[str, dict[Scheme, float]]) -> float:
    return sum(scores[name][choice] for name, choice in plan.schemes if choice)


@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_is_that_of_brute_force(seed: int) -> None:
    scores = harms(seed)
    for bpw in (3.0, 4.0, 9.0):
        fits = [plan for plan in every_plan() if size(PARTS, plan).bpw <= bpw]
        best = min(harm(plan, scores) for plan in fits)
        ours = optimum(PARTS, scores, bpw)
        assert size(PARTS, ours).bpw <= bpw
        assert harm(ours, scores) == pytest.approx(best)


def test_limits_hold_and_an_impossible_budget_is_a_sentence() -> None:
    scores = harms(0)
    kept = optimum(PARTS, scores, 5.0, allow=allowed_by(NAMES, {"vision": (8,)}), tie=[("connector", "language")])
    assert kept.bits()["vision"] == 8
    assert kept["connector"] == kept["language"]
    with pytest.raises(UserError, match=r"^no plan fits 1.00 bpw .*; ask for more$"):
        optimum(PARTS, scores, 1.0)
    wide = {name: {scheme: row[scheme] for scheme in SCHEMES[1:]} for name, row in scores.items()}
    with pytest.raises(UserError, match=r"^no plan fits 3.00 bpw .*; ask for more, or give lower widths \(--bits\)$"):
        optimum(PARTS, wide, 3.0)
    with pytest.raises(UserError, match=r"^no plan fits 4.00 bpw .*; ask for more, or allow lower widths \(--allow\)"):
        optimum(PARTS, scores, 4.0, allow=allowed_by(NAMES, {"*": (8,)}))


def test_a_narrower_width_never_counts_for_less_damage() -> None:
    scores = harms(1)
    scores["language"][SCHEMES[0]] = 0.0  # noise: two bits said to do no damage
    plan = optimum(PARTS, scores, 9.0)
    assert plan.bits()["language"] > 2


def test_scores_are_combined_whatever_their_units() -> None:
    one, other = harms(0), harms(1)
    loud = {name: {scheme: 1e6 * v for scheme, v in row.items()} for name, row in other.items()}
    both, again = combined([one, other]), combined([one, loud])
    assert both.keys() == one.keys()
    for name in NAMES:
        for scheme in SCHEMES:
            assert both[name][scheme] == pytest.approx(again[name][scheme])
            ratio = both[name][scheme] / both["vision"][SCHEMES[0]]
            each = [s[name][scheme] / s["vision"][SCHEMES[0]] for s in (one, other)]
            assert ratio == pytest.approx(np.sqrt(each[0] * each[1]))
    one["vision"][SCHEMES[0]] = 0.0
    assert combined([one, other])["vision"][SCHEMES[0]] == 0.0


def test_expectations_help_while_little_is_measured_and_yield_to_data() -> None:
    """From four readings of 125: right expectations order plans better than none; wrong ones are overcome by data."""
    space = Space.of(every_plan())
    index = space.encode(every_plan())
    gained, overcome = [], []
    for seed in range(4):
        truth = harms(seed)
        score = np.array([np.exp(-5 * harm(plan, truth)) for plan in every_plan()])
        some = np.random.default_rng(seed).choice(len(score), 4, replace=False)
        few = {"space": space, "index": index[some], "score": score[some], "full": 1.0}
        told, plain = (fit_surrogate(**few, expected=e).predict(index) for e in (truth, None))  # type: ignore[arg-type]
        gained.append(spearmanr(told, score).statistic - spearmanr(plain, score).statistic)
        wrong = {name: truth[other] for name, other in zip(NAMES, reversed(NAMES), strict=True)}
        believing = fit_surrogate(space, index, score, 1.0, expected=wrong).predict(index)
        overcome.append(float(np.sqrt(np.mean((believing - score) ** 2))))
    assert np.mean(gained) > 0.02
    assert max(overcome) < 0.03


def study(
    tmp_path: Path, noise: float, count: int, seed: int = 0, times: int = 1
) -> tuple[Study, dict[str, dict[Scheme, float]]]:
    """A study of the first plans of a shuffled list, full precision among them."""
    truth, draw = harms(seed), np.random.default_rng(seed)
    order = draw.permutation(len(every_plan()) - 1)[: count - 1] + 1
    plans = times * [every_plan()[i] for i in (0, *order)]
    made = Study.create(tmp_path, PARTS, ["score"], {"model": "planted"})
    scores = [{"score": float(np.exp(-5 * harm(plan, truth)) + noise * draw.standard_normal())} for plan in plans]
    made.append(plans, scores)
    return made, truth


def test_a_study_predicts_from_what_it_expected(tmp_path: Path) -> None:
    made, truth = study(tmp_path / "s", 0.0, 4)
    before = Knapsack.of(made, ["score"])
    expected.save(made.path, truth, "planted")
    after = Knapsack.of(made, ["score"])
    assert sum(map(len, before.space.choices)) < sum(map(len, after.space.choices))  # unmeasured schemes are offered
    (best,) = solve(made, bpw=4.0, top=1)
    fits = [plan for plan in every_plan() if size(PARTS, plan).bpw <= 4.0]
    assert harm(best.plan, truth) == pytest.approx(min(harm(plan, truth) for plan in fits))
    (tmp_path / "s" / "expected.json").write_text("{}")
    with pytest.raises(UserError, match=r"expected.json cannot be used: .*; delete it"):
        Knapsack.of(made, ["score"])


def test_the_best_reading_is_drawn_towards_the_surrogate(tmp_path: Path) -> None:
    """The winner's curse: over noisy studies, the best reading lies above the truth, what is believed of it less so."""
    cursed, cured = [], []
    for seed in range(6):
        made, truth = study(tmp_path / str(seed), 0.07, 40, seed, times=2)
        knapsack = Knapsack.of(made, ["score"])
        scores = predicted_shares(made, knapsack, {"score": 1.0})
        readings: dict[str, list[float]] = {}
        for trial in made.measured():
            readings.setdefault(trial.key, []).append(trial.scores["score"]["mean"])
        assert scores.keys() == readings.keys()
        best = max((t for t in made.measured() if not t.plan.is_native), key=lambda t: np.mean(readings[t.key]))
        real = float(np.exp(-5 * harm(best.plan, truth)))
        cursed.append(float(np.mean(readings[best.key])) - real)
        cured.append(scores[best.key] * knapsack.full("score") - real)
    assert np.mean(cursed) > 0.03
    assert abs(np.mean(cured)) < np.mean(cursed) / 2


def test_the_best_reading_is_verified_beside_the_best_belief(tmp_path: Path) -> None:
    """What is believed starts from scores, which may be wrong: then a plan that was measured to be good ranks low."""
    others = 0
    for seed in range(6):
        made, truth = study(tmp_path / str(seed), 0.07, 12, seed)
        wrong = {name: truth[other] for name, other in zip(NAMES, (*NAMES[1:], NAMES[0]), strict=True)}
        expected.save(made.path, wrong, "planted")
        request = PlanRequest((9.0,), {"score": 1.0}, top=2)
        fitting = [t for t in made.measured() if t.bpw <= 9.0]
        shares = predicted_shares(made, Knapsack.of(made, ["score"]), {"score": 1.0})
        read = max(fitting, key=lambda t: t.scores["score"]["mean"])
        others += read.key != max(fitting, key=lambda t: shares[t.key]).key
        ((found, _),) = candidates(made, request, [])
        assert read.plan in [one.plan for one in found]
        assert len(found) == 2
    assert others > 1


def test_scores_that_are_the_truth_foretell_every_plan(tmp_path: Path) -> None:
    made, truth = study(tmp_path / "s", 0.0, 40)
    found = agreement_of_scores(made, truth)
    assert isinstance(found, ScoreAgreement)
    assert found.rank_correlation == pytest.approx(1.0)
    assert found.plans == 39
    wrong = agreement_of_scores(made, {name: {s: -v for s, v in row.items()} for name, row in truth.items()})
    assert isinstance(wrong, ScoreAgreement)
    assert wrong.rank_correlation == pytest.approx(-1.0)
    assert wrong.error > 5 * found.error


def test_why_no_agreement_is_known_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few, truth = study(tmp_path / "few", 0.0, 3)
    assert agreement_of_scores(few, truth) == (
        f"2 of 2 quantized plans in {few.path} hold only what is scored here; agreement needs 4"
    )
    many, truth = study(tmp_path / "many", 0.0, 40)
    none = {name: {} for name in truth}
    assert isinstance(agreement_of_scores(many, truth), ScoreAgreement)
    assert str(agreement_of_scores(many, none)).startswith(f"0 of 39 quantized plans in {many.path} hold only what is")
    assert "since others hold" in str(agreement_of_scores(many, none))
    print_attributions(
        [Attribution(name, truth, 1.0) for name in ("gram", "kl")],
        {"gram": agreement_of_scores(many, none)},
        Checks({"gram": Check(8, 0.5, None), "kl": Check(8, None, 1.0)}, 1.0),
    )
    said = capsys.readouterr().out
    assert said.count("0 of 39 quantized plans in") == 1
    assert "error: root mean square of what the prediction misses" in said
    assert "–: gram only orders plans, in no unit of damage" in said
    assert "–: too few sums of kl differ for a rank correlation (--check runs more plans)" in said
    one_width = {name: dict([next(iter(row.items()))]) for name, row in truth.items()}
    print_attributions([Attribution("kl", one_width, 1.0)], {}, Checks({"kl": Check(1, None, 1.0)}, 1.0))
    assert "differ for a rank correlation (plans of one width do not: name more, --bits)" in capsys.readouterr().out
    assert "rank correlation, study" not in said
    same = {name: dict.fromkeys(row, 0.0) for name, row in truth.items()}
    assert "have all the same score, or the same sum of scores" in str(agreement_of_scores(many, same))


def test_plans_are_proposed_until_there_are_enough_or_none_is_new(tmp_path: Path) -> None:
    made, _ = study(tmp_path / "s", 0.0, 3)
    known = [trial.plan for trial in made.trials()]
    new = [plan for plan in every_plan() if plan not in known]

    def run(trials: int, proposals: list[Plan]) -> list[Plan]:
        asked = []
        for plan in openings_then_proposals(made, [known[0], new[0], new[1]], lambda now: proposals, trials):
            asked.append(plan)
            made.append([plan], [{"score": 0.5}])
        return asked

    assert run(4, new) == [new[0]]  # an opening plan that was measured is not asked for again
    assert run(6, [*known, new[2]]) == [new[1], new[2]]
    assert run(9, new[:3]) == []
