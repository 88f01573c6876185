"""Families end to end, from a saved folder: processor, prompt, a sweep, and answers that are the likeliest words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_vlms
import torch
from few import few
from PIL import Image

from sensitivity.api.sweeping import sweep
from sensitivity.measure.evaluation import answer, evaluate
from sensitivity.measure.generate import shared_images
from sensitivity.measure.generate.batches import Batch, batches_by_image, prompt_text
from sensitivity.measure.loop import _SharedWork
from sensitivity.models.discovery import inspect
from sensitivity.models.families import FAMILIES
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.tasks.examples.types import SHORT_ANSWER, Example, Task
from sensitivity.tasks.table import task

ASKING = [name for name in saved_vlms.BUILDERS if name != "blip2_itm"]
SOME = ["llava", "blip2_t5", "qwen2_vl", "smolvlm"]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions to each of two pictures, one wide and one high."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    lines = []
    for name, shape in (("wide", (20, 40, 3)), ("high", (48, 24, 3))):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / f"{name}.png")
        for i, words in enumerate(("where is the 3?", "how many digits are there?")):
            lines.append({"id": f"{name}-{i}", "image": f"{name}.png", "prompt": words, "answers": ["top left"]})
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "own.jsonl"


def greedy(vlm: VLM, example: Example, steps: int) -> list[int]:
    """The likeliest word after the prompt, again and again, by the model's forward pass alone."""
    with Image.open(example.image) as picture:
        inputs = dict(
            vlm.processor(images=[[picture]], text=[prompt_text(vlm, example)], padding=True, return_tensors="pt")
        )
    said: list[int] = []
    for _ in range(steps):
        more = dict(inputs)
        if vlm.encoder_decoder:
            more["decoder_input_ids"] = torch.tensor([[0, *said]])
        else:
            for name, value in inputs.items():
                if value.shape == inputs["input_ids"].shape:
                    tail = said if name == "input_ids" else [int(name == "attention_mask")] * len(said)
                    more[name] = torch.cat([value, torch.tensor([tail], dtype=value.dtype)], 1)
        with torch.no_grad():
            said.append(int(vlm.model(**more).logits[0, -1].argmax()))
        if said[-1] in (vlm.processor.tokenizer.eos_token_id, vlm.model.config.image_token_id):
            break  # after the image's own word, the forward pass would look for another image
    return said


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("name", few(ASKING, SOME))
def test_a_sweep_of_two_plans_from_a_saved_folder(name: str, own: Path, tmp_path: Path) -> None:
    vlm = load(str(saved_vlms.save(name, tmp_path / name)))
    parts = inspect(vlm, by="part")
    plan = Plan.uniform(parts, scheme("rtn", 3))
    study = sweep(vlm, parts, [plan], [str(own)], tmp_path / "study", n=4)
    native, quantized = study.examples(study.native), study.examples(plan)
    assert native is not None
    assert quantized is not None
    assert len(native) == len(quantized) == 4
    assert np.isfinite(native["nll"]).all()
    assert not np.allclose(native["nll"], quantized["nll"])
    answers = dict(zip(native["example"], native["answer"], strict=True))
    for example in task(str(own), n=4).examples[:2]:
        words = vlm.processor.tokenizer.decode(greedy(vlm, example, 3), skip_special_tokens=True).strip()
        assert answers[example.id].removesuffix("…").startswith(words.removesuffix("…")) or (
            words.startswith(answers[example.id].removesuffix("…"))
        )


def asked_of_many_sizes(folder: Path, n: int = 12) -> Task:
    """Three questions to each of four pictures, one of which is high; no answer is done before its last word."""
    rng = np.random.default_rng(0)
    lines = []
    for name in ("one", "high", "three", "four"):
        shape = (40, 20, 3) if name == "high" else (20, 40, 3)
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / f"{name}.png")
        for i, words in enumerate(("where is the 3?", "how many digits are there?", "what is this?")):
            answers = ["top left" if i else "a red 3"]
            lines.append({"id": f"{name}-{i}", "image": f"{name}.png", "prompt": words, "answers": answers})
    (folder / "many.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return replace(task(str(folder / "many.jsonl"), n=n), exact=False, max_new_tokens=12)


def talkative(name: str, folder: Path) -> VLM:
    """A model whose weights are so large that every place and every word before it change the answer."""
    vlm = load(str(saved_vlms.save(name, folder)), dtype="float32")
    torch.manual_seed(1)
    for parameter in vlm.model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.35)
    return vlm


def by_example(rows: dict[str, list[Any]], name: str) -> dict[str, Any]:
    return dict(zip(rows["example"], rows[name], strict=True))


SHARING = [name for name in ASKING if name not in ("blip2_t5", "paligemma")]  # whose images see the question


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("name", ASKING)
def test_questions_on_top_of_their_images_are_answered_as_whole_prompts_are(name: str, tmp_path: Path) -> None:
    vlm, asked = talkative(name, tmp_path / name), asked_of_many_sizes(tmp_path)
    apart = list(batches_by_image(vlm, asked))
    assert all(bool(batch.prefix) == (name in SHARING) for batch in apart)
    assert len(apart) == (2 if name in ("smolvlm", "idefics3") else 1)  # they cut high pictures into more
    ours, theirs = evaluate(vlm, asked), evaluate(vlm, asked, plain=True)
    assert by_example(ours, "answer") == by_example(theirs, "answer")
    assert by_example(ours, "nll") == pytest.approx(by_example(theirs, "nll"), rel=1e-4, abs=1e-4)
    assert len(set(theirs["answer"])) > 1


def by_both_paths(vlm: VLM, asked: Task, plans: Sequence[Plan] = ()) -> tuple[list[Any], list[Any]]:
    """Scores and answers as a sweep finds them, plan after plan, with and without sharing."""
    parts, found = inspect(vlm, by="part"), []
    for plain in (False, True):
        trial = _SharedWork(vlm, parts, [asked], plain=plain, growing=False)
        rows = [trial.run(plan, 0, trial.ends[-1]) for plan in plans or [Plan.uniform(parts, None)]]
        found.append([(by_example(one, "score"), by_example(one, "answer")) for one in rows])
    return found[0], found[1]


def with_its_own(vlm: VLM, asked: Task, share: int = 1) -> Task:
    """What the model says is right, at least of every so manieth example."""
    said = by_example(evaluate(vlm, asked, plain=True), "answer")
    examples = tuple(
        replace(one, answers=(said[one.id],)) if i % share == 0 else one for i, one in enumerate(asked.examples)
    )
    return replace(asked, examples=examples, exact=True)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("name", few(ASKING, SOME))
def test_right_answers_are_found_right_by_both_paths(name: str, tmp_path: Path) -> None:
    """A draft that is right must not help itself: it is what the model would have said without it."""
    vlm = talkative(name, tmp_path / name)
    asked = with_its_own(vlm, replace(asked_of_many_sizes(tmp_path), max_new_tokens=3), 2)
    parts = inspect(vlm, by="part")
    plans = [Plan.uniform(parts, scheme("rtn", bits) if bits else None) for bits in (None, 8, 3, None)]
    fast, plain = by_both_paths(vlm, asked, plans)
    assert [scores for scores, _ in fast] == [scores for scores, _ in plain]
    assert sum(fast[0][0].values()) >= 6
    assert fast[0] == fast[3]  # where an answer is cut does not depend on what was said before
    whole_fast, whole_plain = by_both_paths(vlm, replace(asked, exact=False), plans)
    assert whole_fast == whole_plain


@pytest.mark.parametrize("name", few(["llava", "blip2_opt", "blip2_t5"], ["blip2_opt", "blip2_t5"]))
@pytest.mark.parametrize("which", ["none", "another", "two", "penalty", "start"])
def test_answers_end_where_generation_ends_them(name: str, which: str, tmp_path: Path) -> None:
    """BLIP-2 generates by the configuration of the model inside it."""
    vlm, asked = talkative(name, tmp_path / name), asked_of_many_sizes(tmp_path, 6)
    words = vlm.processor.tokenizer
    said = words(evaluate(vlm, asked, plain=True)["answer"][0], add_special_tokens=False)["input_ids"]
    inner = getattr(vlm.model, "language_model", vlm.model) if name != "llava" else vlm.model
    if which == "penalty":
        inner.generation_config.repetition_penalty = 3.0
    elif which == "start":
        inner.generation_config.decoder_start_token_id = 7
    else:
        ended: dict[str, Any] = {"none": None, "another": said[-1], "two": [said[-1], words.eos_token_id]}
        inner.generation_config.eos_token_id = ended[which]
    fast, plain = by_both_paths(vlm, asked)
    assert fast == plain
    own = with_its_own(vlm, asked)
    fast, plain = by_both_paths(vlm, own)
    assert fast[0][0] == plain[0][0]


def test_several_images_in_one_cluster_are_each_looked_at(tmp_path: Path) -> None:
    vlm, asked = talkative("llava", tmp_path / "llava"), asked_of_many_sizes(tmp_path)
    apart = {image: np.asarray(Image.open(tmp_path / f"{image}.png")) for image in ("one", "high", "three", "four")}
    for images in (lambda one: one.image, lambda one: apart[one.id.split("-")[0]]):
        together = replace(asked, examples=tuple(replace(e, cluster="all", image=images(e)) for e in asked.examples))
        fast, plain = by_both_paths(vlm, together)
        assert fast == plain == by_both_paths(vlm, asked)[0]


def test_a_proof_needs_no_room_of_the_sweep_s(tmp_path: Path) -> None:
    """With a limit that the proof would not fit in, a feature layer that is not the last is found out all the same."""
    vlm = talkative("llava", tmp_path / "llava")
    vlm.model.config.vision_feature_layer = -2
    parts = inspect(vlm, by="part")
    for gb in (8.0, 5e-6):
        trial = _SharedWork(vlm, parts, [asked_of_many_sizes(tmp_path)], memory_gb=gb)
        assert trial.prefix_cache
        assert trial.prefix_cache.stages["vision"].boundaries == [4]
        assert trial.prefix_cache._bytes == 0


def test_the_image_s_own_token_in_a_text_is_named(tmp_path: Path) -> None:
    vlm, asked = talkative("llava", tmp_path / "llava"), asked_of_many_sizes(tmp_path)
    one = asked.examples[0]
    with pytest.raises(UserError, match=r"the prompt of example one-0 holds <image>, by which .* marks images"):
        list(batches_by_image(vlm, replace(asked, examples=(replace(one, prompt="what is <image>?"),))))
    with pytest.raises(UserError, match="the first right answer of example one-0 holds <image>"):
        list(batches_by_image(vlm, replace(asked, examples=(replace(one, answers=("<image>",)),))))


def test_images_may_take_fewer_places_than_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The likelihoods of Qwen's answers tell: without its own places they are others."""
    vlm, asked = talkative("qwen2_5_vl", tmp_path / "qwen"), asked_of_many_sizes(tmp_path)
    theirs = by_example(evaluate(vlm, asked, plain=True), "nll")
    prefill_images = shared_images.prefill_images

    def misplaced(vlm: VLM, batch: Batch) -> Any:
        cache, positions = prefill_images(vlm, batch)
        assert (positions < batch.prefix).all()
        return cache, torch.full_like(positions, batch.prefix)

    monkeypatch.setattr(shared_images, "prefill_images", misplaced)
    ours = by_example(evaluate(vlm, asked), "nll")
    assert max(abs(ours[name] - theirs[name]) for name in theirs) > 5e-4


@pytest.mark.parametrize("window", [5, 24, 64])
def test_layers_that_look_back_only_so_far(window: int, tmp_path: Path) -> None:
    vlm, asked = talkative("gemma3", tmp_path / "gemma"), asked_of_many_sizes(tmp_path)
    vlm.model.config.text_config.sliding_window = window
    for layer in vlm.model.model.language_model.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = window
    ours, theirs = evaluate(vlm, asked), evaluate(vlm, asked, plain=True)
    assert by_example(ours, "answer") == by_example(theirs, "answer")
    assert by_example(ours, "nll") == pytest.approx(by_example(theirs, "nll"), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", SHARING)
def test_what_is_accepted_is_not_read_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, asked = talkative(name, tmp_path / name), asked_of_many_sizes(tmp_path)
    batch = next(batches_by_image(vlm, asked))
    read = []
    before = shared_images._QuestionPasses.__call__

    def reading(self: Any, rows: list[int], drafts: list[list[int]], accepted: list[int]) -> Any:
        handle = self.model.get_input_embeddings().register_forward_hook(lambda *a: read.append(a[2].shape[1]))
        try:
            return before(self, rows, drafts, accepted)
        finally:
            handle.remove()

    monkeypatch.setattr(shared_images._QuestionPasses, "__call__", reading)
    answer(vlm, asked, batch)
    assert len(read) > 3
    assert read[0] == max(len(prompt) + len(right) for prompt, right in zip(batch.prompts, batch.targets, strict=True))
    assert max(read[1:]) <= max(map(len, batch.targets)) + 1  # of the guess, and not of the question
    assert read[-1] == 1


def test_penalties_are_left_to_generate(tmp_path: Path) -> None:
    vlm, asked = talkative("llava", tmp_path / "llava"), asked_of_many_sizes(tmp_path)
    before = evaluate(vlm, asked)["answer"]
    vlm.model.generation_config.repetition_penalty = 3.0
    assert not any(batch.prefix for batch in batches_by_image(vlm, asked))
    assert evaluate(vlm, asked)["answer"] == evaluate(vlm, asked, plain=True)["answer"] != before


def test_pictures_of_many_sizes_with_a_question_each_stay_together(tmp_path: Path) -> None:
    vlm, asked = talkative("smolvlm", tmp_path / "smolvlm"), asked_of_many_sizes(tmp_path)
    one_each = replace(asked, examples=asked.examples[::3])
    assert [(batch.prefix, len(batch.examples)) for batch in batches_by_image(vlm, one_each)] == [(0, 4)]


def test_video_parts_are_left_out_and_pictures_stay(tmp_path: Path) -> None:
    processor = load(str(saved_vlms.save("qwen2_5_vl", tmp_path / "qwen"))).processor
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert isinstance(processor, type(processor).__mro__[1])
    assert type(processor.image_processor).__name__.startswith("Qwen2VLImageProcessor")


def example(kind: str, prompt: str) -> Example:
    return Example("one", "one", kind, np.zeros((4, 4, 3), np.uint8), prompt, ("yes",))


@pytest.mark.parametrize(
    ("family", "kind", "prompt", "expected"),
    [
        ("blip-2", "yes/no", "is it a cat?" + SHORT_ANSWER, "Question: is it a cat? Short answer:"),
        ("blip-2", "caption", "Provide a caption.", ""),
        ("paligemma", "yes/no", "is it a cat?" + SHORT_ANSWER, "<image>answer en is it a cat?"),
        ("paligemma", "caption", "Provide a caption.", "<image>caption en"),
        ("llava", "caption", "Provide a caption.", "USER: <image>\nProvide a caption. ASSISTANT:"),
        ("llava", "all", "is {it}?" + SHORT_ANSWER, f"USER: <image>\nis {{it}}?{SHORT_ANSWER} ASSISTANT:"),
    ],
)
def test_prompts_as_the_family_wants_them(family: str, kind: str, prompt: str, expected: str) -> None:
    vlm = VLM("x", None, None, FAMILIES[family], "", 16)
    assert prompt_text(vlm, example(kind, prompt)) == expected


def test_special_tokens_that_the_tokenizer_leaves_in_are_no_part_of_an_answer(
    tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = load(str(saved_vlms.save("blip2_opt", tmp_path / "blip2")))
    asked = task(str(own), n=2)
    before = evaluate(vlm, asked, plain=True)["answer"]
    decode = type(vlm.processor.tokenizer).batch_decode
    monkeypatch.setattr(
        type(vlm.processor.tokenizer),
        "batch_decode",
        lambda *args, **how: [f"<image>{text}</s><pad><|im_end|>" for text in decode(*args, **how)],
    )
    assert evaluate(vlm, asked, plain=True)["answer"] == before


def drop_words(folder: Path) -> None:
    """A tokenizer that was fetched without its added words."""
    file = folder / "tokenizer.json"
    data: dict[str, Any] = json.loads(file.read_text())
    data["model"]["vocab"].pop("<image>", None)
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "<image>"]
    file.write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))


def test_a_tokenizer_without_an_image_token_is_named(tmp_path: Path) -> None:
    folder = saved_vlms.save("llava", tmp_path / "llava")
    drop_words(folder)
    with pytest.raises(UserError, match=r"the tokenizer of .*llava does not know '<image>', which marks images"):
        load(str(folder))
    shutil.copy(saved_vlms.save("llava", tmp_path / "whole") / "tokenizer.json", folder)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "image_token_index": 999}))
    with pytest.raises(UserError, match=r"has no token with id 999, by which config.json marks images"):
        load(str(folder))


@pytest.mark.parametrize(("name", "least"), [("vqa", 0.9), ("caption", 0.8), ("scene", 0.9)])
def test_the_embedded_blip2_answers_and_guesses_about_others_images(name: str, least: float) -> None:
    vlm = load("embedded:scenes-blip2")
    asked = task(name, n=25)
    rows = evaluate(vlm, asked, plain=True)
    assert np.mean(rows["score"]) > least
    moved = [*asked.examples[5:], *asked.examples[:5]]
    wrong = tuple(replace(e, image=other.image) for e, other in zip(asked.examples, moved, strict=True))
    assert np.mean(evaluate(vlm, replace(asked, examples=wrong), plain=True)["score"]) < 0.6
