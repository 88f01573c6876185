"""load_plugins(): imports what SENSITIVITY_PLUGINS names, so that a command knows the rows that it adds to tables."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from sensitivity.spec.errors import UserError, reason

VARIABLE = "SENSITIVITY_PLUGINS"  # files that end in .py, and modules, with a colon between them; workers inherit it


def load_plugins() -> None:
    """Import every file and module that the environment variable names; an error says which cannot be imported."""
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        try:
            if name.endswith(".py"):
                _run_file(Path(name).expanduser())
            else:
                importlib.import_module(name)
        except UserError:
            raise
        except Exception as error:  # whatever the code of others may raise
            what = f"{type(error).__name__}: {reason(error)}"
            raise UserError(f"{VARIABLE} names {name}, which cannot be imported ({what})") from error


def _run_file(path: Path) -> None:
    """Run a file as a module of its own, whose name no library has."""
    spec = spec_from_file_location(f"sensitivity_plugin_{path.stem}", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise UserError(f"{VARIABLE} names {path}, and there is no such file")
    sys.modules[spec.name] = module = module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
