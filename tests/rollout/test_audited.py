"""Whatever a rollout decides is in the audit trail, once, whoever decided it and wherever a process was killed."""

import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from millrace.applications import Application, Promotion
from millrace.environments.audit import search, verify
from millrace.lakehouse.audit.head import noted
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_AUDIT, PLATFORM
from millrace.rollout import people
from millrace.rollout.controller import tick
from millrace.rollout.decisions import read_journal
from millrace.rollout.promotion import record_approval
from millrace.settings import Settings
from tests.rollout.conftest import passes_gate
from tests.rollout.killed import PLACES, freeze_until, tick_until

ANN = {"actor": "ann", "reason": "erika@example.org complained"}


def told(settings: Settings, application: Application) -> list[tuple[str, ...]]:
    names = ("actor", "action", "outcome", "release_version")
    return [tuple(entry[name] for name in names) for entry in search(settings, application=application.name)]


def test_each_decision_promotion_and_approval_is_an_entry_as_it_happens(
    tracked: Settings, application: Application
) -> None:
    asking = application.model_copy(update={"promotion": Promotion(approval_in=("dev",))})
    tick(tracked, asking, run="scheduled__1")
    passes_gate(tracked, asking, "2")
    answer = {"params_input": {"reason": ANN["reason"]}, "responded_by_user": {"name": "bob"}}
    record_approval(tracked, asking, "2", answer | {"chosen_options": ["Approve"]})
    record_approval(tracked, asking, "3", answer | {"chosen_options": ["Reject"]})
    tick(tracked, asking, run="scheduled__2")
    people.freeze(tracked, asking, **ANN)
    people.resume(tracked, asking, **ANN)
    people.skip(tracked, asking, **ANN)
    people.roll_back(tracked, asking, **ANN)
    assert told(tracked, application) == [
        ("service/controller", "promotion", "bootstrap", "1"),
        ("service/gate", "gate", "passed", "2"),
        ("person/bob", "approval", "admit", "2"),
        ("person/bob", "approval", "reject", "3"),
        ("service/controller", "decision", "start", "2"),
        ("person/ann", "decision", "freeze", "2"),
        ("person/ann", "decision", "resume", "2"),
        ("person/ann", "promotion", "skip", "2"),
        ("person/ann", "decision", "rollback", "2"),
    ]
    entries = [one for one in search(tracked, application=application.name) if one["action"] != "gate"]
    assert [entry["resource"] for entry in entries] == [f"ops/decisions/{number}" for number in range(8)]
    assert [entry["run"] for entry in entries][::3] == ["scheduled__1", "scheduled__2", "person/ann"]
    assert entries[3]["details"]["share"] == asking.rollout.steps[0].share
    trail = verify(tracked)
    assert (trail.entries, trail.waiting) == (9, 0)
    tick(tracked, asking, run="scheduled__3")
    assert verify(tracked) == trail, "a tick without a decision tells nothing"

    files = Path(Lake.of(tracked, PLATFORM).uri(OPS_AUDIT)).glob("month=*/*.parquet")
    said = "".join(str(pq.read_table(path).to_pylist()) for path in files)
    assert "person/ann" in said
    assert "erika" not in said, "what a person wrote as a reason stays in the journal"


@pytest.mark.parametrize("place", PLACES)
def test_a_person_whose_process_is_killed_between_journal_and_trail_is_in_it_once_after_the_next_tick(
    place: str, tracked: Settings, application: Application
) -> None:
    tick(tracked, application, run="test")
    assert freeze_until(place, tracked, application) == -signal.SIGKILL
    assert [decision.kind for decision in read_journal(Lake.of(tracked, application.name))] == ["bootstrap", "freeze"]
    entries = [("service/controller", "promotion", "bootstrap", "1")]
    frozen = ("person/ann", "decision", "freeze", "1")
    before = verify(tracked) if place == "before the trail" else None
    assert told(tracked, application) == (entries if before else [*entries, frozen])
    assert before is None or before.waiting == 1
    for _ in range(2):
        tick(tracked, application, run="test")
        assert told(tracked, application) == [*entries, frozen]
    trail = verify(tracked)
    assert (trail.entries, trail.waiting) == (2, 0)
    assert noted(tracked) == trail.head


def test_a_tick_that_is_killed_before_the_trail_is_made_good_by_the_next(
    tracked: Settings, application: Application
) -> None:
    assert tick_until(tracked, application) == -signal.SIGKILL
    assert told(tracked, application) == []
    assert tick(tracked, application, run="next")["decision"] is None
    assert told(tracked, application) == [("service/controller", "promotion", "bootstrap", "1")]
    assert search(tracked)[0]["run"] == "killed"
    assert verify(tracked).waiting == 0
