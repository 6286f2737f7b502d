"""The money of a run: nothing is begun that could pass the ceiling, and what is begun always finishes. Pure: no Ray, no clock."""

from __future__ import annotations


class Budget:
    """Dollars spent and promised, together never above `ceiling`; None is no ceiling.

    A unit of work reserves the most it can cost before it starts, and settles what it did cost when it is done. `spent` is
    what earlier parts of the run cost.
    """

    def __init__(self, ceiling: float | None, spent: float = 0.0) -> None:
        self.ceiling, self.spent = ceiling, spent
        self._reserved: dict[str, float] = {}

    @property
    def reserved(self) -> float:
        """Dollars the units under way may still cost."""
        return sum(self._reserved.values())

    def reserve(self, unit: str, most: float) -> bool:
        """Promise a unit the `most` it can cost, and return True; or return False where the ceiling has no room for it.

        A unit that reserves again was lost under way (its process died): what it was promised before counts as spent.
        """
        self.spent += self._reserved.pop(unit, 0.0)
        if self.ceiling is not None and self.spent + self.reserved + most > self.ceiling:
            return False
        self._reserved[unit] = most
        return True

    def is_reserved(self, unit: str) -> bool:
        """Whether a unit is under way."""
        return unit in self._reserved

    def settle(self, unit: str, cost: float) -> None:
        """Count what a unit under way did cost, and free the rest of its promise. Raises `KeyError` for any other unit."""
        del self._reserved[unit]
        self.spent += cost
