"""A release as a teacher: what it answers with more of the documents before it, a student learns to answer with less.

Sequence-level knowledge distillation (Kim & Rush, 2016, arXiv:1606.07947). The teacher may be any release that can be
loaded here, also one that asks a paid model; what its answers cost is written down.
"""

import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow.compute as pc

from millrace.applications import Application
from millrace.errors import ReleaseError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.costs import Cost, cost_id, record_cost
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_EXCHANGES
from millrace.releases.loader import ReleaseLoader
from millrace.releases.pipeline import MAX_QUESTION, Answer, AnswerPipeline
from millrace.scoring.duplicates import near_duplicates
from millrace.settings import Settings
from millrace.training.pool import Asked, same_words

AT_ONCE = 8
"""Questions that the teacher answers together."""


def taught(
    settings: Settings,
    application: Application,
    version: str,
    known: Sequence[Asked],
    held_out: Sequence[str],
    *,
    size: int,
    run: str,
) -> tuple[list[Asked], int]:
    """What release `version` answers to users' questions and those of `known`, with `training.teacher_chunks` chunks in
    its prompt; and how many answers are nothing to learn, as they were cut short or are empty.

    Args:
        held_out: questions near one of these are not asked.
        size: questions to ask at most; users' first, then chosen by hash.

    Raises:
        ReleaseError: there is no such release, or MLflow doesn't answer.
        EngineError: it can't be loaded, or its server doesn't answer.
        RetrievalError: there is no index build.
    """
    lake = Lake.of(settings, application.name)
    asked = _questions(lake, known)
    leaking = near_duplicates([one.question for one in asked], held_out)
    asked = [one for position, one in enumerate(asked) if position not in leaking][:size]
    started = time.perf_counter()
    loader = ReleaseLoader(settings, application)
    try:
        loaded = loader.load(version)
        manifest = loaded.manifest
        wider = manifest.retrieval.model_copy(update={"chunks": application.training.teacher_chunks})
        teacher = AnswerPipeline(manifest.changed(retrieval=wider), loaded.engine, loaded.retriever)
        build = teacher.retriever.build
        with ThreadPoolExecutor(AT_ONCE, "teacher") as pool:
            answers = list(pool.map(lambda one: _answer(teacher, one.question, build), asked))
    finally:
        loader.close()
    seconds = time.perf_counter() - started
    prompt, completion = (
        sum(getattr(answer.usage, name) for answer in answers if answer)
        for name in ("prompt_tokens", "completion_tokens")
    )
    subject = f"answers of release {version}"
    cost = Cost(
        cost_id("training", subject, uuid.uuid4().hex),
        "training",
        subject,
        seconds=seconds,
        tokens=prompt + completion,
        cost_usd=application.prices.machine("training", seconds)
        + application.prices.answer(manifest.generator.name, prompt, completion),
    )
    record_cost(lake, cost, run=run)
    learnt = [
        Asked(one.question, answer.text, "teacher", one.simulated, one.section, one.document_id)
        for one, answer in zip(asked, answers, strict=True)
        if answer and answer.text and answer.finish_reason == "stop"
    ]
    return learnt, len(asked) - len(learnt)


def _questions(lake: Lake, known: Sequence[Asked]) -> list[Asked]:
    """Each once: what users asked, then what documents answer."""
    rows = lake.read(SILVER_EXCHANGES, ["question", "simulated"], where=~pc.field("pinned")).to_pylist()
    users = {
        same_words(row["question"]): Asked(row["question"].strip(), "", "teacher", row["simulated"], None, None)
        for row in sorted(rows, key=lambda row: row["question"])
        if 0 < len(row["question"].strip()) <= MAX_QUESTION
    }
    documents = {same_words(one.question): one for one in known}
    return [
        *sorted(users.values(), key=lambda one: content_hash(one.question)),
        *sorted(
            (one for key, one in documents.items() if key not in users), key=lambda one: content_hash(one.question)
        ),
    ]


def _answer(teacher: AnswerPipeline, question: str, build: str) -> Answer | None:
    try:
        return teacher.answer(question, build=build)
    except ReleaseError:
        return None  # A question that doesn't fit the prompt is no example.
