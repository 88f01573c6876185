"""The parts of every supported family, from small models and from true sizes; a class that nobody knows."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import small_vlms as small
import torch
import transformers as T
from torch import nn

from sensitivity.models.discovery import discover
from sensitivity.models.families import FAMILIES, Family
from sensitivity.spec.components import GRANULARITIES, GROUPS, ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.sizes import size

TWO_TOWERS = ("attn", "ff"), None, ("attn", "ff")  # kinds in the blocks of vision, connector, language
BOTH = ("attn", "cross", "ff")
KINDS = {
    **dict.fromkeys(small.BUILDERS, TWO_TOWERS),
    "blip2_opt": (("attn", "ff"), BOTH, ("attn", "ff")),
    "blip2_t5": (("attn", "ff"), BOTH, BOTH),
    "instructblip": (("attn", "ff"), BOTH, ("attn", "ff")),
    "blip2_retrieval": (("attn", "ff"), BOTH, None),
    "mllama": (("attn", "ff"), None, BOTH),
    "florence2": (("attn", "ff"), None, BOTH),
}
BLOCKS = {
    **dict.fromkeys(small.BUILDERS, (5, 0, 5)),
    "blip2_opt": (5, 6, 5),
    "blip2_t5": (5, 6, 3 + 4),  # the encoder's blocks, then the decoder's
    "instructblip": (5, 6, 5),
    "blip2_retrieval": (5, 6, 0),
    "mllama": (4 + 2, 0, 7),
    "florence2": (1 + 1 + 2 + 1, 0, 3 + 3),
}


@functools.cache
def parts(name: str) -> ComponentMap:
    return discover(small.on_meta(name), name=name)


@pytest.fixture(params=small.BUILDERS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- the contract


def test_every_linear_weight_is_in_one_component_or_kept_with_a_reason(family: str) -> None:
    model, found = small.on_meta(family), parts(family)
    placed = [w.name for c in found.components for w in c.weights]
    kept = {k.name: k.reason for k in found.kept}
    assert sorted([*placed, *kept]) == sorted(name for name, _ in model.named_parameters())
    assert all(kept.values())
    aliases = {id(p) for name, p in model.named_parameters() if name in {*placed, *kept}}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert id(module.weight) in aliases, path
    assert found.numel == sum(p.numel() for p in model.parameters())
    for weight in found.weights:
        linear = model.get_submodule(weight.module)
        assert isinstance(linear, nn.Linear)
        assert (weight.rows, weight.cols) == tuple(linear.weight.shape)
        assert weight.bias == (f"{weight.module}.bias" if linear.bias is not None else None)


def test_what_is_kept_is_never_a_linear_layer_but_for_heads_and_packed_attention(family: str) -> None:
    model = small.on_meta(family)
    for kept in parts(family).kept:
        owner = model.get_submodule(kept.name.rpartition(".")[0])
        if isinstance(owner, nn.Linear) and kept.name.endswith(".weight"):
            assert kept.reason in ("output head", "packed attention, which is not read through linear layers")


def test_blocks_kinds_and_thirds(family: str) -> None:
    for part, blocks, kinds in zip(("vision", "connector", "language"), BLOCKS[family], KINDS[family], strict=True):
        weights = [w for w in parts(family).weights if w.part == part and w.block is not None]
        assert {w.blocks for w in weights} <= {blocks}
        assert {w.block for w in weights} == set(range(blocks))
        assert sorted({str(w.kind) for w in weights}) == sorted(kinds or ())
        for weight in weights:
            assert weight.block is not None
            third = (weight.block >= blocks // 3) + (weight.block >= 2 * blocks // 3)
            assert weight.group == GROUPS[third]
            words = weight.name.lower()
            if weight.kind == "attn":
                assert "att" in words
            if any(word in words for word in (".fc", "mlp", "dense_h")) and "attn" not in words:
                assert weight.kind == "ff"


def test_blocks_are_numbered_as_data_flows(family: str) -> None:
    for part in ("vision", "language"):
        order = dict.fromkeys(w.block for w in parts(family).weights if w.part == part and w.block is not None)
        assert list(order) == sorted(order)


def test_every_granularity_holds_the_same_weights(family: str) -> None:
    everything = Counter(w.name for w in parts(family).weights)
    for by in GRANULARITIES:
        assert Counter(w.name for c in parts(family).regroup(by).components for w in c.weights) == everything


def test_queries_keys_and_values_share_an_input(family: str) -> None:
    for weight in parts(family).weights:
        parent, _, leaf = weight.module.rpartition(".")
        if leaf in ("k_proj", "key", "k", "v_proj", "value", "v", "gate_proj", "up_proj", "wi_0", "wi_1"):
            assert weight.shares_input == parent
        elif leaf in ("q_proj", "query", "q"):
            crossing = weight.kind == "cross" or "x_attn" in weight.name
            assert weight.shares_input == (None if crossing else parent)
        else:
            assert weight.shares_input is None


def test_every_family_that_is_named_is_tested() -> None:
    built = [small.on_meta(name) for name in small.BUILDERS]
    known = {type(model).__name__ for model in built} | {str(model.config.model_type) for model in built}  # type: ignore[union-attr]
    assert set(FAMILIES) <= known


# -- names, by hand


THIRDS = [f"{group}.{kind}" for group in GROUPS for kind in ("attn", "ff")]
CROSSED = [f"{group}.{kind}" for group in GROUPS for kind in ("attn", "cross", "ff")]
LLAVA = [*(f"vision.{g}" for g in THIRDS), "connector", *(f"language.{g}" for g in THIRDS)]
BLIP2 = [*(f"vision.{g}" for g in THIRDS), *(f"connector.{g}" for g in CROSSED), "connector.projection"]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("llava", LLAVA),
        ("qwen3_vl", LLAVA),
        ("blip2_opt", [*BLIP2, *(f"language.{g}" for g in THIRDS)]),
        ("blip2_retrieval", BLIP2),
    ],
)
def test_names(name: str, names: list[str]) -> None:
    assert list(parts(name).names) == names


@pytest.mark.parametrize(
    ("name", "component", "modules"),
    [
        ("qwen2_vl", "connector", {"model.visual.merger.mlp.0", "model.visual.merger.mlp.2"}),
        ("qwen2_vl", "vision.front.attn", {"model.visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.proj"}),
        ("blip2_opt", "connector.projection", {"language_projection"}),
        ("clip", "connector", {"visual_projection", "text_projection"}),
        ("siglip", "connector", {"text_model.head"}),
        ("siglip", "vision.other", {"vision_model.head.mlp.fc1", "vision_model.head.mlp.fc2"}),
        ("idefics3", "connector", {"model.connector.modality_projection.proj"}),
        ("mllama", "connector", {"model.multi_modal_projector"}),
        (
            "kosmos2",
            "connector",
            {
                "image_to_text_projection.dense",
                *(f"image_to_text_projection.x_attn.{p}_proj" for p in ("q", "k", "v", "out")),
            },
        ),
        ("mllama", "language.end.cross", {f"model.language_model.layers.5.cross_attn.{p}_proj" for p in "qkvo"}),
        (
            "blip2_opt",
            "connector.front.ff",
            {f"qformer.encoder.layer.{i}.{way}_query.dense" for i in (0, 1) for way in ("intermediate", "output")},
        ),
        (
            "florence2",
            "vision.front.attn",
            {
                f"model.vision_tower.blocks.0.0.{place}.{layer}"
                for place in ("spatial_block.window_attn", "channel_block.channel_attn")
                for layer in ("qkv", "proj")
            },
        ),
    ],
)
def test_members(name: str, component: str, modules: set[str]) -> None:
    assert {w.module for w in parts(name)[component].weights} == modules


@pytest.mark.parametrize(
    ("name", "weight", "reason"),
    [
        ("llava", "lm_head.weight", "output head"),
        ("blip2_opt", "language_model.model.decoder.embed_tokens.weight", "embedding, tied to the output head"),
        ("blip2_opt", "query_tokens", "learned token"),
        ("blip2_retrieval", "itm_head.weight", "output head"),
        ("llava", "model.vision_tower.embeddings.patch_embedding.weight", "patch convolution"),
        ("llava", "model.vision_tower.embeddings.position_embedding.weight", "position embedding"),
        (
            "siglip",
            "vision_model.head.attention.in_proj_weight",
            "packed attention, which is not read through linear layers",
        ),
        (
            "gemma3",
            "model.multi_modal_projector.mm_input_projection_weight",
            "bare parameter of Gemma3MultiModalProjector, not a linear layer",
        ),
        ("mllama", "model.language_model.layers.2.cross_attn_attn_gate", "scale or gate"),
    ],
)
def test_reasons(name: str, weight: str, reason: str) -> None:
    assert {k.name: k.reason for k in parts(name).kept}[weight] == reason


# -- true sizes, and the bits per weight that were published for them


def blip2(cls: type[nn.Module], vision: dict[str, object] | None = None, **qformer: object) -> nn.Module:
    text = {"model_type": "opt", "vocab_size": 50304, "hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32}
    text |= {"num_attention_heads": 32, "word_embed_proj_dim": 2560}
    return cls(T.Blip2Config(vision_config=vision, text_config=text, qformer_config=qformer))


def llava_7b() -> nn.Module:
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"vocab_size": 32064, "intermediate_size": 11008, "max_position_embeddings": 4096}
    return small.llava(small.VICUNA_7B | text, {**vision, "image_size": 336, "patch_size": 14, "projection_dim": 768})


@functools.cache
def true_size(name: str) -> ComponentMap:
    with torch.device("meta"):
        if name == "llava":
            return discover(llava_7b())
        if name == "blip2":
            return discover(blip2(T.Blip2ForConditionalGeneration))
        # the checkpoint fine-tuned on COCO: larger images, so more positions, and one word more
        vision, words = {"image_size": 364}, 30523
        return discover(blip2(T.Blip2ForImageTextRetrieval, vision, use_qformer_text_input=True, vocab_size=words))


def numel(found: ComponentMap, *patterns: str) -> int:
    return sum(c.numel for pattern in patterns for c in found.match(pattern))


BLOCK_PATTERNS = tuple(f"connector.{group}" for group in GROUPS)


def test_true_sizes() -> None:
    llava, blip, retrieval = (true_size(name) for name in ("llava", "blip2", "retrieval"))
    assert llava.numel == 7_063_427_072
    assert numel(llava, "vision") == 301_989_888
    assert numel(llava, "language") == 6_476_005_376
    assert blip.numel == 3_744_761_856
    assert numel(blip, "vision") == 984_023_040
    assert numel(blip, *BLOCK_PATTERNS) == 104_988_672
    assert numel(blip, "language") == 2_516_582_400
    assert retrieval.numel == 1_172_623_618
    assert numel(retrieval, *BLOCK_PATTERNS) == 161_611_776


@pytest.mark.parametrize(
    ("name", "patterns", "published"),
    [
        ("blip2", ("vision", *BLOCK_PATTERNS, "language"), {2: 2.520, 3: 3.483, 4: 4.446, 8: 8.297}),
        ("retrieval", ("vision", *BLOCK_PATTERNS), {2: 2.322, 3: 3.299, 4: 4.276, 8: 8.184}),
        ("llava", ("vision", "language"), {2: 2.566, 3: 3.525, 4: 4.485, 8: 8.323}),
    ],
)
def test_published_bits_per_weight(name: str, patterns: tuple[str, ...], published: dict[int, float]) -> None:
    found = true_size(name)
    for bits, bpw in published.items():
        plan = Plan.of(found, dict.fromkeys(patterns, Scheme("codes", bits)))
        assert size(found, plan).bpw_codes == pytest.approx(bpw, abs=5e-4)


# -- classes that nobody has written words about


class Block(nn.Module):
    def __init__(self, feed_forward: str = "mlp") -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("query", "key", "value", "out")})
        self.add_module(feed_forward, nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)))


class Tower(nn.Module):
    def __init__(self, depth: int = 5, **words: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(**words) for _ in range(depth))


class Stranger(nn.Module):
    def __init__(self, beside: str = "bridge", **words: str) -> None:
        super().__init__()
        self.eye, self.mind = Tower(), Tower(**words)
        self.add_module(beside, nn.Linear(8, 8))
        self.words = nn.Embedding(10, 8)
        self.lm_head = nn.Linear(8, 10, bias=False)
        self.lm_head.weight = self.words.weight

    def get_encoder(self, modality: str) -> nn.Module:
        return self.eye

    def get_decoder(self) -> nn.Module:
        return self.mind


def test_an_unknown_class_is_discovered_by_its_getters() -> None:
    found = discover(Stranger())
    assert list(found.names) == LLAVA
    assert {k.reason for k in found.kept} == {"bias", "embedding, tied to the output head"}
    assert [w.module for w in found["connector"].weights] == ["bridge"]


def test_what_cannot_be_placed_is_named() -> None:
    with pytest.raises(UserError, match="cannot place these modules of Stranger: ear; "):
        discover(Stranger(beside="ear"))
    found = discover(Stranger(beside="ear"), Family(connector=("ear",)))
    assert [w.module for w in found["connector"].weights] == ["ear"]


def test_layers_of_no_known_kind_are_named() -> None:
    with pytest.raises(
        UserError, match=r"attention or feed-forward: mind.blocks.0.thinking.0, mind.blocks.0.thinking.1"
    ):
        discover(Stranger(feed_forward="thinking"))
    assert list(discover(Stranger(feed_forward="thinking"), Family(kinds={"thinking": "ff"})).names) == LLAVA


def test_a_model_without_eyes_is_refused() -> None:
    with torch.device("meta"):
        model = T.LlamaForCausalLM(T.LlamaConfig(**small.LLAMA))
    with pytest.raises(UserError, match="found no vision part in LlamaForCausalLM, which holds model, lm_head"):
        discover(model)


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(UserError, match="unknown granularity 'layer'"):
        discover(small.on_meta("llava"), by="layer")
