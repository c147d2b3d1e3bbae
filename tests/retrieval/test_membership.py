import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.retrieval.membership import OPEN, Key, Member, gaps, next_serial, plan_build

CONTENTS = st.sets(st.integers(0, 6)).map(lambda numbers: frozenset((str(n), "v1") for n in numbers))
"""What a build shall hold."""
ATTEMPTS = st.lists(st.tuples(CONTENTS, st.integers(0, 12), st.booleans()), max_size=12)
"""Content; how many writes are done before the builder is killed; whether old builds are collected after it."""


class Collection:
    """Points in memory, written one at a time, and the builds that were completed."""

    def __init__(self) -> None:
        self.points: dict[str, Member] = {}
        self.builds: dict[int, frozenset[Key]] = {}
        self.attempt: tuple[int, frozenset[Key]] = (0, frozenset())
        self.uploads = 0

    def build(self, target: frozenset[Key], lives: int) -> bool:
        head = max(self.builds, default=0)
        found = [member for member in self.points.values() if member.last >= head]
        serial, content = self.attempt
        if serial <= head or content != target:
            serial = next_serial(found, max(head, serial), clock=0)  # a clock that stands still
        self.attempt = (serial, target)
        plan = plan_build(target, found, head, serial)
        writes = [
            *(Member(f"{key}/{serial}", key, serial, OPEN) for key in sorted(plan.upload)),
            *(self._with_last(point, head) for point in plan.close),
            *(self._with_last(point, OPEN) for point in plan.reopen),
        ]
        self.uploads = len(plan.upload)
        for member in writes[:lives]:
            self.points[member.point] = member
        if lives < len(writes) + len(plan.delete):
            return False
        for point in plan.delete:
            del self.points[point]
        self.builds[serial] = target
        return True

    def collect(self) -> None:
        """Keeps the newest build and one more."""
        for serial in sorted(self.builds)[:-2]:
            del self.builds[serial]
        for earlier, later in gaps(self.builds):
            doomed = [m.point for m in self.points.values() if m.first > earlier and m.last < later]
            for point in doomed:
                del self.points[point]

    def holds(self, serial: int) -> list[Key]:
        return sorted(member.key for member in self.points.values() if member.within(serial))

    def _with_last(self, point: str, last: int) -> Member:
        member = self.points[point]
        return Member(point, member.key, member.first, last)


@pytest.mark.slow
@given(ATTEMPTS)
def test_every_build_holds_exactly_its_content_for_ever_whoever_is_killed_or_collected_after_it(
    attempts: list[tuple[frozenset[Key], int, bool]],
) -> None:
    collection = Collection()
    for target, lives, collect in attempts:
        collection.build(target, lives)
        if collect:
            collection.collect()
        for serial, content in collection.builds.items():
            assert collection.holds(serial) == sorted(content)


@given(CONTENTS, CONTENTS)
def test_a_build_uploads_only_what_the_one_before_it_did_not_have(
    before: frozenset[Key], after: frozenset[Key]
) -> None:
    collection = Collection()
    assert collection.build(before, lives=100)
    assert collection.build(after, lives=100)
    assert collection.uploads == len(after - before)


@given(CONTENTS, CONTENTS, st.integers(0, 6))
def test_a_killed_build_goes_on_where_it_was(before: frozenset[Key], after: frozenset[Key], lives: int) -> None:
    collection = Collection()
    collection.build(before, lives=100)
    if not collection.build(after, lives):
        assert collection.build(after, lives=100)
        assert collection.uploads == max(len(after - before) - lives, 0)


@pytest.mark.slow
@given(ATTEMPTS)
def test_after_a_collection_no_point_is_left_that_is_in_no_build(
    attempts: list[tuple[frozenset[Key], int, bool]],
) -> None:
    collection = Collection()
    for target, _, _ in attempts:
        collection.build(target, lives=100)
    collection.collect()
    assert all(any(member.within(serial) for serial in collection.builds) for member in collection.points.values())


def test_a_serial_is_greater_than_all_in_use_even_if_the_clock_went_back() -> None:
    found = [Member("a", ("a", "v1"), 5, OPEN), Member("b", ("b", "v1"), 900, 950)]
    assert next_serial(found, head=7, clock=3) == 951
    assert next_serial(found, head=7, clock=10_000) == 10_000
