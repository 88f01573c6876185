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
    def forward(rows: list[int], drafts: list[list[int]], accepted: list[int]) -> torch.Tensor:
        longest = max(len(draft) - far for draft, far in zip(drafts, accepted, strict=True)) + 1
        logits = torch.zeros(len(rows), longest, WORDS)
        for i, (row, draft, far) in enumerate(zip(rows, drafts, accepted, strict=True)):
            for place in range(longest):
                logits[i, place, next_token(seed, row, draft[: far + place])] = 1
        forward.passes += 1
        return logits

    forward.passes = 0  # type: ignore[attr-defined]
    return forward


@given(st.integers(0, 1 << 20), st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=4), st.integers(1, 9))
def test_any_draft_ends_in_the_greedy_answer(seed: int, guesses: list[tuple[list[int], list[int]]], most: int) -> None:
    found = Drafts.of([first for first, _ in guesses])
    forward = reader(seed)
    while found.unfinished:
        found.verify(forward, {END}, most)
        found.take_earlier_answers([[second] for _, second in guesses])
    assert found.answers == [greedy(seed, row, most) for row in range(len(guesses))]
    assert forward.passes <= most


@given(st.integers(0, 1 << 20), TOKENS)
def test_a_neighbor_that_agrees_costs_one_pass_more(seed: int, first: list[int]) -> None:
    found, forward = Drafts.of([first]), reader(seed)
    found.verify(forward, {END}, 8)
    if found.unfinished:
        assert found.take_earlier_answers([[greedy(seed, 0, 8)]])
        found.verify(forward, {END}, 8)
    assert not found.unfinished
    assert forward.passes <= 2
    assert found.answers == [greedy(seed, 0, 8)]


def test_an_older_plan_s_answer_is_tried_where_the_latest_begins_differently() -> None:
    right, forward = greedy(4, 0, 8), reader(4)
    latest = [(right[0] + 1) % WORDS, *right[1:]]
    found = Drafts.of([latest])
    earlier = with_earlier_answers(with_earlier_answers(None, [right]), [latest])
    assert earlier == [[latest, right]]
    found.verify(forward, {END}, 8)
    assert found.take_earlier_answers(earlier)
    found.verify(forward, {END}, 8)
    assert (found.unfinished, found.answers, forward.passes) == ([], [right], 2)


def test_few_answers_are_remembered_each_once_and_the_latest_first() -> None:
    earlier = None
    for token in [*range(12), 5]:
        earlier = with_earlier_answers(earlier, [[token]])
    assert earlier == [[[5], [11], [10], [9], [8], [7], [6], [4]]]


def test_what_is_hopeless_is_left_off_and_the_rest_goes_on() -> None:
    right, other, forward = greedy(1, 0, 8), greedy(1, 1, 8), reader(1)
    wrong = [(right[0] + 1) % WORDS, *right]
    found = Drafts.of([wrong, wrong])
    while found.unfinished:
        found.verify(forward, {END}, 8, cannot_be_right=lambda row, tokens: row == 0)
        found.take_earlier_answers(None)
    assert len(found.answers[0]) == 1
    assert found.answers[1] == other
