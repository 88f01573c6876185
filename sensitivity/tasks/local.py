"""A user's own data: a JSON Lines file with image, prompt and answers per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sensitivity import tasks
from sensitivity.errors import UserError

NEEDS = 'each line is like {"image": "a.jpg", "prompt": "What is this?", "answers": ["a cat"]}'


def jsonl(path: Path, split: str, n: int, seed: int) -> tasks.Task:
    """n examples drawn with the seed; a line may name its "split" (evaluation where it does not)."""
    lines = [line for line in _lines(path) if line.get("split", "evaluation") == split]
    if not lines:
        raise UserError(f'{path} has no {split} lines; {NEEDS}, and may have "split": "{split}"')
    order = np.random.default_rng(seed).permutation(len(lines))[:n]
    examples = tuple(_example(path, lines[i]) for i in sorted(order))
    ids = [example.id for example in examples]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise UserError(f"{path} has the id '{twice}' twice")
    return tasks.Task(path.stem, examples, tasks.exact)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error.msg}); {NEEDS}") from error
        given = fields if isinstance(fields, dict) else {}
        if missing := [name for name in ("image", "prompt", "answers") if not given.get(name)]:
            raise UserError(f"{path}, line {number} lacks {' and '.join(missing)}; {NEEDS}")
        yield {**fields, "number": number}


def _example(path: Path, fields: dict[str, Any]) -> tasks.Example:
    image = path.parent / fields["image"]
    answers = fields["answers"]
    return tasks.Example(
        id=str(fields.get("id", f"line-{fields['number']}")),
        cluster=str(fields["image"]),
        kind=str(fields.get("kind", "all")),
        image=image,
        prompt=str(fields["prompt"]),
        answers=(answers,) if isinstance(answers, str) else tuple(str(answer) for answer in answers),
    )
