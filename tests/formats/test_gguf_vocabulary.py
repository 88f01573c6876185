"""llama.cpp splits text into the tokens of the model's own tokenizer, or the tokenizer is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers as tk
import transformers as T
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from sensitivity.formats.gguf.exporter import header_of
from sensitivity.formats.gguf.metadata import language_writer
from sensitivity.formats.gguf.vocabulary import LLAMA, QWEN, add_vocabulary, check_vocabulary, kind_of, split_rule
from sensitivity.spec.errors import UserError

pytest.importorskip("gguf", reason="needs the extra `gguf`")
CORPUS = [
    "What color is the third box? I'm 100% sure: it's  blue!\n\n(x, y) = 12345, the boxes are there.",
    "naïve cafés serve the coffee; WE'LL see  more\tboxes\n  than 3 or 33 or 333 of the other colors.",
]
TEXTS = [
    *CORPUS,
    " the box",
    "the\n\n\nbox   is\t\there ",
    "图片里有3个 boxes",
    "<|end|>what<|end|> is",
    "I'M there'll",
]
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tk.Regex(CONTRACTIONS + pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


RULES = {
    "qwen2": split(QWEN),
    "llama-bpe": split(LLAMA),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
}


def of_bytes(name: str) -> Any:
    """Pairs of letters that stand for bytes, merged, as in GPT-2, Llama 3, Qwen2 and SmolLM."""
    inner = tk.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = RULES[name], decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<|end|>"], initial_alphabet=letters)
    inner.train_from_iterator(CORPUS * 3, trainer)
    return T.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def of_letters() -> Any:
    """Letters merged, with bytes for those that are not known, as in Llama 2."""
    inner = tk.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    known = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=known))
    rules = json.loads(inner.to_str())
    rules["added_tokens"] = rules["added_tokens"][:3]
    inner = tk.Tokenizer.from_str(json.dumps(rules))
    return T.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", [*RULES, "letters"])
def test_text_becomes_the_same_tokens(name: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="needs xllamacpp of the extra `gguf`, which CI does not install")
    import ctypes

    from sensitivity.formats.gguf.library import xllamacpp_library

    tokenizer = of_letters() if name == "letters" else of_bytes(name)
    rows = len(tokenizer) + 4
    writer = language_writer(T.LlamaConfig(vocab_size=rows, hidden_size=64, num_attention_heads=2))
    add_vocabulary(writer, tokenizer, rows)
    header_of(writer, tmp_path / "words.gguf")
    lib = xllamacpp_library()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(str(tmp_path / "words.gguf").encode(), params)
    assert model
    vocabulary, found = lib.llama_model_get_vocab(model), (ctypes.c_int32 * 400)()
    for text in TEXTS if name != "letters" else TEXTS[:4]:
        raw = text.encode()
        count = lib.llama_tokenize(vocabulary, raw, len(raw), found, len(found), False, True)
        assert list(found[:count]) == tokenizer(text, add_special_tokens=False)["input_ids"], text
    lib.llama_model_free(model)


@pytest.mark.parametrize("name", list(RULES))
def test_rules_are_known_by_name(name: str) -> None:
    assert split_rule(json.loads(of_bytes(name).backend_tokenizer.to_str())) == name


def test_a_rule_without_a_name_is_refused() -> None:
    tokenizer = of_bytes("gpt-2")
    tokenizer.backend_tokenizer.pre_tokenizer = split(r"\p{L}+|\p{N}{1,2}")
    with pytest.raises(UserError, match=r"llama\.cpp has no name for the rule by which this tokenizer splits text"):
        check_vocabulary(tokenizer)
    with pytest.raises(UserError, match=r"llama\.cpp has no tokenizer of the type Unigram"):
        kind_of({"model": {"type": "Unigram"}})
