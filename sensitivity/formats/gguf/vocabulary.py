"""Writes the tokenizer of tokenizer.json into the header of a language model's GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerFast

from sensitivity.spec.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter

Rules = Mapping[str, Any]  # the content of a tokenizer.json
BYTES, WORDS, SENTENCE = "bytes as letters", "whole words", "letters with bytes as fallback"  # kinds of tokenizers
# ends of tokenizer.json's regular expressions that split text before merging; REGEX has llama.cpp's names of them
QWEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REGEX = {"qwen2": QWEN, "llama-bpe": LLAMA}


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, rows: int, template: object = None) -> None:
    """Add the tokens of a tokenizer, one for each row of the embedding, and a chat template."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = kind_of(rules)
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    texts = [tokens.get(number, f"[PAD{number}]") for number in range(rows)]
    if kind == WORDS:
        texts = [text.replace("▁", " ") for text in texts]
    writer.add_token_list(texts)
    added = {one["content"]: one["special"] for one in rules["added_tokens"]}
    writer.add_token_types([_type(tokens.get(n), added, kind, tokenizer.unk_token) for n in range(rows)])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in rules["model"].get("merges", [])]
    if kind == SENTENCE:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(texts, merges))
        writer.add_add_space_prefix(_adds_space(rules))
    else:  # llama.cpp has no rule that splits text into whole words: that kind is only for the tests' models
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_rule(rules) if kind == BYTES else "gpt-2")
        writer.add_token_merges(merges or ["a a"])  # llama.cpp needs at least one
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(_adds_bos(tokenizer))
    if isinstance(template, str):
        writer.add_chat_template(template)


def check_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise an error for a tokenizer whose rules llama.cpp does not have."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    if kind_of(rules) == BYTES:
        split_rule(rules)


def kind_of(rules: Rules) -> str:
    """The kind of a tokenizer, which decides the tokenizer of llama.cpp that is used for it."""
    model = rules["model"]
    if model["type"] == "WordLevel":
        return WORDS
    if model["type"] == "BPE":
        return SENTENCE if model.get("byte_fallback") else BYTES
    raise UserError(f"llama.cpp has no tokenizer of the type {model['type']} for this model; use another format")


def split_rule(rules: Rules) -> str:
    """llama.cpp's name of the rule that splits text before it is merged."""
    steps: Sequence[Rules] = (rules.get("pre_tokenizer") or {}).get("pretokenizers") or [
        rules.get("pre_tokenizer") or {}
    ]
    for step in steps:
        if step.get("type") == "Digits" and step.get("individual_digits"):
            return "smollm"
        pattern = step.get("pattern", {}).get("Regex", "")
        if name := next((name for name, part in REGEX.items() if pattern.endswith(part)), None):
            return name
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        return "gpt-2"
    raise UserError("llama.cpp has no name for the rule by which this tokenizer splits text; use another format")


def _type(token: str | None, added: Mapping[str, bool], kind: str, unknown: str | None) -> int:
    """The type of a token; `added` says of each added token whether it is special."""
    from gguf import TokenType

    if token is None:
        return TokenType.UNUSED
    if token == unknown and kind != BYTES:
        return TokenType.UNKNOWN
    if token in added:
        return TokenType.CONTROL if added[token] else TokenType.USER_DEFINED
    if kind == WORDS:  # llama.cpp finds such tokens as whole texts, and never merges letters into them
        return TokenType.USER_DEFINED
    byte = kind == SENTENCE and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return TokenType.BYTE if byte else TokenType.NORMAL


def _scores(texts: Sequence[str], merges: Sequence[str]) -> list[float]:
    """A score for each token, with which llama.cpp merges letters in the tokenizer's order of merges."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", "", 1), number)
    return [-float(rank.get(text, len(merges))) for text in texts]


def _adds_space(rules: Rules) -> bool:
    """Whether the tokenizer puts a space before a text."""
    written = json.dumps([rules.get("normalizer"), rules.get("pre_tokenizer")])
    return '"Prepend"' in written or '"prepend_scheme": "always"' in written or '"prepend_scheme": "first"' in written


def _adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer puts the bos token before a prompt."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
