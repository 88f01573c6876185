"""Greedy decoding from drafts: one forward pass verifies a whole draft, up to the first wrong token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

# rows, their drafts, and how many tokens of each are accepted -> logits for the tokens after those, and for one more
Reader = Callable[[list[int], list[list[int]], list[int]], Tensor]

# a row and its accepted tokens -> whether they can no longer become a right answer
Hopeless = Callable[[int, list[int]], bool]

# row by row the answers of earlier plans, the latest first
Known = list[list[list[int]]]
KEPT = 8  # answers per row: enough that one of them continues like the next plan's, and few enough for memory


def with_earlier_answers(known: Known | None, answers: Sequence[list[int]]) -> Known:
    """A plan's answers in front of those of earlier plans, row by row and without repeats."""
    before = known or [[] for _ in answers]
    return [
        [answer, *(other for other in others if other != answer)][:KEPT]
        for answer, others in zip(answers, before, strict=True)
    ]


def left_off(row: int, tokens: list[int], hopeless: Hopeless | None, begun: int = 0) -> int | None:
    """After how many tokens an answer could no longer be right, if so, whatever drafts were read."""
    if hopeless is None or not hopeless(row, tokens):
        return None
    return next(place for place in range(begun + 1, len(tokens) + 1) if hopeless(row, tokens[:place]))


@dataclass
class Drafts:
    """The state of greedy decoding, row by row; the result is exactly what one token at a time would give.

    transformers' assisted decoding does this for one row at a time; a batch has many.
    """

    tokens: list[list[int]]  # accepted ones first, then the rest of the draft
    accepted: list[int]
    left: list[int]  # rows that are not finished
    gained: list[int]  # tokens that the last pass added to a row

    @classmethod
    def of(cls, guesses: Sequence[Sequence[int]]) -> Drafts:
        """Begin with one draft for each row."""
        none = [0] * len(guesses)
        return cls([list(guess) for guess in guesses], none, list(range(len(guesses))), list(none))

    def advance(self, read: Reader, ends: set[int], most: int, hopeless: Hopeless | None = None) -> Tensor:
        """Verify the drafts of all unfinished rows in one forward pass, and correct the first wrong token of each.

        A row also ends where it becomes `hopeless`: no continuation can be right.
        """
        logits = read(self.left, [self.tokens[row] for row in self.left], [self.accepted[row] for row in self.left])
        for row, best in zip(list(self.left), logits.argmax(-1).tolist(), strict=True):
            draft, begun = self.tokens[row], self.accepted[row]
            # A draft token is accepted if it is the argmax of the model's own logits. The first that is not is replaced
            # by the argmax, which follows accepted tokens alone; logits after it follow a wrong token and are
            # ignored. So each pass gains at least one token.
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
        """Replace drafts by earlier plans' answers that begin with the accepted tokens; whether there were any.

        Other rows keep their old draft, twice as far as its last part was right: reading wrong tokens costs time, too.
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
        """The accepted tokens of each row."""
        return [draft[:far] for draft, far in zip(self.tokens, self.accepted, strict=True)]
