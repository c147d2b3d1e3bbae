"""The same answers as a stream: Structured Streaming follows `bronze/questions` up to now, then ends (`availableNow`).

Each micro-batch goes through `slices.py`, so what a batch answered a stream doesn't ask, and the other way round. The
checkpoint is only a cursor that saves reading the table again: it is kept per release, and without it the stream
begins at the beginning and finds everything answered. Over Spark Connect the function of a micro-batch runs beside
the server, in its Python, which has this package as Spark's workers do.
"""

from functools import partial
from pathlib import Path

from pyspark.sql.connect.dataframe import DataFrame
from pyspark.sql.connect.session import SparkSession

from millrace.batch.slices import Job, answer_waiting, on_spark, refuse_duplicates
from millrace.errors import BatchError
from millrace.lakehouse.spark_session import adopt
from millrace.lakehouse.tables import BRONZE_QUESTIONS

_LOOK_SECONDS = 5
"""How long one call waits for the stream's end."""
_STARTS = 4
"""How often the stream is started before that fails for good. The server gives the process of a micro-batch ten seconds
to report, which starting Python may take on a machine that is busy."""
_STARTED_LATE = "Python worker failed to connect back"


def answer_stream(job: Job, checkpoint: Path) -> None:
    """Answer every question that came since the checkpoint; return when the stream has caught up.

    If the caller is killed, the stream goes on beside the server; the next call with the same checkpoint ends it and
    takes its place.

    Raises:
        BatchError: a micro-batch can't be answered, or the checkpoint is of no use any more. What was committed stays.
        LakehouseError: Spark doesn't answer.
    """
    checkpoint.mkdir(parents=True, exist_ok=True)

    def follow(session: SparkSession) -> None:
        # A rewritten file brings its questions once more, which is harmless; leaving its changes out would not be.
        source = session.readStream.format("delta").option("ignoreChanges", "true")
        query = (
            source.load(str(job.lake.uri(BRONZE_QUESTIONS)))  # of Python's own strings only, it says
            .writeStream.queryName(f"{job.lake.application} {job.pinned.release_id}")
            .option("checkpointLocation", str(checkpoint))
            .trigger(availableNow=True)
            .foreachBatch(partial(_micro_batch, job=job))
            .start()
        )
        try:
            while not query.awaitTermination(_LOOK_SECONDS):
                pass
        except (KeyboardInterrupt, SystemExit):
            query.stop()
            raise

    for start in range(_STARTS):
        try:
            on_spark(job, follow)
            return
        except BatchError as error:
            if _STARTED_LATE in str(error) and start + 1 < _STARTS:
                continue
            raise BatchError(
                f"the stream of {BRONZE_QUESTIONS.path} ended: {error} (its checkpoint is {checkpoint}; should that be "
                "what is wrong, remove it: nothing is answered twice)"
            ) from error


def _micro_batch(rows: DataFrame, number: int, *, job: Job) -> None:
    """Runs beside the server."""
    session: SparkSession = rows.sparkSession
    adopt(job.spark_url, session)
    table = partial(_table, uri=job.lake.uri(BRONZE_QUESTIONS))

    def these(_: SparkSession) -> DataFrame:
        return rows

    refuse_duplicates(job, table, among=these)
    answer_waiting(job, these)


def _table(session: SparkSession, *, uri: str) -> DataFrame:
    return session.read.format("delta").load(uri)
