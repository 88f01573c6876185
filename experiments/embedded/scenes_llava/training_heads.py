"""Modules used only in training scenes-llava: symbols that replace image tokens, and heads that read the patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.embedded.batches import Batch, encode
from experiments.embedded.scenes_llava import model as llava
from sensitivity.tasks import scenes as S

SCALE = 0.4  # of position and box beside the words of a patch: smaller, so that words dominate the sum


class Symbols(nn.Module):
    """Ideal image tokens: for each patch the sum of the embeddings of the words that describe it.

    The language model learns to answer from these before any image exists, and the projector then learns to output
    them. Prototypes that learned both at once from questions and answers did not reach these scores.
    """

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.corner = nn.Embedding(4 * 26, width)
        self.angle = nn.Embedding(len(S.ANGLES), width)
        self.patch = nn.Embedding(llava.PATCHES, width)
        for table in (self.corner, self.angle, self.patch):
            nn.init.normal_(table.weight, 0.0, 0.2)

    def forward(self, batch: Batch, words: Tensor) -> Tensor:
        corners = self.corner(batch.corners + 26 * torch.arange(4)).sum(-2)
        there = words[batch.words].sum(-2) + SCALE * (corners + self.angle(batch.angle))
        return words[batch.background][:, None] + SCALE * self.patch.weight + there * batch.filled[..., None]


class PatchHeads(nn.Module):
    """Linear heads on the vision tower that read what each patch shows; their loss trains the tower by itself."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.out = nn.ModuleDict(
            {
                "digit": nn.Linear(width, 11),
                "colour": nn.Linear(width, len(S.COLORS) + 1),
                "angle": nn.Linear(width, len(S.ANGLES)),
                "background": nn.Linear(width, len(S.BACKGROUNDS)),
                "box": nn.Linear(width, 4 * 26),
            }
        )

    def forward(self, batch: Batch, seen: Tensor) -> tuple[Tensor, dict[str, float]]:
        there = batch.filled
        first = {"digit": encode("0")[0], "colour": encode("red")[0], "background": encode("paper")[0]}
        digit = torch.where(there, batch.words[..., 0] - first["digit"], 10)
        colour = torch.where(there, batch.words[..., 1] - first["colour"], len(S.COLORS))
        background = (batch.background - first["background"])[:, None].expand_as(there)
        asked = {
            "digit": (1.0, seen, digit),
            "colour": (0.5, seen, colour),
            "background": (0.2, seen, background),
            "angle": (0.3, seen[there], batch.angle[there]),
            "box": (0.4, seen[there], batch.corners[there]),
        }
        total, right = seen.new_zeros(()), {}
        for name, (weight, features, truth) in asked.items():
            scores = self.out[name](features).unflatten(-1, (*truth.shape[features.dim() - 1 :], -1))
            total = total + weight * cross_entropy(scores.flatten(0, -2), truth.flatten())
            hit = (scores.argmax(-1) == truth).float()
            right["eye " + name] = float((hit[there] if name in ("digit", "colour") else hit).mean())
        return total, right
