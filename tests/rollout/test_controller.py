"""The controller against a real MLflow server and real Delta tables, through whole rollouts and deaths."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import deltalake
import mlflow
import pyarrow as pa
import pytest

from millrace.applications import Application
from millrace.errors import ReleaseError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_ALERTS, OPS_BREACHES, OPS_EVALUATIONS, PLATFORM
from millrace.releases import published_split
from millrace.releases.split import Split
from millrace.rollout import people
from millrace.rollout.controller import tick
from millrace.rollout.decisions import fold, read_journal, split_of
from millrace.settings import Settings
from tests.rollout.crowd import START, Crowd

Tick = Callable[[], dict[str, Any]]


@pytest.fixture
def lake(tracked: Settings, application: Application) -> Lake:
    return Lake.of(tracked, application.name)


@pytest.fixture
def ticks(tracked: Settings, application: Application) -> Tick:
    return lambda: tick(tracked, application, run="test")


@pytest.fixture
def published(tracked: Settings, application: Application) -> Callable[[], Split | None]:
    return lambda: published_split.read_split(tracked, application.name)


def pass_gate(lake: Lake, candidate: str, champion: str = "1", after: float = 0) -> None:
    row = {
        "evaluation_id": f"{champion}-{candidate}",
        "evaluation_set": "s",
        "champion": champion,
        "candidate": candidate,
        "candidate_release_id": candidate,
        "champion_release_id": champion,
        "index_build": "b",
        "passed": True,
        "criteria": "[]",
        "examples": "[]",
        "evaluated_at": START + timedelta(seconds=after),
    }
    lake.merge(OPS_EVALUATIONS, pa.Table.from_pylist([row], schema=OPS_EVALUATIONS.rows_schema), run="test")


def kinds(lake: Lake) -> list[str]:
    return [decision.kind for decision in read_journal(lake)]


def play(lake: Lake, ticks: Tick, means: dict[str, float], *, users: int = 70, most: int = 20) -> list[str]:
    """Users come and the controller ticks until the rollout is over; the kinds of all decisions."""
    crowd = Crowd(lake, means)
    for _ in range(most):
        ticks()
        split = split_of(read_journal(lake))
        assert split is not None
        if len(kinds(lake)) > 2 and split.challenger is None:
            return kinds(lake)
        if split.challenger is not None:
            crowd.visit(split, users)
    raise AssertionError(f"undecided: {kinds(lake)}")


def test_without_any_release_nothing_is_decided(tracked: Settings, qa: Application) -> None:
    found = tick(tracked, qa.model_copy(update={"name": "nobody_registered_any"}), run="test")
    assert found["decision"] is None
    assert found["champion"] is None


def test_the_first_registered_release_becomes_champion_once(
    ticks: Tick, lake: Lake, published: Callable[[], Split | None]
) -> None:
    assert ticks()["decision"] == "bootstrap"
    assert ticks()["decision"] is None
    assert kinds(lake) == ["bootstrap"]
    assert published() == Split(sequence=0, champion="1")


def test_a_better_candidate_reaches_everybody_step_by_step(
    ticks: Tick, lake: Lake, published: Callable[[], Split | None], tracked: Settings, application: Application
) -> None:
    pass_gate(lake, "2")
    decided = play(lake, ticks, {"1": 0.3, "2": 0.6})
    assert [kind for kind in decided if kind != "hold"] == ["bootstrap", "start", "advance", "promote"]
    shares = [(d.kind, d.share, d.epoch) for d in read_journal(lake) if d.kind in ("start", "advance", "promote")]
    assert shares == [("start", 0.25, 1), ("advance", 0.5, 2), ("promote", 1.0, 2)]
    split = published()
    assert split is not None
    assert (split.champion, split.challenger, split.share) == ("2", None, 0.0)
    assert published_split.read_aliases(tracked, application.name) == {"champion": "2", "previous": "1"}
    assert read_journal(lake)[-1].simulated
    assert ticks()["decision"] is None


def test_a_worse_candidate_is_rolled_back_with_an_alert_and_never_starts_again_by_itself(
    ticks: Tick,
    lake: Lake,
    published: Callable[[], Split | None],
    caplog: pytest.LogCaptureFixture,
    tracked: Settings,
    application: Application,
) -> None:
    pass_gate(lake, "2")
    with caplog.at_level(logging.ERROR, "millrace.alerts"):
        decided = play(lake, ticks, {"1": 0.7, "2": 0.2})
    assert decided[-1] == "rollback"
    assert "advance" not in decided
    assert "rollout of version 2 rolled back: the challenger is worse: quality" in caplog.text
    split = published()
    assert split is not None
    assert (split.champion, split.challenger) == ("1", None)
    assert published_split.read_aliases(tracked, application.name)["champion"] == "1"
    assert ticks()["decision"] is None
    people.admit(tracked, application, "2", actor="ann", reason="fixed upstream")
    assert ticks()["decision"] == "start"


def test_a_hold_is_written_only_when_the_evidence_changed(ticks: Tick, lake: Lake) -> None:
    pass_gate(lake, "2")
    ticks()
    ticks()
    assert ticks()["decision"] == "hold"
    assert ticks()["decision"] is None
    split = split_of(read_journal(lake))
    assert split is not None
    Crowd(lake, {"1": 0.5, "2": 0.5}).visit(split, 5)
    assert ticks()["decision"] == "hold"
    assert ticks()["decision"] is None
    held = read_journal(lake)[-1]
    assert sum(held.evidence["epochs"][0]["closed"].values()) == 5
    assert set(held.evidence["guardrails"]) == {"quality", "success", "latency"}


def test_candidates_wait_for_their_turn_oldest_first(
    ticks: Tick, lake: Lake, tracked: Settings, application: Application
) -> None:
    ticks()
    pass_gate(lake, "3", after=10)
    pass_gate(lake, "2", after=20)
    assert ticks()["challenger"] == "3"
    people.admit(tracked, application, "4", actor="ann", reason="asked for", simulated=True)
    people.roll_back(tracked, application, actor="ann", reason="enough")
    assert ticks()["challenger"] == "2"
    people.roll_back(tracked, application, actor="ann", reason="enough")
    assert ticks()["challenger"] == "4"
    assert read_journal(lake)[-1].simulated


@pytest.mark.parametrize("what", ["tag", "alias"])
def test_what_a_person_moved_is_respected_until_somebody_resumes(
    what: str,
    ticks: Tick,
    lake: Lake,
    published: Callable[[], Split | None],
    tracked: Settings,
    application: Application,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pass_gate(lake, "2")
    ticks()
    ticks()
    before = published()
    assert before is not None
    client = mlflow.MlflowClient(tracking_uri=tracked.mlflow_url, registry_uri=tracked.mlflow_url)
    if what == "tag":
        moved = before.model_copy(update={"share": 0.9})
        published_split.publish_split(tracked, application.name, moved)
    else:
        moved = before
        client.set_registered_model_alias(application.name, "champion", "3")
    with caplog.at_level(logging.ERROR, "millrace.alerts"):
        assert ticks()["decision"] == "freeze"
    assert "by hand" in caplog.text
    for _ in range(2):
        assert ticks()["decision"] is None
        assert published() == moved
    people.resume(tracked, application, actor="ann", reason="was a mistake")
    assert published() == before
    assert published_split.read_aliases(tracked, application.name)["champion"] == "1"
    assert ticks()["decision"] == "hold"


def test_a_freeze_soon_after_another_is_told_too(
    ticks: Tick, lake: Lake, tracked: Settings, application: Application
) -> None:
    ticks()
    client = mlflow.MlflowClient(tracking_uri=tracked.mlflow_url, registry_uri=tracked.mlflow_url)
    for _ in range(2):
        client.set_registered_model_alias(application.name, "champion", "3")
        assert ticks()["decision"] == "freeze"
        people.resume(tracked, application, actor="ann", reason="was a mistake")
    titles = Lake.of(tracked, PLATFORM).read(OPS_ALERTS)["title"].to_pylist()
    assert sorted(titles) == [f"{application.name} decision {number}: rollout frozen" for number in (1, 3)]


def test_who_rates_differs_freezes_and_reports_bounds(ticks: Tick, lake: Lake, published: Any) -> None:
    pass_gate(lake, "2")
    ticks()
    ticks()
    split = published()
    Crowd(lake, {"1": 0.5, "2": 0.5}).visit(split, 300, answer_rate={"1": 0.95, "2": 0.4})
    assert ticks()["decision"] == "freeze"
    assert read_journal(lake)[-1].evidence["guardrails"]["quality"]["bounds"]
    assert published() == split


def test_a_tag_behind_the_journal_is_published_by_the_next_tick_frozen_or_not(
    ticks: Tick, lake: Lake, published: Callable[[], Split | None], tracked: Settings, application: Application
) -> None:
    pass_gate(lake, "2")
    ticks()
    old = published()
    ticks()
    new = published()
    assert old is not None
    published_split.publish_split(tracked, application.name, old)
    people.freeze(tracked, application, actor="ann", reason="lunch")
    found = ticks()
    assert (found["decision"], found["published"]) == (None, True)
    assert published() == new


def test_of_two_ticks_at_once_one_decides_and_the_other_ends_quietly(ticks: Tick, lake: Lake) -> None:
    results: list[dict[str, Any]] = []
    both = [threading.Thread(target=lambda: results.append(ticks())) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(results) == 2
    assert kinds(lake) == ["bootstrap"]


def test_a_registry_that_does_not_answer_is_one_clear_error(tracked: Settings, application: Application) -> None:
    nobody = tracked.model_copy(update={"mlflow_uri": "http://127.0.0.1:9"})
    with pytest.raises(ReleaseError):
        tick(nobody, application, run="test")


class Killed(BaseException):
    """Nothing catches it: what dies, dies."""


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], None]]:
    """Call with n: the process "dies" right after its n-th write from now, a Delta commit or a write to MLflow."""
    left: list[int | None] = [None]

    def dying(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if left[0] is not None:
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
            return result

        return run

    import millrace.lakehouse.local as local

    monkeypatch.setattr(local, "write_deltalake", dying(deltalake.write_deltalake))
    for name in ("set_registered_model_tag", "set_registered_model_alias", "delete_registered_model_alias"):
        monkeypatch.setattr(mlflow.MlflowClient, name, dying(getattr(mlflow.MlflowClient, name)))
    yield lambda n: left.__setitem__(0, n)
    left[0] = None


@pytest.mark.parametrize(
    ("means", "after"),
    [({"1": 0.3, "2": 0.6}, 1), ({"1": 0.3, "2": 0.6}, 3), ({"1": 0.7, "2": 0.2}, 2)],
    ids=["promoted 1", "promoted 3", "rolled back 2"],
)
def test_ticks_that_die_after_a_write_lead_where_unhurt_ones_do(
    means: dict[str, float],
    after: int,
    ticks: Tick,
    lake: Lake,
    published: Callable[[], Split | None],
    deaths: Callable[[int | None], None],
    tracked: Settings,
    application: Application,
) -> None:
    died = 0

    def hurt() -> dict[str, Any]:
        nonlocal died
        deaths(after)
        try:
            return ticks()
        except Killed:
            died += 1
            deaths(None)
            return ticks()

    pass_gate(lake, "2")
    decided = [kind for kind in play(lake, hurt, means) if kind != "hold"]
    ended = ["advance", "promote"] if means["2"] > means["1"] else ["rollback"]
    assert decided == ["bootstrap", "start", *ended]
    assert died
    state = fold(read_journal(lake))
    assert state.champion == ("2" if "promote" in decided else "1")
    assert published() == state.split()
    assert published_split.read_aliases(tracked, application.name)["champion"] == state.champion
    assert ticks()["decision"] is None


def test_the_journal_is_readable_as_plain_rows(ticks: Tick, lake: Lake) -> None:
    ticks()
    row = deltalake.DeltaTable(f"{lake.root}/{lake.environment}/{lake.application}/ops/decisions").to_pyarrow_table()
    assert row["kind"].to_pylist() == ["bootstrap"]
    assert json.loads(row["evidence"][0].as_py()) == {}


def breach(
    lake: Lake,
    version: str,
    start: Any,
    *,
    action: str = "rollback",
    after: float = 0,
    length: float = 3600,
    found: float = 0,
) -> str:
    """A row as the monitor writes it, of a window that began `after` seconds after `start`, `found` after its end."""
    began = start + timedelta(seconds=after)
    row = {
        "date": began.date(),
        "breach_id": f"{version}-{began.isoformat()}-{action}-{found}",
        "interval_start": began,
        "interval_end": began + timedelta(seconds=length),
        "release_id": f"rel-{version}",
        "release_version": version,
        "metric": "failed_share",
        "bound": "failed_share above 0.2",
        "value": 0.8,
        "action": action,
        "reason": "failed_share was 0.8 on 100 exchanges",
        "simulated": True,
        "at": began + timedelta(seconds=length + found),
    }
    lake.merge(OPS_BREACHES, pa.Table.from_pylist([row], schema=OPS_BREACHES.rows_schema), run="test")
    return row["breach_id"]


def test_a_breach_of_the_challenger_makes_one_rollback_decision(
    ticks: Tick, lake: Lake, published: Callable[[], Split | None], caplog: pytest.LogCaptureFixture
) -> None:
    pass_gate(lake, "2")
    ticks()
    ticks()
    now = read_journal(lake)[-1].decided_at
    breach(lake, "2", now, action="alert")
    breach(lake, "1", now)
    breach(lake, "2", now, after=-3700)
    breach(lake, "2", now, found=25 * 3600)
    assert ticks()["decision"] == "hold", "another release, a time before the rollout, another action, a backfill's"
    breach_id = breach(lake, "2", now, after=-600)
    with caplog.at_level(logging.ERROR, "millrace.alerts"):
        assert ticks()["decision"] == "rollback"
    assert "rollout of version 2 rolled back" in caplog.text
    decided = read_journal(lake)[-1]
    assert (decided.actor, decided.challenger, decided.champion, decided.share) == ("monitor", "2", "1", 0.0)
    assert decided.reason == "version 2 is beyond a bound of the policy: failed_share was 0.8 on 100 exchanges"
    assert decided.evidence["breach_id"] == breach_id
    assert decided.simulated
    assert published() == Split(sequence=decided.sequence, champion="1")


def test_a_breach_of_the_champion_brings_the_previous_one_back_once(
    ticks: Tick,
    lake: Lake,
    published: Callable[[], Split | None],
    tracked: Settings,
    application: Application,
) -> None:
    pass_gate(lake, "2")
    ticks()
    ticks()
    people.skip(tracked, application, actor="ann", reason="in a hurry")
    now = read_journal(lake)[-1].decided_at
    breach(lake, "2", now)
    assert ticks()["decision"] == "rollback"
    split = published()
    assert split is not None
    assert (split.champion, split.challenger) == ("1", None)
    assert published_split.read_aliases(tracked, application.name)["champion"] == "1"
    breach(lake, "1", now, length=7200)
    assert ticks()["decision"] is None, "there is nothing further back"
    assert kinds(lake).count("rollback") == 1


def test_a_breach_waits_for_a_person_who_froze_and_is_answered_after(
    ticks: Tick, lake: Lake, tracked: Settings, application: Application
) -> None:
    pass_gate(lake, "2")
    ticks()
    ticks()
    people.freeze(tracked, application, actor="ann", reason="looking into it")
    breach(lake, "2", read_journal(lake)[-1].decided_at)
    assert ticks()["decision"] is None
    people.resume(tracked, application, actor="ann", reason="seen enough")
    assert ticks()["decision"] == "rollback"


def test_a_release_that_is_admitted_again_is_not_charged_with_what_was_answered(
    ticks: Tick, lake: Lake, tracked: Settings, application: Application
) -> None:
    pass_gate(lake, "2")
    ticks()
    ticks()
    breach(lake, "2", read_journal(lake)[-1].decided_at)
    assert ticks()["decision"] == "rollback"
    people.admit(tracked, application, "2", actor="ann", reason="fixed upstream")
    assert ticks()["decision"] == "start"
    assert ticks()["decision"] == "hold"
