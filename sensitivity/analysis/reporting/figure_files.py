"""Files of a report's figures: its page lists them with hashes, so that none of other origin is replaced."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from sensitivity.analysis.reporting.static_figures import DrawnFigure
from sensitivity.spec.errors import UserError
from sensitivity.spec.files import (
    csv_bytes,
    disk_error,
    is_unfinished,
    mark_finished,
    mark_unfinished,
    write_atomically,
)

LIST = re.compile(rb"<!-- files: (\{.*\}) -->\s*$")


class FigureFiles:
    """The figures of a report, which are written together, over those of an earlier report alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.contents = folder, dict[str, bytes]()

    def add(self, name: str, picture: DrawnFigure) -> None:
        """A figure, as PNG, SVG and CSV."""
        suffixed = {"png": picture.png, "svg": picture.svg.encode(), "csv": csv_bytes(picture.rows)}
        self.contents |= {f"{name}.{suffix}": content for suffix, content in suffixed.items()}

    def write(self, page: bytes) -> Path:
        """Write all figures and the page, which lists them; raise an error before where a file is not ours."""
        target = self.folder / "index.html"
        self.check(self.contents)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.folder, error) from error
        mark_unfinished(self.folder)
        for name, content in self.contents.items():
            write_atomically(self.folder / name, content)
        names = json.dumps({name: _hash(content) for name, content in self.contents.items()})
        write_atomically(target, page + b"<!-- files: " + names.replace("--", "-\\u002d").encode() + b" -->\n")
        mark_finished(self.folder)
        return target

    def check(self, names: Iterable[str] = ()) -> None:
        """Raise an error where a file of these names, or of an earlier report, is not as an earlier report wrote it."""
        earlier = listed(self.folder / "index.html")
        # what a killed run began is ours, and so is what an earlier version wrote, whose page has no list
        if earlier is None or is_unfinished(self.folder):
            return
        for file in (self.folder / name for name in {*names, *earlier}):
            if file.is_symlink() or (file.exists() and earlier.get(file.name) != _hash(file.read_bytes())):
                raise UserError(
                    f"{file} is not replaced: it is not as an earlier report wrote it; move it away, or choose another "
                    "--out"
                )


def listed(page: Path) -> dict[str, str] | None:
    """The files that a page lists, with their hashes; None for a page without a list."""
    with contextlib.suppress(OSError, ValueError):
        if match := LIST.search(page.read_bytes()):
            found = json.loads(match[1])
            return found if isinstance(found, dict) else None
    return None


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
