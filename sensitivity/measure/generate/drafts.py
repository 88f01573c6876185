"""Greedy answers from drafts: a whole guess is read in one pass, and kept up to the first token that differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

# rows, a draft for each and how much of that is accepted -> logits that predict what comes after that, and one more
Reader = Callable[[list[int], list[list[int]], list[int]], Tensor]

# a row and its accepted tokens -> whether they can no longer become a right answer
Hopeless = Callable[[int, list[int]], bool]

# row by row what other plans answered, the latest first
Known = list[list[list[int]]]
KEPT = 8  # answers of a row: enough for one of them to go on like the next plan's, and few enough to forget


def with_earlier_answers(known: Known | None, answers: Sequence[list[int]]) -> Known:
    """With a plan's answers in front of those of the plans before it."""
    before = known or [[] for _ in answers]
    return [
        [answer, *(other for other in others if other != answer)][:KEPT]
        for answer, others in zip(answers, before, strict=True)
    ]


def left_off(row: int, tokens: list[int], hopeless: Hopeless | None, begun: int = 0) -> int | None:
    """After how many tokens it became hopeless, if it did: the same, however far a pass happened to read."""
    if hopeless is None or not hopeless(row, tokens):
        return None
    return next(place for place in range(begun + 1, len(tokens) + 1) if hopeless(row, tokens[:place]))


@dataclass
class Drafts:
    """What greedy decoding has found so far, row by row; it is exactly what one token at a time would give."""

    tokens: list[list[int]]  # accepted ones first, then guesses
    accepted: list[int]
    left: list[int]  # rows that are not finished
    gained: list[int]  # tokens that the last pass added to a row

    @classmethod
    def of(cls, guesses: Sequence[Sequence[int]]) -> Drafts:
        none = [0] * len(guesses)
        return cls([list(guess) for guess in guesses], none, list(range(len(guesses))), list(none))

    def advance(self, read: Reader, ends: set[int], most: int, hopeless: Hopeless | None = None) -> Tensor:
        """Read the drafts of all unfinished rows in one pass, and put right the first token that differs in each.

        A row is left off where it is `hopeless`: whatever comes next, it will not be right.
        """
        logits = read(self.left, [self.tokens[row] for row in self.left], [self.accepted[row] for row in self.left])
        for row, best in zip(list(self.left), logits.argmax(-1).tolist(), strict=True):
            draft, begun = self.tokens[row], self.accepted[row]
            agrees, far = True, begun
            while agrees and far < most and not (far and draft[far - 1] in ends):
                token = best[far - begun]
                agrees = far < len(draft) and draft[far] == token
                draft[far : far + 1] = [token]
                far += 1
            finished = draft[far - 1] in ends or far >= most
            if cut := left_off(row, draft[:far], hopeless, begun):
                far, finished = cut, True
            self.accepted[row], self.gained[row] = far, far - begun
            if finished:
                self.left.remove(row)
        return logits

    def guess(self, known: Known | None) -> bool:
        """Take what other plans answered for drafts, where that begins as what is accepted; whether any did.

        Elsewhere the old guess goes on, twice as far as its last part was right: reading what is wrong costs, too.
        """
        found = False
        for row in self.left:
            far = self.accepted[row]
            begun = self.tokens[row][:far]
            others = known[row] if known else []
            fitting = next((answer for answer in others if len(answer) > far and answer[:far] == begun), None)
            self.tokens[row] = list(fitting or self.tokens[row][: far + 2 * self.gained[row]])
            found = found or fitting is not None
        return found

    @property
    def answers(self) -> list[list[int]]:
        return [draft[:far] for draft, far in zip(self.tokens, self.accepted, strict=True)]
