"""Which points of a lineage's collection belong to which build, as numbers. Pure; knows no Qdrant.

Builds of a lineage are numbered upwards by a serial. A point carries the serial of the first build that it is in and
that of the last one (`OPEN` while nothing has removed it), so it is in build `s` exactly when `first <= s <= last`: a
new build touches only what changed, and nothing that a new build writes can change an older one. What an attempt that
never became a build has left is seen by its numbers: it began after the newest build (the head), or closed at it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

OPEN = 2**53 - 1
"""`last` of a point that is in the newest build, and in what comes after: the largest integer that JSON carries."""

Key = tuple[str, str]
"""Chunk id and content hash: what must be equal for a point to be used again."""


@dataclass(frozen=True)
class Member:
    """A point as far as membership goes."""

    point: str
    key: Key
    first: int
    last: int

    def within(self, serial: int) -> bool:
        return self.first <= serial <= self.last


@dataclass(frozen=True)
class Plan:
    """What makes a build of a collection. Each step may be done twice; done in part, planning again gives the rest."""

    upload: set[Key] = field(default_factory=set)
    """New points, `first` = the build's serial, `last` = `OPEN`."""
    close: list[str] = field(default_factory=list)
    """Points whose `last` becomes the head's serial."""
    reopen: list[str] = field(default_factory=list)
    """Points whose `last` becomes `OPEN` again: an attempt that came to nothing had closed them."""
    delete: list[str] = field(default_factory=list)
    """Points that are in no build."""


def plan_build(target: Collection[Key], found: Iterable[Member], head: int, serial: int) -> Plan:
    """How to get from the head to a build that holds exactly `target`.

    Args:
        found: every point with `last >= head`.
        head: serial of the newest build; 0: there is none.
        serial: of the build to make, greater than any other.
    """
    plan = Plan()
    there: set[Key] = set()
    for member in found:
        if head < member.first != serial:
            plan.delete.append(member.point)
        elif member.key in target and member.key not in there:
            there.add(member.key)
            if member.last != OPEN:
                plan.reopen.append(member.point)
        elif member.first == serial:
            plan.delete.append(member.point)
        elif member.last == OPEN:
            plan.close.append(member.point)
    plan.upload.update(set(target) - there)
    return plan


def next_serial(found: Iterable[Member], head: int, clock: int) -> int:
    """Greater than every serial in use, whatever the clock (microseconds) says."""
    used = [number for member in found for number in (member.first, member.last) if number != OPEN]
    return max(clock, head + 1, *(number + 1 for number in used))


def gaps(serials: Iterable[int]) -> list[tuple[int, int]]:
    """Neighbours among the serials of the builds that are kept, from 0 on: a point with `first > a` and `last < b` is
    in none of them."""
    ordered = sorted(serials)
    return list(zip([0, *ordered], ordered, strict=False))
