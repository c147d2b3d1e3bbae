"""The journal: every decision of a rollout, who or what took it and on which evidence, one row each, never changed.

What is true now (champion, challenger, share, frozen, who waits) is the fold of the journal, and so is the split
that the gateway follows. Knows the journal's table; does not know why a decision is taken.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from millrace.errors import LakehouseError, MillraceError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.local import LocalEngine
from millrace.lakehouse.tables import OPS_DECISIONS
from millrace.releases.split import Split

Kind = Literal[
    "bootstrap",  # the first champion
    "admit",  # a person lets a release roll out
    "reject",  # a person does not: it rolls out only if somebody admits it after all
    "start",  # a rollout begins: the first step's share
    "advance",  # the next step's share, a new epoch
    "hold",  # undecided; recorded with the evidence
    "freeze",  # the controller decides nothing more
    "resume",  # it decides again
    "rollback",  # the challenger gets nothing; without a challenger: the previous champion is back
    "promote",  # the challenger is champion, on evidence
    "skip",  # the challenger is champion, because a person says so
]
WRITER = "journal"
"""Name of the journal's transactions on its table; their number is the sequence."""


class Decision(BaseModel):
    """One row of the journal. `champion` and `share` hold from this decision on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequence: int = Field(ge=0)
    decided_at: AwareDatetime
    kind: Kind
    actor: str = Field(min_length=1)
    reason: str = Field(min_length=1)
    rollout_id: str | None = None
    epoch: int | None = None
    champion: str | None = None
    challenger: str | None = None
    """Release version that the decision is about."""
    share: float = Field(0.0, ge=0, le=1)
    """Of traffic that `challenger` gets from now on."""
    evidence: dict[str, Any] = {}
    simulated: bool = False
    """Rests on simulated users."""


@dataclass(frozen=True)
class Admission:
    """A release that a person let roll out, and that waits for its turn."""

    version: str
    at: datetime
    simulated: bool


@dataclass(frozen=True)
class State:
    """What the journal says now."""

    sequence: int = -1
    """Of the last decision; -1: the journal is empty."""
    champion: str | None = None
    previous: str | None = None
    """The champion before: where a rollback without a rollout goes."""
    challenger: str | None = None
    """Of the active rollout; None: there is none."""
    rollout_id: str | None = None
    epoch: int = 0
    share: float = 0.0
    frozen: bool = False
    cause: str | None = None
    """Of the freeze, where the controller froze."""
    overruled: frozenset[str] = frozenset()
    """Causes of freezes that a person has lifted in this rollout."""
    waiting: tuple[Admission, ...] = ()
    decided: frozenset[str] = frozenset()
    """Releases that were champion or challenger once, or rejected: only a person may let them roll out."""
    split_sequence: int = 0
    """Of the decision that the current split follows from."""

    def after(self, decision: Decision) -> "State":
        """The state that `decision` leads to.

        Raises:
            LakehouseError: the decision does not follow from this state.
        """
        if decision.sequence != self.sequence + 1:
            raise LakehouseError(
                f"{OPS_DECISIONS.path}: decision {decision.sequence} follows {self.sequence}; restore it"
            )
        if problem := self.objection(decision.kind):
            raise LakehouseError(
                f"{OPS_DECISIONS.path}: decision {decision.sequence} ({decision.kind}) can't be: {problem}; restore it"
            )
        state = replace(self, sequence=decision.sequence)
        ended = replace(
            state,
            challenger=None,
            rollout_id=None,
            epoch=0,
            share=0.0,
            frozen=False,
            cause=None,
            split_sequence=decision.sequence,
        )
        match decision.kind:
            case "hold":
                return state
            case "freeze":
                return replace(state, frozen=True, cause=decision.evidence.get("cause"))
            case "resume":
                lifted = {self.cause} if self.cause else set()
                return replace(state, frozen=False, cause=None, overruled=self.overruled | lifted)
            case "admit":
                version = str(decision.challenger)
                admission = Admission(version, decision.decided_at, decision.simulated)
                others = tuple(waiting for waiting in self.waiting if waiting.version != version)
                return replace(state, waiting=(*others, admission))
            case "reject":
                version = str(decision.challenger)
                waiting = tuple(waiting for waiting in self.waiting if waiting.version != version)
                return replace(state, waiting=waiting, decided=self.decided | {version})
            case "bootstrap":
                return replace(ended, champion=decision.champion, decided=self.decided | {str(decision.champion)})
            case "start":
                return replace(
                    self._shared(decision),
                    challenger=decision.challenger,
                    rollout_id=decision.rollout_id,
                    overruled=frozenset(),
                    waiting=tuple(w for w in self.waiting if w.version != decision.challenger),
                    decided=self.decided | {str(decision.challenger)},
                )
            case "advance":
                return self._shared(decision)
            case "promote" | "skip":
                # Who waits and has meanwhile become champion waits no more.
                waiting = tuple(w for w in self.waiting if w.version != self.challenger)
                return replace(ended, champion=self.challenger, previous=self.champion, waiting=waiting)
            case "rollback":
                if self.challenger:
                    return replace(ended)
                waiting = tuple(w for w in self.waiting if w.version != self.previous)
                return replace(ended, champion=self.previous, previous=None, waiting=waiting)

    def objection(self, kind: Kind) -> str | None:
        """Why a decision of this kind can't be taken now; None: it can."""
        active = self.challenger is not None
        objections = {
            "bootstrap": self.champion is not None and f"version {self.champion} is champion already",
            "admit": self.champion is None and "there is no champion to compare with",
            "reject": self.champion is None and "there is no champion that could stay",
            "start": (self.champion is None and "there is no champion to compare with")
            or (active and f"version {self.challenger} is rolling out already"),
            "advance": not active and "no rollout is active",
            "hold": not active and "no rollout is active",
            "freeze": self.frozen and "the rollout is frozen already",
            "resume": not self.frozen and "nothing is frozen",
            "rollback": not active and self.previous is None and "no rollout is active and there is no champion before",
            "promote": not active and "no rollout is active",
            "skip": not active and "no rollout is active",
        }
        return objections[kind] or None

    def split(self) -> Split:
        """What the gateway should follow."""
        return Split(
            sequence=self.split_sequence,
            rollout_id=self.rollout_id,
            epoch=self.epoch,
            champion=self.champion,
            challenger=self.challenger,
            share=self.share,
            salt=self.rollout_id or "",
        )

    def _shared(self, decision: Decision) -> "State":
        return replace(
            self,
            sequence=decision.sequence,
            split_sequence=decision.sequence,
            epoch=decision.epoch or 0,
            share=decision.share,
        )


def fold(journal: Sequence[Decision]) -> State:
    """What the journal says now.

    Raises:
        LakehouseError: it has gaps, or decisions that can't follow one another.
    """
    state = State()
    for decision in journal:
        state = state.after(decision)
    return state


def split_of(journal: Sequence[Decision]) -> Split | None:
    """The split that the gateway should follow; None: there is no champion yet."""
    state = fold(journal)
    return state.split() if state.champion else None


def splits_of(journal: Sequence[Decision]) -> list[Split]:
    """Every split that the journal ever asked for, in order."""
    state, splits = State(), []
    for decision in journal:
        state = state.after(decision)
        if state.champion and state.split_sequence == decision.sequence:
            splits.append(state.split())
    return splits


def read_journal(lake: Lake) -> list[Decision]:
    """All decisions, in order.

    Raises:
        LakehouseError: a row can't be understood.
    """
    rows = lake.read(OPS_DECISIONS, OPS_DECISIONS.rows_schema.names).sort_by("sequence").to_pylist()
    try:
        return [Decision.model_validate(row | {"evidence": json.loads(row["evidence"])}) for row in rows]
    except ValueError as error:
        raise LakehouseError(f"{OPS_DECISIONS.path} can't be understood: {error}; restore it") from None


def append(lake: Lake, decision: Decision, *, run: str) -> None:
    """Write `decision` as the journal's next row.

    Raises:
        ConflictError: another decision came first; nothing was written.
    """
    row = decision.model_dump() | {"evidence": json.dumps(decision.evidence, sort_keys=True)}
    LocalEngine().append_at(
        lake.own_uri(OPS_DECISIONS),
        OPS_DECISIONS,
        pa.Table.from_pylist([row], schema=OPS_DECISIONS.rows_schema),
        run=run,
        writer=WRITER,
        expected=decision.sequence - 1 if decision.sequence else None,
    )


def decide(state: State, kind: Kind, *, actor: str, reason: str, **fields: Any) -> Decision:
    """The next decision of the journal that `state` is the fold of. What `fields` leave out stays as it is.

    Raises:
        MillraceError: it can't be taken now; the message says why.
    """
    if problem := state.objection(kind):
        raise MillraceError(f"{kind} is not possible: {problem}")
    now = {
        "rollout_id": state.rollout_id,
        "epoch": state.epoch or None,
        "champion": state.champion,
        "challenger": state.challenger,
        "share": state.share,
    }
    return Decision(
        sequence=state.sequence + 1,
        decided_at=datetime.now(UTC),
        kind=kind,
        actor=actor,
        reason=reason,
        **(now | fields),
    )
