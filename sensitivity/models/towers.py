"""Finds a model's vision, connector and language modules, by its getters and its family's facts."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from sensitivity.models.families import Family
from sensitivity.spec.components import natural_order
from sensitivity.spec.errors import UserError

# transformers has no getter for a connector: it is beside vision and language, under one of these names.
CONNECTOR = re.compile(
    r"project(or|ion)|connector|merger|q_?former|resampler|perceiver|adapt[eo]r|aligner|abstractor|bridge"
    r"|query_tokens|image_newline"
)


class Towers:
    """The modules of each part (vision, connector, language), which tell to which part a path belongs."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model = model
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.part_of_module: dict[str, str] = {}  # module path -> part
        # a family's facts come first: they are written down where getters are missing or wrong
        vision = self._named_modules(family.vision) or self._from_getter("get_encoder", modality="image")
        language = self._named_modules(family.language) or self._from_getter("get_decoder")
        for part, paths, others in (("vision", vision, language), ("language", language, vision)):
            # a getter that returns a module around the other part has found nothing of its own
            mine = [path for path in paths if not any(inside(other, path) for other in others)]
            if not mine:
                raise UserError(self._not_found(part))
            self.part_of_module.update(dict.fromkeys(mine, part))
        self.part_of_module.update(dict.fromkeys(self._named_modules(family.connector), "connector"))
        self.heads = {
            *self._named_modules(family.heads),
            *self._from_getter("get_output_embeddings"),
            *self._named_modules(("lm_head",)),
        }

    def part(self, path: str) -> str | None:
        """The part of a path: that of the longest known path around it; None if it is unknown."""
        containing = [known for known in self.part_of_module if inside(path, known)]
        if containing:
            return self.part_of_module[max(containing, key=len)]
        return "connector" if CONNECTOR.search(path.lower()) else None

    def unplaced_error(self, paths: Iterable[str]) -> UserError:
        """The error for linear layers in no part; it names the largest modules around them that hold no known part."""
        names = sorted({self._outermost(path) for path in paths}, key=natural_order)
        return UserError(
            f"cannot place these modules of {type(self.model).__name__}: {', '.join(names)}; each must belong to "
            "vision, connector or language, so name them in FAMILIES (sensitivity/models/families.py)"
        )

    def _outermost(self, path: str) -> str:
        """The outermost module around a path that holds no module of a known part."""
        names = path.split(".")
        outer_paths = (".".join(names[: i + 1]) for i in range(len(names)))
        return next(top for top in outer_paths if not any(inside(known, top) for known in self.part_of_module))

    def _from_getter(self, getter: str, **arguments: str) -> list[str]:
        """The path of the module that a getter returns; empty if it returns nothing, or falls back to the model."""
        found = getattr(self.model, getter, lambda **_: None)(**arguments)
        path = self.paths.get(id(found), "")
        return [path] if path else []

    def _named_modules(self, names: Iterable[str]) -> list[str]:
        """The modules whose paths end with a name; the nearest to the root, so that wrappers do not matter."""
        result = []
        for word in names:
            matching = [path for path in self.paths.values() if f".{path}".endswith(f".{word}")]
            depth = min((path.count(".") for path in matching), default=0)
            result += [path for path in matching if path.count(".") == depth]
        return result

    def _not_found(self, part: str) -> str:
        """The error text for a part that was not found."""
        children = [name for name, child in self.model.named_children() if any(True for _ in child.parameters())]
        return (
            f"found no {part} part in {type(self.model).__name__}, which holds {', '.join(children)}; "
            f"a vision-language model is needed: if it is one, name its {part} modules in FAMILIES "
            "(sensitivity/models/families.py)"
        )


def inside(path: str, containing: str) -> bool:
    """Whether a path is `containing`, or below it."""
    return path == containing or path.startswith(containing + ".")
