"""Image tokens that are pruned by attention: nothing where nothing is pruned, a slow version, both paths, refusals."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sensitivity.api.sweeping import sweep
from sensitivity.measure.evaluation import evaluate
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.install.pruned_tokens import pruning_hooks
from sensitivity.measure.passes.pruned_attention import PruningState
from sensitivity.measure.passes.token_batches import answer_batches as token_batches
from sensitivity.measure.passes.token_batches import calibration_pass, image_token
from sensitivity.models.discovery import inspect
from sensitivity.models.vlm import VLM
from sensitivity.quantize.methods import weights_of
from sensitivity.quantize.scheme_settings import check_scheme, scheme
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import Notice, UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.rules import violations
from sensitivity.tasks.table import task


@pytest.fixture(scope="module")
def parts(scenes_llava: VLM) -> ComponentMap:
    return inspect(scenes_llava, by="part")


def pruning(share: float, after: int = 1, method: str = "rtn", bits: int = 4, **more: Any) -> Scheme:
    return scheme(method, bits, prune=share, prune_after=after, **more)


@contextmanager
def pruned(vlm: VLM, parts: ComponentMap, chosen: Scheme) -> Iterator[None]:
    """The hooks alone, around full-precision weights."""
    handles = list(pruning_hooks(vlm.model, parts.weights, {w.name: chosen for w in parts.weights}))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(vlm: VLM, n: int = 3) -> Tensor:
    with torch.inference_mode():
        return torch.as_tensor(calibration_pass(vlm, next(token_batches(vlm, [task("vqa", n=n)]))).logits)


def test_nothing_pruned_is_nothing_changed(scenes_llava: VLM, parts: ComponentMap) -> None:
    """Letter for letter, and bit for bit."""
    assert scheme("bivlm", 1, prune=0.0) == scheme("bivlm", 1)
    chosen = pruning(0.5)
    assert weights_of(chosen) == scheme("rtn", 4)
    check_scheme(chosen)
    before, some = logits(scenes_llava), task("vqa", n=6)
    answers = evaluate(scenes_llava, some, plain=True)
    with pruned(scenes_llava, parts, pruning(1e-9)):  # rounds to no token at all
        assert torch.equal(logits(scenes_llava), before)
        assert evaluate(scenes_llava, some, plain=True) == answers
    assert torch.equal(logits(scenes_llava), before)


def slow(vlm: VLM, parts: ComponentMap, share: float, after: int) -> Tensor:
    """The logits where tokens are really taken out: the blocks after `after` get a sequence without them, one by one.

    Only for prompts without padding. Positions stay those of the whole sequence.
    """
    batch = next(token_batches(vlm, [task("vqa", n=1)]))
    ids, model = batch.inputs["input_ids"], vlm.model
    language = model.get_submodule("model.language_model")
    seen: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["states"], seen["kwargs"] = args[0], {**kwargs, "past_key_values": None}  # a second run would append to it

    layers = language.layers
    handle = layers[after].register_forward_pre_hook(note, with_kwargs=True)
    with torch.inference_mode():
        calibration_pass(vlm, batch)
    handle.remove()
    states, kwargs, layer = seen["states"], seen["kwargs"], layers[after]
    cos, sin = kwargs["position_embeddings"]
    with torch.inference_mode():
        x, attention = layer.input_layernorm(states), layer.self_attn
        heads = [
            p(x)[0].unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
            for p in (attention.q_proj, attention.k_proj)
        ]
        query, key = (one * cos[0] + rotated(one) * sin[0] for one in heads)
        key = key.repeat_interleave(len(query) // len(key), 0)
        end = ids.shape[1] - batch.logits_to_keep
        received = (query[:, end : end + 1] @ key[:, : end + 1].mT * attention.scaling).softmax(-1).mean(0)[0]
        image = [i for i, token in enumerate(ids[0].tolist()) if token == image_token(model)]
        dropped = sorted(image, key=lambda i: (float(received[i]), i))[: round(share * len(image))]
        kept = [i for i in range(ids.shape[1]) if i not in dropped]
        states = layer(states, **kwargs)
        states = (states[0] if isinstance(states, tuple) else states)[:, kept]
        shorter = {**kwargs, "position_embeddings": (cos[:, kept], sin[:, kept]), "attention_mask": None}
        for one in layers[after + 1 :]:
            states = one(states, **shorter)
            states = states[0] if isinstance(states, tuple) else states
        return torch.as_tensor(model.lm_head(language.norm(states)))[:, -batch.logits_to_keep :]


def rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


@pytest.mark.parametrize(("share", "after"), [(0.3, 0), (0.75, 1), (1.0, 0)])
def test_hidden_tokens_are_as_if_taken_out(scenes_llava: VLM, parts: ComponentMap, share: float, after: int) -> None:
    with pruned(scenes_llava, parts, pruning(share, after)):
        found = logits(scenes_llava, 1)
    assert torch.allclose(found, slow(scenes_llava, parts, share, after), atol=1e-4)
    assert not torch.allclose(found, logits(scenes_llava, 1), atol=1e-3)


def test_what_a_prompt_hides_stays_hidden_in_its_answer(scenes_llava: VLM, parts: ComponentMap) -> None:
    """Generating token by token agrees with one pass over prompt and answer, in a batch with padding too."""
    some = task("caption", n=4, seed=1)
    model = scenes_llava.model
    with pruned(scenes_llava, parts, pruning(0.8, 0)), torch.inference_mode():
        from sensitivity.measure.generate.batches import batches_by_image
        from sensitivity.measure.generate.whole_prompts import answer_logits

        batch = next(batches_by_image(scenes_llava, some, plain=True))
        written = model.generate(**batch.inputs, do_sample=False, num_beams=1, max_new_tokens=8)
        written = written[:, batch.inputs["input_ids"].shape[1] :]
        once = answer_logits(scenes_llava, batch.inputs, [row.tolist() for row in written])
    for row, tokens in enumerate(written.tolist()):
        ends = [i for i, token in enumerate(tokens) if token == scenes_llava.processor.tokenizer.eos_token_id]
        length = ends[0] + 1 if ends else len(tokens)
        assert once[row].argmax(-1)[:length].tolist() == tokens[:length]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ways_of_attention_agree(scenes_llava: VLM, parts: ComponentMap, attention: str) -> None:
    model, held = scenes_llava.model, scenes_llava.model.config._attn_implementation
    with pruned(scenes_llava, parts, pruning(0.5)):
        expected = logits(scenes_llava)
        try:
            model.set_attn_implementation(attention)
            assert torch.allclose(logits(scenes_llava), expected, atol=1e-4)
        finally:
            model.set_attn_implementation(held)


def test_the_least_attended_go_and_ties_by_position() -> None:
    prompts = PruningState(7)
    ids = torch.tensor([[1, 7, 7, 7, 7, 2], [7, 7, 1, 1, 1, 2]])
    prompts.begin(nn.Identity(), (), {"input_ids": ids, "logits_to_keep": 2})
    assert prompts.end == 4
    received = torch.tensor([[0.0, 0.3, 0.1, 0.1, 0.2, 0.0], [0.5, 0.4, 0.0, 0.0, 0.0, 0.0]])
    prompts.decide(received, 0.5)
    assert prompts.hidden.int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    prompts.decide(1 - received, 0.75)  # a later block hides more, and what is hidden stays so
    assert prompts.hidden.int().tolist() == [[0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    seen = prompts.visible(2, 6)
    assert seen is not None
    assert seen.shape == (2, 1, 6, 6)
    assert bool(seen[0, 0].diagonal().all())
    assert not bool(seen[0, 0, 5, 1])


def test_a_sweep_takes_the_plain_path_and_says_so_once(scenes_llava: VLM, tmp_path: Path) -> None:
    by_group = inspect(scenes_llava, by="group")
    ends = {"language.end": scheme("rtn", 3)}
    two = [Plan.of(by_group, {"*": pruning(share, 0)} | more) for share in (0.5, 1.0) for more in ({}, ends)]
    plans = [Plan.of(by_group, {"*": scheme("rtn", 4)}), *two]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", Notice)
        fast = sweep(scenes_llava, by_group, plans, ["vqa"], tmp_path / "fast", n=8)
    assert sum("plans that prune image tokens read whole prompts" in str(one.message) for one in told) == 1
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", Notice)
        plain = sweep(scenes_llava, by_group, plans, ["vqa"], tmp_path / "plain", n=8, plain=True)
    assert not told
    for plan in plans:
        first, second = (study.examples(plan) for study in (fast, plain))
        assert first is not None
        assert second is not None
        first, second = (one.sort_values("example") for one in (first, second))
        assert first["score"].tolist() == second["score"].tolist()
        assert first["nll"].tolist() == pytest.approx(second["nll"].tolist(), abs=1e-4)
    assert fast.table()["vqa.nll"].nunique() == len(plans) + 1


def test_what_would_not_be_exact_or_has_no_effect_is_refused(scenes_llava: VLM, parts: ComponentMap) -> None:
    plan = Plan.uniform(parts, pruning(0.5))
    with quantized(scenes_llava.model, parts, plan), pytest.raises(UserError, match="this prompt is read in pieces"):
        evaluate(scenes_llava, task("vqa", n=2))
    assert logits(scenes_llava).isfinite().all()
    with (
        pytest.raises(UserError, match="prune_after=9: the language model has 4 blocks, 0 to 3"),
        quantized(scenes_llava.model, parts, Plan.uniform(parts, pruning(0.5, 9))),
    ):
        pass
    with pytest.raises(UserError, match="set prune beside it"):
        scheme("rtn", 4, prune_after=3)
    with pytest.raises(UserError, match=r"prune of rtn is a number from 0 to 1, not 1\.5"):
        scheme("rtn", 4, prune=1.5)
    for name in ("fake", "compressed-tensors"):
        assert any(
            "reads all tokens of an image; sweep with --set prune=0" in one for one in violations(parts, plan, name)
        )
    assert not violations(parts, plan, "plan")


def test_pruning_alone_is_a_plan(scenes_llava: VLM, parts: ComponentMap) -> None:
    plan = Plan.of(parts, {"language": scheme("keep", 16, prune=1.0, prune_after=0)})
    before = logits(scenes_llava)
    with quantized(scenes_llava.model, parts, plan) as changed:
        assert changed == set()
        assert not torch.allclose(logits(scenes_llava), before, atol=1e-3)
    with quantized(scenes_llava.model, parts, Plan.of(parts, {"vision": pruning(1.0, bits=8)})):
        assert torch.allclose(logits(scenes_llava), before, atol=0.5)  # of the vision tower: no effect beyond rounding
