"""Schemes, plans and what they weigh, against sizes counted by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sensitivity.spec.components import ComponentMap, Kept, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.headers import bpw_in_gb
from sensitivity.spec.sizes import GB, bits_in_bytes, budget_bits, bytes_in_words, choice_bits, kept_bits, size
from sensitivity.spec.stored_bits import OVERHEAD, groups


@pytest.fixture
def parts() -> ComponentMap:
    weights = [Weight(f"v.{i}.{kind}.weight", 6, 10, "vision", i, 3, kind) for i in range(3) for kind in ("attn", "ff")]
    weights += [Weight("p.weight", 4, 6, "connector", None, 0, None, bias="p.bias")]
    kept = (Kept("emb", 100, "embedding"), Kept("p.bias", 4, "bias"))
    return ComponentMap("toy", "part", tuple(weights), kept)


def test_native_plan_weighs_sixteen_bits(parts: ComponentMap) -> None:
    weight = size(parts, Plan.uniform(parts, None))
    assert weight.bpw == weight.bpw_codes == 16
    assert weight.bytes == 2 * (6 * 60 + 24 + 104)


@pytest.mark.parametrize(
    ("scheme", "overhead"),
    [
        (Scheme("rtn", 4, "row", True), 6 * 16),
        (Scheme("rtn", 4, "row", False), 6 * (16 + 4)),
        (Scheme("rtn", 4, "tensor", True), 16),
        (Scheme("rtn", 3, 4, False), 6 * 3 * (16 + 3)),  # 10 columns in groups of 4, 4 and 2
        (Scheme("uniform", 4, "tensor", False), 64),
    ],
)
def test_all_that_is_stored_is_counted(parts: ComponentMap, scheme: Scheme, overhead: int) -> None:
    plan = Plan.of(parts, {"vision": scheme})
    bits = 6 * (60 * scheme.bits + overhead) + 16 * (24 + 104)
    assert size(parts, plan).bits == bits
    assert size(parts, plan).bpw_codes == (360 * scheme.bits + 16 * 128) / 488


def test_bits_of_choices_add_up_to_the_size_of_every_plan(parts: ComponentMap) -> None:
    options = [None, Scheme("rtn", 4, 4, False), Scheme("uniform", 2, "tensor", False)]
    bits = choice_bits(parts, [(name,) for name in parts.names], [options] * len(parts.names))
    together = choice_bits(parts, [parts.names], [options])[0]
    for i, first in enumerate(options):
        for j, second in enumerate(options):
            plan = Plan(tuple(zip(parts.names, (first, second), strict=True)))
            assert size(parts, plan).bits == kept_bits(parts) + bits[0][i] + bits[1][j]
        assert together[i] == bits[0][i] + bits[1][i]


def test_budgets_in_bits_per_weight_and_in_bytes(parts: ComponentMap) -> None:
    assert parts.numel == 488
    assert budget_bits(parts, 4.125) == 2013  # 4.125 * 488 is a whole number of bits
    assert budget_bits(parts, 4.1) == 2000  # and 2000.8 is not
    assert budget_bits(parts, size(parts, Plan.uniform(parts, None)).bpw) == 16 * 488
    assert bits_in_bytes(12.5) == 100
    assert bpw_in_gb(parts, 488 / GB) == pytest.approx(8)
    assert bpw_in_gb(parts, 488 / GB, headers=244) == pytest.approx(4)
    assert bpw_in_gb(parts, 0.0, headers=244) > 0  # a budget below the headers is a budget that nothing fits


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (999_999, "1000 kB"),
        (1.83e6, "1.83 MB"),
        (18.3e6, "18.3 MB"),
        (183e6, "183 MB"),
        (13.5e9, "13.5 GB"),
    ],
)
def test_bytes_in_words(count: float, words: str) -> None:
    assert bytes_in_words(count) == words


def test_quantized_biases_are_counted(parts: ComponentMap) -> None:
    with_biases = Scheme("uniform", 4, "tensor", False, (("biases", True),))
    without = Scheme("uniform", 4, "tensor", False)
    difference = size(parts, Plan.of(parts, {"connector": with_biases})).bits
    difference -= size(parts, Plan.of(parts, {"connector": without})).bits
    assert difference == 4 * (4 - 16) + 64


def test_native_bits_of_a_float32_checkpoint_count(parts: ComponentMap) -> None:
    from dataclasses import replace

    wide = replace(parts, native_bits=32)
    assert size(wide, Plan.uniform(wide, None)).bpw == 32
    assert size(wide, Plan.uniform(wide, None)).bpw_codes == 16  # the papers' convention


def test_groups_of_a_row_that_they_do_not_divide() -> None:
    assert groups(Scheme("rtn", 4, 128), 10, 300) == 30
    assert groups(Scheme("rtn", 4, 128), 10, 64) == 10


def test_the_last_pattern_that_matches_wins(parts: ComponentMap) -> None:
    fine = parts.regroup("group.kind")
    four, eight = Scheme("rtn", 4), Scheme("rtn", 8)
    plan = Plan.of(fine, {"*": eight, "vision": four, "*.attn": None})
    assert plan["connector"] == eight
    assert plan["vision.front.ff"] == four
    assert plan["vision.end.attn"] is None


def test_a_pattern_that_matches_nothing_is_an_error(parts: ComponentMap) -> None:
    with pytest.raises(UserError, match="no component matches 'visual'; there are vision, connector"):
        Plan.of(parts, {"visual": None})


def test_json_round_trip(parts: ComponentMap) -> None:
    plan = Plan.of(parts, {"vision": Scheme("gptq", 3, 128, False, (("damp", 0.01), ("act_order", True)))})
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.key == plan.key


def test_key_is_the_same_in_another_process(parts: ComponentMap) -> None:
    code = (
        "from sensitivity.spec.plan import *; "
        "print(Plan((('vision', Scheme('rtn', 4, 128, False, (('b', 1), ('a', 2)))), ('connector', None))).key)"
    )
    keys = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    settings = (("a", 2), ("b", 1))
    here = Plan((("vision", Scheme("rtn", 4, 128, False, settings)), ("connector", None))).key
    assert keys == {here + "\n"}


def test_key_depends_on_every_field() -> None:
    schemes = [
        Scheme("rtn", 4), Scheme("rtn", 3), Scheme("uniform", 4), Scheme("rtn", 4, 64), Scheme("rtn", 4, "row", False),
        Scheme("rtn", 4, "row", True, (("damp", 1),)), None,
    ]  # fmt: skip
    assert len({Plan((("vision", scheme),)).key for scheme in schemes}) == len(schemes)


@pytest.mark.parametrize("bits", [0, 17, 2.5, True, "4"])
def test_bits_outside_the_range(bits: object) -> None:
    with pytest.raises(UserError, match="bits must be a whole number from 1 to 16"):
        Scheme("rtn", bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("group", [0, -1, "rows"])
def test_groups_that_make_no_sense(group: object) -> None:
    with pytest.raises(UserError, match="group must be 'tensor', 'row' or a number of columns"):
        Scheme("rtn", 4, group)  # type: ignore[arg-type]


def test_an_unknown_field_of_a_stored_scheme_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown scheme field 'bitz'.*did you mean bits"):
        Scheme.from_json({"method": "rtn", "bits": 4, "bitz": 3})


def test_a_plan_for_another_model_is_refused(parts: ComponentMap) -> None:
    with pytest.raises(UserError, match=r"the plan is for other components: missing .*connector.*unknown .*audio"):
        size(parts, Plan((("vision", None), ("audio", None))))


def test_every_method_counts_its_bits() -> None:
    from sensitivity.quantize.methods import METHODS

    assert set(METHODS) <= set(OVERHEAD)
