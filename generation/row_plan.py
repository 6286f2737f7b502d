"""Decide for each row which candidates come from earlier sets and which are sampled. Imports no Ray.

The candidates of the extended set come first (`generate.extend`), then those of `generate.reuse`; the rest is sampled.
"""

from __future__ import annotations

from typing import Any

from cluster.config import Config
from generation.earlier_set import EarlierSet
from generation.reuse import ReusableCandidates


class RowPlanner:
    """Plans prepared rows, and counts them."""

    def __init__(self, config: Config, reusable: ReusableCandidates, earlier: EarlierSet | None) -> None:
        self._decodings = config.sampler.decodings
        self._model, self._only_reused = config.sampler.model, config.generate.reuse_only
        self._reusable, self._earlier = reusable, earlier
        self.complete = 0
        """Rows without answer choices that are not sampled."""
        self.left_out = 0
        """Rows that `generate.reuse_only` leaves out."""
        self.draws = 0
        """Candidates to sample."""

    def plan(self, row: dict[str, Any]) -> bool:
        """Set `reused` and `draw` of a row (columns of `schema.PREPARED_WITH_REUSE`); return False if the row is left out."""
        kept = self._earlier.find(row) if self._earlier else None
        if row["answer_choices"] is not None:
            return True
        reused = [] if kept is None else list(kept.candidates)
        draw = [each.n for each in self._decodings] if kept is None else list(kept.draw)
        whole = {each.name: number for number, each in enumerate(self._decodings) if draw[number] == each.n}
        found = self._reusable.find(row["id"], whole) if whole else {}
        for name in found:
            draw[whole[name]] = 0
        if any(draw) and self._only_reused:
            if kept is None:
                self.left_out += 1
                return False
            draw = [0] * len(draw)
        if found:
            self._reusable.count(found, complete=not any(draw))
            reused += [{**each, "model": self._model, "label": None} for _, pool in found.values() for each in pool]
        self.complete += not any(draw)
        self.draws += sum(draw)
        row["reused"], row["draw"] = reused or None, draw
        return True
