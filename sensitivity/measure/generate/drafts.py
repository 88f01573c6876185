"""Greedy decoding from drafts: one forward pass verifies a whole draft, up to the first wrong token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

# rows, their drafts, and how many tokens of each are accepted -> logits for the tokens after those, and for one more
ForwardPass = Callable[[list[int], list[list[int]], list[int]], Tensor]

# a row and its accepted tokens -> whether they can no longer become a right answer
CannotBeRight = Callable[[int, list[int]], bool]

# for each row, the answers of earlier plans in tokens, the latest first
EarlierAnswers = list[list[list[int]]]
ANSWERS_PER_ROW = 8  # enough that one of them continues like the next plan's, and few enough for memory


def with_earlier_answers(earlier: EarlierAnswers | None, answers: Sequence[list[int]]) -> EarlierAnswers:
    """A plan's answers in front of those of earlier plans, row by row and without repeats."""
    before = earlier or [[] for _ in answers]
    return [
        [answer, *(other for other in others if other != answer)][:ANSWERS_PER_ROW]
        for answer, others in zip(answers, before, strict=True)
    ]


def decided_length(row: int, tokens: list[int], cannot_be_right: CannotBeRight | None, start: int = 0) -> int | None:
    """The number of tokens after which an answer could no longer be right, or None if it still may be."""
    if cannot_be_right is None or not cannot_be_right(row, tokens):
        return None
    return next(place for place in range(start + 1, len(tokens) + 1) if cannot_be_right(row, tokens[:place]))


@dataclass
class Drafts:
    """The state of greedy decoding, row by row; the result is exactly what one token at a time would give.

    transformers' assisted decoding does this for one row at a time; a batch has many.
    """

    tokens: list[list[int]]  # accepted ones first, then the rest of the draft
    accepted: list[int]
    unfinished: list[int]  # rows that are not finished
    newly_accepted: list[int]  # tokens that the last pass added to a row

    @classmethod
    def of(cls, guesses: Sequence[Sequence[int]]) -> Drafts:
        """Begin with one draft for each row."""
        zeros = [0] * len(guesses)
        return cls([list(guess) for guess in guesses], zeros, list(range(len(guesses))), list(zeros))

    def verify(
        self, forward: ForwardPass, ends: set[int], max_tokens: int, cannot_be_right: CannotBeRight | None = None
    ) -> Tensor:
        """Verify the drafts of all unfinished rows in one forward pass, and correct the first wrong token of each.

        A row also ends where `cannot_be_right` says that no continuation can be right.
        """
        logits = forward(
            self.unfinished,
            [self.tokens[row] for row in self.unfinished],
            [self.accepted[row] for row in self.unfinished],
        )
        for row, predicted in zip(list(self.unfinished), logits.argmax(-1).tolist(), strict=True):
            draft, start = self.tokens[row], self.accepted[row]
            # A draft token is accepted if it is the argmax of the model's own logits. The first that is not is replaced
            # by the argmax, which follows accepted tokens alone; logits after it follow a wrong token and are
            # ignored. So each pass gains at least one token.
            matches, length = True, start  # `predicted` begins with the token after the accepted ones
            while matches and length < max_tokens and not (length and draft[length - 1] in ends):
                token = predicted[length - start]
                matches = length < len(draft) and draft[length] == token
                draft[length : length + 1] = [token]
                length += 1
            finished = draft[length - 1] in ends or length >= max_tokens
            if cut := decided_length(row, draft[:length], cannot_be_right, start):
                length, finished = cut, True
            self.accepted[row], self.newly_accepted[row] = length, length - start
            if finished:
                self.unfinished.remove(row)
        return logits

    def take_earlier_answers(self, earlier: EarlierAnswers | None) -> bool:
        """Replace drafts by earlier plans' answers that begin with the accepted tokens; true if there were any.

        Without one, a draft keeps twice as many tokens as the last pass accepted: reading wrong ones costs time.
        """
        replaced = False
        for row in self.unfinished:
            length = self.accepted[row]
            start = self.tokens[row][:length]
            others = earlier[row] if earlier else []
            continuation = next(
                (answer for answer in others if len(answer) > length and answer[:length] == start), None
            )
            self.tokens[row] = list(continuation or self.tokens[row][: length + 2 * self.newly_accepted[row]])
            replaced = replaced or continuation is not None
        return replaced

    @property
    def answers(self) -> list[list[int]]:
        """The accepted tokens of each row."""
        return [draft[:length] for draft, length in zip(self.tokens, self.accepted, strict=True)]
