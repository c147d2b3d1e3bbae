"""From the gate to the rollout: with a person where the environment asks for one, by itself elsewhere."""

import mlflow
import pytest

from millrace.applications import Application, Promotion
from millrace.environments.audit import search
from millrace.errors import ApprovalError, MillraceError
from millrace.lakehouse.lake import Lake
from millrace.releases.registry import BUILDER_TAG
from millrace.rollout import people
from millrace.rollout.controller import tick
from millrace.rollout.decisions import read_journal
from millrace.rollout.promotion import next_promotion, record_approval
from millrace.settings import Settings
from tests.rollout.conftest import passes_gate


@pytest.fixture
def asking(application: Application) -> Application:
    """Asks a person, in dev too."""
    return application.model_copy(update={"promotion": Promotion(approval_in=("dev",))})


@pytest.fixture
def passed(tracked: Settings, application: Application) -> Lake:
    """Version 1 is champion; version 2, built by bob, passed the gate against it."""
    tick(tracked, application, run="test")
    client = mlflow.MlflowClient(tracking_uri=tracked.mlflow_url, registry_uri=tracked.mlflow_url)
    client.set_model_version_tag(application.name, "2", BUILDER_TAG, "bob")
    passes_gate(tracked, application, "2")
    return Lake.of(tracked, application.name)


def answer(option: str, name: str | None, reason: str = "looks right") -> dict:
    """As the operator gives it."""
    user = None if name is None else {"id": name, "name": name}
    return {"chosen_options": [option], "params_input": {"reason": reason}, "responded_by_user": user}


def test_where_the_policy_asks_for_nobody_the_gates_word_is_enough(
    passed: Lake, tracked: Settings, application: Application
) -> None:
    assert tick(tracked, application, run="test")["decision"] == "start"
    assert next_promotion(tracked, application) is None


def test_a_release_waits_until_somebody_else_than_its_builder_approves(
    passed: Lake, tracked: Settings, asking: Application
) -> None:
    assert tick(tracked, asking, run="test")["decision"] is None
    waiting = next_promotion(tracked, asking)
    assert waiting is not None
    assert (waiting["candidate"], waiting["champion"], waiting["built_by"]) == ("2", "1", "bob")
    assert "Built by bob" in waiting["told"]

    with pytest.raises(ApprovalError, match=r"bob built version 2 of .* and can.t decide about it"):
        record_approval(tracked, asking, "2", answer("Approve", "bob"))
    assert tick(tracked, asking, run="test")["decision"] is None

    record_approval(tracked, asking, "2", answer("Approve", "ann"))
    assert tick(tracked, asking, run="test")["decision"] == "start"
    admit, start = read_journal(passed)[-2:]
    assert (admit.kind, admit.actor, admit.reason, admit.challenger) == ("admit", "ann", "looks right", "2")
    assert start.challenger == "2"


def test_what_never_passed_the_gate_is_not_admitted_by_an_answer(
    passed: Lake, tracked: Settings, asking: Application
) -> None:
    before = read_journal(passed)
    with pytest.raises(ApprovalError, match=r"version 3 of .* has not passed the gate against the champion, version 1"):
        record_approval(tracked, asking, "3", answer("Approve", "ann"))
    assert read_journal(passed) == before


def test_the_gates_last_word_counts(
    passed: Lake, tracked: Settings, asking: Application, application: Application
) -> None:
    passes_gate(tracked, application, "2", passed=False)
    assert next_promotion(tracked, asking) is None
    with pytest.raises(ApprovalError, match="has not passed the gate"):
        record_approval(tracked, asking, "2", answer("Approve", "ann"))
    assert tick(tracked, application, run="test")["decision"] is None
    passes_gate(tracked, application, "2")
    assert tick(tracked, application, run="test")["decision"] == "start"


def test_a_late_answer_admits_nothing_that_passed_against_an_earlier_champion(
    passed: Lake, tracked: Settings, asking: Application
) -> None:
    people.admit(tracked, asking, "3", actor="ann", reason="urgent")
    tick(tracked, asking, run="test")
    people.skip(tracked, asking, actor="ann", reason="urgent")
    before = read_journal(passed)
    with pytest.raises(ApprovalError, match=r"version 2 of .* has not passed the gate against the champion, version 3"):
        record_approval(tracked, asking, "2", answer("Approve", "ann"))
    assert read_journal(passed) == before
    record_approval(tracked, asking, "2", answer("Reject", "ann"))
    assert read_journal(passed)[-1].kind == "reject"


def test_an_answer_is_recorded_once_however_often_the_task_runs(
    passed: Lake, tracked: Settings, asking: Application
) -> None:
    record_approval(tracked, asking, "2", answer("Approve", "ann"))
    before = read_journal(passed)
    assert record_approval(tracked, asking, "2", answer("Approve", "ann")) is None
    tick(tracked, asking, run="test")
    assert record_approval(tracked, asking, "2", answer("Approve", "ann")) is None
    assert read_journal(passed)[: len(before)] == before
    assert [d.kind for d in read_journal(passed)].count("admit") == 1


def test_what_was_rejected_rolls_out_only_if_somebody_admits_it_after_all(
    passed: Lake, tracked: Settings, asking: Application, application: Application
) -> None:
    record_approval(tracked, asking, "2", answer("Reject", "ann", "answers rudely"))
    rejected = read_journal(passed)[-1]
    assert (rejected.kind, rejected.actor, rejected.reason) == ("reject", "ann", "answers rudely")
    assert next_promotion(tracked, asking) is None
    for policy in (asking, application):
        assert tick(tracked, policy, run="test")["decision"] is None
    people.admit(tracked, asking, "2", actor="ann", reason="on second thought")
    assert tick(tracked, asking, run="test")["decision"] == "start"


@pytest.mark.parametrize("name", ["admin", "millrace", "Anonymous"])
def test_beyond_one_machine_only_a_person_approves(
    passed: Lake, tracked: Settings, asking: Application, name: str
) -> None:
    reached = tracked.model_copy(update={"bind": "0.0.0.0"})
    before = read_journal(passed)
    with pytest.raises(ApprovalError, match=f"{name} is no person, and in dev only a person decides about version 2"):
        record_approval(reached, asking, "2", answer("Approve", name))
    assert read_journal(passed) == before
    (tried,) = search(reached, action="approval")
    assert (tried["actor"], tried["resource"], tried["outcome"]) == (f"person/{name}", "release/2", "refused")
    assert record_approval(reached, asking, "2", answer("Approve", "ann")) is not None


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (answer("Approve", None), "nobody is named as having answered"),
        (answer("Approve", "ann", " "), "admit needs the name of who decides and a reason"),
    ],
)
def test_an_answer_without_a_name_or_a_reason_is_refused_and_leaves_no_trace(
    passed: Lake, tracked: Settings, asking: Application, said: dict, why: str
) -> None:
    before = read_journal(passed)
    with pytest.raises(MillraceError, match=why):
        record_approval(tracked, asking, "2", said)
    assert read_journal(passed) == before
