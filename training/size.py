"""How much a split or a step holds; apart from its readers, so that the loop needs no Arrow."""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    """How much there is in a split or in a step."""

    pairs: int
    instructions: int
    """Those with a pair."""
