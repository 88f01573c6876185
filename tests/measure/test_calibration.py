"""Calibration: every layer of every family sees its tokens once and knows what they are; both paths; the cache."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fed_vlms import FAMILIES, built, fed
from few import few
from PIL import Image
from torch import Tensor, nn

from sensitivity.api.sweeping import with_calibration as calibrated_
from sensitivity.measure.calibrate.cache import Cache
from sensitivity.measure.calibrate.calibration import (
    calibration_examples,
    calibration_statistics,
    gather_exposed,
    gather_float,
    over_images,
)
from sensitivity.measure.calibrate.collecting import collect
from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.install.plan_in_model import prepare, quantized
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.measure.passes.token_batches import (
    ANSWER,
    MODALITIES,
    PADDING,
    VISION,
    TokenBatch,
    _stacked,
    answer_batches,
    calibration_pass,
)
from sensitivity.models.discovery import inspect
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import Linears, input_of
from sensitivity.quantize.methods import METHODS
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import Notice, UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.tasks.examples.types import Example, Task
from sensitivity.tasks.table import task

N = 20


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def parts(scenes_llava: VLM) -> ComponentMap:
    return inspect(scenes_llava, by="part")


@pytest.fixture(scope="module")
def statistics(scenes_llava: VLM, parts: ComponentMap) -> Statistics:
    return calibration_statistics(scenes_llava, parts, ["vqa", "caption"], n=N)


# -- one pass, all layers


def test_statistics_are_what_a_plain_loop_over_examples_finds(
    scenes_llava: VLM, parts: ComponentMap, statistics: Statistics
) -> None:
    """One example at a time, one hook on every single layer, and everything multiplied out in double precision."""
    seen: dict[str, Tensor] = {}
    handles = []
    for weight in parts.weights:

        def hook(module: nn.Module, args: tuple[Tensor, ...], name: str = weight.name) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            seen[name] = seen.get(name, 0) + x.T @ x

        handles.append(scenes_llava.model.get_submodule(weight.module).register_forward_pre_hook(hook))
    for drawn in calibration_examples(["vqa", "caption"], N, 0):
        for example in drawn.examples:
            text = scenes_llava.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.prompt}]}],
                add_generation_prompt=True,
            )
            text += " " + example.answers[0]
            picture = Image.fromarray(example.image)  # type: ignore[arg-type]
            inputs = scenes_llava.processor(images=[picture], text=[text], return_tensors="pt")
            with torch.inference_mode():
                scenes_llava.model(**inputs)
    for handle in handles:
        handle.remove()
    found = statistics.gather(parts.weights)
    for weight in parts.weights:
        gram = found[input_of(weight)].gram
        scale = float(gram.diagonal().max())
        torch.testing.assert_close(gram.double() / scale, seen[weight.name] / scale, rtol=0, atol=1e-5)


def test_every_token_is_counted_once_by_what_it_is(
    scenes_llava: VLM, parts: ComponentMap, statistics: Statistics
) -> None:
    tokenizer = scenes_llava.processor.tokenizer
    examples = [e for drawn in calibration_examples(["vqa", "caption"], N, 0) for e in drawn.examples]
    words = [len(tokenizer(e.prompt, add_special_tokens=False)["input_ids"]) + 1 for e in examples]  # and <answer>
    said = [len(tokenizer(e.answers[0], add_special_tokens=False)["input_ids"]) for e in examples]
    found = statistics.gather(parts.weights)
    for weight in parts.weights:
        counts = dict(zip(MODALITIES, found[input_of(weight)].modalities.tolist(), strict=True))
        if weight.part == "language":
            assert counts == {"padding": 0, "vision": 36 * N, "prompt": sum(words), "answer": sum(said)}
        else:
            patches = 37 if weight.part == "vision" else 36
            assert counts == {"padding": 0, "vision": patches * N, "prompt": 0, "answer": 0}
        assert found[input_of(weight)].tokens == sum(counts.values())


def test_padding_never_counts(scenes_llava: VLM, parts: ComponentMap) -> None:
    (batch,) = answer_batches(scenes_llava, [task("vqa", "calibration", 1, 0)])
    language = [w for w in parts.weights if w.part == "language"]
    plain = collect(scenes_llava, language, [batch])
    (_, text), said = batch.sequences[0], batch.sequences[1]
    more = dict(batch.inputs)
    for name, fill in (("input_ids", 0), ("attention_mask", 0)):
        value = more[name]
        more[name] = torch.cat([value, torch.full((1, 5), fill, dtype=value.dtype)], dim=1)
    wider = torch.cat([text, torch.full((1, 5), PADDING)], dim=1)
    padded = collect(scenes_llava, language, [TokenBatch(more, [("language", wider), said])])
    for name, found in padded.items():
        assert found.tokens == plain[name].tokens
        assert found.modalities[PADDING] == 5
        torch.testing.assert_close(found.gram, plain[name].gram, rtol=1e-3, atol=1e-3)


def test_examples_are_put_together_only_where_nothing_needs_padding(scenes_llava: VLM) -> None:
    made = list(
        answer_batches(scenes_llava, [task("vqa", "calibration", 40, 0), task("caption", "calibration", 10, 0)])
    )
    assert sum(len(batch.sequences[0][1]) for batch in made) == 50
    assert len(made) < 50
    for batch in made:
        assert batch.inputs["attention_mask"].all()
        assert batch.sequences[0][1].shape == batch.inputs["input_ids"].shape


# -- families


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_of_a_family_sees_tokens_and_takes_every_method(name: str) -> None:
    vlm = built(name)
    parts, batch = inspect(vlm, by="part"), fed(name, vlm)
    found = collect(vlm, parts.weights, [batch])
    assert {input_of(weight) for weight in parts.weights} == set(found)
    for weight in parts.weights:
        modality = found[input_of(weight)].modalities
        assert modality[VISION] > 0 or weight.part != "vision"
        if weight.part == "language" and weight.kind == "ff" and vlm.encoder_decoder and "decoder" in weight.name:
            assert modality.tolist() == [0, 0, 0, 8]
    facts = {"path": "float"}
    statistics = Statistics(facts, lambda weights, done=None: {input_of(w): found[input_of(w)] for w in weights})
    chosen = {
        part: scheme(method, 3, calibration=facts)
        for part, method in zip(parts.names, ("gptq", "awq", "clip"), strict=False)
    }
    with quantized(vlm.model, parts, Plan.of(parts, chosen), statistics=statistics) as changed, torch.no_grad():
        assert changed == {weight.name for weight in parts.weights}
        calibration_pass(vlm, batch)


def test_every_mask_grows_with_the_answer() -> None:
    vlm = built("mllama")
    rows = fed("mllama", vlm).inputs
    batch = _stacked(vlm, [(i, {name: t[i : i + 1] for name, t in rows.items()}, [7, 8, 9, 1]) for i in range(2)])
    assert batch.inputs["cross_attention_mask"].shape[:2] == batch.inputs["input_ids"].shape
    language = [weight for weight in inspect(vlm).weights if weight.part == "language"]
    (found,) = collect(vlm, language[:1], [batch]).values()
    assert found.modalities[ANSWER] == 6


# -- block by block


def alike(a: Mapping[str, Curvature], b: Mapping[str, Curvature]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name].gram, b[name].gram) and a[name].modalities.tolist() == b[name].modalities.tolist()
        for name in a
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_block_by_block_is_bit_for_bit_what_whole_passes_find(name: str) -> None:
    """On the float model, and on one whose blocks change on the way: feature layers, second stacks and all."""
    vlm = built(name)
    parts, batch = inspect(vlm, by="block"), fed(name, vlm)
    few = gather_float(vlm, parts, lambda _: [batch], {}, None, gram_bytes=0)
    sequential = gather_exposed(vlm, parts, lambda _: [batch])
    found = collect(vlm, parts.weights, [batch])
    done: list[tuple[str, Scheme]] = []
    for component in parts.components:
        asked = few(component.weights)
        assert alike(asked, {shared: found[shared] for shared in asked})
    for i, component in enumerate(parts.components):
        on_the_way = sequential(component.weights, done)
        if i % 3 == 2 or component.weights[0].block is None:
            assert alike(on_the_way, collect(vlm, component.weights, [batch]))
        for weight in component.weights:
            vlm.model.get_parameter(weight.name).data.mul_(0.9)
        done += [(weight.name, scheme("rtn", 4)) for weight in component.weights]


def test_each_block_runs_twice_at_most_and_nothing_behind_it(scenes_llava: VLM, parts: ComponentMap) -> None:
    """Once to be seen, once more when it is quantized: the sequential path costs two passes, not one for each block."""
    finer, calls = parts.regroup("block"), Counter()
    data = [task("vqa", "calibration", 1, 0)]
    sequential = gather_exposed(scenes_llava, finer, lambda _: answer_batches(scenes_llava, data))
    sequential(finer.components[0].weights, [])  # finds out what may be skipped
    one = [next(w for w in c.weights) for c in finer.components if c.weights[0].block is not None]
    handles = [
        scenes_llava.model.get_submodule(w.module).register_forward_hook(lambda *_, name=w.name: calls.update([name]))
        for w in one
    ]
    done: list[tuple[str, Scheme]] = []
    for component in finer.components:
        sequential(component.weights, done)
        done += [(weight.name, scheme("rtn", 4)) for weight in component.weights]
    for handle in handles:
        handle.remove()
    loose = len(finer.components) - len(one)  # what stands outside of blocks may be read at the end
    assert max(calls.values()) <= 2 + loose
    assert calls[one[0].name] == 2


def test_another_plan_starts_where_it_differs(scenes_llava: VLM, parts: ComponentMap) -> None:
    """What was kept of one plan is not taken for what another would have: also after a plan that nobody described."""
    finer = parts.regroup("block")
    data = [task("vqa", "calibration", 2, 0)]
    sequential = gather_exposed(scenes_llava, finer, lambda rows: answer_batches(scenes_llava, data, rows))
    plain = lambda weights, done=None: collect(scenes_llava, weights, answer_batches(scenes_llava, data))  # noqa: E731
    facts = {"path": "exposed"}
    three, two = (scheme("gptq", bits, order="given", clip=False, calibration=facts) for bits in (3, 2))
    first, middle, last = finer.names[1], finer.names[4], finer.names[-1]
    plans = [
        {first: three, last: three},
        {first: two, last: three},
        {first: two, middle: two, last: three},
        {last: three},
    ]
    for plan in plans:
        fast, slow = (
            installed(scenes_llava, finer, Plan.of(finer, plan), WeightCodes(), Statistics(facts, gather))
            for gather in (sequential, plain)
        )
        assert same(fast, slow)
    name = finer[first].weights[0].name
    own = scenes_llava.model.get_parameter(name).data
    scenes_llava.model.get_parameter(name).data = own * 0.5
    try:
        assert alike(sequential(finer[last].weights), plain(finer[last].weights))
    finally:
        scenes_llava.model.get_parameter(name).data = own


def test_what_a_pass_through_an_unknown_model_recorded_is_never_replayed(
    scenes_llava: VLM, parts: ComponentMap
) -> None:
    """A pass that was not told what is quantized may have seen anything, so it is no pass through the float model."""
    finer = parts.regroup("block")
    data = [task("vqa", "calibration", 2, 0)]
    sequential = gather_exposed(scenes_llava, finer, lambda rows: answer_batches(scenes_llava, data, rows))
    first, last = finer.components[0].weights, finer.components[-1].weights
    weight = scenes_llava.model.get_parameter(first[0].name)
    own = weight.data
    weight.data = own * 0.5
    try:
        sequential(last)
    finally:
        weight.data = own
    expected = collect(scenes_llava, last, answer_batches(scenes_llava, data))
    assert alike(sequential(last, ()), expected)


def test_no_more_matrices_are_held_than_there_is_room_for(
    scenes_llava: VLM, parts: ComponentMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest block's worth at a time, and the same quantized weights."""
    alive: weakref.WeakSet[Curvature] = weakref.WeakSet()
    most = [0]
    start = Curvature.__init__

    def counting(self: Curvature, *how: Any) -> None:
        start(self, *how)
        alive.add(self)
        most[0] = max(most[0], sum(4 * one.width**2 for one in alive))

    whole = calibration_statistics(scenes_llava, parts, ["vqa"], n=3)
    monkeypatch.setattr(Curvature, "__init__", counting)
    little = calibration_statistics(scenes_llava, parts, ["vqa"], n=3, gram_bytes=0)
    finer = parts.regroup("block")
    blocks = [sum(4 * w.cols**2 for w in {input_of(w): w for w in c.weights}.values()) for c in finer.components]
    plan = Plan.uniform(finer, scheme("gptq", 3, calibration=whole.facts))
    found = installed(scenes_llava, finer, plan, WeightCodes(), little)
    assert 0 < most[0] <= max(blocks) < sum(blocks) / 5
    assert same(found, installed(scenes_llava, finer, plan, WeightCodes(), whole))


def test_a_q_former_that_reads_the_question_knows_it_from_its_queries() -> None:
    vlm = built("instructblip")
    parts = inspect(vlm)
    found = collect(vlm, parts.weights, [fed("instructblip", vlm)])
    seen = {w.name: found[input_of(w)].modalities.tolist() for w in parts.weights if w.part == "connector"}
    assert seen["qformer.encoder.layer.0.attention.attention.query.weight"] == [1, 64, 5, 0]
    assert seen["qformer.encoder.layer.0.intermediate.dense.weight"] == [1, 0, 5, 0]
    assert seen["qformer.encoder.layer.0.intermediate_query.dense.weight"] == [0, 64, 0, 0]
    assert seen["qformer.encoder.layer.0.crossattention.attention.key.weight"] == [0, 10, 0, 0]


def test_a_layer_without_tokens_is_named() -> None:
    vlm = built("blip2_retrieval")  # its text goes through the Q-Former, and here there is only an image
    weight = next(w for w in inspect(vlm).weights if "intermediate.dense" in w.name)
    with pytest.raises(UserError, match=f"{weight.name} received no token"):
        collect(vlm, [weight], [])


def test_inputs_that_are_no_numbers_name_the_layer(scenes_llava: VLM, parts: ComponentMap) -> None:
    (batch,) = answer_batches(scenes_llava, [task("vqa", "calibration", 1, 0)])
    broken = {**batch.inputs, "pixel_values": torch.full_like(batch.inputs["pixel_values"], float("nan"))}
    with pytest.raises(UserError, match=r"inputs of \S*vision_tower\.\S*layers\.0\.\S+ are NaN or infinite"):
        collect(scenes_llava, parts.weights, [dataclasses.replace(batch, inputs=broken)])


# -- data


def test_calibration_data_is_never_evaluated_on(scenes_llava: VLM, parts: ComponentMap, tmp_path: Path) -> None:
    calibration_statistics(scenes_llava, parts, ["vqa"], n=2, against=[task("vqa", "evaluation", 50)])
    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "prompt": "where is the 3?", "answers": ["top left"], "split": split, "id": split}
        for split in ("calibration", "evaluation")
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(UserError, match="calibration example calibration of mine is also evaluated on"):
        calibration_statistics(scenes_llava, parts, [str(file)], n=1, against=[task(str(file), "evaluation")])


def test_calibration_examples_show_as_many_images_as_there_are() -> None:
    """Five questions share an image: of each image one is taken, of all kinds alike, before a second one is."""
    (drawn,) = calibration_examples(["vqa"], 40, 0)
    assert len({example.id for example in drawn.examples}) == len({example.cluster for example in drawn.examples}) == 40
    assert set(Counter(example.kind for example in drawn.examples).values()) == {8}
    (again,) = calibration_examples(["vqa"], 40, 0)
    assert [one.id for one in again.examples] == [one.id for one in drawn.examples]
    images = [
        Example(f"{image}-{k}", image, "", np.zeros((2, 2, 3), dtype=np.uint8), "?", ("a",))
        for image in "abc"
        for k in range(3)
    ]
    assert [one.id for one in over_images(images, 4)] == ["a-0", "b-1", "c-2", "a-1"]
    assert sorted(one.id for one in over_images(images, 99)) == sorted(one.id for one in images)


def test_own_lines_are_calibrated_on_whatever_images_there_are(tmp_path: Path) -> None:
    """Two images and nine questions: no more can be shown, and the number that was asked for is kept."""
    for name in "ab":
        Image.fromarray(np.full((8, 8, 3), ord(name), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    asked = {"answers": ["x"], "split": "calibration"}
    lines = [{"image": f"{'ab'[k % 2]}.png", "prompt": f"{k}?", **asked} for k in range(9)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (drawn,) = calibration_examples([str(tmp_path / "own.jsonl")], 6, 0)
    assert len(drawn.examples) == len({example.id for example in drawn.examples}) == 6
    assert sorted(Counter(example.cluster for example in drawn.examples).values()) == [3, 3]


def test_facts_name_the_data(statistics: Statistics) -> None:
    assert {key: statistics.facts[key] for key in ("calibration", "examples", "seed", "path")} == {
        "calibration": "vqa,caption", "examples": N, "seed": 0, "path": "float",
    }  # fmt: skip
    assert len(str(statistics.facts["data"]).split(".")) == 2


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"path": "all"}, "unknown calibration path 'all'; choose from float, exposed, both"),
        ({"n": 0}, "0 calibration examples are too few for 1 tasks"),
    ],
)
def test_a_wrong_wish_is_refused(scenes_llava: VLM, parts: ComponentMap, how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibration_statistics(scenes_llava, parts, ["vqa"], **how)


def test_statistics_must_be_those_of_the_scheme(scenes_llava: VLM, parts: ComponentMap, statistics: Statistics) -> None:
    other = scheme("gptq", 4, calibration={**statistics.facts, "seed": 1})
    with (
        pytest.raises(UserError, match="asks for calibration with seed = 1, and these statistics have 0"),
        quantized(scenes_llava.model, parts, Plan.uniform(parts, other), statistics=statistics),
    ):
        pass


# -- weights from them


def installed(
    vlm: VLM, parts: ComponentMap, plan: Plan, memory: WeightCodes, statistics: Statistics
) -> dict[str, Tensor]:
    with quantized(vlm.model, parts, plan, memory, statistics) as changed:
        return {name: vlm.model.get_parameter(name).detach().clone() for name in changed}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


HOSTS = [("gptq", 2), ("gptq", 4), ("clip", 3), ("awq", 3), ("smooth", 3), ("qvla", 3), ("qsvd", 4)]
GRIDS = [("squeezellm", 3), ("leanquant", 3), ("leanquant-affine", 3), ("bpdq", 2), ("billm", 1), ("spqr", 3)]
CALIBRATED = {"quick": [("gptq", 2), ("gptq", 4), ("awq", 3), ("leanquant-affine", 3)], "all": [*HOSTS, *GRIDS]}


def test_all_calibrated_methods_are_meant() -> None:
    others = {"vlm-ptq", "gwq"}  # with inputs of both paths, or with gradients
    assert {name for name, _ in CALIBRATED["all"]} == {n for n, row in METHODS.items() if row.calibrated} - others


def calibrated(which: str, statistics: Statistics) -> list[Scheme]:
    return [scheme(name, bits, calibration=statistics.facts) for name, bits in CALIBRATED[which]]


@pytest.mark.parametrize("which", few(CALIBRATED, ["quick"]))
def test_prepared_weights_are_those_found_plan_by_plan(
    which: str, scenes_llava: VLM, parts: ComponentMap, statistics: Statistics
) -> None:
    finer = parts.regroup("group")
    plans = [Plan.of(finer, {"connector": one, "language.end": one}) for one in calibrated(which, statistics)]
    memory = WeightCodes()
    prepare(scenes_llava.model, finer, plans, memory, statistics)
    size = len(memory)
    for plan in plans:
        assert same(
            installed(scenes_llava, finer, plan, memory, statistics),
            installed(scenes_llava, finer, plan, WeightCodes(), statistics),
        )
    assert len(memory) == size


@pytest.mark.parametrize("which", few(CALIBRATED, ["quick"]))
def test_a_weight_does_not_depend_on_what_else_the_plan_holds(
    which: str, scenes_llava: VLM, parts: ComponentMap, statistics: Statistics
) -> None:
    finest, blocks = parts.regroup("linear"), parts.regroup("block")
    name = "model.language_model.layers.1.self_attn.k_proj"
    for one in calibrated(which, statistics):
        alone = installed(scenes_llava, finest, Plan.of(finest, {name: one}), WeightCodes(), statistics)
        full = installed(scenes_llava, blocks, Plan.of(blocks, {"language.0*": one}), WeightCodes(), statistics)
        assert list(alone) == [f"{name}.weight"]
        assert torch.equal(alone[f"{name}.weight"], full[f"{name}.weight"])


def test_coverage_at_every_granularity(scenes_llava: VLM, parts: ComponentMap, statistics: Statistics) -> None:
    memory = WeightCodes()
    for by in ("part", "group", "kind", "group.kind", "block", "linear"):
        finer = parts.regroup(by)
        component = finer.components[len(finer.components) // 2]
        plan = Plan.of(finer, {component.name: scheme("gptq", 3, calibration=statistics.facts)})
        changed = installed(scenes_llava, finer, plan, memory, statistics)
        assert set(changed) == {weight.name for weight in component.weights}


# -- inputs that already passed quantized layers


@pytest.fixture(scope="module")
def on_the_way(scenes_llava: VLM, parts: ComponentMap) -> Statistics:
    return calibration_statistics(scenes_llava, parts, ["vqa"], n=2, path="exposed")


def test_the_exposed_path_sees_what_the_layers_before_it_became(
    scenes_llava: VLM, parts: ComponentMap, on_the_way: Statistics
) -> None:
    float_path = calibration_statistics(scenes_llava, parts, ["vqa"], n=2)
    parts = parts.regroup("group")
    ends = ("vision.front", "language.end")
    first, last = (
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "model.language_model.layers.3.mlp.up_proj.weight",
    )
    on_float, on_exposed = (
        installed(scenes_llava, parts, Plan.of(parts, dict.fromkeys(ends, two)), WeightCodes(), s)
        for s in (float_path, on_the_way)
        for two in [scheme("gptq", 2, calibration=s.facts)]
    )
    assert torch.equal(on_float[first], on_exposed[first])  # nothing stands before the first block
    assert not torch.equal(on_float[last], on_exposed[last])


def test_the_exposed_path_is_the_same_again_and_memory_does_not_mix_plans_up(
    scenes_llava: VLM, parts: ComponentMap, on_the_way: Statistics
) -> None:
    four, two = (scheme("gptq", bits, calibration=on_the_way.facts) for bits in (4, 2))
    parts = parts.regroup("group")
    plans = [Plan.of(parts, {"vision.front": v, "language.end": four}) for v in (four, two)]
    memory = WeightCodes()
    for plan in (*plans, *plans):
        shared = installed(scenes_llava, parts, plan, memory, on_the_way)
        assert same(shared, installed(scenes_llava, parts, plan, WeightCodes(), on_the_way))


# -- the cache


@pytest.mark.parametrize("room", [1 << 30, 0])
def test_statistics_from_the_cache_are_the_same_bits(
    scenes_llava: VLM, parts: ComponentMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    cache, files = Cache(tmp_path), 1 if room else len(parts.regroup("block").names)
    a = calibration_statistics(scenes_llava, parts, ["vqa"], n=3, cache=cache, gram_bytes=room).gather(parts.weights)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    monkeypatch.setattr("sensitivity.measure.calibrate.calibration.collect", lambda *_: pytest.fail("computed again"))
    b = calibration_statistics(scenes_llava, parts, ["vqa"], n=3, cache=cache, gram_bytes=room).gather(parts.weights)
    for name in a:
        assert torch.equal(a[name].gram, b[name].gram)
        assert torch.equal(a[name].mean_magnitude, b[name].mean_magnitude)
        assert a[name].modalities.tolist() == b[name].modalities.tolist()
    monkeypatch.undo()
    calibration_statistics(scenes_llava, parts, ["vqa"], n=4, cache=cache)
    assert len(list(tmp_path.glob("*.safetensors"))) == files + 1


def test_quantized_weights_from_the_cache_are_the_same_bits(
    scenes_llava: VLM, parts: ComponentMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finer = parts.regroup("group")
    plain = calibration_statistics(scenes_llava, parts, ["vqa"], n=3)
    one = scheme("gptq", 3, calibration=plain.facts)
    plan = Plan.of(finer, {"vision.front": one, "connector": scheme("rtn", 3)})
    expected = installed(scenes_llava, finer, plan, WeightCodes(), plain)
    cached = calibration_statistics(scenes_llava, parts, ["vqa"], n=3, cache=Cache(tmp_path))
    assert same(installed(scenes_llava, finer, plan, WeightCodes(), cached), expected)
    solved = Plan.of(finer, {"vision.front": one})

    def nothing_to_solve(linears: Linears, missing: Sequence[Scheme]) -> list[object]:
        assert not missing, "computed again"
        return []

    monkeypatch.setattr("sensitivity.measure.install.quantizer.solve", nothing_to_solve)
    again = installed(scenes_llava, finer, solved, WeightCodes(), cached)
    assert same(again, {name: expected[name] for name in again})
    monkeypatch.undo()
    name = next(iter(again))  # another weight is other content, whatever the model is called
    parameter = scenes_llava.model.get_parameter(name)
    own = parameter.data
    parameter.data = own * 2
    try:
        assert not torch.equal(installed(scenes_llava, finer, solved, WeightCodes(), cached)[name], again[name])
    finally:
        parameter.data = own


def test_where_statistics_exceed_the_cache_quantized_weights_are_found_without_them(
    scenes_llava: VLM, parts: ComponentMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for an export of a large model: its Gram matrices are not stored, their hashes are."""
    finer = parts.regroup("block")
    matrices = sum(4 * weight.cols**2 for weight in {input_of(w): w for w in parts.weights}.values())
    cache = Cache(tmp_path, limit_gb=1.5 * matrices / 1e9)

    def calibrated(n: int = 3) -> Statistics:
        return calibration_statistics(scenes_llava, parts, ["vqa"], n=n, cache=cache, gram_bytes=0)

    first = calibrated()
    names = finer.names[1:3]
    plan = Plan.of(
        finer, {name: scheme("gptq", bits, calibration=first.facts) for name, bits in zip(names, (3, 4), strict=True)}
    )
    expected = installed(scenes_llava, finer, plan, WeightCodes(), first)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 0 < size < matrices / 2
    with monkeypatch.context() as never:
        never.setattr("sensitivity.measure.calibrate.calibration.collect", lambda *_: pytest.fail("calibrated again"))
        assert same(installed(scenes_llava, finer, plan, WeightCodes(), calibrated()), expected)
    more = calibrated(n=4)
    other = Plan.of(finer, {names[0]: scheme("gptq", 3, calibration=more.facts)})
    found = installed(scenes_llava, finer, other, WeightCodes(), more)
    fresh = calibration_statistics(scenes_llava, parts, ["vqa"], n=4, gram_bytes=0)
    assert same(found, installed(scenes_llava, finer, other, WeightCodes(), fresh))
    assert not same(found, {name: expected[name] for name in found})


def test_the_cache_survives_damage_and_stays_small(tmp_path: Path) -> None:
    cpu, made = torch.device("cpu"), []

    def entry(cache: Cache, number: int) -> float:
        def make() -> dict[str, Tensor]:
            made.append(number)
            return {"x": torch.full((250,), float(number))}  # 1,000 bytes and a header

        return float(cache.fetch({"entry": number}, make, cpu)["x"][0])

    cache = Cache(tmp_path / "deep" / "down", limit_gb=3.6e-6)
    assert [entry(cache, i) for i in (1, 2, 1)] == [1, 2, 1]
    assert made == [1, 2]
    for file in cache.folder.glob("*.safetensors"):
        file.write_bytes(b"damaged")
    assert entry(cache, 1) == 1
    assert made == [1, 2, 1]
    for i in range(3, 9):
        entry(cache, i)
        assert sum(file.stat().st_size for file in cache.folder.iterdir()) <= 3.6e3 + 300
    assert entry(cache, 8) == 8
    assert made == [1, 2, 1, 3, 4, 5, 6, 7, 8]
    assert entry(Cache(tmp_path / "none", limit_gb=0), 5) == 5


def test_a_cache_that_cannot_be_written_to_is_said_and_does_without(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder would be")
    cache = Cache(tmp_path / "taken")
    with pytest.warns(Notice, match=r"nothing can be kept in .*taken: calibration is done again by the next run"):
        found = cache.fetch({"entry": 1}, lambda: {"x": torch.ones(3)}, torch.device("cpu"))
    assert found["x"].tolist() == [1, 1, 1]
    assert not (tmp_path / "none").exists()


def test_why_nothing_can_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object, **named: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("sensitivity.measure.calibrate.cache.save_file", fail)
    with pytest.warns(Notice, match=r"calibration is done again by the next run \(.*Input/output error"):
        Cache(tmp_path).fetch({"entry": 1}, lambda: {"x": torch.ones(3)}, torch.device("cpu"))


def test_a_full_cache_is_seldom_looked_through_and_keeps_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look takes as long as there are files: one for every entry would take most of a long sweep's time."""
    looks, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: looks.append(folder) or scandir(folder))
    cache, device = Cache(tmp_path, limit_gb=4e-4), torch.device("cpu")
    for number in range(600):
        cache.store({"number": number}, {"x": torch.full((250,), float(number))}, device)  # 1 kB, and its header
        if number % 50 == 49:
            assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 4e5 + 300 * 4  # headers are not counted
    assert cache.load({"number": 599}, device) is not None
    assert cache.load({"number": 0}, device) is None
    assert 1 < len(looks) < 250


def fetching(folder: Path, limit: float, times: int) -> int:
    """How many entries had to be made."""
    cache, made = Cache(folder, limit), []
    for i in range(times):
        right = torch.full((1000,), float(i % 8))

        def make(i: int = i, right: Tensor = right) -> dict[str, Tensor]:
            made.append(i)
            return {"x": right}

        assert torch.equal(cache.fetch({"entry": i % 8}, make, torch.device("cpu"))["x"], right)
    return len(made)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_share_the_cache_and_it_may_be_deleted_under_them(tmp_path: Path) -> None:
    """Eight entries where five fit, two processes that want them all, and a person with a shovel."""
    folder = tmp_path / "cache"
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        both = [pool.submit(fetching, folder, 2.2e-5, 400) for _ in range(2)]
        while not all(process.done() for process in both):
            time.sleep(0.002)
            shutil.rmtree(folder, ignore_errors=True)
        assert all(process.result() > 8 for process in both)
        shutil.rmtree(folder, ignore_errors=True)
        assert pool.submit(fetching, folder, 1, 16).result() == 8
    assert fetching(folder, 1, 16) == 0  # what another process left


@pytest.mark.parametrize("limit", [0, 8])
def test_how_much_is_kept_is_the_callers_choice(
    scenes_llava: VLM, parts: ComponentMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    monkeypatch.setenv("SENSITIVITY_CACHE", str(tmp_path))
    calibrated_(scenes_llava, parts, [scheme("gptq", 3)], ["vqa"], n=1, cache_gb=limit)
    assert len(list(tmp_path.glob("*.safetensors"))) == bool(limit)


def test_only_tasks_that_exist(scenes_llava: VLM, parts: ComponentMap) -> None:
    with pytest.raises(UserError, match="unknown task 'vqua'"):
        calibration_statistics(scenes_llava, parts, ["vqua"])
    assert isinstance(task("vqa", "calibration", 1), Task)
