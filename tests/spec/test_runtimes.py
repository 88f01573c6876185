"""What runtimes can load: breaches say which component and why, and searches obey them, as brute force shows."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest

from sensitivity.analysis.allocate.legal import plans_for
from sensitivity.spec.components import ComponentMap, Kept, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.loadable import allowed, restrict, searches
from sensitivity.spec.runtimes.rules import check, tied, violations
from sensitivity.spec.runtimes.table import RUNTIMES, abilities


def rtn(bits: int, group: int | str = "row", symmetric: bool = True, method: str = "rtn") -> Scheme:
    return Scheme(method, bits, group, symmetric)


def linear(name: str, part: str, kind: str, block: int, shares: str | None, rows: int = 64, cols: int = 64) -> Weight:
    return Weight(f"{name}.weight", rows, cols, part, block, 2, kind, shares_input=shares)


def model(by: str = "linear", odd: int = 64) -> ComponentMap:
    weights = []
    for part in ("vision", "language"):
        for block in range(2):
            at = f"{part}.{block}"
            weights += [linear(f"{at}.attn.{n}", part, "attn", block, f"{at}.attn") for n in ("q", "k", "v")]
            weights += [linear(f"{at}.mlp.{n}", part, "ff", block, f"{at}.mlp") for n in ("gate", "up")]
            weights.append(linear(f"{at}.mlp.down", part, "ff", block, None, cols=odd if part == "vision" else 64))
    return ComponentMap("small", by, tuple(weights), (Kept("head", 64, "output head", "language"),))


def test_every_runtime_takes_full_precision() -> None:
    parts = model()
    for name in RUNTIMES:
        assert violations(parts, Plan.uniform(parts, None), name) == []


@pytest.mark.parametrize(
    ("name", "scheme", "says"),
    [
        ("compressed-tensors", rtn(4), None),
        ("compressed-tensors", rtn(3, 32), None),
        ("compressed-tensors", rtn(4, "tensor", False), None),
        ("compressed-tensors", rtn(1), "symmetric codes of 2, 3, 4, 5, 6, 7, 8 bits, not 1"),
        ("compressed-tensors", rtn(4, "row", False), "zero points at --group tensor, not at --group row; use --symm"),
        ("compressed-tensors", rtn(4, "tensor", False, "uniform"), "use --method rtn, or --format fake"),
        ("compressed-tensors", rtn(4, 32, True, "awq"), "no place for the factor per input"),
        ("modelopt", rtn(4, 32, True, "awq"), None),
        ("compressed-tensors", rtn(4, 48), "groups of 48 do not divide rows of 64 weights; use --group row"),
        ("vllm", rtn(3, 32), None),
        ("vllm", rtn(3, 32, False), "asymmetric codes of 4, 8 bits, not 3"),
        ("vllm", rtn(4, 16), "groups of row, 32, 64, 128 at 4 bits, not 16"),
        ("gptq", rtn(5, 32, False), None),
        ("gptq", rtn(1), "not 1"),
        ("awq", rtn(4, 32, False), None),
        ("awq", rtn(3, 32), "symmetric codes of 4 bits, not 3"),
        ("auto-round", rtn(4, 32, False), "AutoRound loads no asymmetric codes; use --symmetric"),
        ("bnb", rtn(4), "use --method nf4 at 4 bits or llm-int8 at 8"),
        ("bnb", rtn(4, 64, True, "nf4"), None),
        ("torchao", rtn(3, "tensor"), "not one per tensor; use --group row"),
        ("modelopt", rtn(4), "groups of 32, 64, 128 at 4 bits, not row"),
        ("modelopt", rtn(8), None),
        ("llama.cpp", rtn(3), "columns in multiples of 256 at 3 bits"),
        ("llama.cpp", rtn(4), None),
        ("mlx", rtn(4), "MLX (mlx-lm, mlx-vlm) loads no symmetric codes; use --no-symmetric"),
        ("mlx", rtn(4, 64, False), None),
        ("fake", rtn(1, "tensor", False, "uniform"), None),
        ("plan", replace(rtn(3), activations=4, cache=2), None),
        ("compressed-tensors", replace(rtn(8), activations=8), None),
        ("compressed-tensors", replace(rtn(4), activations=8), None),
        (
            "compressed-tensors",
            replace(rtn(4), activations=4),
            "of these bits: 8 beside 4-bit weights, 8 beside 8-bit weights; not 4 beside 4-bit weights",
        ),
        ("compressed-tensors", replace(rtn(4, 32), activations=8), "a scale per row; use --symmetric --group row"),
        ("vllm", replace(rtn(8), activations=8), None),
        ("vllm", replace(rtn(4), activations=8), "8 beside 8-bit weights; not 8 beside 4-bit weights"),
        ("gptq", replace(rtn(4), activations=8), "cannot say that activations are rounded; sweep without"),
        (
            "fake",
            replace(rtn(4), activations=8),
            "plain weights cannot say that activations are",
        ),
        ("vllm", replace(rtn(8), cache=8), "no place for a rounded cache; sweep without --cache-bits"),
    ],
)
def test_a_uniform_plan_is_legal_or_told_why_not(name: str, scheme: Scheme, says: str | None) -> None:
    parts = model()
    found = violations(parts, Plan.uniform(parts, scheme), name)
    if says is None:
        assert found == []
    else:
        assert any(says in line for line in found), found


def test_only_the_components_that_break_a_rule_are_named() -> None:
    parts = model("group.kind", odd=40)
    (found,) = violations(parts, Plan.uniform(parts, rtn(4, 64)), "compressed-tensors")
    named = [component.name for component in parts.match("vision*ff")]
    assert found.startswith(", ".join(f"{name} (rtn:4)" for name in named) + ": groups of 64 do not divide rows of 40")


def test_a_method_that_is_not_stored_is_the_only_thing_that_is_said() -> None:
    """Another method has another grid; and of many parts, a few are named."""
    parts = model("group.kind")
    (found,) = violations(parts, Plan.uniform(parts, Scheme("uniform", 3, group="tensor")), "awq")
    first, *others = parts.names
    assert found.startswith(f"{first} (uniform:3), ")
    assert f" and {len(others) - 3} more: AutoAWQ's layout cannot hold what uniform stores; use --method rtn" in found
    told = violations(parts, Plan.uniform(parts, rtn(3, 512)), "awq")
    assert any(one.endswith("AutoAWQ's layout loads symmetric codes of 4 bits, not 3") for one in told)
    assert not any("takes groups" in one for one in told)  # those of 3 bits mean nothing there


def test_biases_are_kept_by_packed_formats() -> None:
    parts = model()
    plan = Plan.uniform(parts, Scheme("rtn", 4, settings=(("biases", True),)))
    assert "keeps biases in full precision" in violations(parts, plan, "compressed-tensors")[0]
    assert violations(parts, plan, "fake") == []


def test_what_becomes_one_layer_must_share_a_scheme() -> None:
    parts = model()
    groups = tied(parts, "vllm")
    assert ("vision.0.attn.q", "vision.0.attn.k", "vision.0.attn.v") in groups
    assert len(groups) == 8
    assert not any("vision.0.mlp.down" in group for group in groups)
    plan = Plan.of(parts, {"vision.0.attn.q": rtn(8)}, rtn(4))
    (found,) = violations(parts, plan, "vllm")
    assert "vision.0.attn.q at rtn:8" in found
    assert "must have one scheme" in found
    assert violations(parts, plan, "compressed-tensors") == []


def test_coarser_components_are_tied_only_where_they_split_a_layer() -> None:
    assert tied(model("kind"), "vllm") == []
    assert tied(model("linear"), "gptq") == []


def test_one_scheme_for_all_where_a_runtime_has_one() -> None:
    parts = model("part")
    mixed = Plan.of(parts, {"vision": rtn(4, 32)}, rtn(4, 64))
    assert any("one for all that is quantized" in line for line in violations(parts, mixed, "awq"))
    assert violations(parts, Plan.of(parts, {"vision": None}, rtn(4, 64)), "awq") == []


@pytest.mark.parametrize("name", list(RUNTIMES))
def test_allowed_and_tied_say_the_same_as_breaches(name: str) -> None:
    """Brute force: over all plans of a small model, those without breaches are those that some search would visit."""
    parts = ComponentMap(
        "tiny",
        "linear",
        tuple(linear(n, "language", "attn", 0, "attn" if n in "qk" else None) for n in ("q", "k", "o")),
        (),
    )
    choices = [None, rtn(4), rtn(3), rtn(4, 32, False), rtn(8, 64, True, "nf4"), rtn(4, 64, True, "nf4")]
    ties = tied(parts, name)
    looks = searches(parts, name, choices)
    for chosen in itertools.product(choices, repeat=3):
        plan = Plan(tuple(zip(parts.names, chosen, strict=True)))
        found = any(
            all(fine(component, scheme) for component, scheme in plan.schemes)
            and all(len({plan[member] for member in group}) == 1 for group in ties)
            for fine in looks
        )
        assert found == (violations(parts, plan, name) == []), (name, plan.describe())


@pytest.mark.parametrize("how", ["grid", "one-at-a-time", "random"])
@pytest.mark.parametrize("name", list(RUNTIMES))
def test_a_sweep_for_a_runtime_tries_legal_plans_alone(name: str, how: str) -> None:
    """Brute force: a grid tries all legal plans without native parts; other lists try none that is illegal."""
    parts = ComponentMap(
        "tiny",
        "linear",
        tuple(linear(n, "language", "attn", 0, "attn" if n in "qk" else None) for n in ("q", "k", "o")),
        (),
    )
    every = [rtn(3), rtn(4), rtn(4, 32, False), rtn(8, "row"), rtn(8, 64, True, "nf4"), rtn(4, 64, True, "nf4")]
    usable, left_out = restrict(parts, every, name)
    assert [s for s in every if not violations(parts, Plan.uniform(parts, s), name)] == usable
    assert len(usable) == len(every) or left_out
    found = plans_for(name, parts, usable, how, trials=None if how == "grid" else 20)
    assert isinstance(found, list)
    assert not [plan.describe() for plan in found if violations(parts, plan, name)]
    if how == "grid":
        rows = (Plan(tuple(zip(parts.names, row, strict=True))) for row in itertools.product(every, repeat=3))
        legal = {plan for plan in rows if not violations(parts, plan, name)}
        assert set(found) == legal | {Plan.uniform(parts, None)}


def test_what_a_runtime_leaves_out_is_said_with_the_rule() -> None:
    parts = model("group.kind", odd=40)
    usable, left_out = restrict(parts, [rtn(4), rtn(4, 64), rtn(1)], "compressed-tensors")
    assert usable == [rtn(4), rtn(4, 64)]
    assert any(line.startswith("rtn:1 of all parts: ") and "not 1" in line for line in left_out)
    assert any(line.startswith("rtn:4 of vision") and "do not divide rows of 40" in line for line in left_out)
    _, ties = restrict(model("linear"), [rtn(4)], "vllm")
    assert any(line.startswith("vision.0.attn.q, vision.0.attn.k, vision.0.attn.v share their scheme") for line in ties)


def test_a_space_that_a_runtime_cannot_load_is_refused_with_the_rule() -> None:
    parts = model("part")
    with pytest.raises(UserError, match=r"awq can load none of these schemes: rtn:3 of all parts: .* not 3"):
        restrict(parts, [rtn(3)], "awq")
    only_three = {"vision": 3}
    wanted = lambda name, scheme: scheme is not None and scheme.bits == only_three.get(name, scheme.bits)  # noqa: E731
    with pytest.raises(UserError, match=r"awq can load none of the schemes allowed for vision: .* not 3"):
        restrict(parts, [rtn(3), rtn(4)], "awq", wanted)


def test_a_search_cannot_walk_where_all_must_be_alike() -> None:
    parts = model("part")
    both = [rtn(4, 64, True, "nf4"), rtn(8, "row", True, "llm-int8")]
    usable, _ = restrict(parts, both, "bnb")
    assert usable == both
    with pytest.raises(UserError, match=r"bnb takes one scheme for all .* give one width with --bits, or use --search"):
        plans_for("bnb", parts, usable, "tpe")
    assert callable(plans_for("bnb", parts, usable[:1], "tpe"))


@pytest.mark.parametrize("name", list(RUNTIMES))
def test_abilities_name_what_is_legal(name: str) -> None:
    """The words are flags; what they say of a width is true of some group."""
    words = abilities(name)
    parts = model("part")
    for flag, symmetric in (("--symmetric", True), ("--no-symmetric", False)):
        bits = re.search(rf"(?<!\S){flag}(?: --group \S+)? --bits (\d+(?:,\d+)*)", words)
        for width in [int(b) for b in bits[1].split(",")] if bits else []:
            tried = [
                rtn(width, group, symmetric, method)
                for group in ("row", "tensor", 16, 32, 64)
                for method in ("rtn", "nf4", "llm-int8")
            ]
            wide = name == "llama.cpp" and width in (2, 3, 6)  # needs rows of 256
            assert wide or any(not violations(parts, Plan.uniform(parts, one), name) for one in tried), (width, words)


def test_an_illegal_plan_is_an_error_that_names_the_way_out() -> None:
    parts = model("part")
    with pytest.raises(UserError, match=r"vision \(rtn:1\), language \(rtn:1\): .*`sensitivity legalize`"):
        check(parts, Plan.uniform(parts, rtn(1)), "gptq")


def test_an_unknown_runtime_is_told_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown runtime 'vlm'; choose from plan, .* \(did you mean vllm\?\)"):
        allowed(model(), "vlm")
