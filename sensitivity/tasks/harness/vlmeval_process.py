"""The process of a data set of VLMEvalKit: answers requests, one JSON value per line, until its input ends.

`vlmeval.py` starts it as python -m sensitivity.tasks.harness.vlmeval_process.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from sensitivity.spec.errors import UserError, reason
from sensitivity.tasks.harness import vlmeval_library, vlmeval_scores

PROBED = 30  # questions on which it is tested which of the library's values scores a single answer
Request = Mapping[str, Any]  # JSON from `vlmeval.py`


class Served:
    """The data set that the first request names, and a method for each kind of later request."""

    def __init__(self, request: Request) -> None:
        name, folder = request["name"], Path(request["folder"])
        self.dataset = vlmeval_library.load_dataset(Path(request["package"]), name, folder, request["published"])
        self.evaluation = vlmeval_scores.evaluation_of(self.dataset, name)
        self.rows = vlmeval_library.rows_of(self.dataset)
        # on the same questions for every split, n and seed, so that the meaning of a score never changes
        self.by = self.evaluation.choose(vlmeval_library.first_answered(self.dataset, PROBED))

    def asked(self, request: Request) -> list[dict[str, object]]:
        """The prompts of some questions, or the reason why a question cannot be asked."""
        prompts: list[dict[str, object]] = []
        for number in request["numbers"]:
            try:
                prompts.append(vlmeval_library.asked(self.dataset, number, Path(request["images"])))
            except UserError:
                raise
            except Exception as error:  # of Pillow, or of the data set's own code
                prompts.append({"flaw": reason(error)})
        return prompts

    def scores(self, request: Request) -> list[float]:
        """The score of each answer."""
        return self.evaluation.scores([(number, text) for number, text in request["answers"]])

    def figures(self, request: Request) -> dict[str, float]:
        """The figures of all answers together."""
        return self.evaluation.figures([(number, text) for number, text in request["answers"]])


def answer_requests() -> None:
    """Answer requests. What the library prints goes to standard error, so that it is not taken for an answer."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    socket.socket.connect = _offline  # type: ignore[method-assign]
    served: Served | None = None
    said: dict[str, object]
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if served is None:
                served = Served(request)
                answer: object = {"rows": served.rows, "by": served.by}
            else:
                do: Callable[[Request], object] = getattr(served, request["do"])
                answer = do(request)
            said = {"answer": answer}
        except UserError as error:
            said = {"error": str(error)}
        except Exception as error:  # of the library; the user gets it in one sentence
            said = {"error": "", "why": reason(error)}
        answers.write(json.dumps(said) + "\n")
        answers.flush()


def _offline(*_: object) -> NoReturn:
    raise UserError("it wants the network, which a sweep does not use")


if __name__ == "__main__":
    answer_requests()
