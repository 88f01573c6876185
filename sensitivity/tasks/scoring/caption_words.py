"""Splits a caption into words as the Stanford tokenizer of COCO's evaluation does, without Java."""

from __future__ import annotations

import re

# Captions are scored example by example, thousands of times in a sweep, and must score the same with and without Java.
# The Penn Treebank rules that matter for captions are therefore implemented here; tests compare them with the Java
# program.

_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "`": "'", "–": "-", "—": "-", "…": "."})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SPLIT = {word.replace(" ", ""): word for word in ("can not", "gon na", "got ta", "wan na", "lem me", "gim me")}

# alternatives are tried from top to bottom, so special cases come before the general word
_TOKEN = re.compile(
    r"""
      (?:[a-z]\.){2,}                                    # u.s.  p.m.  t.v.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|sq|etc|ltd|inc|co|corp|ave|blvd|rd|mt|ft)\.(?!\w)
    | no\.(?=\s*\d) | [a-z]\.(?![^\W_])                  # no. 5, j. smith
    | '\d0s\b                                            # '90s
    | '(?:n|em|til)\b'? | o'clock\b | ma'am\b | y'(?=all\b)
    | \d+:\d+(?=[ap]m\b)                               # 5:30 pm
    | [^\W_]+(?=n't\b)                                   # do n't
    | n't\b
    | '(?:s|m|d|re|ve|ll)\b
    | \d+(?:[.,:/]\d+)*(?:-?(?:[^\W_]|-(?=[^\W_]))+)?    # 5:30  1,000  10-year-old  80s
    | @?[^\W_]+(?:(?:[-/._@&]|'(?!(?:s|m|d|re|ve|ll|t)\b)(?=[^\W_]))[^\W_]+)*(?<!n(?='t\b))
    | <[^\W_]+>
    | [?!]{2,}                                          # kept, unlike one of them
    | [()\[\]{}$%&#@=+*~^/\\<>|_]
    """,
    re.VERBOSE,
)


def words(caption: str) -> list[str]:
    """The words of a caption in lower case, with clitics as words of their own and without punctuation."""
    split: list[str] = []
    for token in _TOKEN.findall(caption.lower().translate(_QUOTES)):
        split += _SPLIT.get(token, _BRACKETS.get(token, token)).split()
    return split
