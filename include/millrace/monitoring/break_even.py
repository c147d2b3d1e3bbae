"""What answering costs a month as a function of load, and where the cheaper of two ways to answer changes.

An own model is rented in whole machines, so its cost is a staircase; a paid API's is a straight line. The two can
cross many times: the line passes under a step before the next machine, and lies under the staircase again behind it.
Pure: it knows neither tables nor declarations.
"""

import math
from dataclasses import dataclass

DAYS = 365 / 12
"""Of a month."""
HOURS = 24 * DAYS
OWN_MODEL = "own model"

MOST = 12
"""Changes that are listed; what follows for good is told nevertheless."""
ROUNDING = 1e-9
"""Two slopes are equal within this, relative; a machine is full within this share of what it carries; a month's dollars
decide nothing within this share of what a machine costs, or of what the API takes for a full one's answers."""


@dataclass(frozen=True)
class OwnModel:
    """A model on machines of one kind."""

    machine_usd: float
    """Of one machine, a month."""
    capacity: float
    """Queries a day that one machine carries, above 0."""
    minimum_machines: int
    development_usd: float = 0.0
    """A month, whatever the load; so is the next."""
    batch_usd: float = 0.0
    name: str = OWN_MODEL

    def machines(self, load: float) -> int:
        """Whole machines for `load` queries a day."""
        return max(self.minimum_machines, math.ceil(load / self.capacity - ROUNDING))

    def serving_usd(self, load: float) -> float:
        """A month, at `load` queries a day; so are the others."""
        return self.machines(load) * self.machine_usd

    def month_usd(self, load: float) -> float:
        return self.development_usd + self.batch_usd + self.serving_usd(load)


@dataclass(frozen=True)
class PaidApi:
    """A model that is paid by the token."""

    name: str
    query_usd: float
    development_usd: float = 0.0
    """A month, whatever the load; so is the next."""
    batch_usd: float = 0.0

    def serving_usd(self, load: float) -> float:
        """A month, at `load` queries a day; so are the others."""
        return load * DAYS * self.query_usd

    def month_usd(self, load: float) -> float:
        return self.development_usd + self.batch_usd + self.serving_usd(load)


@dataclass(frozen=True)
class Change:
    """Above `queries_per_day`, `cheaper` is the cheaper one; up to it, the other."""

    queries_per_day: float
    cheaper: str


@dataclass(frozen=True)
class BreakEven:
    """Own model against one API. Where both cost the same, the API counts as the cheaper one: it needs no machine."""

    api: str
    at_first: str
    """The cheaper one at the lowest loads."""
    changes: tuple[Change, ...]
    """By load; the first `MOST` of them."""
    for_good: str | None
    """The cheaper one at all high loads; None: it changes with every machine, for ever."""
    for_good_from: float | None
    """Queries a day above which that is so."""


def break_even(own: OwnModel, api: PaidApi) -> BreakEven:
    """Every load at which the cheaper of the two changes, exactly: no grid, no search.

    With n machines the own model costs the same for all loads up to n · capacity, and a line rises from the API's
    fixed costs. So it is cheaper above where that line meets the step, if this lies before the step's end. What
    remains is to join neighbouring stretches, and to know when the pattern ends: each full machine gains
    capacity · price - machine over the API, whichever sign that has.
    """
    line = _Line(own, api)
    stretches: list[tuple[float, float]] = []  # where the own model is cheaper: above the first, up to the second
    machines = line.first
    while len(stretches) * 2 <= MOST and line.wins(machines):
        last = line.last(machines)
        stretches.append((line.met(machines), last * own.capacity))
        if math.isinf(last):
            break
        machines = int(last) + 1
    changes = [
        Change(load, cheaper)
        for begin, end in stretches
        for load, cheaper in ((begin, own.name), (end, api.name))
        if 0 < load < math.inf
    ]
    at_first = own.name if stretches and stretches[0][0] <= 0 else api.name
    return BreakEven(api.name, at_first, tuple(changes[:MOST]), *line.settled())


class _Line:
    """An API's straight line, seen from the own model's steps.

    A step wins if its machines, when full, are cheaper than the API; it carries the next one if that is cheaper even
    when empty. Both are told by comparing how many machines there are with a number that is computed once, so that
    whatever is within rounding is decided everywhere alike.
    """

    def __init__(self, own: OwnModel, api: PaidApi) -> None:
        self.own, self.api = own, api
        self.slope = api.query_usd * DAYS
        self.gap = own.development_usd + own.batch_usd - api.development_usd - api.batch_usd
        full = self.slope * own.capacity
        rounding = ROUNDING * max(full, own.machine_usd)
        gain = full - own.machine_usd
        self.gain = gain if abs(gain) > rounding else 0.0
        """Dollars a month that each further full machine saves against the API."""
        must_win, must_carry = self.gap + rounding, self.gap + own.machine_usd - rounding
        minimum = float(own.minimum_machines)
        self.least, self.most = minimum, math.inf
        """The steps that win."""
        self.carrying_from, self.carrying_to = minimum, math.inf
        """Those of them that carry the next; none: from an infinite one."""
        if self.gain > 0:
            self.least = max(minimum, math.floor(must_win / self.gain) + 1)
            self.carrying_from = max(self.least, math.ceil(must_carry / self.gain))
        elif self.gain < 0:
            self.most = math.ceil(must_win / self.gain) - 1
            self.carrying_to = min(self.most - 1, math.floor(must_carry / self.gain))
        else:
            self.most = math.inf if must_win < 0 else 0
            self.carrying_from = minimum if must_carry <= 0 else math.inf

    @property
    def first(self) -> int:
        """Machines of the first step that may win."""
        return int(self.least)

    def wins(self, machines: int) -> bool:
        return self.least <= machines <= self.most

    def met(self, machines: float) -> float:
        """The load above which the own model is cheaper while it needs so many machines, which win."""
        before = 0.0 if machines == self.own.minimum_machines else (machines - 1) * self.own.capacity
        step = self.gap + machines * self.own.machine_usd
        return min(max(before, step / self.slope), machines * self.own.capacity) if self.slope else before

    def last(self, machines: int) -> float:
        """The last step of the stretch that begins within this one, which wins. Infinite: it never ends."""
        return self.carrying_to + 1 if self.carrying_from <= machines <= self.carrying_to else machines

    def settled(self) -> tuple[str | None, float | None]:
        """Who is cheaper at all high loads, and above which."""
        if not math.isinf(self.most):
            return self.api.name, self.most * self.own.capacity if self.most >= self.own.minimum_machines else 0.0
        if math.isinf(self.carrying_from):
            return None, None
        return self.own.name, self.met(self.carrying_from)
