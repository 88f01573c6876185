"""Names, thirds, granularities, and the rule that no weight is lost."""

from __future__ import annotations

import json

import pytest

from sensitivity.spec.components import GRANULARITIES, ComponentMap, Kept, Weight, check
from sensitivity.spec.errors import UserError


def tower(part: str, blocks: int) -> list[Weight]:
    kinds = {"q": "attn", "fc": "ff"}
    return [
        Weight(f"{part}.{i}.{name}.weight", 2, 3, part, i, blocks, kind)
        for i in range(blocks)
        for name, kind in kinds.items()
    ]


@pytest.mark.parametrize(("blocks", "sizes"), [(39, (13, 13, 13)), (12, (4, 4, 4)), (32, (10, 11, 11)), (2, (0, 1, 1))])
def test_thirds(blocks: int, sizes: tuple[int, int, int]) -> None:
    groups = [weight.group for weight in tower("vision", blocks) if weight.kind == "attn"]
    assert tuple(groups.count(name) for name in ("front", "middle", "end")) == sizes
    assert groups == sorted(groups, key=("front", "middle", "end").index)


def test_components_come_in_data_flow_order_and_a_coarser_map_is_a_union() -> None:
    weights = (*tower("language", 3), Weight("p.weight", 2, 2, "connector", None, 0, None), *tower("vision", 12))
    fine = ComponentMap("toy", "linear", weights, ())
    assert fine.regroup("part").names == ("vision", "connector", "language")
    assert fine.regroup("kind").names == ("vision.attn", "vision.ff", "connector", "language.attn", "language.ff")
    assert fine.regroup("block").names[:2] == ("vision.00", "vision.01")
    for by in GRANULARITIES:
        assert sorted(w.name for c in fine.regroup(by).components for w in c.weights) == sorted(w.name for w in weights)


def test_what_stands_outside_the_blocks_has_a_name_of_its_own() -> None:
    outside = (
        Weight("proj.weight", 2, 2, "connector", None, 12, None),
        Weight("pool.weight", 2, 2, "vision", None, 3, "ff"),
    )
    parts = ComponentMap("toy", "group.kind", outside, ())
    assert parts.names == ("vision.other", "connector.projection")


def test_json_round_trip() -> None:
    parts = ComponentMap("toy", "block", tuple(tower("vision", 3)), (Kept("e", 5, "embedding", "language"),), 32)
    assert ComponentMap.from_json(json.loads(json.dumps(parts.to_json()))) == parts


def test_lost_doubled_and_invented_weights_are_errors() -> None:
    weights = tower("vision", 3)
    parameters = {weight.name: weight.numel for weight in weights}
    check(weights, [], parameters)
    with pytest.raises(UserError, match=r"weights in no component and not kept: lost\.weight"):
        check(weights, [], {**parameters, "lost.weight": 1})
    with pytest.raises(UserError, match=r"weights placed twice: vision\.0\.q\.weight"):
        check(weights, [Kept("vision.0.q.weight", 6, "norm")], parameters)
    with pytest.raises(UserError, match=r"weights not in the model: ghost"):
        check(weights, [Kept("ghost", 6, "norm")], parameters)


def test_messages_name_the_choices() -> None:
    parts = ComponentMap("toy", "part", tuple(tower("vision", 3)), ())
    with pytest.raises(UserError, match=r"unknown granularity 'parts'; choose from part, .* \(did you mean part\?\)"):
        parts.regroup("parts")
    with pytest.raises(UserError, match=r"unknown component 'visoin'; choose from vision \(did you mean vision\?\)"):
        parts["visoin"]
