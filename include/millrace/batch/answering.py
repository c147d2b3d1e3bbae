"""What a Spark worker does: record batches of questions in, record batches of answers out.

The release is data that travels with the function (`Pinned`); each worker process opens it once and keeps it for its
next task. Several questions are answered at a time, which the generator computes together. A question that can't be
answered is a row with its error; a release that answers nothing at all fails the task. Knows no table and no Spark.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from millrace.applications import Application
from millrace.errors import BatchError, EngineError, MillraceError, ReleaseError
from millrace.lakehouse.tables import GOLD_ANSWERS
from millrace.releases.package import read_release
from millrace.releases.pipeline import Answer, AnswerPipeline
from millrace.releases.pyfunc import AT_ONCE, open_pipeline
from millrace.releases.registry import fetch_release
from millrace.settings import Settings

PROBE = "What are these documents about?"


@dataclass(frozen=True)
class Pinned:
    """A release and an index build, fixed for one run, and all that a worker needs to answer from them."""

    application: Application
    release_id: str
    version: str
    generator: str
    """Name, for its price."""
    index_build: str
    folder: Path
    """The release on the machine that started the run."""
    config: dict[str, Any] = field(repr=False)  # may hold a key
    """As `releases.package.LOAD_CONFIG`."""
    registry: dict[str, Any]
    """Settings with which a worker that can't see `folder` fetches the release."""


def answer_questions(batches: Iterator[pa.RecordBatch], pinned: Pinned, mode: str) -> Iterator[pa.RecordBatch]:
    """Rows with `question_id` and `question` → rows of `gold/answers`, a batch for a batch.

    Raises:
        BatchError: the release answers nothing.
        MillraceError: it can't be opened, or its index build can't be searched.
    """
    for batch in batches:
        rows = answer_rows(_opened(pinned), pinned, batch.to_pylist(), mode)
        yield pa.RecordBatch.from_pylist(rows, schema=GOLD_ANSWERS.rows_schema)


def answer_rows(
    pipeline: AnswerPipeline, pinned: Pinned, questions: list[dict[str, Any]], mode: str
) -> list[dict[str, Any]]:
    """A row of `gold/answers` for each question, in their order. Raises as `answer_questions`."""

    def answer(question: dict[str, Any]) -> tuple[Answer | MillraceError, float]:
        started = time.perf_counter()
        try:
            return pipeline.answer(question["question"], build=pinned.index_build), time.perf_counter() - started
        except (EngineError, ReleaseError) as error:
            return error, time.perf_counter() - started

    with ThreadPoolExecutor(AT_ONCE, "batch") as pool:
        outcomes = list(pool.map(answer, questions))
        failed = [at for at, (outcome, _) in enumerate(outcomes) if isinstance(outcome, MillraceError)]
        if failed:
            _require_answers(pipeline, pinned, outcomes[failed[0]][0])
            # Asked again: an outage may have come and gone since.
            again = pool.map(answer, [questions[at] for at in failed])
            for at, outcome in zip(failed, again, strict=True):
                outcomes[at] = outcome
    return [
        _row(question, outcome, seconds, pinned, mode)
        for question, (outcome, seconds) in zip(questions, outcomes, strict=True)
    ]


def _require_answers(pipeline: AnswerPipeline, pinned: Pinned, failure: object) -> None:
    """It must be the questions that can't be answered, not the release that can't answer."""
    try:
        pipeline.answer(PROBE, build=pinned.index_build)
    except (EngineError, ReleaseError) as error:
        raise BatchError(
            f"release {pinned.application.name}@{pinned.version} answers nothing: {error}; the first question failed "
            f"with: {failure}; nothing of this slice was written, run it again when the release answers"
        ) from None


def _row(
    question: dict[str, Any], outcome: Answer | MillraceError, seconds: float, pinned: Pinned, mode: str
) -> dict[str, Any]:
    row = {
        "question_id": question["question_id"],
        "release_id": pinned.release_id,
        "release_version": pinned.version,
        "index_build": pinned.index_build,
        "question": question["question"],
        "answer": None,
        "citations": [],
        "finish_reason": None,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "seconds": seconds,
        "cost_usd": 0.0,
        "error": None,
        "mode": mode,
    }
    if isinstance(outcome, MillraceError):
        return row | {"error": str(outcome)}
    usage = outcome.usage
    return row | {
        "answer": outcome.text,
        "citations": [hit.chunk_id for hit in outcome.citations],
        "finish_reason": outcome.finish_reason,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cost_usd": pinned.application.prices.answer(pinned.generator, usage.prompt_tokens, usage.completion_tokens),
    }


_kept: list[tuple[Pinned, AnswerPipeline]] = []
"""The release that this process has open, at most one: a generator fills memory."""


def _opened(pinned: Pinned) -> AnswerPipeline:
    if _kept and _kept[0][0] == pinned:
        return _kept[0][1]
    while _kept:
        _kept.pop()[1].engine.close()
    pipeline = open_pipeline(_folder(pinned), pinned.config)
    _kept.append((pinned, pipeline))
    return pipeline


def _folder(pinned: Pinned) -> Path:
    """The release's folder here; on another machine it is fetched into the cache, and verified, first."""
    if pinned.folder.is_dir():
        return pinned.folder
    here = Settings(home=Path(pinned.config["cache"]) / "batch", **pinned.registry)
    folder = fetch_release(here, pinned.application, pinned.version)
    if (found := read_release(folder).release_id) != pinned.release_id:
        raise BatchError(
            f"{pinned.application.name}@{pinned.version} is {found} in the registry at {here.mlflow_url} and "
            f"{pinned.release_id} where the run began; let the workers see the same registry"
        )
    return folder
