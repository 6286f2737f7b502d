"""Log the unused parts of a source, each line once, and count rows that were merged or rendered blank. Imports no Ray."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.progress import log
from generation.sources.row import encodable


class Notes:
    """The log lines and counts of one source, which a run can read several times."""

    def __init__(self) -> None:
        self.merged = 0
        """Rows that became a part of the row before them, because each was one choice of one example."""
        self.blank = 0
        """Renderings of templates that were blank: such a template does not apply to the row."""
        self.too_long = 0
        """Rows that were left out because of `source.max_instruction_chars`."""
        self._logged: set[str] = set()

    def reset_counts(self) -> None:
        """Set the counts to 0, after a reading that only counts the rows."""
        self.merged = self.blank = self.too_long = 0

    def log(self, text: str) -> None:
        """Log a line, unless it was logged before."""
        if text not in self._logged:
            self._logged.add(text)
            log(encodable(text))

    def add(self, setting: str, merged: int, blank: int, unused: Mapping[str, int]) -> None:
        """Add the counts of one reading of a source, and log them.

        Args:
            setting: the setting of the source and its value.
            merged: rows that were merged.
            blank: blank renderings.
            unused: rows for each field that is not used.
        """
        self.merged += merged
        self.blank += blank
        if merged:
            self.log(f"{setting}: {merged:,} rows with one choice each were merged into the row of their example")
        if blank:
            self.log(f"{setting}: {blank:,} renderings are blank; such a template does not apply to the row")
        if unused:
            self.log(
                f"{setting}: fields that are not used, with their rows: " + ", ".join(f"{name} {unused[name]:,}" for name in sorted(unused))
            )
