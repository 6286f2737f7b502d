"""The dollar budget of a run: reserve the maximum cost of a unit before it starts, settle its actual cost afterwards.

Pure: imports no Ray and reads no clock.
"""

from __future__ import annotations


class Budget:
    """Dollars spent and reserved. Their sum never exceeds `ceiling`; a ceiling of None means no limit.

    `spent` starts at the cost of earlier attempts of the run. A unit reserves its maximum cost before it starts. After it
    has finished, its actual cost is settled.
    """

    def __init__(self, ceiling: float | None, spent: float = 0.0) -> None:
        self.ceiling, self.spent = ceiling, spent
        self._reserved: dict[str, float] = {}

    @property
    def reserved(self) -> float:
        """Return the dollars that units in progress may still cost."""
        return sum(self._reserved.values())

    def reserve(self, unit: str, max_cost: float) -> bool:
        """Reserve `max_cost` dollars for a unit; return False, without a reservation, if the sum would exceed the ceiling.

        A unit that reserves a second time was lost in progress, because its process exited. Its first reservation then
        counts as spent.
        """
        self.spent += self._reserved.pop(unit, 0.0)
        if self.ceiling is not None and self.spent + self.reserved + max_cost > self.ceiling:
            return False
        self._reserved[unit] = max_cost
        return True

    def is_reserved(self, unit: str) -> bool:
        """Return whether a unit has a reservation that is not settled."""
        return unit in self._reserved

    def settle(self, unit: str, cost: float) -> None:
        """Add the actual cost of a unit, in dollars, to `spent` and release its reservation.

        Raises `KeyError` for a unit without a reservation.
        """
        del self._reserved[unit]
        self.spent += cost
