"""CIDEr of each caption, with the references of a whole task, and pycocoevalcap's corpus metrics."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence

from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples.types import Example, Metric, Task
from sensitivity.tasks.scoring.caption_words import words

ORDERS = 4  # n-grams of one to four words
SIGMA = 6.0  # width of CIDEr-D's Gaussian penalty on a difference in length
Gram = tuple[str, ...]
INSTALL = "pip install 'vlm-sensitivity[tasks]'"
SLOW = ("METEOR",)  # its Java program takes seconds to start, and 2 GB


def task(name: str, examples: tuple[Example, ...], notes: tuple[str, ...] = ()) -> Task:
    """Captions scored by CIDEr, with the other metrics that are usually reported."""
    further, missing = caption_metrics()
    return Task(name, examples, cider(examples), metrics=further, notes=(*notes, *missing), slow=SLOW)


def cider(examples: Sequence[Example]) -> Callable[[str, Example], float]:
    """The CIDEr-D of an answer, from 0 to 10, with the document frequencies of these examples' references.

    Vedantam et al. 2015, section 5, with the details of pycocoevalcap: each image is one document, term frequencies are
    counts, an answer's counts are clipped to the reference's, and a Gaussian penalizes a difference in the number of
    bigrams. Its mean over the examples is pycocoevalcap's corpus CIDEr.

    It is computed here because a sweep scores a few answers at a time, with the references of the whole task. It
    depends on which images are evaluated: scores of different samples are not comparable, and with a single image every
    score is 0.
    """
    images_with: Counter[Gram] = Counter()
    for example in examples:
        # a set: an n-gram counts once per image, however often its references use it
        images_with.update({gram for right in example.answers for gram in _grams(right)})
    documents = math.log(max(len(examples), 1))
    idf = {gram: documents - math.log(count) for gram, count in images_with.items()}

    def vector(text: str) -> tuple[list[dict[Gram, float]], list[float], int]:
        by_order: list[dict[Gram, float]] = [{} for _ in range(ORDERS)]
        counts = _grams(text)
        for gram, count in counts.items():
            # an n-gram in no reference gets the idf of one that occurs once
            by_order[len(gram) - 1][gram] = count * idf.get(gram, documents)
        norms = [math.sqrt(sum(weight**2 for weight in order.values())) for order in by_order]
        return by_order, norms, sum(count for gram, count in counts.items() if len(gram) == 2)

    def score(answer: str, example: Example) -> float:
        given, lengths, bigrams = vector(answer)
        total = 0.0
        for right in example.answers:
            reference, others, expected = vector(right)
            alike = 0.0
            for n in range(ORDERS):
                if lengths[n] and others[n]:
                    both = ((weight, reference[n].get(gram, 0.0)) for gram, weight in given[n].items())
                    # the cosine similarity of the two vectors, with the answer's weights clipped to the reference's
                    alike += sum(min(ours, theirs) * theirs for ours, theirs in both) / (lengths[n] * others[n])
            total += alike * math.exp(-((bigrams - expected) ** 2) / (2 * SIGMA**2))
        return 10 * total / (ORDERS * len(example.answers))

    return score


def _grams(text: str) -> Counter[Gram]:
    tokens = words(text)
    return Counter(tuple(tokens[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(tokens) - n + 1))


def caption_metrics() -> tuple[dict[str, Metric], tuple[str, ...]]:
    """Those of BLEU-4, ROUGE-L and METEOR that are installed, and notes on the others."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return {}, (f"BLEU-4, ROUGE-L and METEOR are left out: they need pycocoevalcap ({INSTALL})",)
    plain: dict[str, Metric] = {"BLEU-4": bleu4, "ROUGE-L": rouge_l}
    if shutil.which("java") is None:
        return plain, ("METEOR is left out: it needs Java, and there is none on the path",)
    return plain | {"METEOR": meteor}, ()


def bleu4(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """BLEU-4 of all answers, from pycocoevalcap."""
    from pycocoevalcap.bleu.bleu import Bleu

    return float(Bleu(4).compute_score(*_corpus(answers, examples), verbose=0)[0][3])


def rouge_l(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """ROUGE-L of all answers, from pycocoevalcap."""
    from pycocoevalcap.rouge.rouge import Rouge

    return float(Rouge().compute_score(*_corpus(answers, examples))[0])


def meteor(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """METEOR 1.5 of all answers, from pycocoevalcap's Java program."""
    from pycocoevalcap.meteor.meteor import Meteor

    right, given = _corpus(answers, examples)
    program = Meteor()
    try:
        # the program would wait for more input after an empty line
        return float(program.compute_score(right, {i: [answer or "."] for i, [answer] in given.items()})[0])
    except (OSError, ValueError) as error:
        raise UserError(f"METEOR's Java program failed ({error}); it needs 2 GB; try java -version") from error
    finally:
        # pycocoevalcap leaves the process running and its pipes open until garbage collection
        pipes = program.meteor_p
        pipes.kill()
        pipes.wait()
        for pipe in (pipes.stdin, pipes.stdout, pipes.stderr):
            pipe.close()


def _corpus(answers: Sequence[str], examples: Sequence[Example]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and answers in the form that pycocoevalcap takes."""
    right = {i: [" ".join(words(one)) for one in example.answers] for i, example in enumerate(examples)}
    return right, {i: [" ".join(words(answer))] for i, answer in enumerate(answers)}


def rouge(kind: str) -> Callable[[str, str], float]:
    """rouge_score's F1 with stemming between an answer and a right one; kind is rouge1 or rougeL."""
    if importlib.util.find_spec("rouge_score") is None:
        raise UserError(f"captions of regions are scored by rouge_score, which is not installed; type {INSTALL}")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], use_stemmer=True)
    return lambda answer, right: float(scorer.score(right, answer)[kind].fmeasure)
