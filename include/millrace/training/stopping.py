"""When to stop, and which weights to keep, from what was measured on the development split. Pure."""

from collections.abc import Sequence
from typing import NamedTuple


class Measured(NamedTuple):
    """The mean loss on the development split after so many steps."""

    step: int
    loss: float


def best_of(history: Sequence[Measured]) -> Measured:
    """The lowest; of equal ones the earliest."""
    return min(history, key=lambda measured: measured.loss)


def exhausted(history: Sequence[Measured], patience: int) -> bool:
    """Whether the last `patience` measurements brought nothing better than one before them (Prechelt, 1998)."""
    return bool(history) and len(history) - 1 - history.index(best_of(history)) >= patience
