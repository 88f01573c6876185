"""Files that are either there in full or not at all."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from sensitivity.errors import UserError


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A temporary name beside the target, moved into place only when the block ends well."""
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        yield unfinished
        os.replace(unfinished, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(target: Path, content: bytes) -> None:
    with whole(target) as unfinished:
        unfinished.write_bytes(content)
