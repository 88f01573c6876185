"""Drafts give exactly what greedy decoding gives, token by token, whatever is guessed; and good guesses save passes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sensitivity.measure.generate.drafts import Drafts, with_earlier_answers

END, WORDS = 0, 5
TOKENS = st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=8)


def next_token(seed: int, row: int, before: list[int]) -> int:
    """A language model: the next word depends on all words before."""
    generator = torch.Generator().manual_seed(hash((seed, row, *before)) % (1 << 30))
    return int(torch.randint(0, WORDS, (), generator=generator))


def greedy(seed: int, row: int, most: int) -> list[int]:
    said: list[int] = []
    while len(said) < most and END not in said:
        said.append(next_token(seed, row, said))
    return said


def reader(seed: int):  # type: ignore[no-untyped-def]
    def read(rows: list[int], drafts: list[list[int]], accepted: list[int]) -> torch.Tensor:
        longest = max(len(draft) - far for draft, far in zip(drafts, accepted, strict=True)) + 1
        logits = torch.zeros(len(rows), longest, WORDS)
        for i, (row, draft, far) in enumerate(zip(rows, drafts, accepted, strict=True)):
            for place in range(longest):
                logits[i, place, next_token(seed, row, draft[: far + place])] = 1
        read.passes += 1
        return logits

    read.passes = 0  # type: ignore[attr-defined]
    return read


@given(st.integers(0, 1 << 20), st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=4), st.integers(1, 9))
def test_any_draft_ends_in_the_greedy_answer(seed: int, guesses: list[tuple[list[int], list[int]]], most: int) -> None:
    found = Drafts.of([first for first, _ in guesses])
    read = reader(seed)
    while found.left:
        found.advance(read, {END}, most)
        found.guess([[second] for _, second in guesses])
    assert found.answers == [greedy(seed, row, most) for row in range(len(guesses))]
    assert read.passes <= most


@given(st.integers(0, 1 << 20), TOKENS)
def test_a_neighbor_that_agrees_costs_one_pass_more(seed: int, first: list[int]) -> None:
    found, read = Drafts.of([first]), reader(seed)
    found.advance(read, {END}, 8)
    if found.left:
        assert found.guess([[greedy(seed, 0, 8)]])
        found.advance(read, {END}, 8)
    assert not found.left
    assert read.passes <= 2
    assert found.answers == [greedy(seed, 0, 8)]


def test_an_older_plan_s_answer_is_tried_where_the_latest_begins_differently() -> None:
    right, read = greedy(4, 0, 8), reader(4)
    latest = [(right[0] + 1) % WORDS, *right[1:]]
    found = Drafts.of([latest])
    known = with_earlier_answers(with_earlier_answers(None, [right]), [latest])
    assert known == [[latest, right]]
    found.advance(read, {END}, 8)
    assert found.guess(known)
    found.advance(read, {END}, 8)
    assert (found.left, found.answers, read.passes) == ([], [right], 2)


def test_few_answers_are_remembered_each_once_and_the_latest_first() -> None:
    known = None
    for token in [*range(12), 5]:
        known = with_earlier_answers(known, [[token]])
    assert known == [[[5], [11], [10], [9], [8], [7], [6], [4]]]


def test_what_is_hopeless_is_left_off_and_the_rest_goes_on() -> None:
    right, other, read = greedy(1, 0, 8), greedy(1, 1, 8), reader(1)
    wrong = [(right[0] + 1) % WORDS, *right]
    found = Drafts.of([wrong, wrong])
    while found.left:
        found.advance(read, {END}, 8, hopeless=lambda row, tokens: row == 0)
        found.guess(None)
    assert len(found.answers[0]) == 1
    assert found.answers[1] == other
