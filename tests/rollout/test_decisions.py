"""The journal: what it says now is the fold of its rows, and two writers can't both write the next one."""

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.errors import ConflictError, LakehouseError, MillraceError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.local import LocalEngine
from millrace.lakehouse.tables import OPS_DECISIONS
from millrace.rollout.decisions import (
    Decision,
    State,
    append,
    decide,
    fold,
    read_journal,
    split_of,
    splits_of,
)

KINDS = ["bootstrap", "admit", "start", "advance", "hold", "freeze", "resume", "rollback", "promote", "skip"]


def decision(state: State, kind: Any, version: str = "2", share: float = 0.25) -> Decision:
    """The decision of `kind` as the controller or a person writes it."""
    fields: dict[str, Any] = {}
    match kind:
        case "bootstrap":
            fields = {"champion": "1"}
        case "admit":
            fields = {"challenger": version, "rollout_id": None, "epoch": None, "share": 0.0}
        case "start":
            fields = {"challenger": version, "rollout_id": f"r{state.sequence}", "epoch": 1, "share": share}
        case "advance":
            fields = {"epoch": state.epoch + 1, "share": share}
        case "freeze":
            fields = {"evidence": {"cause": "response"}}
        case "promote" | "skip":
            fields = {"champion": state.challenger, "share": 1.0}
        case "rollback" if state.challenger is None:
            fields = {"champion": state.previous, "challenger": state.champion, "share": 0.0}
        case "rollback":
            fields = {"share": 0.0}
    return decide(state, kind, actor="test", reason="because", **fields)


def journal(*kinds: str) -> list[Decision]:
    rows: list[Decision] = []
    for kind in kinds:
        rows.append(decision(fold(rows), kind))
    return rows


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(2, 5), st.floats(0.01, 0.9)), max_size=40))
def test_any_sequence_of_legal_decisions_folds_to_a_consistent_state(acts: list[tuple[Any, int, float]]) -> None:
    state, rows, shares = State(), [], []
    for kind, version, share in acts:
        if state.objection(kind) or str(version) in (state.champion, state.challenger):
            continue
        rows.append(decision(state, kind, str(version), share))
        state = state.after(rows[-1])
        assert (state.challenger is None) == (state.rollout_id is None) == (state.share == 0) == (state.epoch == 0)
        assert state.challenger is None or state.challenger != state.champion
        assert state.champion not in [waiting.version for waiting in state.waiting]
        assert state.champion is None or state.champion in state.decided
        assert len({waiting.version for waiting in state.waiting}) == len(state.waiting)
        split = split_of(rows)
        if split is not None:
            assert (split.champion, split.challenger, split.share) == (state.champion, state.challenger, state.share)
            assert split.salt == (state.rollout_id or "")
            assert rows[split.sequence].kind not in ("hold", "freeze", "resume", "admit")
            shares.append(split)
    assert fold(rows) == state
    assert [row.sequence for row in rows] == list(range(len(rows)))
    # Only decisions about shares make new splits, and the last one made is the present one.
    assert splits_of(rows) == list({split.sequence: split for split in shares}.values())


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(st.lists(st.sampled_from(KINDS), max_size=6))
def test_a_journal_reads_back_as_written(tmp_path_factory: pytest.TempPathFactory, kinds: list[str]) -> None:
    lake = Lake(str(tmp_path_factory.mktemp("lake")), "dev", "qa")
    rows: list[Decision] = []
    for kind in ["bootstrap", *kinds]:
        if not fold(rows).objection(kind):  # type: ignore[arg-type]
            rows.append(decision(fold(rows), kind))
            append(lake, rows[-1], run="test")
    assert read_journal(lake) == rows


def test_an_empty_journal_has_no_split(lake: Lake) -> None:
    assert read_journal(lake) == []
    assert split_of([]) is None


def test_of_two_decisions_on_one_state_only_the_first_is_written(lake: Lake) -> None:
    append(lake, decision(State(), "bootstrap"), run="test")
    state = fold(read_journal(lake))
    append(lake, decision(state, "freeze"), run="test")
    with pytest.raises(ConflictError):
        append(lake, decision(state, "admit"), run="test")
    assert [row.kind for row in read_journal(lake)] == ["bootstrap", "freeze"]


def test_a_rollback_without_a_rollout_brings_the_previous_champion_back_once() -> None:
    rows = journal("bootstrap", "start", "promote", "rollback")
    state = fold(rows)
    assert (state.champion, state.previous, state.challenger) == ("1", None, None)
    assert rows[-1].challenger == "2"
    with pytest.raises(MillraceError, match="no rollout is active and there is no champion before"):
        decision(state, "rollback")


@pytest.mark.parametrize(
    ("kinds", "kind", "why"),
    [
        ((), "start", "there is no champion"),
        (("bootstrap",), "bootstrap", "version 1 is champion already"),
        (("bootstrap",), "skip", "no rollout is active"),
        (("bootstrap",), "rollback", "no rollout is active"),
        (("bootstrap", "start"), "start", "version 2 is rolling out already"),
        (("bootstrap", "freeze"), "freeze", "frozen already"),
        (("bootstrap",), "resume", "nothing is frozen"),
    ],
)
def test_a_decision_that_cant_be_taken_says_why(kinds: tuple[str, ...], kind: str, why: str) -> None:
    with pytest.raises(MillraceError, match=why):
        decision(fold(journal(*kinds)), kind)


def test_what_a_person_lifted_stays_lifted_until_the_next_rollout() -> None:
    rows = journal("bootstrap", "start", "freeze", "resume")
    assert fold(rows).overruled == {"response"}
    rows.append(decision(fold(rows), "rollback"))
    rows.append(decision(fold(rows), "start"))
    assert fold(rows).overruled == frozenset()


def test_a_journal_with_a_gap_or_an_impossible_row_is_refused(lake: Lake) -> None:
    rows = journal("bootstrap", "start", "advance")
    with pytest.raises(LakehouseError, match="decision 2 follows 0"):
        fold([rows[0], rows[2]])
    with pytest.raises(LakehouseError, match=r"decision 1 \(advance\) can't be: no rollout is active"):
        fold([rows[0], rows[2].model_copy(update={"sequence": 1})])
    row = rows[0].model_dump() | {"evidence": "not JSON"}
    LocalEngine().append_at(
        lake.uri(OPS_DECISIONS),
        OPS_DECISIONS,
        pa.Table.from_pylist([row], schema=OPS_DECISIONS.rows_schema),
        run="test",
        writer="journal",
        expected=None,
    )
    with pytest.raises(LakehouseError, match="can't be understood"):
        read_journal(lake)
