"""Following the split: loaded before it is routed to, kept while it is used, served on while the registry is away."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.errors import ReleaseError
from millrace.releases.pipeline import AnswerPipeline
from millrace.releases.split import Split
from millrace.serving import traffic as traffic_module
from millrace.serving.refusal import Refusal
from millrace.serving.traffic import MOST_PINNED, Traffic
from tests.serving.parrot import Drawer, Gateway, Parrot, Shelf, a_release

FIRST = Split(sequence=0, champion="1")
ROLLOUT = Split(sequence=1, rollout_id="r", epoch=1, champion="1", challenger="2", share=1.0, salt="s")


@pytest.fixture
def shelf() -> Shelf:
    drawer = Drawer()
    return Shelf(FIRST, {str(n): a_release(Parrot(), drawer, prompt_version=str(n)) for n in range(1, 8)})


@pytest.fixture
def traffic(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Iterator[Traffic]:
    monkeypatch.setattr(traffic_module, "RETRY_SECONDS", 0.0)
    made = Traffic("qa", shelf)
    made.turn()
    yield made
    made.stop()


def served(traffic: Traffic, pin: str | None = None, user: str = "u") -> str:
    with traffic.route(pin, user) as route:
        assert route.pipeline is not None
        return route.assignment.version


def test_a_new_split_is_followed_at_the_next_turn_and_what_it_drops_is_unloaded(traffic: Traffic, shelf: Shelf) -> None:
    assert served(traffic) == "1"
    shelf.published = ROLLOUT
    traffic.turn()
    assert served(traffic) == "2"
    shelf.published = Split(sequence=2, champion="2")
    traffic.turn()
    assert (served(traffic), shelf.unloaded) == ("2", ["1"])


def test_while_the_registry_is_away_the_last_split_goes_on(traffic: Traffic, shelf: Shelf) -> None:
    shelf.reachable = False
    traffic.turn()
    assert (traffic.not_ready, served(traffic)) == (None, "1")


def test_a_release_is_not_unloaded_while_an_exchange_uses_it(traffic: Traffic, shelf: Shelf) -> None:
    with traffic.route(None, "u") as route:
        shelf.published = Split(sequence=1, champion="2")
        traffic.turn()
        traffic.turn()
        assert (route.assignment.version, shelf.unloaded) == ("1", [])
    traffic.turn()
    assert shelf.unloaded == ["1"]


def test_nobody_waits_for_a_challenger_that_is_still_loading(shelf: Shelf, start: Callable[..., Gateway]) -> None:
    loading, loaded = threading.Event(), threading.Event()

    class Slow(Shelf):
        def load(self, version: str) -> AnswerPipeline:
            if version == "2":
                loading.set()
                assert loaded.wait(10)
            return super().load(version)

    slow = Slow(FIRST, shelf.pipelines)
    gateway = start(slow)
    slow.published = ROLLOUT
    assert loading.wait(5)
    begun = time.monotonic()
    told = gateway.ask().json()["millrace"]
    assert (told["release_version"], told["arm"]) == ("1", None)
    assert time.monotonic() - begun < 2
    loaded.set()
    gateway.wait_until(lambda: gateway.ask().json()["millrace"]["release_version"] == "2")


def test_a_champion_that_cannot_be_loaded_leaves_the_split_before_in_place(traffic: Traffic, shelf: Shelf) -> None:
    shelf.pipelines["3"] = ReleaseError("no weights")
    shelf.published = Split(sequence=1, champion="3")
    traffic.turn()
    assert served(traffic) == "1"
    shelf.pipelines["3"] = shelf.pipelines["4"]
    traffic.turn()
    assert served(traffic) == "3"


def test_a_challenger_that_could_not_be_loaded_is_tried_again(traffic: Traffic, shelf: Shelf) -> None:
    good, shelf.pipelines["2"] = shelf.pipelines["2"], RuntimeError("broken pipe")
    shelf.published = ROLLOUT
    traffic.turn()
    with traffic.route(None, "u") as route:
        assert (route.pipeline, route.broken, route.fallback_version) == (None, "broken pipe", "1")
        assert route.assignment.arm == "challenger"
    shelf.pipelines["2"] = good
    traffic.turn()
    assert served(traffic) == "2"


def test_a_challenger_that_broke_while_it_warmed_up_is_unloaded_when_the_split_drops_it(
    traffic: Traffic, shelf: Shelf
) -> None:
    shelf.pipelines["2"] = a_release(Parrot(breaks_after=0), Drawer(), prompt_version="2")
    for split in (ROLLOUT, Split(sequence=2, champion="1")):
        shelf.published = split
        traffic.turn()
    assert shelf.unloaded == ["2"]


@pytest.mark.parametrize("victim", ["1", "2"])
def test_a_release_whose_engine_broke_is_loaded_again(traffic: Traffic, shelf: Shelf, victim: str) -> None:
    shelf.published = Split(sequence=1, rollout_id="r", epoch=1, champion="1", challenger="2", share=1.0, salt="s")
    traffic.turn()
    old = shelf.pipelines[victim]
    assert isinstance(old, AnswerPipeline)
    old.engine.broken = "out of memory"  # type: ignore[misc]
    shelf.pipelines[victim] = ReleaseError("the machine is full")
    traffic.turn()
    assert shelf.unloaded == [victim]
    if victim == "1":
        assert "the machine is full" in (traffic.not_ready or "")
    else:
        assert traffic.not_ready is None
        with traffic.route(None, "u") as route:
            assert (route.pipeline, route.broken, route.fallback_version) == (None, "the machine is full", "1")
    shelf.pipelines[victim] = a_release(Parrot(), Drawer())
    traffic.turn()
    assert (traffic.not_ready, served(traffic)) == (None, "2")
    with traffic.route(victim, "u") as route:
        assert route.pipeline is shelf.pipelines[victim]


def test_pins_load_on_demand_and_only_a_few_stay_loaded(traffic: Traffic, shelf: Shelf) -> None:
    for version in ("3", "4", "5", "3"):
        assert served(traffic, version) == version
    assert "1" not in shelf.unloaded
    assert len({"3", "4", "5"} - set(shelf.unloaded)) <= MOST_PINNED
    with pytest.raises(Refusal, match="no release '99'") as refusal:
        served(traffic, "99")
    assert refusal.value.status == 404
    shelf.reachable = False
    with pytest.raises(Refusal, match="does not answer") as refusal:
        served(traffic, "7")
    assert refusal.value.status == 503
    assert served(traffic, "3") == "3"


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("split"), st.sampled_from("1234"), st.sampled_from("1234")),
            st.tuples(st.just("pin"), st.sampled_from("1234567"), st.just("")),
            st.tuples(st.just("away"), st.just(""), st.just("")),
        ),
        max_size=12,
    )
)
def test_whatever_happens_a_route_leads_to_a_loaded_release(steps: list[tuple[str, str, str]]) -> None:
    drawer = Drawer()
    loaded: set[str] = set()

    class Watched(Shelf):
        def load(self, version: str) -> AnswerPipeline:
            loaded.add(version)
            return super().load(version)

        def unload(self, version: str) -> None:
            assert version in loaded
            loaded.discard(version)

    shelf = Watched(FIRST, {str(n): a_release(Parrot(), drawer) for n in range(1, 8)})
    traffic = Traffic("qa", shelf)
    traffic.turn()
    for number, (what, one, other) in enumerate(steps):
        shelf.reachable = what != "away"
        if what == "split":
            challenger = None if one == other else other
            shelf.published = Split(sequence=number + 1, champion=one, challenger=challenger, share=0.5)
        if what == "pin":
            assert served(traffic, one) in loaded
        traffic.turn()
        for user in "abcdef":
            assert served(traffic, None, user) in loaded
        assert len(loaded) <= 2 + MOST_PINNED
