"""The small gate of new documents: a new index build is published only if it still finds what was found before.

Canaries are questions with known answers from the training split, so that nothing of the evaluation leaks into
what is published. Of releases it knows which lineages they search.
"""

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from millrace.applications import Application
from millrace.errors import BuildLost, CanaryError
from millrace.lakehouse.audit.chain import Event, record
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_DOCUMENTS
from millrace.releases.lineages import searched_lineages
from millrace.retrieval.builds import Builds, current
from millrace.retrieval.embed import Lineage, declared_lineage
from millrace.retrieval.index import builds_of
from millrace.retrieval.search import Retriever
from millrace.settings import Settings
from millrace.sources.questions import Question, derive_questions

log = logging.getLogger(__name__)

DEPTH = 5
"""A canary is found if its document is among this many hits."""
FIRST_RECALL = 0.5
"""What a first build must reach: there is none to compare with."""


def publish_builds(
    settings: Settings, application: Application, built: list[dict[str, Any]], *, run: str
) -> list[dict[str, Any]]:
    """`publish_build` of what `build_indexes` made, each with its `lineage`. One that finds less keeps no other back.

    Raises:
        CanaryError: at least one finds less; the others are published.
    """
    searched = {lineage.id: lineage for lineage in searched_lineages(settings, application)}
    published, refusals = [], []
    for one in built:
        if one["lineage"] not in searched:  # its release was rolled back meanwhile
            continue
        try:
            published.append(
                publish_build(settings, application, one["build"], run=run, lineage=searched[one["lineage"]])
            )
        except CanaryError as refusal:
            refusals.append(str(refusal))
    if refusals:
        raise CanaryError("; ".join(refusals))
    return published


def publish_tuned(settings: Settings, application: Application, tuned: dict[str, Any], *, run: str) -> dict[str, Any]:
    """`publish_build` of the first build with an embedding model that was fine-tuned.

    Args:
        tuned: with `lineage`, `model`, `folder` of the model's files, and `build`.
    """
    lineage = Lineage(tuned["lineage"], tuned["model"], Path(tuned["folder"]))
    return publish_build(settings, application, tuned["build"], run=run, lineage=lineage)


def publish_build(
    settings: Settings, application: Application, build: str, *, run: str, lineage: Lineage | None = None
) -> dict[str, Any]:
    """Publish `build` if its recall@5 on the canaries is at most `canary_margin` below the published build's.

    Only questions whose document is in the published build are counted; a document that was removed from the lake
    asks nothing. Where there are none, or the published build is lost, `build` is held against what a first one must
    reach.

    Args:
        lineage: that the build is of; None: the declared one.

    Returns:
        `build`, `lineage`, `previous`, `canaries` (how many were asked), `recall`, `recall_before` (None: nothing to
        measure), `run`, and `changed`: whether the pointer moved.

    Raises:
        CanaryError: the build finds less. The published build stays.
        RetrievalError: there is no such build.
    """
    lineage = lineage or declared_lineage(application)
    builds = builds_of(settings, application.name, lineage.id)
    before = current(builds)
    outcome: dict[str, Any] = {"build": build, "lineage": lineage.id, "previous": before}
    outcome |= {"canaries": 0, "recall": None, "recall_before": None}
    if build != before:
        outcome |= _compare(settings, application, lineage, builds, build, before)
        try:
            _refuse_loss(application, outcome)
        except CanaryError:
            _tell(settings, application, outcome, "refused", run)
            raise
        # Decided; who is killed before the pointer moves decides the same again.
        _tell(settings, application, outcome, "published", run)
    return outcome | {"run": run, "changed": builds.publish(build)}


def _tell(settings: Settings, application: Application, outcome: dict[str, Any], what: str, run: str) -> None:
    """Into the audit trail, once a run."""
    resource = f"index/{outcome['lineage']}/{outcome['build']}"
    event = Event(
        event_id=f"{application.name}/{resource}/{what}/{run}",
        occurred_at=datetime.now(UTC),
        actor="service/canaries",
        action="decision",
        application=application.name,
        resource=resource,
        outcome=what,
        run=run,
        details={name: outcome[name] for name in ("previous", "canaries", "recall", "recall_before")},
    )
    record(settings, [event], run=run)


def choose_canaries(questions: list[Question], limit: int) -> list[Question]:
    """The same `limit` training questions on every call: their ids are hashes, so the first ones are a fair sample."""
    return [question for question in questions if question.split == "training"][:limit]


def _compare(
    settings: Settings, application: Application, lineage: Lineage, builds: Builds, build: str, before: str | None
) -> dict[str, Any]:
    documents = Lake.of(settings, application.name).read(SILVER_DOCUMENTS)
    asked = choose_canaries(derive_questions(documents, application), application.retrieval.canaries)
    if not asked:
        return {}
    retriever = Retriever(builds, lineage.open(settings))
    try:
        there = retriever.documents(before) if before is not None else frozenset()
    except BuildLost as lost:
        # Nothing can be searched: the next build must not wait for one that will never be made again.
        log.warning("%s: the published build is lost, the next one is held against a first: %s", application.name, lost)
        before, there = None, frozenset()
    if known := [question for question in asked if question.document_id in there]:
        asked = known
    return {
        "canaries": len(asked),
        "recall": _recall(retriever, asked, build),
        "recall_before": _recall(retriever, asked, before) if known and before is not None else None,
    }


def _recall(retriever: Retriever, questions: list[Question], build: str) -> float:
    found = [
        any(hit.document_id == question.document_id for hit in retriever.search(question.question, DEPTH, build))
        for question in questions
    ]
    return sum(found) / len(found)


def _refuse_loss(application: Application, outcome: dict[str, Any]) -> None:
    recall, before = outcome["recall"], outcome["recall_before"]
    if recall is None:
        return
    needed = FIRST_RECALL if before is None else before - application.retrieval.canary_margin
    if recall < needed:
        raise CanaryError(
            f"{application.name}: index build {outcome['build']} of lineage {outcome['lineage']} finds {recall:.3f} of "
            f"{outcome['canaries']} canaries, {needed:.3f} is needed; the published build {outcome['previous']} stays. "
            "Look at what changed in the documents, or raise canary_margin"
        )
