"""Every question once: what a table of questions asks and a release has not answered, slice by slice, each committed.

`gold/answers` is the only memory: what is in it is never asked again, whoever asked it, and a killed run leaves
whole slices. Both modes (`inference.py`, `stream.py`) come through here. Questions are answered on Spark's workers;
answers, a few hundred bytes for a second of a machine, travel through this process, which commits them as every
table is committed. Each slice looks through the ids of both tables, so slices grow with them (a slice of an hour's
answers is a good one).
"""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql.connect.dataframe import DataFrame
from pyspark.sql.connect.functions import builtin as f
from pyspark.sql.connect.session import SparkSession

from millrace.batch.answering import Pinned, answer_questions
from millrace.errors import BatchError
from millrace.lakehouse.costs import Cost, cost_id, record_cost
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.spark import mapped
from millrace.lakehouse.spark_session import Refused, on_server
from millrace.lakehouse.tables import BRONZE_QUESTIONS, GOLD_ANSWERS

T = TypeVar("T")

Questions = Callable[[SparkSession], DataFrame]
"""Rows of `bronze/questions` in a session."""

SHOWN = 3
"""Duplicates that a refusal names."""


@dataclass(frozen=True)
class Job:
    """One run, as data: it travels to where a streaming batch is worked on."""

    lake: Lake
    spark_url: str
    pinned: Pinned
    mode: str
    """batch or stream."""
    run: str
    slice: int
    workers: int
    retry_errors: bool = False
    """Whether an error that another run got is no answer."""


@dataclass(frozen=True)
class Outcome:
    """What was done: questions asked, of them without an answer, tokens read and written."""

    asked: int = 0
    errors: int = 0
    tokens: int = 0

    def __add__(self, other: "Outcome") -> "Outcome":
        return Outcome(self.asked + other.asked, self.errors + other.errors, self.tokens + other.tokens)


def answer_waiting(job: Job, questions: Questions, limit: int | None = None) -> Outcome:
    """Answer what of `questions` the release has not answered, oldest first, at most `limit` of them.

    Raises:
        BatchError: a slice can't be answered; the slices before it are committed.
        LakehouseError: Spark doesn't answer, or the answers can't be committed.
    """
    done = Outcome()
    while limit is None or done.asked < limit:
        size = job.slice if limit is None else min(job.slice, limit - done.asked)
        started = time.perf_counter()
        answers = on_spark(job, partial(_answer, job=job, questions=questions, size=size))
        if answers.num_rows:
            # The cost first: a slice that is killed between the two is paid for twice.
            record_cost(job.lake, _cost(job, answers, time.perf_counter() - started), run=job.run)
            if job.retry_errors:
                _forget_errors(job, answers)
            job.lake.merge(GOLD_ANSWERS, answers, run=job.run)
        done += _outcome(answers)
        if answers.num_rows < size:
            break
    return done


def refuse_duplicates(job: Job, questions: Questions, among: Questions | None = None) -> None:
    """
    Args:
        among: only ids that occur here.

    Raises:
        BatchError: an id stands for several questions. The same question twice is once.
    """

    def find(session: SparkSession) -> pa.Table:
        rows = questions(session)
        if among is not None:
            rows = rows.join(among(session).select("question_id").distinct(), "question_id", "left_semi")
        texts = f.collect_set("question").alias("texts")
        doubled = rows.groupBy("question_id").agg(texts).where(f.size("texts") > 1)
        return doubled.orderBy("question_id").limit(SHOWN + 1).toArrow()

    found = on_spark(job, find).to_pylist()
    if not found:
        return
    told = "; ".join(f"{row['question_id']}: {' / '.join(map(_short, sorted(row['texts'])))}" for row in found[:SHOWN])
    more = " and more" if len(found) > SHOWN else ""
    raise BatchError(
        f"{BRONZE_QUESTIONS.path} has ids that stand for several questions ({told}{more}); nothing was asked: "
        "give every question an id of its own, and delete the rows that are wrong"
    )


def on_spark(job: Job, work: Callable[[SparkSession], T]) -> T:
    """What `work` returns, given a session; it may run twice.

    Raises:
        BatchError: what the server said, in one sentence.
        LakehouseError: it doesn't answer.
    """
    try:
        return on_server(job.spark_url, work)
    except Refused as refused:
        raise said(str(refused)) from refused


def said(sentence: str) -> BatchError:
    """What a worker or the server said, as our own error; a worker's is its sentence already."""
    kind, colon, rest = sentence.partition(": ")
    return BatchError(rest if colon and kind.endswith("Error") and kind.isidentifier() else sentence)


def _answer(session: SparkSession, *, job: Job, questions: Questions, size: int) -> pa.Table:
    answered = (
        session.read.format("delta")
        .load(job.lake.uri(GOLD_ANSWERS))
        .where(f.col("release_id") == job.pinned.release_id)
    )
    if job.retry_errors:
        answered = answered.where(f.col("error").isNull() | (f.col("written_by") == job.run))
    waiting = (
        questions(session)
        .groupBy("question_id")
        .agg(f.min("question").alias("question"), f.min("asked_at").alias("asked_at"))
        .join(answered.select("question_id"), "question_id", "left_anti")
        .orderBy("asked_at", "question_id")
        .limit(size)
        .select("question_id", "question")
        .repartition(job.workers)
    )
    function = partial(answer_questions, pinned=job.pinned, mode=job.mode)
    answers: pa.Table = mapped(waiting, function, GOLD_ANSWERS).toArrow()
    return answers


def _forget_errors(job: Job, answers: pa.Table) -> None:
    """Of the questions that `answers` has: a merge leaves a row that is there as it is."""
    ids = ", ".join("'" + str(one).replace("'", "''") + "'" for one in answers["question_id"].to_pylist())
    mine = f"target.release_id = '{job.pinned.release_id}' AND target.error IS NOT NULL"
    gone = f"{mine} AND target.question_id IN ({ids})"
    job.lake.merge(GOLD_ANSWERS, GOLD_ANSWERS.rows_schema.empty_table(), run=job.run, delete_unmatched=gone)


def _outcome(answers: pa.Table) -> Outcome:
    tokens = (pc.sum(answers[name]).as_py() or 0 for name in ("prompt_tokens", "completion_tokens"))
    return Outcome(answers.num_rows, answers.num_rows - answers["error"].null_count, sum(tokens))


def _cost(job: Job, answers: pa.Table, seconds: float) -> Cost:
    prices = job.pinned.application.prices
    return Cost(
        cost_id("batch", BRONZE_QUESTIONS.path, uuid.uuid4().hex),
        "batch",
        BRONZE_QUESTIONS.path,
        seconds=seconds,
        tokens=_outcome(answers).tokens,
        cost_usd=(pc.sum(answers["cost_usd"]).as_py() or 0.0) + prices.machine("batch", seconds),
        release_id=job.pinned.release_id,
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")
