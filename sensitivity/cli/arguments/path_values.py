"""Types of flag values that name files, folders and databases; a path to write to is checked before anything runs."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from sensitivity.cli.arguments.values import PATH, model_or_task, shown
from sensitivity.spec.files import PACKAGE


def path(text: str) -> Path:
    """The path of something to be read; ~ is the home folder."""
    return Path(os.path.expanduser(model_or_task(text)))


def out(text: str) -> Path:
    """A path to be written, which must be outside this package and not contain the working or home folder."""
    target = path(text)
    where = target.resolve()
    if where in (here := Path.cwd().resolve(), *here.parents) or where == Path.home().resolve():
        raise argparse.ArgumentTypeError(
            f"takes a folder of its own, such as runs/first; {shown(text)} is or holds the working or home folder"
        )
    if where == PACKAGE or PACKAGE in where.parents:
        raise argparse.ArgumentTypeError(f"takes a folder outside this package, and {shown(text)} is inside")
    # the nearest folder that exists: everything below it will be created
    there = next(parent for parent in where.parents if os.path.exists(parent))
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"cannot be {shown(text)}, since {shown(str(there))} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"cannot be {shown(text)}: nothing may be written in {shown(str(there))}")
    return target


def out_folder(text: str) -> Path:
    """The path of a folder to be written."""
    target = out(text)
    if target.exists() and not target.is_dir():
        raise argparse.ArgumentTypeError(f"takes a folder, and {shown(text)} is a file")
    return target


def file(text: str) -> Path:
    """The path of a file to be written."""
    target = out(text)
    if target.is_dir():
        raise argparse.ArgumentTypeError(f"takes a file, and {shown(text)} is a folder")
    return target


def address(text: str) -> str:
    """The URL of a database; its login is left out of messages."""
    if not re.fullmatch(r"[a-z][\w+.-]*://\S+", text) or not text.isprintable() or len(text.encode()) > PATH:
        raise argparse.ArgumentTypeError(
            f"takes a URL such as postgresql+psycopg://HOST/DB, not {_without_login(text)}"
        )
    return text


def _without_login(text: str) -> str:
    return shown(re.sub(r"//.*@", "//", text))
