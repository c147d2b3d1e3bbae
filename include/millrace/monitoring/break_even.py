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
"""Two slopes are equal within this, relative; a machine is full, and two loads are equal, within this share of what one
machine carries."""


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
    machines, sliver = line.first, ROUNDING * own.capacity
    for _ in range(MOST + 2):  # each step from the first on begins a stretch, or none after it does
        begin, last = line.met(machines), float(machines)
        if begin < machines * own.capacity - sliver:
            last = line.last(machines)
            if stretches and begin <= stretches[-1][1] + sliver:
                begin, _ = stretches.pop()
            stretches.append((begin, last * own.capacity))
        elif line.gain <= 0:
            break  # further machines only lose
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
    """An API's straight line, seen from the own model's steps."""

    def __init__(self, own: OwnModel, api: PaidApi) -> None:
        self.own, self.api = own, api
        self.slope = api.query_usd * DAYS
        self.gap = own.development_usd + own.batch_usd - api.development_usd - api.batch_usd
        full = self.slope * own.capacity
        gain = full - own.machine_usd
        self.gain = gain if abs(gain) > ROUNDING * max(full, own.machine_usd) else 0.0
        """Dollars a month that each further full machine saves against the API."""
        joined = self.gap + own.machine_usd
        self.joined = joined if abs(joined) > ROUNDING * own.machine_usd else 0.0
        """What full machines must have gained to carry an empty one."""

    @property
    def first(self) -> int:
        """Machines of the first step that is worth a look: before it the API is cheaper throughout."""
        skipped = math.floor(self.gap / self.gain) if self.gain > 0 else 0
        return max(self.own.minimum_machines, skipped)

    def met(self, machines: int) -> float:
        """The load above which the own model is cheaper while it needs so many machines; infinite: nowhere."""
        before = 0.0 if machines == self.own.minimum_machines else (machines - 1) * self.own.capacity
        step = self.gap + machines * self.own.machine_usd
        if self.slope == 0:
            return before if step < -ROUNDING * self.own.machine_usd else math.inf
        return max(before, step / self.slope)

    def last(self, machines: int) -> float:
        """The last step of the stretch that begins within this one: until then no further machine, however empty,
        makes the API cheaper. Infinite: never."""
        if self.gain >= 0:
            gained = machines * self.gain
            return math.inf if gained >= self.joined * (1 - ROUNDING) and gained > self.gap else machines
        return max(machines, math.ceil(self.joined / self.gain * (1 - ROUNDING)))

    def settled(self) -> tuple[str | None, float | None]:
        """Who is cheaper at all high loads, and above which."""
        own, joined = self.own, self.joined
        if self.gain > 0:
            return own.name, self.met(max(own.minimum_machines, math.ceil(joined / self.gain * (1 - ROUNDING))))
        if self.gain < 0:
            step = math.ceil(self.gap / self.gain * (1 - ROUNDING)) - 1
            return self.api.name, step * own.capacity if step >= own.minimum_machines else 0.0
        if self.gap >= 0:
            return self.api.name, 0.0
        return (own.name, self.met(own.minimum_machines)) if joined <= 0 else (None, None)
