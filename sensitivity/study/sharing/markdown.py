"""Escapes text from elsewhere for Markdown and for its YAML front matter."""

from __future__ import annotations

import json
import re

# text that YAML reads as a string without quotes, except for its numbers and words such as `no`
PLAIN_YAML = re.compile(r"[A-Za-z0-9][\w.+-]*")
MARKUP = str.maketrans({letter: f"&#{ord(letter)};" for letter in "<>&|`[]*\\"})


def escaped(text: str) -> str:
    """Text from elsewhere for use in Markdown: it can start no tag, link, image, emphasis or table cell."""
    return " ".join(text.split()).translate(MARKUP)


def yaml_text(text: str) -> str:
    """Text for the YAML front matter, quoted as JSON where needed: a JSON string is a YAML string."""
    simple = PLAIN_YAML.fullmatch(text) and not re.fullmatch(r"(?i)y|n|yes|no|on|off|true|false|null|[\d._+e-]+", text)
    return text if simple else json.dumps(text)
