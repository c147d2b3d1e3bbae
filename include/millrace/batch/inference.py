"""A release over the table of questions: which release, which index build, which questions, and how far it went.

It chooses and counts; `slices.py` answers, `stream.py` follows the table.
"""

from functools import partial
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql.connect.dataframe import DataFrame
from pyspark.sql.connect.functions import builtin as f
from pyspark.sql.connect.session import SparkSession

from millrace.applications import Application
from millrace.batch.answering import Pinned
from millrace.batch.slices import Job, Outcome, answer_waiting, refuse_duplicates
from millrace.batch.stream import answer_stream
from millrace.errors import BatchError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import BRONZE_QUESTIONS, GOLD_ANSWERS
from millrace.releases.package import read_release
from millrace.releases.published_split import read_split
from millrace.releases.pyfunc import load_config
from millrace.releases.registry import fetch_release
from millrace.retrieval.index import builds_of, published_build
from millrace.settings import Settings

Mode = Literal["batch", "stream"]


def infer(
    settings: Settings,
    application: Application,
    *,
    run: str,
    mode: Mode = "batch",
    release: str | None = None,
    limit: int | None = None,
    batch: str | None = None,
    retry_errors: bool = False,
) -> dict[str, Any]:
    """Answer every question of `bronze/questions` that the release has not answered yet, into `gold/answers`.

    Args:
        run: who writes, for provenance.
        mode: `batch`: the table as it is now; `stream`: what came since the last stream of this release, by
            Structured Streaming, up to now.
        release: its version; None: the champion.
        limit: questions to ask at most; None: all.
        batch: only questions that were submitted under this name.
        retry_errors: also those to which the release has only an error of another run's.

    Returns:
        `release_version`, `release_id`, `index_build`, `questions_version`, `asked`, `errors` (of those asked),
        `tokens`, and `changed`: whether anything was written.

    Raises:
        BatchError: there is no release to ask, an id stands for several questions, the choice of arguments makes no
            sense, or a slice can't be answered (those before it are committed: run it again).
        SettingsError: the release's generator has no price.
        MillraceError: the release or its index build isn't there, or MLflow or Spark don't answer.
    """
    if mode == "stream" and (limit is not None or batch is not None or retry_errors):
        raise BatchError(
            "a stream answers whatever is new: limit, batch and retry_errors go with mode batch; leave them out"
        )
    lake = Lake.of(settings, application.name)
    pinned = pin(settings, application, release)
    version = lake.version(BRONZE_QUESTIONS)
    done = Outcome()
    if version is not None:
        job = Job(
            lake=lake,
            spark_url=settings.spark_connection,
            pinned=pinned,
            mode=mode,
            run=run,
            slice=settings.batch_slice,
            workers=settings.batch_workers,
            retry_errors=retry_errors,
        )
        questions = partial(_read, uri=lake.uri(BRONZE_QUESTIONS), version=version, batch=batch)
        # All of them, whatever is asked now: an id that stands for two questions has no right answer.
        refuse_duplicates(job, partial(questions, batch=None))
        lake.engine(GOLD_ANSWERS).create(lake.uri(GOLD_ANSWERS), GOLD_ANSWERS)
        if mode == "batch":
            done = answer_waiting(job, questions, limit)
        else:
            done = _streamed(settings, job)
    return {
        "release_version": pinned.version,
        "release_id": pinned.release_id,
        "index_build": pinned.index_build,
        "questions_version": version,
        **vars(done),
        "changed": done.asked > 0,
    }


def pin(settings: Settings, application: Application, release: str | None = None) -> Pinned:
    """The release (None: the champion) and the index build that is published now.

    Raises:
        BatchError: there is no champion.
        MillraceError: as `infer`.
    """
    version = release
    if version is None:
        split = read_split(settings, application.name)
        version = split.champion if split else None
    if version is None:
        raise BatchError(
            f"{application.name} has no champion to answer questions; let a release through the gate, or name a version"
        )
    folder = fetch_release(settings, application, version)
    manifest = read_release(folder)
    application.prices.of(manifest.generator.name)
    lineage = manifest.retrieval.lineage
    build = published_build(settings, application, lineage)
    builds_of(settings, application.name, lineage).open(build)  # here it is one sentence, not one on every worker
    return Pinned(
        application=application,
        release_id=manifest.release_id,
        version=version,
        generator=manifest.generator.name,
        index_build=build,
        folder=folder,
        config=load_config(settings, application.name, build),
        registry={
            "mlflow_uri": settings.mlflow_url,
            "mlflow_workspaces": settings.mlflow_workspaces,
            "environment": settings.environment,
        },
    )


def _read(session: SparkSession, *, uri: str, version: int, batch: str | None) -> DataFrame:
    rows = session.read.format("delta").option("versionAsOf", version).load(uri)
    return rows if batch is None else rows.where(f.col("batch") == batch)


def _streamed(settings: Settings, job: Job) -> Outcome:
    """The stream works elsewhere: what it did is what the table has more than before."""
    before = _answered(job)
    checkpoint = settings.home / "streams" / settings.environment / job.lake.application / job.pinned.release_id
    answer_stream(job, checkpoint)
    after = _answered(job)
    return Outcome(after.asked - before.asked, after.errors - before.errors, after.tokens - before.tokens)


def _answered(job: Job) -> Outcome:
    columns = ["error", "prompt_tokens", "completion_tokens"]
    rows: pa.Table = job.lake.read(GOLD_ANSWERS, columns, where=pc.field("release_id") == job.pinned.release_id)
    tokens = sum(pc.sum(rows[name]).as_py() or 0 for name in columns[1:])
    return Outcome(rows.num_rows, rows.num_rows - rows["error"].null_count, tokens)
