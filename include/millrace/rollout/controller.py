"""The controller: every tick reads journal, published split and evidence, and takes at most one decision.

Level-triggered: nothing is remembered between ticks but the journal, so a tick that is killed anywhere is made good
by the next one. A decision is appended on the version of the journal that it was taken on, so two ticks can't both
decide; the registry's tag is made to match afterwards, and the audit trail follows. It does not know how evidence is
judged (`judgement.py`).
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from millrace.alerts import Alert, send
from millrace.applications import Application
from millrace.errors import ConflictError
from millrace.lakehouse.audit.journals import follow
from millrace.lakehouse.lake import Lake
from millrace.releases import registry
from millrace.releases.split import Split
from millrace.rollout.breaches import MONITOR, unanswered
from millrace.rollout.decisions import Decision, State, append, decide, fold, read_journal, splits_of
from millrace.rollout.evidence import collect_evidence
from millrace.rollout.judgement import judge
from millrace.rollout.promotion import needs_approval, passed_gate
from millrace.rollout.publication import Published, publish, published
from millrace.settings import Settings

CONTROLLER = "controller"
"""Actor of every decision that no person took."""
ALERTING = ("freeze", "rollback")


@dataclass(frozen=True)
class View:
    """What one tick sees."""

    settings: Settings
    application: Application
    lake: Lake
    journal: list[Decision]
    state: State
    published: Published


def tick(settings: Settings, application: Application, *, run: str) -> dict[str, Any]:
    """Take the decision that is due, if one is, and publish the split that the journal asks for.

    Returns: `decision` (kind or None), `reason`, `sequence`, `champion`, `challenger`, `share`, `published` (whether
    the tag was written), `changed` (whether the split is another one now).

    Raises:
        ReleaseError: the registry does not answer; what was decided is published by the next tick.
        LakehouseError: the journal can't be understood, or the audit trail can't be written: the next tick does it.
    """
    try:
        return _tick(settings, application, run=run)
    finally:
        # Last, so that nobody's share waits for it; and at every tick, for whoever was cut off before it.
        follow(settings, application.name, run=run)


def _tick(settings: Settings, application: Application, *, run: str) -> dict[str, Any]:
    view = look(settings, application)
    moved, written = moved_by_hand(view), False
    if moved is None:
        # Before any further decision, so that every share that was decided is also tried. Even when frozen: a
        # rollback that was decided and never published would leave users with the bad release.
        written = republish(view)
    if view.state.frozen:
        # What a person moved stays as it is, and nothing is decided for as long as a person wants it so.
        return _told(view.state, None, "frozen; a person may resume, skip or roll back", published=written)
    decision = due(view, moved)
    if decision is None:
        return _told(view.state, None, "nothing to decide", published=written)
    if decision.kind in ALERTING:
        # Before it is written: a tick killed in between alerts again, one killed after has alerted.
        _alert(settings, application, decision)
    try:
        append(view.lake, decision, run=run)
    except ConflictError:
        # Somebody else (a person, another tick) decided on this state first; the next tick sees what.
        return _told(view.state, None, "another decision came first", published=written)
    state = view.state.after(decision)
    if state.split_sequence == decision.sequence:
        publish(settings, application)
        written = True
    return _told(state, decision.kind, decision.reason, published=written)


def look(settings: Settings, application: Application) -> View:
    """Journal, its fold, and what is published. The journal is read last: it is never older than the tag."""
    found = published(settings, application)
    lake = Lake.of(settings, application.name)
    journal = read_journal(lake)
    return View(settings, application, lake, journal, fold(journal), found)


def due(view: View, moved: str | None) -> Decision | None:
    """The decision to take now, `moved` being what a person moved by hand."""
    if moved is not None:
        return _decide(view, "freeze", moved, evidence={"cause": "moved_by_hand"})
    return next(filter(None, (step(view) for step in STEPS)), None)


def moved_by_hand(view: View) -> str | None:
    """What the tag or the alias `champion` says that the journal never asked for; None: they are ours."""
    splits = splits_of(view.journal)
    split, champion = view.published.split, view.published.champion
    if split is not None and split not in splits:
        found = f"the split tag was changed by hand: {split.model_dump_json()} is not from the journal"
    elif champion is not None and champion not in _champions_around(split, splits):
        found = f"the alias champion was moved by hand to version {champion}"
    else:
        return None
    return f"{found}; nothing was undone: resume to follow the journal again, or skip or roll back"


def republish(view: View) -> bool:
    """Make the tag match the journal, if a tick or a person's command was cut off before it did."""
    if view.state.champion is None or view.published.split == view.state.split():
        return False
    publish(view.settings, view.application)
    return True


def bootstrap(view: View) -> Decision | None:
    """The first registered release answers everybody until a better one is found."""
    if view.state.champion is not None:
        return None
    versions = list(registry.versions(view.settings, view.application))
    if not versions:
        return None
    return _decide(view, "bootstrap", "the first registered release", champion=versions[0])


def answer_breach(view: View) -> Decision | None:
    """Take back the release whose breach asks for it: the challenger, or, without one, the champion."""
    breach = unanswered(view.lake, view.journal, view.state)
    if breach is None:
        return None
    told = {"breach_id": breach.breach_id, "bound": breach.bound, "value": breach.value}
    window = [breach.interval_start.isoformat(), breach.interval_end.isoformat()]
    back = {"champion": view.state.previous, "challenger": breach.version} if not view.state.challenger else {}
    return decide(
        view.state,
        "rollback",
        actor=MONITOR,
        reason=f"version {breach.version} is beyond a bound of the policy: {breach.reason}",
        share=0.0,
        evidence={"cause": "breach", "window": window, **told},
        simulated=breach.simulated,
        **back,
    )


def start(view: View) -> Decision | None:
    """Begin with the release that has waited longest."""
    if view.state.champion is None or view.state.challenger is not None:
        return None
    passed = [] if needs_approval(view.settings, view.application) else passed_gate(view.lake, view.state)
    waiting = sorted([*view.state.waiting, *passed], key=lambda admission: admission.at)
    if not waiting:
        return None
    first, step = waiting[0], view.application.rollout.steps[0]
    by_person = first in view.state.waiting
    return _decide(
        view,
        "start",
        "admitted by a person" if by_person else f"passed the gate against version {view.state.champion}",
        rollout_id=uuid.uuid4().hex[:12],
        epoch=1,
        challenger=first.version,
        share=step.share,
        evidence={"admitted_at": first.at.isoformat(), "admitted_by": "person" if by_person else "gate"},
        simulated=first.simulated,
    )


def reconcile(view: View) -> Decision | None:
    """Judge the active rollout by its evidence."""
    state, policy = view.state, view.application.rollout
    if state.rollout_id is None:
        return None
    # The declaration may have lost steps since; the last one then decides.
    position = min(state.epoch, len(policy.steps)) - 1
    step = policy.steps[position]
    evidence = collect_evidence(view.lake, policy, state.rollout_id)
    judgement = judge(evidence, step, state.epoch, policy, state.overruled)
    about = {"evidence": judgement.summary, "simulated": evidence.simulated}
    match judgement.kind:
        case "freeze":
            return _decide(view, "freeze", judgement.reason, **about)
        case "rollback":
            return _decide(view, "rollback", judgement.reason, share=0.0, **about)
        case "advance" if position + 1 < len(policy.steps):
            share = policy.steps[position + 1].share
            return _decide(view, "advance", judgement.reason, share=share, epoch=state.epoch + 1, **about)
        case "advance":
            return _decide(view, "promote", judgement.reason, champion=state.challenger, share=1.0, **about)
    if _known(judgement.summary) == _known(_last_evidence(view)):
        # Ticks without news leave no rows: the journal is the timeline of the evidence, not of the clock.
        return None
    return _decide(view, "hold", judgement.reason, **about)


STEPS: tuple[Callable[[View], Decision | None], ...] = (bootstrap, answer_breach, start, reconcile)


def _champions_around(published: Split | None, splits: list[Split]) -> set[str | None]:
    """Champions that the alias may name: those since the published split. Aliases are written before the tag, so a
    crash leaves them ahead of it, never behind."""
    since = splits.index(published) if published in splits else 0
    return {split.champion for split in splits[since:]}


def _last_evidence(view: View) -> dict[str, Any]:
    ours = (d.evidence for d in reversed(view.journal) if d.rollout_id == view.state.rollout_id and d.evidence)
    return next(ours, {})


def _known(evidence: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in evidence.items() if key != "as_of"}


def _decide(view: View, kind: Any, reason: str, **fields: Any) -> Decision:
    return decide(view.state, kind, actor=CONTROLLER, reason=reason, **fields)


def _alert(settings: Settings, application: Application, decision: Decision) -> None:
    what = "frozen" if decision.kind == "freeze" else "rolled back"
    about = f" of version {decision.challenger}" if decision.challenger else ""
    send(
        Alert(
            # Each decision is another trouble: one soon after the last must reach somebody too.
            title=f"{application.name} decision {decision.sequence}: rollout{about} {what}",
            what=decision.reason,
            source=f"{application.name}.rollout",
            runbook=f"{settings.airflow_url}/dags/{application.name}.rollout",
        ),
        settings,
    )


def _told(state: State, kind: str | None, reason: str, *, published: bool) -> dict[str, Any]:
    return {
        "decision": kind,
        "reason": reason,
        "sequence": state.sequence,
        "champion": state.champion,
        "challenger": state.challenger,
        "share": state.share,
        "frozen": state.frozen,
        "published": published,
        "changed": published,
    }
