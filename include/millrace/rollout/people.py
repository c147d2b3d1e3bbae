"""What people do to a rollout by hand: each act is a decision in the journal, with name and reason.

Whoever calls has found out who the actor is; here a name is only required. The split is published at once, so that
a person needn't wait for the next tick, then the audit trail follows; if either fails, the next tick does it.
"""

from collections.abc import Callable
from typing import Any

from millrace.applications import Application
from millrace.errors import ConflictError, MillraceError
from millrace.lakehouse.audit.chain import PERSON
from millrace.lakehouse.audit.journals import follow
from millrace.lakehouse.lake import Lake
from millrace.releases import registry
from millrace.rollout.decisions import Decision, Kind, State, append, decide, fold, read_journal
from millrace.rollout.publication import publish
from millrace.settings import Settings

ATTEMPTS = 5
"""Appends before a person is told that others decide all the time."""


def freeze(settings: Settings, application: Application, *, actor: str, reason: str) -> Decision:
    """The controller decides nothing more until somebody resumes; shares stay as they are.

    Raises:
        MillraceError: it is frozen already, or actor or reason is missing.
    """
    return _act(settings, application, "freeze", actor, reason)


def resume(settings: Settings, application: Application, *, actor: str, reason: str) -> Decision:
    """The controller decides again, and the registry's tag and aliases follow the journal again.

    Raises:
        MillraceError: nothing is frozen, or actor or reason is missing.
        ReleaseError: the registry does not answer; it stays frozen.
    """
    state = fold(read_journal(Lake.of(settings, application.name)))
    if state.frozen and state.champion:
        # First the tag: if it had been moved by hand and the resume came first, a tick in between would freeze again.
        publish(settings, application)
    return _act(settings, application, "resume", actor, reason)


def skip(settings: Settings, application: Application, *, actor: str, reason: str) -> Decision:
    """The challenger becomes champion now, whatever the evidence.

    Raises:
        MillraceError: no rollout is active, or actor or reason is missing.
    """
    return _act(settings, application, "skip", actor, reason)


def roll_back(settings: Settings, application: Application, *, actor: str, reason: str) -> Decision:
    """End the active rollout; without one, the previous champion is champion again.

    Raises:
        MillraceError: there is nothing to go back from, or actor or reason is missing.
    """
    return _act(settings, application, "rollback", actor, reason)


def admit(
    settings: Settings, application: Application, version: str, *, actor: str, reason: str, simulated: bool = False
) -> Decision:
    """Let a registered release roll out, whatever the gate says and even if it was rolled back before.

    Raises:
        MillraceError: it is not registered, is champion or rolling out now, or actor or reason is missing.
    """
    _require_registered(settings, application, version)
    return _act(settings, application, "admit", actor, reason, challenger=version, simulated=simulated)


def reject(settings: Settings, application: Application, version: str, *, actor: str, reason: str) -> Decision:
    """A release that waits for approval does not roll out, though the gate let it pass; `admit` is the way back.

    Raises:
        MillraceError: it is not registered, is champion or rolling out now, or actor or reason is missing.
    """
    _require_registered(settings, application, version)
    return _act(settings, application, "reject", actor, reason, challenger=version)


def withdraw(settings: Settings, application: Application, version: str, *, actor: str, reason: str) -> list[Decision]:
    """No user is given this release any more, whatever it is now: a rollout of it ends; of a champion the one before is
    back, after a rollout against it has ended; else it is rejected, so that it doesn't roll out by itself.

    Returns:
        What was decided, one or two decisions.

    Raises:
        MillraceError: it is not registered, it is champion and there is none before, or actor or reason is missing.
    """
    _require_registered(settings, application, version)
    lake, taken = Lake.of(settings, application.name), list[Decision]()

    def chosen(state: State) -> tuple[Kind, dict[str, Any]]:
        if version not in (state.champion, state.challenger):
            return "reject", {"challenger": version}
        if version == state.champion and state.previous is None:
            raise MillraceError(
                f"version {version} of {application.name} is its first champion, so there is none to go back to; let "
                "another release roll out, and skip to it"
            )
        return "rollback", {}

    while not taken or fold(read_journal(lake)).champion == version:
        taken.append(_act(settings, application, chosen, actor, reason))
    return taken


def _require_registered(settings: Settings, application: Application, version: str) -> None:
    known = registry.versions(settings, application)
    if version not in known:
        raise MillraceError(
            f"version {version!r} of {application.name} is not registered; registered are {', '.join(known) or 'none'}"
        )


def _act(
    settings: Settings,
    application: Application,
    act: Kind | Callable[[State], tuple[Kind, dict[str, Any]]],
    actor: str,
    reason: str,
    **fields: Any,
) -> Decision:
    """
    Args:
        act: the kind of decision, or what says it, and its fields, of the state that it is taken on.
    """
    lake = Lake.of(settings, application.name)
    run = f"{PERSON}{actor}"
    for _ in range(ATTEMPTS):
        state = fold(read_journal(lake))
        kind, fields = act(state) if callable(act) else (act, fields)
        if not actor.strip() or not reason.strip():
            raise MillraceError(f"{kind} needs the name of who decides and a reason; give both")
        if kind in ("admit", "reject") and fields["challenger"] in (state.champion, state.challenger):
            role = "champion" if fields["challenger"] == state.champion else "rolling out"
            raise MillraceError(f"version {fields['challenger']} is {role} already; there is nothing to {kind}")
        decision = decide(state, kind, actor=actor, reason=reason, **(_fields(state, kind) | fields))
        try:
            append(lake, decision, run=run)
        except ConflictError:
            continue
        if state.after(decision).split_sequence == decision.sequence:
            publish(settings, application)
        follow(settings, application.name, run=run)
        return decision
    raise MillraceError(f"{kind} lost {ATTEMPTS} times to other decisions; try again")


def _fields(state: State, kind: Kind) -> dict[str, Any]:
    """What this act changes, beside what `decide` takes from the state."""
    match kind:
        case "skip":
            return {"champion": state.challenger, "share": 1.0}
        case "rollback" if state.challenger is None:
            return {"champion": state.previous, "challenger": state.champion, "share": 0.0}
        case "rollback":
            return {"share": 0.0}
        case "admit" | "reject":
            return {"rollout_id": None, "epoch": None, "share": 0.0}
    return {}
