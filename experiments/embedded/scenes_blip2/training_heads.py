"""Modules used only in training the BLIP-2 models: symbols that replace queries, and heads that read the queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.embedded.batches import Batch, encode
from experiments.embedded.scenes_blip2 import model as blip2
from experiments.embedded.scenes_llava.training_heads import SCALE
from sensitivity.tasks import scenes as S


def quarters(batch: Batch) -> Tensor:
    """Scenes x 4 x 4: token ids of digit, color and place (two words) in each quarter; 0 where it is empty."""
    found = torch.zeros(len(batch.scenes), blip2.CELLS, 4, dtype=torch.long)
    for row, scene in zip(found, batch.scenes, strict=True):
        for d in scene.digits:
            row[d.cell] = torch.tensor(encode(f"{d.value} {d.color} {S.CELLS[d.cell]}"))
    return found


class QuarterSymbols(nn.Module):
    """Ideal queries: each is the sum of the embeddings of the words that describe its quarter of the scene."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Embedding(blip2.QUERIES, blip2.WORDS)
        nn.init.normal_(self.query.weight, 0.0, 0.2)

    def forward(self, batch: Batch, words: Tensor) -> Tensor:
        there = quarters(batch)
        said = (words[there] * (there > 0)[..., None]).sum(-2).repeat(1, blip2.QUERIES // blip2.CELLS, 1)
        return words[batch.background][:, None] + SCALE * self.query.weight + said


class QuarterHeads(nn.Module):
    """Linear heads that read from each query what its quarter shows; their loss trains the Q-Former to look there."""

    def __init__(self) -> None:
        super().__init__()
        most = {"digit": 11, "colour": len(S.COLORS) + 1, "background": len(S.BACKGROUNDS)}
        self.out = nn.ModuleDict({name: nn.Linear(blip2.WIDTH, n) for name, n in most.items()})

    def forward(self, batch: Batch, found: Tensor) -> tuple[Tensor, dict[str, float]]:
        there = quarters(batch)
        first = {"digit": encode("0")[0], "colour": encode("red")[0], "background": encode("paper")[0]}
        filled = there[..., 0] > 0
        truths = {
            "digit": torch.where(filled, there[..., 0] - first["digit"], 10),
            "colour": torch.where(filled, there[..., 1] - first["colour"], len(S.COLORS)),
            "background": (batch.background - first["background"])[:, None].expand(-1, blip2.CELLS),
        }
        total, right = found.new_zeros(()), {}
        for name, truth in truths.items():
            truth = truth.repeat(1, blip2.QUERIES // blip2.CELLS)
            scores = self.out[name](found)
            total = total + cross_entropy(scores.flatten(0, 1), truth.flatten())
            hit = (scores.argmax(-1) == truth).float()
            right["query " + name] = float((hit if name == "background" else hit[filled.repeat(1, 4)]).mean())
        return total, right


def captions(batch: Batch) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of every scene's caption, as the retrieval model reads it."""
    encoded = blip2.tokenizer(retrieval=True)([S.caption(s) for s in batch.scenes], padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def same_caption(batch: Batch) -> Tensor:
    """Scenes x scenes: which have the same caption, so that neither is a wrong answer for the other."""
    said = [S.caption(s) for s in batch.scenes]
    return torch.tensor([[a == b for b in said] for a in said])
