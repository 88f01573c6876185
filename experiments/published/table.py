"""All published studies by name, as `python -m experiments.published` takes them."""

from __future__ import annotations

from experiments.published import geochat, mmq
from experiments.published.declaration import PublishedStudy

STUDIES: dict[str, PublishedStudy] = mmq.STUDIES | geochat.STUDIES
