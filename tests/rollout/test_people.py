"""What people do by hand: decisions with name and reason, in the journal and in the split."""

from collections.abc import Callable
from typing import Any

import pytest

from millrace.applications import Application
from millrace.errors import MillraceError
from millrace.lakehouse.lake import Lake
from millrace.releases import published_split
from millrace.rollout import people
from millrace.rollout.controller import tick
from millrace.rollout.decisions import read_journal
from millrace.settings import Settings

ANN = {"actor": "ann", "reason": "because"}


@pytest.fixture
def started(tracked: Settings, application: Application) -> Lake:
    """A champion, and version 2 at the first step."""
    tick(tracked, application, run="test")
    people.admit(tracked, application, "2", **ANN, simulated=True)
    tick(tracked, application, run="test")
    return Lake.of(tracked, application.name)


def test_each_act_is_a_decision_with_name_and_reason(
    started: Lake, tracked: Settings, application: Application
) -> None:
    people.freeze(tracked, application, **ANN)
    assert tick(tracked, application, run="test")["decision"] is None
    people.resume(tracked, application, **ANN)
    people.skip(tracked, application, **ANN)
    people.roll_back(tracked, application, **ANN)
    journal = read_journal(started)
    assert [d.kind for d in journal] == ["bootstrap", "admit", "start", "freeze", "resume", "skip", "rollback"]
    assert [(d.actor, d.reason) for d in journal[3:]] == [("ann", "because")] * 4
    assert [(d.champion, d.challenger, d.share) for d in journal[-2:]] == [("2", "2", 1.0), ("1", "2", 0.0)]
    assert journal[1].simulated
    assert journal[2].simulated
    split = published_split.read_split(tracked, application.name)
    assert split is not None
    assert (split.sequence, split.champion, split.challenger) == (6, "1", None)


def test_a_rollback_by_hand_acts_at_once(started: Lake, tracked: Settings, application: Application) -> None:
    people.roll_back(tracked, application, **ANN)
    split = published_split.read_split(tracked, application.name)
    assert split is not None
    assert (split.champion, split.challenger, split.share) == ("1", None, 0.0)
    assert tick(tracked, application, run="test")["decision"] is None


@pytest.mark.parametrize(
    ("act", "why"),
    [
        (lambda s, a: people.admit(s, a, "99", **ANN), "version '99' of .* is not registered; registered are 1, 2"),
        (lambda s, a: people.admit(s, a, "1", **ANN), "version 1 is champion already"),
        (lambda s, a: people.admit(s, a, "2", **ANN), "version 2 is rolling out already"),
        (lambda s, a: people.resume(s, a, **ANN), "nothing is frozen"),
        (lambda s, a: people.freeze(s, a, actor=" ", reason="because"), "needs the name"),
        (lambda s, a: people.freeze(s, a, actor="ann", reason=""), "needs the name of who decides and a reason"),
    ],
)
def test_what_cant_be_done_is_said_in_one_sentence_and_leaves_no_trace(
    act: Callable[[Settings, Application], Any], why: str, started: Lake, tracked: Settings, application: Application
) -> None:
    before = read_journal(started)
    with pytest.raises(MillraceError, match=why):
        act(tracked, application)
    assert read_journal(started) == before


@pytest.mark.parametrize("act", [people.skip, people.roll_back])
def test_without_a_rollout_there_is_nothing_to_skip_or_to_go_back_from(
    act: Callable[..., Any], tracked: Settings, application: Application
) -> None:
    tick(tracked, application, run="test")
    with pytest.raises(MillraceError, match="no rollout is active"):
        act(tracked, application, **ANN)


def test_a_withdrawn_release_is_given_to_nobody_whatever_it_was(
    started: Lake, tracked: Settings, application: Application
) -> None:
    def withdrawn(version: str) -> list[tuple[str, str | None]]:
        return [(d.kind, d.champion) for d in people.withdraw(tracked, application, version, **ANN)]

    def published() -> tuple[str | None, str | None]:
        split = published_split.read_split(tracked, application.name)
        assert split is not None
        return split.champion, split.challenger

    assert withdrawn("2") == [("rollback", "1")]  # it was rolling out
    people.admit(tracked, application, "3", **ANN)
    assert withdrawn("3") == [("reject", "1")]  # it was waiting
    assert tick(tracked, application, run="test")["decision"] is None
    assert published() == ("1", None)

    people.admit(tracked, application, "2", **ANN)
    tick(tracked, application, run="test")
    people.skip(tracked, application, **ANN)
    people.admit(tracked, application, "4", **ANN)
    tick(tracked, application, run="test")
    assert published() == ("2", "4")
    assert withdrawn("2") == [("rollback", "2"), ("rollback", "1")]  # it was champion, and 4 rolled out against it
    assert published() == ("1", None)
    assert tick(tracked, application, run="test")["decision"] is None
    assert {(d.actor, d.reason) for d in read_journal(started)[-2:]} == {("ann", "because")}

    before = read_journal(started)
    for version, why in (("1", "version 1 of .* is its first champion, so there is none"), ("99", "is not registered")):
        with pytest.raises(MillraceError, match=why):
            withdrawn(version)
    assert read_journal(started) == before
