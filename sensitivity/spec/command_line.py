"""Commands that messages tell the user to type."""

import shlex


def shell_word(value: object) -> str:
    """A path or a name as one word of a command, in quotes where the shell needs them."""
    return shlex.quote(str(value))
