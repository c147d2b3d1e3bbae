"""Break-even: a staircase against a line, every crossing of it and no other."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from millrace.monitoring.break_even import DAYS, MOST, OWN_MODEL, BreakEven, Change, OwnModel, PaidApi, break_even


def own_model(machine_usd: float, capacity: float = 1000.0, minimum: int = 1, fixed: float = 0.0) -> OwnModel:
    return OwnModel(machine_usd, capacity, minimum, development_usd=fixed)


def api(slope: float, fixed: float = 0.0) -> PaidApi:
    """`slope` dollars a month for each query a day."""
    return PaidApi("api", slope / DAYS, development_usd=fixed)


def told(found: BreakEven) -> list[tuple[float, str]]:
    return [(round(change.queries_per_day, 6), change.cheaper) for change in found.changes]


def test_a_line_may_pass_under_a_step_before_it_stays_above() -> None:
    found = break_even(own_model(100), api(0.16))
    assert told(found) == [(625, OWN_MODEL), (1000, "api"), (1250, OWN_MODEL)]
    assert (found.at_first, found.for_good, found.for_good_from) == ("api", OWN_MODEL, 1250)


def test_machines_that_cost_more_than_they_save_lose_in_the_end() -> None:
    found = break_even(own_model(100), api(0.08, fixed=50))
    assert told(found) == [(625, OWN_MODEL), (1000, "api"), (1875, OWN_MODEL), (2000, "api")]
    assert (found.at_first, found.for_good, found.for_good_from) == ("api", "api", 2000)


def test_machines_that_save_what_they_cost_change_it_for_ever() -> None:
    found = break_even(own_model(100), api(0.1, fixed=50))
    assert told(found)[:4] == [(500, OWN_MODEL), (1000, "api"), (1500, OWN_MODEL), (2000, "api")]
    assert (len(found.changes), found.for_good, found.for_good_from) == (MOST, None, None)


def test_whoever_is_cheaper_at_every_load_never_breaks_even() -> None:
    assert break_even(own_model(100), api(0.05)) == BreakEven("api", "api", (), "api", 0.0)
    assert break_even(own_model(100), api(0.2, fixed=500)) == BreakEven("api", OWN_MODEL, (), OWN_MODEL, 0.0)
    assert break_even(own_model(0), api(0.0)) == BreakEven("api", "api", (), "api", 0.0)


def test_machines_that_are_rented_anyway_are_filled_before_another_is_paid() -> None:
    found = break_even(own_model(100, minimum=3), api(0.25))
    assert told(found) == [(1200, OWN_MODEL)], "two thirds of a staircase that begins with three machines"


def cheaper(own: OwnModel, other: PaidApi, load: float) -> str | None:
    """The cheaper one; None where rounding decides."""
    mine, its = own.month_usd(load), other.month_usd(load)
    if abs(mine - its) <= 1e-7 * max(mine, its):
        return None
    return own.name if mine < its else other.name


def loads(own: OwnModel, found: BreakEven) -> Iterator[float]:
    """Loads that would show a change that isn't told: both sides of steps and of changes, and between."""
    steps = [machines * own.capacity for machines in range(1, own.minimum_machines + 40)]
    marks = sorted({*steps, *(change.queries_per_day for change in found.changes)})
    for before, mark in zip([0.0, *marks], marks, strict=False):
        yield from (mark * (1 - 1e-6), mark * (1 + 1e-6))
        if mark - before > 1e-6 * mark:  # else within what counts as a full machine
            yield (before + mark) / 2


@st.composite
def pairs(draw: Any) -> tuple[OwnModel, PaidApi]:
    capacity = draw(st.floats(1, 1e6))
    machine = draw(st.one_of(st.just(0.0), st.floats(1, 1e4)))
    own = own_model(machine, capacity, draw(st.integers(1, 4)), draw(st.floats(0, 1e4)))
    # Near what a full machine costs, where there are many crossings, and anywhere.
    near = st.floats(0.8, 1.25).map(lambda share: share * machine)
    full = draw(st.one_of(near, st.just(0.0), st.floats(1e-6, 1e5)))
    return own, api(full / capacity, draw(st.floats(0, 1e4)))


@given(pairs())
@example((own_model(100), api(0.16)))
@example((own_model(100), api(0.1, fixed=50)))
@example((own_model(100), api(0.0999, fixed=1e4)))
@example((own_model(1 + 2e-16, 1), PaidApi("api", 0.03287671232876713, development_usd=1)))
@example(
    (own_model(1.1, 1, 1, 4810.414267508965), PaidApi("api", 0.03345259052316817, development_usd=7761.590059364663))
)
def test_every_change_is_told_and_every_change_told_is_one(pair: tuple[OwnModel, PaidApi]) -> None:
    own, other = pair
    found = break_even(own, other)
    known_to = found.changes[-1].queries_per_day if len(found.changes) == MOST else math.inf
    for change, following in zip(found.changes, found.changes[1:], strict=False):
        assert change.queries_per_day <= following.queries_per_day
        assert change.cheaper != following.cheaper
    for load in loads(own, found):
        if load > known_to or (actual := cheaper(own, other, load)) is None:
            continue
        before = [change for change in found.changes if change.queries_per_day < load]
        assert actual == (before[-1].cheaper if before else found.at_first), load


@given(pairs())
@example((own_model(1000, 1), PaidApi("api", 3.287671232876712e-08, development_usd=1000)))
def test_who_is_cheaper_for_good_is_so_at_all_higher_loads(pair: tuple[OwnModel, PaidApi]) -> None:
    own, other = pair
    found = break_even(own, other)
    assume(found.for_good_from is not None)
    start = max(found.for_good_from or 0.0, 1e-6)
    for factor in (1 + 1e-6, 1.01, 1.5, 2, 3, 10, 1000):
        for load in (start * factor, math.ceil(start * factor / own.capacity) * own.capacity * (1 + 1e-6)):
            assert cheaper(own, other, load) in (None, found.for_good)
    if len(found.changes) < MOST:  # all are told, so the last of them is where it begins
        last = found.changes[-1] if found.changes else Change(0.0, found.at_first)
        assert (last.cheaper, last.queries_per_day) == (found.for_good, pytest.approx(found.for_good_from))


@given(pairs(), st.floats(0.1, 1e7), st.floats(0.1, 1e7))
def test_a_higher_load_never_costs_less(pair: tuple[OwnModel, PaidApi], one: float, another: float) -> None:
    low, high = sorted((one, another))
    for way in pair:
        assert way.month_usd(low) <= way.month_usd(high)


@given(st.integers(1, 10_000), st.floats(1e-3, 1e6))
def test_a_machine_that_is_just_full_needs_no_other(machines: int, capacity: float) -> None:
    own = own_model(1, capacity)
    assert own.machines(machines * capacity) == machines
    assert own.machines(machines * capacity * (1 + 1e-6)) == machines + 1


@pytest.mark.parametrize("gap", [-1e12, -1e6, 1e6, 1e12])
@pytest.mark.parametrize("gain", [-1e-3, -1e-12, 0.0, 1e-12, 1e-3])
def test_extreme_differences_are_settled_at_once(gap: float, gain: float) -> None:
    own = own_model(100, fixed=max(gap, 0.0))
    found = break_even(own, api((100 + gain) / 1000, fixed=max(-gap, 0.0)))
    assert len(found.changes) <= MOST
